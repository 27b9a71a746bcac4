"""The whole program in seconds: two stages on a generated task, as a config file.

The verifier calls a completion correct by its length, so that an untrained model has
groups of all kinds. Where the environment names a tripwire, `FILE STAGE STEP SIGNAL`,
the process sends itself the signal while it grades, as soon as FILE has the row of that
stage and step: that is in the middle of the step after it. TRIPWIRE is tried when rewards are
read, after the last slice of a rollout was sampled, FIRST_SLICE when the first one is graded.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal

from igpo_jax.config import default_config
from igpo_jax.rewards.score import Verdict, register_reward, register_verifier

TRIPWIRE = "IGPO_TEST_TRIPWIRE"
FIRST_SLICE = "IGPO_TEST_TRIPWIRE_FIRST_SLICE"


def _try(wire):
  if os.environ.get(wire):
    file, stage, step, number = os.environ[wire].split()
    lines = pathlib.Path(file).read_text().splitlines() if os.path.exists(file) else []
    at = [(row["stage"], row["step"]) for row in map(json.loads, lines)]
    if (stage, int(step)) in at:
      os.environ[wire] = ""
      signal.raise_signal(int(number))


@register_verifier("lenient")
def _lenient(completion, record):
  del record
  _try(FIRST_SLICE)
  return Verdict(len(completion) % 2 == 1, completion, "ok")


@register_reward("tripwire")
def _tripwire(completion, record, verdict):
  del completion, record, verdict
  _try(TRIPWIRE)
  return 0.0


def get_config():
  config = default_config()
  task = "synthetic:chains?min_steps=2&max_steps=2"
  config.data.sft = f"{task}&split=train&n=64&seed=1"
  config.data.rl = f"{task}&split=train&n=32&seed=2"
  config.data.eval = (f"test={task}&split=test&n=8&seed=3",)
  config.data.prompt_buckets = (12,)
  config.reward.verifier = "lenient"
  config.reward.weights = (("correct", 1.0), ("tripwire", 1.0))

  config.model.d_model = 16
  config.model.n_layers = 1
  config.model.n_heads = 2
  config.model.mlp_hidden = 32

  config.sampler.gen_length = 16
  config.sampler.block_length = 8
  config.sampler.steps = 4
  config.sampler.temperature = 1.0

  config.sft.steps = 4
  config.sft.batch_size = 8
  config.rl.steps = 6
  config.rl.prompts_per_step = 2
  config.rl.group_size = 2
  config.rl.inner_updates = 2
  config.rl_optimizer.learning_rate = 1e-2
  config.sft_optimizer.learning_rate = 1e-2
  config.hints.hide_answer_value = True
  config.hints.chunk_min = 1
  config.hints.chunk_max = 2
  config.eval.batch_size = 8
  config.rl.eval_every = 3

  # What is left to the devices goes through the real program, too (train/sizes.py).
  config.rl.sample_slices = config.rl.micro_batches = config.sft.micro_batches = 0
  config.mesh.data = config.mesh.fsdp = 0

  config.checkpoint.every = 2
  config.log.samples_every = 1
  config.log.samples_per_step = 0
  config.log.token_stats = True
  config.log.tensorboard = False
  return config
