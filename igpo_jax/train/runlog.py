"""The logs of a run: metrics.jsonl, samples.jsonl, TensorBoard, wandb.

Rows have a stage and a step and are in order. A run that is started again drops the rows after the
checkpoint that it continues from, and a half-written last line. So the files become those of an
uninterrupted run, except for `time/...`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from igpo_jax.config import LogConfig
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import Row, bytes_of_rows, can_append, row_file, write_whole
from igpo_jax.parallel.distributed import from_first, share
from igpo_jax.viewer.summary import STAGE_ORDER, offsets


def print_once(message: str) -> None:
  """Prints a line on standard error, above any progress bar, on process 0 only."""
  if jax.process_index() == 0:
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def until(stage: str, step: int) -> Callable[[Row], bool]:
  """A function that is True for the rows up to `step` of `stage`."""
  position = (STAGE_ORDER.index(stage), step)
  return lambda row: (STAGE_ORDER.index(row["stage"]), row["step"]) <= position


def tag(stage: str, name: str) -> str:
  """A metric's name for TensorBoard and wandb, which show all stages of a run together.

  The metrics of evaluations, such as "eval/test/accuracy", keep their names, so that one chart
  shows all stages. Other metrics that both stages have, such as "time/step_seconds", get the
  stage's name in front.
  """
  return name if name.startswith(("eval/", f"{stage}/")) else f"{stage}/{name}"


def read_rows(workdir: epath.Path) -> list[Row]:
  """The rows of a run's metrics.jsonl; [] if there is none.

  Raises:
    UserError: a line that no run has written.
  """
  path = workdir / "metrics.jsonl"
  rows = row_file(path).read()
  for row in rows:
    if row.get("stage") not in STAGE_ORDER or type(row.get("step")) is not int:
      raise UserError(f"{path}: not a row of a run: {json.dumps(row)[:60]}; mend or move the file")
  return rows


class RunLog:
  """The logs of one workdir. Only process 0 reads and writes files.

  Args:
    workdir: made if there is none.
    options: says which logs are written.

  Attributes:
    rows: the rows of metrics.jsonl on process 0; [] on the others.
  """

  def __init__(self, workdir: epath.Path, options: LogConfig):
    self.options, self.workdir = options, workdir
    self.metrics_path = workdir / "metrics.jsonl"
    self.rows: list[Row] = []
    self._writes = jax.process_index() == 0
    self._tensorboard = self._wandb = None
    if not self._writes:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    self._metrics, self._samples = row_file(self.metrics_path), row_file(workdir / "samples.jsonl")
    for file in (self._metrics, self._samples):
      file.cut()  # half a row at the end would run into the next one
    self.rows = read_rows(workdir)
    if options.tensorboard and can_append(workdir):
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
    elif options.tensorboard:
      print_once(
        f"no TensorBoard files: {workdir} cannot be appended to; metrics.jsonl has the numbers"
      )
    if options.wandb:
      try:
        import wandb
      except ImportError:
        raise UserError(
          "config.log.wandb is on, but wandb is not installed: pip install wandb, or turn it off"
        ) from None
      folder = str(workdir) if can_append(workdir) else None
      self._wandb = wandb.init(
        project=options.wandb_project, dir=folder, id=_wandb_id(workdir), resume="allow"
      )
      # Not wandb's own count of calls, which a continued run cannot set back.
      self._wandb.define_metric("*", step_metric="global_step")

  def has(self, stage: str, step: int = 0) -> bool:
    """Whether there is a row of step `step` of `stage`; 0 is any step. A collective."""
    return from_first(
      lambda: any(row["stage"] == stage and step in (0, row["step"]) for row in self.rows)
    )

  def values(self, stage: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in all rows of `stage` that have it; [] on all but process 0."""
    rows = [row for row in self.rows if row["stage"] == stage and row.get(name) is not None]
    return [(row["step"], row[name]) for row in rows]

  def rewind(self, stage: str, step: int) -> None:
    """Drops every row after `step` of `stage` from metrics.jsonl and samples.jsonl."""
    keep = until(stage, step)
    self.rows = [row for row in self.rows if keep(row)]
    if self._writes:
      self._metrics.cut(keep)
      self._samples.cut(keep)

  def metrics(self, stage: str, step: int, values: dict[str, Any]) -> None:
    """Appends one row; values that are not finite are written as null."""
    clean = plain(values)
    if not self._writes:
      return
    row = {"stage": stage, "step": step, **clean}
    self.rows.append(row)
    self._metrics.add([row])
    if not (self._tensorboard or self._wandb):
      return
    overall = offsets(self.rows)[stage] + step
    tagged = {tag(stage, name): value for name, value in clean.items()}
    if self._tensorboard:
      for name, value in tagged.items():
        if isinstance(value, (int, float)):
          self._tensorboard.add_scalar(name, value, overall)
      self._tensorboard.flush()
    if self._wandb:
      self._wandb.log({"global_step": overall, **tagged})

  def samples(self, stage: str, step: int, rows: list[Row], limit: int = 0) -> None:
    """Appends completions of all processes to samples.jsonl, in the order of the batch.

    A collective.

    Args:
      stage, step: of the rows.
      rows: this process's rows. The rows of all processes are sorted by "rank" and "group",
        and written without "rank".
      limit: the largest number of rows that is written; 0: all.
    """
    rank = lambda row: (row.get("rank", 0), row.get("group", 0))
    rows = sorted(share(sorted(rows, key=rank)[: limit or None]), key=rank)[: limit or None]
    if self._writes:
      head = {"stage": stage, "step": step}
      self._samples.add([head | {k: v for k, v in r.items() if k != "rank"} for r in rows])

  def flush(self) -> None:
    """Returns once every row is in its file. Call it before a checkpoint is saved."""
    if self._writes:
      self._metrics.flush()
      self._samples.flush()

  def is_removed(self) -> bool:
    """True if the workdir, or a file of rows, was removed. False on all but process 0."""
    if not self._writes or not can_append(self.workdir):
      return False
    files = self._metrics, self._samples
    return not self.workdir.exists() or any(file.is_removed() for file in files)

  def sizes(self) -> dict[str, int]:
    """Name of each file -> the bytes of its rows. A collective."""
    paths = lambda: (file.path for file in (self._metrics, self._samples))
    return from_first(lambda: {path.name: bytes_of_rows(path) for path in paths()})

  def close(self) -> None:
    """Finishes the files and closes TensorBoard and wandb."""
    if self._writes:
      self._metrics.close()
      self._samples.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()


def _wandb_id(workdir: epath.Path) -> str:
  """The wandb id of this workdir's run, kept in the workdir for when the run is continued."""
  file = workdir / "wandb_id"
  kept = file.read_text().strip() if file.exists() else ""
  if not kept:
    kept = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8)
    write_whole(file, kept + "\n")
  return kept


def plain(values: dict[str, Any]) -> dict[str, Any]:
  """Metrics as JSON values; numbers that are not finite become None. Equal names are one object."""
  return {sys.intern(name): _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
  """A number that JSON knows; dataclasses become dicts elsewhere."""
  if dataclasses.is_dataclass(value):
    raise TypeError("log the fields of a dataclass, not the dataclass")
  if isinstance(value, (str, bool, int)) or value is None:
    return value
  value = float(value)
  return value if math.isfinite(value) else None
