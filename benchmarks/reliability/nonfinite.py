"""NaN and infinities in a gradient, a loss, a row, a weight, a reward: no parameter may see them.

"gradient": one optimizer step with a number that is none, or one too large to square, at a random
place of the gradient, or as the loss. The step must change nothing but its counts, and a step after
it must be the one that a state without it would make. "row": one policy update with such a number
as one row's advantage, or as one log-probability under the old policy or the reference. Either it
is skipped, or all is finite, and the same as without a NaN that no loss looks at. "weight": such a
number at a random place of the parameters. Nothing else may become one. "reward": the whole tiny
run (`tiny_run`), in which one reward is none. It must finish, with skipped updates counted and
finite numbers only. What only one process of two has is in `hosts`.
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
from benchmarks.reliability.table import SPOILT, Campaign, mixed
from igpo_jax.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, RLConfig
from igpo_jax.io.jsonl import Row
from igpo_jax.models import make_lm
from igpo_jax.train.micro_batches import apply_gradient
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.setup import make_optimizer
from igpo_jax.types import Rollout, TrainState

COUNTS = {"gradient": 10, "row": 4, "weight": 4, "reward": 6}
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


PROMPTS, GROUP, LENGTH, VOCAB = 4, 3, 10, 12


@functools.cache
def _policy():
  """(programs, optimizer, parameters, a rollout, its scores, keys) of a tiny model."""
  rl = RLConfig(prompts_per_step=PROMPTS, group_size=GROUP, inner_updates=2)
  config = Config(rl=rl, objective=ObjectiveConfig(beta=0.1))
  lm = make_lm(
    ModelConfig(
      d_model=16, n_layers=1, n_heads=2, mlp_hidden=32, vocab_size=VOCAB, mask_id=1, eos_id=0
    )
  )
  params = lm.init(jax.random.key(0))
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 100)
  rng = np.random.default_rng(0)
  completion = rng.integers(2, VOCAB, (PROMPTS, GROUP, LENGTH))
  ends = rng.integers(2, 2 * LENGTH, (PROMPTS, GROUP, 1))
  hinted = rng.random(completion.shape) < 0.2
  rollout = Rollout(
    prompt=jnp.asarray(rng.integers(2, VOCAB, (PROMPTS, 5)), jnp.int32),
    prompt_valid=jnp.ones((PROMPTS, 5), bool),
    completion=jnp.asarray(np.where(np.arange(LENGTH) >= ends, 0, completion), jnp.int32),
    hinted=jnp.asarray(hinted),
    commit_step=jnp.where(hinted, -1, 0),
    advantages=jnp.asarray(rng.normal(size=(PROMPTS, GROUP)), jnp.float32),
  )
  keys = jax.random.split(jax.random.key(2), PROMPTS)
  programs = make_policy_programs(lm, optimizer, config)
  return programs, optimizer, params, rollout, programs.score(params, params, rollout, keys), keys


def _update(params, rollout, scores):
  """(the state before, the state after, the metrics) of one policy update."""
  programs, optimizer, _, _, _, keys = _policy()
  zero = lambda: jnp.zeros((), jnp.int32)
  begin = lambda: TrainState(
    zero(), jax.tree.map(jnp.copy, params), optimizer.init(params), zero(), zero()
  )
  after, metrics = programs.update(begin(), {}, rollout, scores, keys, jnp.int32(1))
  return begin(), after, metrics


def _spoilt_at_random(array, draw: random.Random, value: str):
  at = tuple(draw.randrange(n) for n in array.shape)
  return array.at[at].set(float(value)), at


def _checked(before, after, metrics, allowed: int) -> list[str]:
  """What is wrong with an update; `allowed`: how many numbers the state had that are none."""
  state = (after.params, after.opt_state)
  if int(metrics["skipped"]) == 1:
    same = _bits(state) == _bits((before.params, before.opt_state))
    counted = int(after.skipped_in_a_row) == 1
    return [] if same and counted else ["skipped, but the state has changed or it is not counted"]
  found = sum(int(np.sum(~np.isfinite(np.asarray(x)))) for x in jax.tree.leaves(state))
  return [] if found <= allowed else [f"{found} numbers that are none after an update"]


def row(draw: random.Random) -> list[str]:
  """One trial; returns what went wrong."""
  *_, params, rollout, scores, _ = _policy()
  value, where = draw.choice(VALUES), draw.choice(("advantages", "old", "ref"))
  if where == "advantages":
    spoilt, at = _spoilt_at_random(rollout.advantages, draw, value)
    before, after, metrics = _update(params, rollout.replace(advantages=spoilt), scores)
  else:
    spoilt, at = _spoilt_at_random(getattr(scores, where), draw, value)
    before, after, metrics = _update(params, rollout, scores._replace(**{where: spoilt}))
  lost = _checked(before, after, metrics, 0)
  if value == "nan" and not int(metrics["skipped"]):
    _, clean, _ = _update(params, rollout, scores)
    if _bits((clean.params, clean.opt_state)) != _bits((after.params, after.opt_state)):
      lost.append("learnt something else")
  return [f"{value} in {where}{list(at)}: {text}" for text in lost]


def weight(draw: random.Random) -> list[str]:
  """One trial; returns what went wrong."""
  *_, params, rollout, scores, _ = _policy()
  leaves, tree = jax.tree.flatten(params)
  which, value = draw.randrange(len(leaves)), draw.choice(VALUES[:3])
  leaves[which], at = _spoilt_at_random(leaves[which], draw, value)
  before, after, metrics = _update(jax.tree.unflatten(tree, leaves), rollout, scores)
  lost = _checked(before, after, metrics, 1)
  return [f"{value} in parameter {which} at {list(at)}: {text}" for text in lost]


def reward(draw: random.Random, folder: epath.Path) -> Row:
  """A whole run with one reward that is no number."""
  spoilt = f"{draw.randrange(CALLS)} {draw.choice(VALUES[:3])}"
  workdir = pathlib.Path(folder, "run")
  command = [sys.executable, "-m", "igpo_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  command.append(f"--config.compilation_cache={folder.parent / 'cache'}")
  done = subprocess.run(command, env=os.environ | {SPOILT: spoilt}, capture_output=True, text=True)
  if done.returncode:
    return {"what": spoilt, "lost": [f"exit code {done.returncode}: {done.stderr[-600:]}"]}
  return {"what": spoilt, **skipped(workdir)}


def skipped(workdir: pathlib.Path) -> Row:
  """What is wrong with a finished run in which one reward was no number.

  An update is skipped for it, unless the completion was not learnt from: a hinted one that did not
  take another's place, or one whose place was taken.
  """
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [row for row in rows if row["stage"] == "rl"]
  learnt_from = any(row["rl/reward_after"] is None for row in steps)
  last, lost = steps[-1], []
  if bool(last["rl/skipped"]) != learnt_from:
    lost.append(f"{last['rl/skipped']} updates skipped, learnt from: {learnt_from}")
  if last["rl/skipped_in_a_row"] or last["rl/grad_norm"] is None:
    lost.append("the last update has no finite gradient")
  return {"skipped": last["rl/skipped"], "lost": lost}


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  draw = random.Random(f"{case} {seed}")
  if case.startswith("reward"):
    return reward(draw, folder)
  one = {"gradient": gradient, "row": row, "weight": weight}[case.partition("/")[0]]
  lost = [f"trial {k}: {text}" for k in range(TRIALS) for text in one(draw)]
  return {"tried": TRIALS, "lost": lost}


CAMPAIGN = Campaign(
  "nonfinite",
  "numbers that are none in gradients, losses, rows, weights and rewards",
  functools.partial(mixed, COUNTS),
  attempt,
)
