"""IGPO on LLaDA-8B-Instruct: trained on MetaMathQA, evaluated on GSM8K.

    python -m igpo_jax.main --config=configs/gsm8k.py:DATA,HARDWARE --workdir=DIR

What DATA holds and what HARDWARE may be: see llada_math.py.
"""

import pathlib

from igpo_jax.config import load_config_file


def get_config(argument="data"):
  config = load_config_file(pathlib.Path(__file__).with_name("llada_math.py"), argument)
  config.data.eval = tuple(e for e in config.data.eval if e.startswith("gsm8k="))
  return config
