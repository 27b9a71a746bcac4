"""The loop of both training stages: steps, rows, evaluations, checkpoints, resuming and stopping.

Resuming is exact because of the order inside a step: every row of step n is written before
checkpoint n is saved, and a restart drops the rows after the checkpoint that it continues from.
Only an evaluation, which may take hours, comes after the checkpoint. The step's row is then saved
in the checkpoint, and a restart makes the evaluation and writes the row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from igpo_jax.checkpoint import Checkpoints, DamagedCheckpoint, saved_steps, shapes_of
from igpo_jax.config import CheckpointConfig, Config, LogConfig
from igpo_jax.errors import UserError
from igpo_jax.parallel.distributed import from_first
from igpo_jax.train.guards import Guards
from igpo_jax.train.lock import WorkdirLock
from igpo_jax.train.progress import Profiler, Progress, device_memory
from igpo_jax.train.runlog import RunLog, plain, print_once
from igpo_jax.train.stop import Stopped, StopSignal
from igpo_jax.types import Params, TrainState
from igpo_jax.viewer.report import write_page


class Collapsed(UserError):
  """A rule of `log.stop_when` held; the state was saved first."""


class NonFinite(UserError):
  """Too many updates in a row had a loss or gradient that is not finite, or steps such logits."""


@dataclasses.dataclass
class Run:
  """A run: everything that its stages share.

  Attributes:
    config: with all sizes resolved.
    workdir: the run's directory.
    log: writes its rows.
    mesh: the device mesh.
    evaluate: (params, label) -> metrics "eval/NAME/..." of every benchmark. Raises `Stopped` if a
      signal asks for it.
    stop: receives signals that ask the run to stop.
    lock: the lock on the workdir.
    progress: the progress display.
  """

  config: Config
  workdir: epath.Path
  log: RunLog
  mesh: jax.sharding.Mesh
  evaluate: Callable[[Params, str], dict[str, float]]
  stop: StopSignal = dataclasses.field(default_factory=StopSignal)
  lock: WorkdirLock | None = None
  progress: Progress = dataclasses.field(init=False)

  def __post_init__(self):
    self.progress = Progress(self.config, self.workdir)

  def checkpoints(self, stage: str) -> Checkpoints:
    """The checkpoints of a stage. A collective."""
    checkpoint = self.config.checkpoint
    scores = from_first(lambda: self.log.values(stage, checkpoint.best_metric))
    return Checkpoints(self.workdir / "checkpoints" / stage, checkpoint.keep, dict(scores))

  def write_page(self) -> None:
    """Writes report.html, with all rows so far. Only process 0 does."""
    self.log.flush()
    if jax.process_index() == 0 and (why := write_page(self.workdir)):
      print_once(why)

  def is_taken_over(self) -> bool:
    """True if this process has seen that another run has taken the workdir over."""
    return self.lock is not None and self.lock.taken_by is not None


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training stage for `run_stage`.

  Attributes:
    name: "sft" or "rl".
    steps: number of steps.
    eval_every: steps between evaluations; 0: only at the end.
    step: (state, n) -> (state, metrics, sample rows), with n from 0. Metrics may be arrays on the
      devices; they are fetched when they are written. A name without "/" gets the stage's name in
      front. May raise `Stopped` if it has not changed the state.
    all_params: trained parameters -> all parameters of the model, those that are not trained
      included.
    shown: names of the metrics that the progress display shows.
    programs: number of programs that the first step compiles.
    explore: of RL: (state, n) -> (policy, `Exploration`), the rollout of step n without its
      updates. None of other stages.
  """

  name: str
  steps: int
  eval_every: int
  step: Callable[[TrainState, int], tuple[TrainState, dict[str, Any], list[dict]]]
  all_params: Callable[[Params], Params]
  shown: tuple[str, ...]
  programs: int = 1
  explore: Callable[[TrainState, int], tuple[Params, Any]] | None = None


def is_multiple(every: int, done: int) -> bool:
  """True if `done` is a multiple of `every` (0: never)."""
  return every > 0 and done % every == 0


def due(every: int, done: int, total: int) -> bool:
  """True if `done` is a multiple of `every` (0: never), or all of `total` steps."""
  return done == total or is_multiple(every, done)


def samples_due(log: LogConfig, done: int, total: int) -> bool:
  """Whether rows of samples.jsonl are written after `done` of `total` steps."""
  return log.samples_every > 0 and due(log.samples_every, done, total)


def should_save(
  checkpoint: CheckpointConfig, done: int, total: int, metrics: dict, evaluating: bool = False
) -> bool:
  """Whether to save a checkpoint: at the interval, at the end, and if `best_metric` is measured.

  Args:
    checkpoint: the options.
    done, total: steps done, and of the stage.
    metrics: metrics of this step.
    evaluating: whether an evaluation follows this step.
  """
  best = checkpoint.best_metric
  measured = bool(best) and (best in metrics or (evaluating and best.startswith("eval/")))
  return due(checkpoint.every, done, total) or measured


