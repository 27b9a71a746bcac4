"""IGPO on LLaDA-MoE-7B-A1B-Instruct with LoRA on attention and experts.

    python -m igpo_jax.main --config=configs/llada_moe.py \\
        --config.init_from=DIR --config.data.rl=URI --config.data.eval=gsm8k=URI

What is not the model's is that of llada_8b.py, but for a smaller rank: every expert has adapters
of its own. Experts lie over mesh.fsdp, which has to divide 64. Nobody has published IGPO on this
model.
"""

import pathlib

from igpo_jax.config import load_config_file


def get_config():
  config = load_config_file(pathlib.Path(__file__).with_name("llada_8b.py"))
  model = config.model
  model.family = "llada_moe"
  model.d_model = 2048
  model.n_layers = 16
  model.n_heads = 16
  model.n_kv_heads = 16
  model.vocab_size = 157184
  model.mask_id = 156895
  model.eos_id = 156892
  model.stop_ids = (156892,)
  model.rope_theta = 50_000.0
  model.moe.experts = 64
  model.moe.experts_per_token = 8
  model.moe.expert_hidden = 1024
  model.lora.rank = 16
  return config
