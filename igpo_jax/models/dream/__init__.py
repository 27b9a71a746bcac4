"""Dream-7B (arXiv 2508.15487) and DiffuCoder: Qwen2.5 blocks that predict one position ahead.

Biases on queries, keys and values. The state of position k - 1 predicts the token of position k
(`LM` says how callers see that). Positions are counted without padding. Chat: ChatML with
`<|im_start|>` and `<|im_end|>`; the system prompt is that of the directory's chat template.
"""

from __future__ import annotations

from igpo_jax.models import hf_layout
from igpo_jax.models.family import Design, Family

FAMILY = Family(
  name="dream",
  model_types=("Dream", "dream"),
  design=lambda config: Design(qkv_bias=True, counts_positions=True, shift=1),
  fields=hf_layout.FIELDS,
  defaults={"tie_embeddings": False},
  required={k: v for k, v in hf_layout.REQUIRED.items() if k != "attention_bias"},
  inert=hf_layout.INERT | {"head_dim"},
  written={"architectures": ["DreamModel"], "hidden_act": "silu", "use_sliding_window": False},
  top=hf_layout.TOP,
  block={**hf_layout.ATTENTION, **hf_layout.QKV_BIASES, **hf_layout.MLP},
  published={
    "Dream-7B": {
      "d_model": 3584, "n_layers": 28, "n_heads": 28, "n_kv_heads": 4, "mlp_hidden": 18944,
      "vocab_size": 152064, "mask_id": 151666, "eos_id": 151643, "rope_theta": 1e6,
      "rms_norm_eps": 1e-6,
    },
  },
  tiny={"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden": 48},
)  # fmt: skip