def run_stage(run: Run, stage: Stage, state: TrainState) -> TrainState:
  """Runs a stage from its last good checkpoint, or from `state` if there is none. A collective.

  Args:
    run: the run.
    stage: the stage.
    state: the state to start from. If there is a checkpoint, its arrays are deleted.

  Returns:
    The state after the last step.

  Raises:
    NonFinite: `log.max_skipped` updates in a row were skipped, or as many steps in a row
      sampled from logits that are not finite. The last checkpoint is kept.
    Collapsed: a rule of `log.stop_when` held. The state was saved before.
    SystemExit: a signal asked to stop. The state was saved before.
    UserError: no checkpoint can be read, the disk is full, or another run has taken the workdir
      over.
  """
  config, best = run.config, run.config.checkpoint.best_metric
  checkpoints = run.checkpoints(stage.name)
  done, state, waiting = resume(run, stage, checkpoints, state)
  # SFT steps that are repeated only for the parameters that RL starts from have their rows already.
  log = None if is_behind(run, stage.name) else run.log
  saved, saved_at = done, time.monotonic()
  profiler = Profiler(run.workdir / "profile" / stage.name, config.log.profile_steps)
  guards = Guards(config.log, stage.name)
  run.progress.begin(stage.name, stage.steps, done, stage.programs)

  def save(note: dict[str, Any]) -> None:
    nonlocal saved, saved_at
    run.log.flush()
    # Repeated SFT steps: its rows are followed by some of RL, which may be dropped.
    sizes = {"bytes": run.log.sizes()} if log is not None else {}
    save_with_rows(run, checkpoints, done, state, {**note, **sizes})
    saved, saved_at = done, time.monotonic()
    run.stop.next_start = f"the same command continues from step {saved}"

  def evaluate(row: dict[str, Any]) -> None:
    """Makes the evaluation of this step, and writes its row."""
    row |= run.evaluate(stage.all_params(state.params), f"{stage.name} {done}")
    run.log.metrics(stage.name, done, row)
    run.log.flush()
    score(row)
    checkpoints.prune()

  def score(row: dict[str, Any]) -> None:
    if row.get(best) is not None and math.isfinite(row[best]):
      checkpoints.scores[done] = float(row[best])

  with (
    contextlib.closing(checkpoints),
    contextlib.closing(run.progress),
    contextlib.closing(profiler),
    run.stop as stop,
  ):
    stop.next_start = f"the same command continues from step {saved}"
    try:
      if waiting:
        evaluate(dict(waiting))
        waiting = None
      most = config.log.max_skipped
      broken = 0  # steps in a row with completions from logits that are not finite
      for n in range(done, stage.steps):
        profiler.step()
        began = time.perf_counter()
        state, metrics, samples = stage.step(state, n)
        done, shown = n + 1, {}
        evaluating = log is not None and due(stage.eval_every, done, stage.steps)
        broken = broken + 1 if metrics.get("not_finite") else 0
        failed = "steps sampled from logits that are not finite" if broken >= most else ""
        row: dict[str, Any] = {}
        if evaluating or failed or (log is not None and due(config.log.every, done, stage.steps)):
          metrics = jax.device_get(metrics)
          row = {k if "/" in k else f"{stage.name}/{k}": v for k, v in metrics.items()}
          row |= {"time/step_seconds": time.perf_counter() - began, **device_memory()}
          shown = {k: float(metrics[k]) for k in stage.shown if k in metrics}
          if metrics["skipped_in_a_row"] >= most:
            failed = "updates had a loss or gradient that is not finite"
          if failed or not evaluating:
            run.log.metrics(stage.name, done, row)
          if failed:
            raise NonFinite(
              f"{stage.name}: {most} {failed} in a row, the last at step {done} (see "
              f"{run.log.metrics_path}): lower {stage.name}_optimizer.learning_rate, or look at "
              "the weights that it began with"
            )
        if samples and log is not None and samples_due(config.log, done, stage.steps):
          run.log.samples(stage.name, done, samples, config.log.samples_per_step)
        if log is not None and is_multiple(config.log.report_every, done):
          run.write_page()
        score(row)
        waiting = plain(row) if evaluating else None
        late, lost = is_late(config.checkpoint, saved_at), run.is_taken_over()
        stopping, late, lost = stop.agreed(late, lost)
        if lost:
          raise UserError(
            f"{run.workdir} was taken over by another run (see docs/several_hosts.md)"
          )
        if stopping or late or should_save(config.checkpoint, done, stage.steps, row, evaluating):
          save({"row": waiting} if waiting else {})
        run.progress.step(done, time.perf_counter() - began, shown)
        if stopping:
          raise Stopped(stopping)
        if evaluating:
          evaluate(row)
          waiting = None
        if row and guards.rules:
          why = guards.reason(row)
          # One process decides: seconds and memory are not the same on all of them.
          if why := from_first(lambda why=why: why):
            if saved != done:
              save({})
            raise Collapsed(f"{stage.name}: stopped at step {done}: {why}; {stop.next_start}")
    except Stopped as stopped:
      if saved != done:
        save({"row": waiting} if waiting else {})
      print_once(f"{stage.name}: {stopped}; {stop.next_start}")
      raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
      print_once(f"{stage.name}: stopped at once; {stop.next_start}")
      raise
  return state


