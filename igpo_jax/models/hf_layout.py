"""The keys that most families' Hugging Face directories share: those of Llama and Qwen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = {
  "d_model": "hidden_size",
  "n_layers": "num_hidden_layers",
  "n_heads": "num_attention_heads",
  "n_kv_heads": "num_key_value_heads",
  "mlp_hidden": "intermediate_size",
  "vocab_size": "vocab_size",
  "rope_theta": "rope_theta",
  "rms_norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
  "mask_id": "mask_token_id",
  "eos_id": "eos_token_id",
}
REQUIRED: Mapping[str, tuple[Any, ...]] = {
  "attention_bias": (False, None),
  "hidden_act": ("silu",),
  "mlp_bias": (False, None),
  "rope_scaling": (None,),
  "use_mrope": (False, None),
  "use_sliding_window": (False, None),
}
INERT = frozenset({
  "attention_dropout", "initializer_range", "max_position_embeddings", "pad_token_id",
  "pretraining_tp", "use_cache", "max_window_layers", "sliding_window",
})  # fmt: skip
TOP = {
  "wte/embedding": "model.embed_tokens.weight",
  "ln_f/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
}
ATTENTION = {
  "attn_norm/scale": "model.layers.{}.input_layernorm.weight",
  "q_proj/kernel": "model.layers.{}.self_attn.q_proj.weight",
  "k_proj/kernel": "model.layers.{}.self_attn.k_proj.weight",
  "v_proj/kernel": "model.layers.{}.self_attn.v_proj.weight",
  "attn_out/kernel": "model.layers.{}.self_attn.o_proj.weight",
  "ff_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
}
QKV_BIASES = {
  f"{name}_proj/bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkv"
}
QK_NORMS = {
  f"{name}_norm/scale": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in "qk"
}


def only_full_attention(hf_config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
  """A `Family.derive` for configurations that may list the attention of each layer."""
  kinds = hf_config.get("layer_types")
  if kinds is not None and not isinstance(kinds, list):
    problems.append(f"layer_types={kinds!r} should be a list")
  elif other := [kind for kind in kinds or () if kind != "full_attention"]:
    problems.append(f"layer_types has {other[0]!r} (only 'full_attention' is supported)")
  return {}


def mlp(where: str, prefix: str = "") -> dict[str, str]:
  """Our parameters of a SwiGLU -> the keys of their tensors.

  Args:
    where: the module in their names, such as "mlp" or "mlp.experts.{expert}".
    prefix: begins our names, such as "experts/".
  """
  names = {"ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj"}
  return {
    f"{prefix}{ours}/kernel": f"model.layers.{{}}.{where}.{theirs}.weight"
    for ours, theirs in names.items()
  }


MLP = mlp("mlp")
