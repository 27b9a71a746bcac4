"""LLaDA-MoE-7B-A1B: LLaDA whose MLPs are 64 experts, 8 of which work on each token.

The router is a softmax over all experts, and the weights of the chosen ones are not divided by
their sum. Queries and keys are normalized per head. config.json has LLaDA's model_type; its key
`num_experts` tells it from LLaDA's.
Chat: `<role>HUMAN</role>...<|role_end|><role>ASSISTANT</role>`, mask 156895.
"""

from __future__ import annotations

from igpo_jax.models import hf_layout
from igpo_jax.models.family import Design, Family, Router

FAMILY = Family(
  name="llada_moe",
  model_types=("llada", "lladamoe"),
  marks=frozenset({"num_experts"}),
  design=lambda config: Design(qk_norm=True, router=Router()),
  reads=frozenset({"moe", "rotary_share", "expert_products", "router_loss", "head_dim"}),
  fields={
    **{ours: theirs for ours, theirs in hf_layout.FIELDS.items() if ours != "mlp_hidden"},
    "moe.experts": "num_experts",
    "moe.experts_per_token": "num_experts_per_tok",
    "moe.expert_hidden": "expert_intermediate_size",
    "rotary_share": "partial_rotary_factor",
    "head_dim": "head_dim",
  },
  defaults={"tie_embeddings": False, "rotary_share": 1.0, "head_dim": 0, "rms_norm_eps": 1e-5},
  required={
    **{k: v for k, v in hf_layout.REQUIRED.items() if k != "mlp_bias"},
    "clip_qkv": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "qk_layernorm": (True,),
    "shared_expert_intermediate_size": (None, 0),
    "router_num_group": (None, 0, 1),
    "router_topk_group": (None, 0, 1),
  },
  stated=frozenset({"qk_layernorm"}),
  # The published code neither renormalizes nor scales weights, whatever these options say.
  inert=hf_layout.INERT | {
    "dense_intermediate_size", "norm_topk_prob", "output_router_logits", "routed_scaling_factor",
    "moe_layer_freq", "router_aux_loss_coef",
  },
  instead={"eos_id": "pad_token_id"},
  derive=lambda hf, problems: _only_experts(hf, problems),
  written={"architectures": ["LLaDAMoEModelLM"], "hidden_act": "silu"},
  top=hf_layout.TOP,
  block={
    **hf_layout.ATTENTION, **hf_layout.QK_NORMS,
    "router/scores": "model.layers.{}.mlp.gate.weight",
    **hf_layout.mlp("mlp.experts.{expert}", "experts/"),
  },
  published={
    "LLaDA-MoE-7B-A1B": {
      "d_model": 2048, "n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "vocab_size": 157184,
      "mask_id": 156895, "eos_id": 156892, "rope_theta": 5e4,
      "moe.experts": 64, "moe.experts_per_token": 8, "moe.expert_hidden": 1024,
    },
  },
  tiny={
    "d_model": 32, "n_layers": 2, "n_heads": 4, "moe.experts": 8, "moe.experts_per_token": 2,
    "moe.expert_hidden": 16,
  },
)  # fmt: skip


def _only_experts(hf, problems: list[str]):
  """Every layer has experts."""
  kinds, layers = hf.get("moe_layer_freq"), hf.get("num_hidden_layers")
  of_each = isinstance(kinds, list) and len(kinds) == layers and all(kind == 1 for kind in kinds)
  if kinds not in (None, 1) and not of_each:
    problems.append(f"moe_layer_freq={kinds!r} is not supported (only 1 for every layer)")
  return {}
