"""A whole run in seconds, as a config file: SFT, RL with hints, evaluations, a report.

The verifier calls a completion correct by its length, so that an untrained model has groups of all
kinds and every step moves the parameters. Where the environment names a SPOILT reward, "CALL
VALUE", that call of the reward part gives this value in place of 0.
"""

from __future__ import annotations

import itertools
import os

from benchmarks.reliability.table import SPOILT
from igpo_jax.config import default_config
from igpo_jax.rewards.score import Verdict, register_reward, register_verifier

_calls = itertools.count()


@register_verifier("odd_length")
def _odd_length(completion, record):
  del record
  return Verdict(len(completion) % 2 == 1, completion, "ok")


@register_reward("spoilt")
def _spoilt(completion, record, verdict):
  del completion, record, verdict
  call, value = os.environ.get(SPOILT, "-1 0").split()
  return float(value) if next(_calls) == int(call) else 0.0


def get_config():
  config = default_config()
  task = "synthetic:chains?min_steps=2&max_steps=2"
  config.data.sft = f"{task}&split=train&n=64&seed=1"
  config.data.rl = f"{task}&split=train&n=32&seed=2"
  config.data.eval = (f"test={task}&split=test&n=8&seed=3",)
  config.data.prompt_buckets = (12,)
  config.reward.verifier = "odd_length"
  config.reward.weights = (("correct", 1.0), ("spoilt", 1.0))

  config.model.d_model = 16
  config.model.n_layers = 1
  config.model.n_heads = 2
  config.model.mlp_hidden = 32

  config.sampler.gen_length = 16
  config.sampler.block_length = 8
  config.sampler.steps = 4
  config.sampler.temperature = 1.0

  config.sft.steps = 8
  config.sft.batch_size = 8
  config.rl.steps = 12
  config.rl.prompts_per_step = 2
  config.rl.group_size = 2
  config.rl.inner_updates = 2
  config.rl_optimizer.learning_rate = 1e-2
  config.sft_optimizer.learning_rate = 1e-2
  config.hints.chunk_min = 1
  config.hints.chunk_max = 2
  config.eval.batch_size = 4
  config.rl.eval_every = 4

  config.checkpoint.every = 2
  config.log.samples_every = 1
  config.log.samples_per_step = 0
  config.log.tensorboard = False
  return config
