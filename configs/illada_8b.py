"""IGPO on iLLaDA-8B: grouped key-value heads, tied embeddings, a mask token of its own.

    python -m igpo_jax.main --config=configs/illada_8b.py \\
        --config.init_from=DIR --config.data.rl=URI --config.data.eval=gsm8k=URI

Sizes as published (32 layers, width 4096, 8 key-value heads, FFN 14,336, vocabulary
155,136, tied): 7,615,025,152 parameters, "7.62B". What config.json says replaces them
when `init_from` is given; `rope_theta`, `rms_norm_eps` and `eos_id` matter to the
numbers and are not in the published table, so nothing but a dry run should go without.
"""

import importlib.util
import pathlib


def get_config():
  # Config files are loaded by path, so a neighbour is, too.
  path = pathlib.Path(__file__).with_name("llada_8b.py")
  spec = importlib.util.spec_from_file_location("llada_8b", path)
  llada_8b = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(llada_8b)

  config = llada_8b.get_config()
  model = config.model
  model.family = "illada"
  model.n_kv_heads = 8
  model.mlp_hidden = 14336
  model.vocab_size = 155136
  model.mask_id = 5
  model.eos_id = 2
  model.stop_ids = (2,)
  model.tie_embeddings = True
  return config
