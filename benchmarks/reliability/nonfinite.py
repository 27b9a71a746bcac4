"""NaN and infinities in a gradient, a loss and a reward: no parameter may see them.

"gradient": one optimizer step with a number that is none, or one too large to square, at a random
place of the gradient, or as the loss. The step must change nothing but its counts, and a step after
it must be the one that a state without it would make. "reward": the whole tiny run (`tiny_run`), in
which one reward is none. It must finish, with skipped updates counted and finite numbers only.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.reliability.kills import CONFIG
from benchmarks.reliability.table import Campaign, mixed
from benchmarks.reliability.tiny_run import SPOILT
from igpo_jax.config import OptimizerConfig
from igpo_jax.io.jsonl import Row
from igpo_jax.train.micro_batches import apply_gradient
from igpo_jax.train.setup import make_optimizer
from igpo_jax.types import TrainState

COUNTS = {"gradient": 10, "reward": 6}
TRIALS = 50
VALUES = ("nan", "inf", "-inf", "1e30", "-3e38")
CALLS = 48  # rewards of the tiny run: 12 steps, 2 prompts, groups of 2


@functools.cache
def _step():
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 100)
  return optimizer, jax.jit(
    lambda state, loss, grads: apply_gradient(state, optimizer, loss, grads)
  )


def _tree(draw: random.Random, dtype) -> dict[str, jax.Array]:
  rng = np.random.default_rng(draw.getrandbits(32))
  shapes = {"embedding": (7, 5), "kernel": (5, 5), "scale": (5,)}
  return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def _bits(tree) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def gradient(draw: random.Random) -> list[str]:
  """One trial; returns what went wrong."""
  optimizer, step = _step()
  dtype = draw.choice((jnp.float32, jnp.bfloat16))
  params, good = _tree(draw, dtype), _tree(draw, dtype)
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, params, optimizer.init(params), zero, zero)
  bad, loss, value = dict(good), jnp.float32(1), draw.choice(VALUES)
  if draw.random() < 0.2:
    loss = jnp.float32(draw.choice(VALUES[:3]))
  else:
    name = draw.choice(list(bad))
    at = tuple(draw.randrange(n) for n in bad[name].shape)
    bad[name] = bad[name].at[at].set(float(value))
  after, metrics = step(state, loss, bad)
  lost = []
  if _bits((after.params, after.opt_state)) != _bits((state.params, state.opt_state)):
    lost.append(f"{value}: the state has changed")
  if (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) != (1, 1):
    lost.append(f"{value}: not counted")
  one, _ = step(after, jnp.float32(1), good)
  other, _ = step(state, jnp.float32(1), good)
  if _bits((one.params, one.opt_state)) != _bits((other.params, other.opt_state)):
    lost.append(f"{value}: the next step is another")
  if int(one.skipped_in_a_row) != 0:
    lost.append(f"{value}: the count in a row goes on")
  return lost


def reward(draw: random.Random, folder: epath.Path) -> Row:
  """A whole run with one reward that is no number."""
  spoilt = f"{draw.randrange(CALLS)} {draw.choice(VALUES[:3])}"
  workdir = pathlib.Path(folder, "run")
  command = [sys.executable, "-m", "igpo_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  command.append(f"--config.compilation_cache={folder.parent / 'cache'}")
  done = subprocess.run(command, env=os.environ | {SPOILT: spoilt}, capture_output=True, text=True)
  if done.returncode:
    return {"what": spoilt, "lost": [f"exit code {done.returncode}: {done.stderr[-600:]}"]}
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  last = [row for row in rows if row["stage"] == "rl"][-1]
  lost = [] if last["rl/skipped"] else ["no update was skipped"]
  if last["rl/skipped_in_a_row"] or last["rl/grad_norm"] is None:
    lost.append("the last update has no finite gradient")
  return {"what": spoilt, "skipped": last["rl/skipped"], "lost": lost}


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  draw = random.Random(f"{case} {seed}")
  if case.startswith("reward"):
    return reward(draw, folder)
  lost = [f"trial {k}: {text}" for k in range(TRIALS) for text in gradient(draw)]
  return {"tried": TRIALS, "lost": lost}


CAMPAIGN = Campaign(
  "nonfinite",
  "numbers that are none in gradients, losses and rewards",
  functools.partial(mixed, COUNTS),
  attempt,
)
