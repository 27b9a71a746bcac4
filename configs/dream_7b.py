"""IGPO on Dream-7B-Instruct or DiffuCoder with LoRA, decoded by Dream's own rules.

    python -m igpo_jax.main --config=configs/dream_7b.py:DATA,HARDWARE --workdir=DIR
    python -m igpo_jax.main --config=configs/dream_7b.py \\
        --config.init_from=DIR --config.data.rl=URI --config.data.eval=gsm8k=URI

What DATA holds and what HARDWARE may be: see llada_math.py, with Dream-v0-Instruct-7B/ in place of
LLaDA's directory. What is not the model's and not the sampler's is LLaDA's. Nobody has published
IGPO on this model: the rates are untried here.
"""

import pathlib

from igpo_jax.config import load_config_file


def get_config(argument=""):
  beside = pathlib.Path(__file__).with_name
  if argument:
    config = load_config_file(beside("llada_math.py"), argument)
    config.init_from = f"{argument.partition(',')[0]}/Dream-v0-Instruct-7B"
    config.eval.protocol = ""  # those that are known here decode as LLaDA does
  else:
    config = load_config_file(beside("llada_8b.py"))
  model = config.model
  model.family = "dream"
  model.d_model = 3584
  model.n_layers = 28
  model.n_heads = 28
  model.n_kv_heads = 4
  model.mlp_hidden = 18944
  model.vocab_size = 152064
  model.mask_id = 151666
  model.eos_id = 151643
  model.stop_ids = (151643, 151645)  # <|endoftext|>, <|im_end|>
  model.rope_theta = 1_000_000.0
  model.rms_norm_eps = 1e-6

  sampler = config.sampler
  sampler.block_length = sampler.gen_length
  sampler.schedule = "linear"
  sampler.remasking = "entropy"
  sampler.temperature = 1.0
  return config
