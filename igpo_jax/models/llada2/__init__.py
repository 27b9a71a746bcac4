"""LLaDA2.0-mini, LLaDA2.1-mini: 256 experts, block-causal attention in blocks of 32.

A sigmoid router with a bias and groups of experts; a shared expert, which works on every token; a
dense first layer; half of each head rotated; queries, keys and values in one tensor.
Chat: `<role>SYSTEM</role>...<|role_end|>`; mask `<|mask|>` 156895.
"""

from __future__ import annotations

from igpo_jax.models import hf_layout
from igpo_jax.models.family import Design, Family, Router

_ATTENTION = {
  "attn_norm/scale": "model.layers.{}.input_layernorm.weight",
  "qkv_proj/kernel": "model.layers.{}.attention.query_key_value.weight",
  "q_norm/scale": "model.layers.{}.attention.query_layernorm.weight",
  "k_norm/scale": "model.layers.{}.attention.key_layernorm.weight",
  "attn_out/kernel": "model.layers.{}.attention.dense.weight",
  "ff_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
}

FAMILY = Family(
  name="llada2",
  model_types=("llada2_moe",),
  design=lambda config: Design(
    qk_norm=True,
    fused_qkv=True,
    counts_positions=True,
    block_length=config.attention_block or 32,
    router=Router("sigmoid", renormalise=True, bias=True),
  ),
  reads=frozenset({
    "moe", "rotary_share", "expert_products", "router_loss", "head_dim", "attention_block",
  }),
  fields={
    **hf_layout.FIELDS,
    "head_dim": "head_dim",
    "rotary_share": "partial_rotary_factor",
    "attention_block": "block_size",
    "moe.experts": "num_experts",
    "moe.experts_per_token": "num_experts_per_tok",
    "moe.expert_hidden": "moe_intermediate_size",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.groups": "n_group",
    "moe.groups_kept": "topk_group",
    "moe.scale": "routed_scaling_factor",
  },
  defaults={"tie_embeddings": False, "head_dim": 0, "attention_block": 32, "moe.dense_layers": 0},
  instead={"eos_id": "pad_token_id"},
  derive=lambda hf, problems: _derived(hf, problems),
  required={
    **{k: v for k, v in hf_layout.REQUIRED.items() if k not in ("attention_bias", "mlp_bias")},
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "norm_topk_prob": (True, None),
    "score_function": ("sigmoid", None),
    "moe_router_enable_expert_bias": (True, None),
    "router_dtype": ("fp32", None),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "use_qk_norm": (True,),
    "use_rmsnorm": (True, None),
    "using_split_qkv_in_self_attention": (False, None),
  },
  stated=frozenset({"use_qk_norm"}),
  inert=hf_layout.INERT | {
    "embedding_dropout", "output_dropout", "output_router_logits", "rotary_dim",
    "num_shared_experts", "mtp_loss_scaling_factor", "num_nextn_predict_layers",
  },
  written={
    "architectures": ["LLaDA2MoeModelLM"], "hidden_act": "silu", "norm_topk_prob": True,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "router_dtype": "fp32",
    "use_qk_norm": True, "num_shared_experts": 1,
  },
  top={**hf_layout.TOP, "wte/embedding": "model.word_embeddings.weight"},
  block={
    **_ATTENTION,
    "router/scores": "model.layers.{}.mlp.gate.weight",
    "router/bias": "model.layers.{}.mlp.gate.expert_bias",
    **hf_layout.mlp("mlp.experts.{expert}", "experts/"),
    **hf_layout.mlp("mlp.shared_experts", "shared_"),
  },
  first_block={**_ATTENTION, **hf_layout.MLP},
  published={
    "LLaDA2.0-mini": {
      "d_model": 2048, "n_layers": 20, "n_heads": 16, "n_kv_heads": 4, "head_dim": 128,
      "mlp_hidden": 5120, "vocab_size": 157184, "mask_id": 156895, "eos_id": 156892,
      "rope_theta": 6e5, "rms_norm_eps": 1e-6, "rotary_share": 0.5, "attention_block": 32,
      "moe.experts": 256, "moe.experts_per_token": 8, "moe.expert_hidden": 512,
      "moe.shared_hidden": 512, "moe.dense_layers": 1, "moe.groups": 8, "moe.groups_kept": 4,
      "moe.scale": 2.5,
    },
  },
  tiny={
    "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "mlp_hidden": 48,
    "rotary_share": 0.5, "attention_block": 4, "moe.experts": 8, "moe.experts_per_token": 2,
    "moe.expert_hidden": 16, "moe.shared_hidden": 16, "moe.dense_layers": 1, "moe.groups": 4,
    "moe.groups_kept": 2, "moe.scale": 2.5,
  },
)  # fmt: skip


def _derived(hf, problems: list[str]):
  """The shared expert's width, from a number of experts; and the rotated share, given twice."""
  size, count = hf.get("moe_intermediate_size"), hf.get("num_shared_experts")
  part, rotated, head = (hf.get(k) for k in ("partial_rotary_factor", "rotary_dim", "head_dim"))
  numbers = all(type(x) in (int, float) for x in (part, rotated, head))
  if numbers and rotated != int(head * part):
    problems.append(f"rotary_dim={rotated} is not head_dim * partial_rotary_factor={head * part:g}")
  if count is None or type(size) is not int or type(count) is not int:
    return {}
  return {"moe.shared_hidden": size * count}
