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

from benchmarks.reliability import tiny_run
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
  config = tiny_run.get_config()
  config.reward.verifier = "lenient"
  config.reward.weights = (("correct", 1.0), ("tripwire", 1.0))
  config.sft.steps = 4
  config.rl.steps = 6
  config.hints.hide_answer_value = True
  config.eval.batch_size = 8
  config.rl.eval_every = 3

  # What is left to the devices goes through the real program, too (train/sizes.py).
  config.rl.sample_slices = config.rl.micro_batches = config.sft.micro_batches = 0
  config.mesh.data = config.mesh.fsdp = 0

  config.log.token_stats = True
  return config
