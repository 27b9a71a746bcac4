"""iLLaDA-8B: LLaDA with grouped heads, tied embeddings and the tensor names of Llama."""

from __future__ import annotations

from igpo_jax.models import hf_layout
from igpo_jax.models.family import Design, Family

FAMILY = Family(
  name="illada",
  model_types=("illada",),
  design=lambda config: Design(),
  fields=hf_layout.FIELDS,
  # The published config.json names no mask token; its generate.py uses 5, "<[MASK]>".
  # The Hugging Face writer leaves tie_word_embeddings out where it is true.
  defaults={"mask_id": 5, "tie_embeddings": True},
  required={
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "layer_norm_eps": (None,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
  },
  inert=frozenset({
    "attention_dropout", "head_dim", "initializer_range", "max_position_embeddings",
    "pad_token_id", "pretraining_tp", "resid_pdrop", "use_cache",
  }),
  top=hf_layout.TOP,
  block={**hf_layout.ATTENTION, **hf_layout.MLP},
  published={
    "iLLaDA-8B": {
      "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "mlp_hidden": 14336,
      "vocab_size": 155136, "mask_id": 5, "tie_embeddings": True,
    },
  },
  tiny={"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden": 48,
        "tie_embeddings": True},
)  # fmt: skip
