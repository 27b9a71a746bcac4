"""LLaDA-8B (arXiv 2502.09992): Llama blocks without biases, every position sees all others.

Chat: `<|startoftext|><|start_header_id|>user<|end_header_id|>`, mask 126336, end of text 126081.
"""

from __future__ import annotations

from igpo_jax.models.family import Design, Family

_LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")

FAMILY = Family(
  name="llada",
  model_types=("llada",),
  design=lambda config: Design(),
  fields={
    "d_model": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "mlp_hidden": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "weight_tying",
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
  },
  # The embedding has vocab_size rows where it is not said that it has more.
  instead={"vocab_size": "vocab_size", "n_kv_heads": "n_heads"},
  required={
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (None, False),
    "rope": (True,),
    # False rotates in bf16: a difference of rounding that we do not reproduce.
    "rope_full_precision": (True,),
    "scale_logits": (False,),
  },
  stated=frozenset({"activation_type", "block_type", "include_bias", "layer_norm_type", "rope"}),
  inert=frozenset({
    "alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine",
    "embedding_dropout", "flash_attention", "init_cutoff_factor", "init_device", "init_fn",
    "init_std", "max_sequence_length", "mlp_ratio", "pad_token_id", "precision",
    "residual_dropout", "use_cache", "vocab_size",
  }),
  written={
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "max_sequence_length": 4096,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "use_cache": False,
  },
  top={
    "wte/embedding": "model.transformer.wte.weight",
    "ln_f/scale": "model.transformer.ln_f.weight",
    "head/kernel": "model.transformer.ff_out.weight",
  },
  block={
    **{f"{name}/kernel": f"model.transformer.blocks.{{}}.{name}.weight" for name in _LINEARS},
    **{f"{name}/scale": f"model.transformer.blocks.{{}}.{name}.weight"
       for name in ("attn_norm", "ff_norm")},
  },
  # The released code, which Hugging Face's Auto classes load where config.json names it.
  code_files=("configuration_llada.py", "modeling_llada.py"),
  auto_map={
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    "AutoModel": "modeling_llada.LLaDAModelLM",
  },
  published={
    "LLaDA-8B": {
      "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden": 12288,
      "vocab_size": 126464, "mask_id": 126336, "eos_id": 126081, "rope_theta": 5e5,
    },
  },
  tiny={"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden": 48},
)  # fmt: skip
