"""IGPO on LLaDA-8B-Instruct as in the paper: MetaMathQA to train on, four benchmarks.

    python -m igpo_jax.main --config=configs/llada_math.py:DATA,HARDWARE --workdir=DIR

DATA (data, if none is given) holds what docs/evaluation.md lists: LLaDA-8B-Instruct/,
MetaMathQA-395K.json, gsm8k/, math500/, amc23/ and minerva_math/. A missing one is told
with where to get it. Every path is a flag, too: --config.init_from, --config.data.rl,
--config.data.eval. gsm8k.py, math500.py, amc.py and minerva.py evaluate on one each.

HARDWARE is one of
    v5e-64   full fine-tuning on 64 chips; also what is trained if none is named
    v5p-32   full fine-tuning on 16 chips
    v5e-8    LoRA (r = 128, alpha = 64) on 8 chips
    gpu      LoRA on GPUs of 80 GB, one or more
docs/scaling.md has the memory and the time of each, and why.
"""

import pathlib
import urllib.parse

from igpo_jax.cli import UserError
from igpo_jax.config import load_config_file
from igpo_jax.eval.protocols import IGPO_TEMPLATE

HARDWARE = ("v5e-64", "v5p-32", "v5e-8", "gpu")


def get_config(argument="data"):
  data, _, hardware = argument.partition(",")
  config = load_config_file(pathlib.Path(__file__).with_name("llada_8b.py"))
  fit_to(config, hardware)
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

  # docs/method.md#defaults; the number of steps is ours.
  config.rl.steps = 200
  config.rl.prompts_per_step = 64
  config.checkpoint.every = 20
  return config


def fit_to(config, hardware):
  """Sizes the run for a slice: what is trained, the mesh, and how much is done at a time."""
  if hardware not in ("", *HARDWARE):
    raise UserError(f"--config: hardware {hardware!r} is not one of {', '.join(HARDWARE)}")
  if hardware in ("v5e-8", "gpu"):
    config.rl.sample_slices = 2 if hardware == "v5e-8" else 16
    config.rl.micro_batches = 2 if hardware == "v5e-8" else 8
    config.sft.micro_batches = 4 if hardware == "v5e-8" else 32
  else:
    # Full fine-tuning: a float32 master, of which the devices read a bfloat16 copy.
    config.model.lora.rank = 0
    config.model.param_dtype = "float32"
  if hardware.startswith("v5"):
    config.mesh.slice = hardware
