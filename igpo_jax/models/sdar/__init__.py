"""SDAR and TraDo (dense): Qwen3 blocks, block-causal attention in blocks of 4.

A position attends to its own block and to earlier ones, so it does not see hints in later blocks.
Chat: ChatML; mask `<|MASK|>` 151669.
"""

from __future__ import annotations

from igpo_jax.models import hf_layout
from igpo_jax.models.family import Design, Family

FAMILY = Family(
  name="sdar",
  model_types=("sdar",),
  design=lambda config: Design(
    qk_norm=True, counts_positions=True, block_length=config.attention_block or 4
  ),
  reads=frozenset({"head_dim", "attention_block"}),
  fields={**hf_layout.FIELDS, "head_dim": "head_dim", "attention_block": "block_size"},
  defaults={"tie_embeddings": False, "head_dim": 128, "attention_block": 4},
  required=hf_layout.REQUIRED,
  inert=hf_layout.INERT | {
    "debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint", "use_deepep",
    "layer_types",
  },
  derive=hf_layout.only_full_attention,
  written={"architectures": ["SDARForCausalLM"], "hidden_act": "silu"},
  top=hf_layout.TOP,
  block={**hf_layout.ATTENTION, **hf_layout.QK_NORMS, **hf_layout.MLP},
  published={
    "SDAR-1.7B": {
      "d_model": 2048, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8, "head_dim": 128,
      "mlp_hidden": 6144, "vocab_size": 151936, "mask_id": 151669, "eos_id": 151643,
      "rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_block": 4,
    },
    "SDAR-8B": {
      "d_model": 4096, "n_layers": 36, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128,
      "mlp_hidden": 12288, "vocab_size": 151936, "mask_id": 151669, "eos_id": 151643,
      "rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_block": 4,
    },
  },
  tiny={
    "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12,
    "mlp_hidden": 48, "attention_block": 4,
  },
)  # fmt: skip
