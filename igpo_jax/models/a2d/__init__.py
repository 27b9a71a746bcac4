"""A2D: autoregressive Qwen2, Qwen3 and Llama checkpoints that became masked diffusion models.

The blocks are those of the checkpoint, but every position attends to all others. The key
`right_shift_logits` in config.json says whether the model still predicts one position ahead;
without the key it does not. `python -m igpo_jax.convert --as-diffusion` makes such a model from an
autoregressive checkpoint.
"""

from __future__ import annotations

from igpo_jax.config import ModelConfig
from igpo_jax.models import hf_layout
from igpo_jax.models.family import Design, Family

_FIELDS = {**hf_layout.FIELDS, "head_dim": "head_dim", "shift_logits": "right_shift_logits"}
_DEFAULTS = {"tie_embeddings": False, "head_dim": 0, "shift_logits": False}
_TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden": 48}
_BLOCK = {**hf_layout.ATTENTION, **hf_layout.MLP}


def _design(**switches: bool):
  return lambda config: Design(shift=_shift(config), counts_positions=True, **switches)


def _shift(config: ModelConfig) -> int:
  return int(config.shift_logits)


QWEN2 = Family(
  name="a2d_qwen2",
  model_types=("a2d-qwen2",),
  autoregressive="qwen2",
  design=_design(qkv_bias=True),
  reads=frozenset({"shift_logits", "head_dim"}),
  fields=_FIELDS,
  defaults=_DEFAULTS,
  required={k: v for k, v in hf_layout.REQUIRED.items() if k != "attention_bias"},
  inert=hf_layout.INERT | {"layer_types"},
  derive=hf_layout.only_full_attention,
  written={"architectures": ["A2DQwen2LMHeadModel"], "hidden_act": "silu"},
  top=hf_layout.TOP,
  block={**_BLOCK, **hf_layout.QKV_BIASES},
  published={
    "A2D-Qwen2.5-0.5B": {
      "d_model": 896, "n_layers": 24, "n_heads": 14, "n_kv_heads": 2, "mlp_hidden": 4864,
      "vocab_size": 151936, "mask_id": 151665, "eos_id": 151643, "rope_theta": 1e6,
      "rms_norm_eps": 1e-6, "tie_embeddings": True,
    },
  },
  tiny={**_TINY, "tie_embeddings": True},
)  # fmt: skip

QWEN3 = Family(
  name="a2d_qwen3",
  model_types=("a2d-qwen3",),
  autoregressive="qwen3",
  design=_design(qk_norm=True),
  reads=frozenset({"shift_logits", "head_dim"}),
  fields=_FIELDS,
  defaults=_DEFAULTS | {"head_dim": 128},
  required=hf_layout.REQUIRED,
  inert=hf_layout.INERT | {"layer_types"},
  derive=hf_layout.only_full_attention,
  written={"architectures": ["A2DQwen3LMHeadModel"], "hidden_act": "silu"},
  top=hf_layout.TOP,
  block={**_BLOCK, **hf_layout.QK_NORMS},
  published={
    "A2D-Qwen3-0.6B": {
      "d_model": 1024, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8, "head_dim": 128,
      "mlp_hidden": 3072, "vocab_size": 151936, "mask_id": 151669, "eos_id": 151643,
      "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_embeddings": True,
    },
  },
  tiny={**_TINY, "head_dim": 12, "shift_logits": True},
)  # fmt: skip

LLAMA = Family(
  name="a2d_llama",
  model_types=("a2d-llama",),
  autoregressive="llama",
  design=_design(),
  reads=frozenset({"shift_logits", "head_dim"}),
  fields=_FIELDS,
  defaults=_DEFAULTS | {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
  required={**hf_layout.REQUIRED, "rope_interleaved": (False, None)},
  inert=hf_layout.INERT | {"is_llama_config"},
  written={"architectures": ["A2DLlamaLMHeadModel"], "hidden_act": "silu"},
  top=hf_layout.TOP,
  block=_BLOCK,
  published={
    "A2D-SmolLM2-135M": {
      "d_model": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "mlp_hidden": 1536,
      "vocab_size": 49280, "mask_id": 49152, "eos_id": 2, "rope_theta": 1e5,
      "rms_norm_eps": 1e-5, "tie_embeddings": True,
    },
  },
  tiny=_TINY,
)  # fmt: skip
