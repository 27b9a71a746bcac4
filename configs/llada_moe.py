"""IGPO on LLaDA-MoE-7B-A1B-Instruct with LoRA on attention and experts.

    python -m igpo_jax.main --config=configs/llada_moe.py:DATA,HARDWARE --workdir=DIR
    python -m igpo_jax.main --config=configs/llada_moe.py \\
        --config.init_from=DIR --config.data.rl=URI --config.data.eval=gsm8k=URI

What DATA holds and what HARDWARE may be: see llada_math.py, with LLaDA-MoE-7B-A1B-Instruct/ in
place of LLaDA's directory. What is not the model's is LLaDA's, but for a smaller rank: every expert
has adapters of its own. --config.mesh.expert=8 keeps an eighth of the experts on each device
(docs/models.md#experts). Nobody has published IGPO on this model.
"""

import pathlib

from igpo_jax.config import load_config_file


def get_config(argument=""):
  beside = pathlib.Path(__file__).with_name
  if argument:
    config = load_config_file(beside("llada_math.py"), argument)
    config.init_from = f"{argument.partition(',')[0]}/LLaDA-MoE-7B-A1B-Instruct"
  else:
    config = load_config_file(beside("llada_8b.py"))
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
  model.lora.rank = min(model.lora.rank, 16)  # 0: everything is trained
  return config
