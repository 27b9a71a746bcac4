"""IGPO on LLaDA-8B-Instruct as in the paper: MetaMathQA to train on, four benchmarks.

    python -m igpo_jax.main --config=configs/llada_math.py:DATA,HARDWARE --workdir=DIR

DATA (data, if none is given) holds what docs/evaluation.md lists: LLaDA-8B-Instruct/,
MetaMathQA-395K.json, gsm8k/, math500/, amc23/ and minerva_math/. A missing one is told
with where to get it. Every path is a flag, too: --config.init_from, --config.data.rl,
--config.data.eval. gsm8k.py, math500.py, amc.py and minerva.py evaluate on one each.

HARDWARE is one of
    v5e-64       full fine-tuning on 64 chips; also what is trained if none is named
    v5p-32       full fine-tuning on 16 chips
    v5e-8        LoRA (r = 128, alpha = 64) on 8 chips
    gpu          LoRA on the GPUs there are, one or more
    h100-1       LoRA on one GPU of 80 GB: a quarter of the prompts a step
    h100-8       LoRA on 8 GPUs of 80 GB
    h100-16      LoRA on 16 of them or more
    h200-1       LoRA on one GPU of 141 GB: a quarter of the prompts a step
    h100-8-full  full fine-tuning on 8 GPUs of 80 GB
    h100-16-full full fine-tuning on 16 of them or more
Any GPU with the memory will do (an A100 of 80 GB is an h100 here, and takes three times as long).
On GPUs mesh, slices and micro-batches follow from the devices (igpo_jax/train/sizes.py).
docs/scaling.md has the memory and the time of each, and why.
"""

import pathlib
import urllib.parse

from igpo_jax.config import load_config_file
from igpo_jax.errors import UserError
from igpo_jax.eval.protocols import IGPO_TEMPLATE

HARDWARE = ("v5e-64", "v5p-32", "v5e-8", "gpu", "h100-1", "h100-8", "h100-16", "h200-1",
            "h100-8-full", "h100-16-full")  # fmt: skip


def get_config(argument="data"):
  data, _, hardware = argument.partition(",")
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

  # docs/method.md#defaults; the number of steps is ours.
  config.rl.steps = 200
  config.rl.prompts_per_step = 64
  # Of the official script's schedule the 50 updates of warm-up: until then AdamW's moments are
  # of few gradients. Not its linear decay to 0: that ties the rate to the number of steps, which
  # is ours, and a run could not be made longer. --config.rl_optimizer.schedule=linear has it.
  config.rl_optimizer.warmup_steps = 50
  config.checkpoint.every = 20
  fit_to(config, hardware)
  return config


def fit_to(config, hardware):
  """Sizes the run for devices: what is trained, the mesh, and how much is done at a time."""
  if hardware not in ("", *HARDWARE):
    raise UserError(f"--config: hardware {hardware!r} is not one of {', '.join(HARDWARE)}")
  chip, *rest = hardware.split("-")
  if hardware in ("", "v5e-64", "v5p-32") or "full" in rest:
    # Full fine-tuning: a float32 master, of which the devices read a bfloat16 copy.
    config.model.lora.rank = 0
    config.model.param_dtype = "float32"
    config.rl_optimizer.learning_rate = 5e-7
  if chip.startswith("v5"):
    config.mesh.slice = hardware
    # Prompts of like length are sampled together, and one slice is graded while the next is
    # sampled (docs/scaling.md).
    config.rl.sample_slices = 4
    config.rl.micro_batches = 2 if hardware == "v5e-8" else 1
    config.sft.micro_batches = 4 if hardware == "v5e-8" else 1
  elif hardware:
    config.mesh.hardware = chip
    config.mesh.devices = int(rest[0]) if rest else 0
    # Known once the devices are.
    config.mesh.data = config.mesh.fsdp = 0
    config.rl.sample_slices = config.rl.micro_batches = config.sft.micro_batches = 0
    config.eval.batch_size = 0
    if hardware in ("h100-1", "h200-1"):
      # 200 steps of 64 prompts would be three to six days on one of them; so they are about one.
      config.rl.prompts_per_step = 16
