"""The loop of a training stage, with its rows, evaluations and checkpoints, around a toy model.

What the loop does with files is the real thing; a step only mixes numbers, so that a whole run
takes a second. Every number depends on all steps before: what a resumed run gets wrong, shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.reliability.table import untimed
from igpo_jax.config import CheckpointConfig, Config, LogConfig
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.train.loop import Run, Stage, run_stage
from igpo_jax.train.runlog import RunLog
from igpo_jax.train.workdir import disk_told
from igpo_jax.types import TrainState

STEPS = 8  # with a checkpoint every 2, an evaluation every 4 and samples every 3
WIDTH = 64


class Killed(BaseException):
  """Ends a run as a kill would: nothing that would follow is done."""


class Ended(NamedTuple):
  """What a whole run leaves.

  Attributes:
    state: all numbers of the last state, as one array.
    rows: of metrics.jsonl, without times.
    samples: the text of samples.jsonl.
  """

  state: np.ndarray
  rows: list[dict[str, Any]]
  samples: str

  def differences(self, other: Ended) -> list[str]:
    """The names of what is not the same, bit for bit."""
    same = {
      "state": self.state.tobytes() == other.state.tobytes(),
      "metrics.jsonl": self.rows == other.rows,
      "samples.jsonl": self.samples == other.samples,
    }
    return [name for name, equal in same.items() if not equal]


def begin() -> TrainState:
  """The state before the first step."""
  zero = lambda: jnp.zeros((), jnp.int32)
  params = {"w": jnp.sin(jnp.arange(WIDTH * WIDTH, dtype=jnp.float32)).reshape(WIDTH, WIDTH)}
  return TrainState(zero(), params, {"m": jnp.zeros((WIDTH, WIDTH))}, zero(), zero())


@jax.jit
def _mix(state: TrainState, n: jax.Array) -> TrainState:
  moment = 0.9 * state.opt_state["m"] + jnp.sin(state.params["w"] * (n + 2))
  params = {"w": state.params["w"] - 0.1 * moment}
  return state.replace(step=state.step + 1, params=params, opt_state={"m": moment})


def run(
  workdir: epath.Path,
  at_step: Callable[[int], None] = lambda n: None,
  at_evaluation: Callable[[str], None] = lambda label: None,
) -> str:
  """Begins or continues the run in a workdir; returns what it said on standard error.

  Args:
    at_step, at_evaluation: called at the start of each; may raise, or harm the disk.
  """

  def step(state, n):
    at_step(n)
    state = _mix(state, jnp.float32(n))
    value = float(jnp.sum(state.params["w"]))
    metrics = {"value": value, "skipped_in_a_row": 0}
    return state, metrics, [{"text": f"{n} {value}", "group": k} for k in range(3)]

  def evaluate(params, label):
    at_evaluation(label)
    return {"eval/t/accuracy": float(jnp.mean(jnp.cos(params["w"])))}

  log = LogConfig(every=1, tensorboard=False, samples_every=3, samples_per_step=2, report_every=0)
  config = dataclasses.replace(
    Config(), checkpoint=CheckpointConfig(every=2, minutes=0, keep=2), log=log
  )
  said = io.StringIO()
  with contextlib.redirect_stderr(said), disk_told(workdir):
    made = Run(config, workdir, RunLog(workdir, log), make_mesh(), evaluate)
    stage = Stage("rl", STEPS, 4, step, lambda params: params, ("value",))
    state = run_stage(made, stage, begin())
    made.log.close()
  np.save(workdir / "last.npy", numbers(state))
  return said.getvalue()


def numbers(state: TrainState) -> np.ndarray:
  """All numbers of a state, one after the other."""
  leaves = jax.tree.leaves((state.params, state.opt_state))
  return np.concatenate([np.asarray(x, np.float32).ravel() for x in leaves])


def ended(workdir: epath.Path) -> Ended:
  """What the finished run in a workdir left."""
  rows, samples = untimed(workdir / "metrics.jsonl"), (workdir / "samples.jsonl").read_text()
  return Ended(np.load(workdir / "last.npy"), rows, samples)
