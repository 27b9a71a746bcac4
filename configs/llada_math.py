"""IGPO on LLaDA-8B-Instruct as in the paper: MetaMathQA to train on, four benchmarks.

    python -m igpo_jax.main --config=configs/llada_math.py:DATA --workdir=DIR

DATA (data, if none is given) holds what docs/evaluation.md lists: LLaDA-8B-Instruct/,
MetaMathQA-395K.json, gsm8k/, math500/, amc23/ and minerva_math/. A missing one is told
with where to get it. Every path is a flag, too: --config.init_from, --config.data.rl,
--config.data.eval. gsm8k.py, math500.py, amc.py and minerva.py evaluate on one each.
"""

import pathlib
import urllib.parse

from igpo_jax.config import load_config_file
from igpo_jax.eval.protocols import IGPO_TEMPLATE


def get_config(data="data"):
  config = load_config_file(pathlib.Path(__file__).with_name("llada_8b.py"))
  config.init_from = f"{data}/LLaDA-8B-Instruct"
  # Training asks as evaluation does.
  template = urllib.parse.quote(IGPO_TEMPLATE)
  config.data.rl = f"jsonl:{data}/MetaMathQA-395K.json?format=metamath&template={template}"
  config.data.eval = (
    f"gsm8k=jsonl:{data}/gsm8k/test.jsonl?format=gsm8k",
    f"math500=jsonl:{data}/math500/test.jsonl?format=math",
    f"amc=jsonl:{data}/amc23/test.jsonl?format=amc",
    f"minerva=jsonl:{data}/minerva_math/test.jsonl?format=minerva",
  )
  config.eval.protocol = "igpo"
  config.eval.batch_size = 64

  # METHOD 7; the number of steps is ours.
  config.rl.steps = 200
  config.rl.prompts_per_step = 64
  config.rl.micro_batches = 8
  config.checkpoint.every = 20
  return config