def save_with_rows(
  run: Run, checkpoints: Checkpoints, step: int, state: TrainState, note: dict[str, Any]
) -> None:
  """Saves a checkpoint, but not into a workdir that was removed. A collective.

  Orbax makes folders that are missing, so the next start would find a checkpoint without its run.

  Raises:
    UserError: the workdir was removed, before or meanwhile; nothing of the checkpoint is left. Or
      the disk is full, or fails.
  """
  if run.log.is_removed():
    raise removed(run, checkpoints, step)
  try:
    checkpoints.save(step, state, note)
  except Exception as error:
    if run.log.is_removed():
      raise removed(run, checkpoints, step) from error
    raise
  if run.log.is_removed():
    raise removed(run, checkpoints, step)


def removed(run: Run, checkpoints: Checkpoints, step: int) -> UserError:
  """The error of a workdir that was removed. What a save made of it again is removed first."""
  checkpoints.discard(step)
  with contextlib.suppress(OSError):  # there is more in it
    for folder in (checkpoints.directory, checkpoints.directory.parent, run.workdir):
      os.rmdir(folder)
  return UserError(
    f"{run.workdir}, or its metrics.jsonl or samples.jsonl, was removed before step {step} was "
    "saved; start the same command again"
  )


def is_late(checkpoint: CheckpointConfig, saved_at: float) -> bool:
  """Whether the last checkpoint is `checkpoint.minutes` old, by the clock of process 0.

  A collective: all processes get the same answer.
  """
  late = checkpoint.minutes > 0 and time.monotonic() - saved_at >= 60 * checkpoint.minutes
  return late and jax.process_index() == 0


def is_behind(run: Run, stage: str) -> bool:
  """Whether `stage` is SFT and RL has begun with its result. A collective."""

  def rl_has_begun() -> bool:
    saved = saved_steps(run.workdir / "checkpoints" / "rl")
    return bool(saved) or any(row["stage"] == "rl" for row in run.log.rows)

  return stage == "sft" and from_first(rl_has_begun)


def resume(
  run: Run, stage: Stage, checkpoints: Checkpoints, state: TrainState
) -> tuple[int, TrainState, dict[str, Any] | None]:
  """Restores the last good checkpoint. A collective.

  Rows after it are dropped, and damaged checkpoints after it are renamed. Files with a wrong size
  or checksum are found damaged by every process. If only one of several processes cannot read its
  part, the run ends with a message.

  Args:
    state: the state to return if there is no checkpoint; otherwise its arrays are deleted.

  Returns:
    (steps done, state, the row whose evaluation is still to be made, or None).

  Raises:
    UserError: there are checkpoints, but none can be read; or there are none although the stage was
      finished.
  """
  from_first(checkpoints.remove_unfinished)
  steps = from_first(checkpoints.steps)
  start, damaged = 0, []
  if steps:
    like = shapes_of(state)
    jax.tree.map(lambda x: x.delete(), state)  # there may be no room for two
  for step in reversed(steps):
    try:
      state, start = checkpoints.restore(step, like), step
      break
    except DamagedCheckpoint as error:
      damaged.append((step, error))
  if damaged and not start:
    raise UserError(
      f"{stage.name}: no checkpoint can be read: {'; '.join(str(e) for _, e in damaged)}. Put a "
      f"good one there, or move {checkpoints.directory} away to begin the stage anew"
    )
  for step, error in damaged:
    moved = from_first(lambda step=step: str(checkpoints.set_aside(step)))
    print_once(f"{stage.name}: {error}; it is {moved} now")
  if damaged:
    checkpoints.reload()
  if not steps and run.log.has(stage.name, stage.steps):
    raise UserError(
      f"{stage.name}: its rows reach the last step, {stage.steps}, but {checkpoints.directory} "
      "holds no checkpoint: put them back, or choose another --workdir"
    )
  waiting, note = None, {}
  if start:
    print_once(f"{stage.name}: continues from its checkpoint of step {start}")
    note = from_first(lambda: checkpoints.note(start))
    warn_of_missing_rows(run, note.get("bytes", {}))
  if is_behind(run, stage.name):
    if start < stage.steps:
      print_once(
        f"{stage.name}: makes step {start + 1} to {stage.steps} again, for RL; rows are kept"
      )
    return start, state, waiting
  if not run.log.has(stage.name, start):
    waiting = note.get("row")
  if waiting or start < stage.steps:
    run.log.rewind(stage.name, start)
  return start, state, waiting


def warn_of_missing_rows(run: Run, saved: dict[str, int]) -> None:
  """Tells which files have fewer bytes of rows than when the checkpoint was saved. A collective."""
  now = run.log.sizes()
  for name, size in saved.items():
    if now[name] < size:
      print_once(
        f"{run.workdir / name}: rows are missing: {now[name]} bytes of the {size} that it had when "
        "the checkpoint was saved; the run goes on without them"
      )
