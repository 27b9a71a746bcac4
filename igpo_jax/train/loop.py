"""What both training stages share: steps, rows, evaluations, checkpoints, resume, stop.

The order inside a step is what makes resume exact: everything about step n is
written before checkpoint n is saved, and a restart drops every row beyond the
checkpoint it continues from.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import CheckpointConfig, Config
from igpo_jax.parallel.distributed import from_first
from igpo_jax.parallel.mesh import over_processes
from igpo_jax.train.runlog import RunLog, say
from igpo_jax.types import Params, TrainState

STOPPED_BY_SIGNAL = 128 + signal.SIGTERM  # the exit code a shell gives such a process


class NonFinite(RuntimeError):
  """Too many updates in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass
class Run:
  """What outlives a stage.

  Attributes:
    config, workdir, log: of the run.
    mesh: the device mesh.
    evaluate: params, label -> metrics "eval/<name>/..." on every benchmark.
  """

  config: Config
  workdir: epath.Path
  log: RunLog
  mesh: jax.sharding.Mesh
  evaluate: Callable[[Params, str], dict[str, float]]

  def checkpoints(self, stage: str) -> Checkpoints:
    """The checkpoints of a stage."""
    cfg = self.config.checkpoint
    return Checkpoints(self.workdir / "checkpoints" / stage, cfg.keep, cfg.best_metric)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training stage for `run_stage`.

  Attributes:
    name: "sft" or "rl".
    steps: how many.
    eval_every: steps between evaluations; 0: only at the end.
    step: (state, n) -> (state, metrics, sample rows); n counts from 0. Metrics may be
      arrays on the device; they are fetched only when they are written. One without a "/"
      in its name is the stage's.
    whole: the state's parameters -> all of the model's: adds what is not trained.
    shown: metrics for the progress bar.
  """

  name: str
  steps: int
  eval_every: int
  step: Callable[[TrainState, int], tuple[TrainState, dict[str, Any], list[dict]]]
  whole: Callable[[Params], Params]
  shown: tuple[str, ...]


class StopSignal:
  """True once SIGTERM or SIGINT has come in on any process; the step under way is finished."""

  def __init__(self):
    self._received = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> StopSignal:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number, frame) -> None:
    if self._received and number == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice: now
    self._received = True

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __bool__(self) -> bool:
    return bool(over_processes(np.array(self._received), np.max))


def due(every: int, done: int, total: int) -> bool:
  """True at every `every`-th step and at the last."""
  return done == total or (every > 0 and done % every == 0)


def should_save(cfg: CheckpointConfig, done: int, total: int, metrics: dict) -> bool:
  """At the interval, at the end, and whenever the metric of the best was measured."""
  return due(cfg.every, done, total) or (bool(cfg.best_metric) and cfg.best_metric in metrics)


def run_stage(run: Run, stage: Stage, state: TrainState) -> TrainState:
  """Runs a stage from its last checkpoint, or from `state` if there is none.

  Returns:
    The state after the last step.

  Raises:
    NonFinite: `log.max_skipped` updates in a row were skipped; the last checkpoint
      stands.
    SystemExit: a signal asked to stop; the state was saved first.
  """
  cfg = run.config
  checkpoints = run.checkpoints(stage.name)
  start = from_first(checkpoints.latest) or 0
  if start:
    state = checkpoints.restore(start, state)
    say(f"{stage.name}: continues from its checkpoint of step {start}")
  if start < stage.steps:
    run.log.rewind(stage.name, start)

  bar = tqdm(
    total=stage.steps, initial=start, desc=stage.name, unit="step", file=sys.stderr,
    disable=jax.process_index() != 0, dynamic_ncols=True, mininterval=1.0,
  )  # fmt: skip
  with bar, StopSignal() as stop:
    for n in range(start, stage.steps):
      began = time.perf_counter()
      done = n + 1
      state, metrics, samples = stage.step(state, n)
      if due(cfg.log.every, done, stage.steps):
        metrics = jax.device_get(metrics)
        row = {k if "/" in k else f"{stage.name}/{k}": v for k, v in metrics.items()}
        row["time/step_seconds"] = time.perf_counter() - began
        if due(stage.eval_every, done, stage.steps):
          row |= run.evaluate(stage.whole(state.params), f"{stage.name} {done}")
        run.log.metrics(stage.name, done, row)
        bar.set_postfix(
          {k: f"{float(metrics[k]):.3g}" for k in stage.shown if k in metrics}, refresh=False
        )
        if metrics["skipped_in_a_row"] >= cfg.log.max_skipped:
          raise NonFinite(
            f"{stage.name}: {cfg.log.max_skipped} updates in a row had a loss or gradient "
            f"that is not finite (last at step {done}); see {run.log.metrics_path}"
          )
      else:
        row = {}
      if samples and cfg.log.samples_every and due(cfg.log.samples_every, done, stage.steps):
        run.log.samples(stage.name, done, samples, cfg.log.samples_per_step)
      stopping = bool(stop)
      if stopping or should_save(cfg.checkpoint, done, stage.steps, row):
        run.log.flush()
        checkpoints.save(done, state, row)
      bar.update()
      if stopping:
        say(f"{stage.name}: stopped by a signal; saved at step {done}")
        raise SystemExit(STOPPED_BY_SIGNAL)
  checkpoints.close()
  return state
