"""What a run writes as it goes: metrics.jsonl, samples.jsonl, TensorBoard, wandb.

Rows carry (stage, step). A run that is started again drops the rows beyond the
checkpoint it continues from, and a line that was cut in half by a kill, so the
files end up as an uninterrupted run would have left them (`time/...` aside).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from igpo_jax.cli import UserError
from igpo_jax.config import LogConfig

# The order of stages in a run; "init" is the evaluation before the first one.
STAGE_ORDER = ("init", "sft", "rl", "eval")

Row = dict[str, Any]


def say(message: str) -> None:
  """One line for the user, above any progress bar, from the first process only."""
  if jax.process_index() == 0:
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def read_rows(path: epath.Path) -> list[Row]:
  """Complete rows of a JSON-lines file; [] if it does not exist.

  Raises:
    UserError: a line other than the last is not JSON.
  """
  if not path.exists():
    return []
  lines = path.read_text().splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(json.loads(line))
    except ValueError:
      if number < len(lines):
        raise UserError(f"{path}:{number}: not a JSON line; mend or move the file") from None
  return rows


def write_rows(path: epath.Path, rows: Iterable[Row]) -> None:
  """Replaces a file at once: a kill leaves the old one or the new one."""
  temporary = path.parent / f"{path.name}.tmp"
  temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
  temporary.replace(path)


def until(stage: str, step: int) -> Callable[[Row], bool]:
  """Keeps the rows that a run at `step` of `stage` has behind it."""
  position = (STAGE_ORDER.index(stage), step)
  return lambda row: (STAGE_ORDER.index(row["stage"]), row["step"]) <= position


class RunLog:
  """The files of one workdir; only the first process writes.

  Args:
    workdir: made if need be.
    cfg: which writers are on.
  """

  def __init__(self, workdir: epath.Path, cfg: LogConfig):
    self.cfg, self.workdir = cfg, workdir
    self.metrics_path = workdir / "metrics.jsonl"
    self.samples_path = workdir / "samples.jsonl"
    self._writes = jax.process_index() == 0
    self._tensorboard = self._wandb = None
    if self._writes and cfg.tensorboard:
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
    if self._writes and cfg.wandb:
      try:
        import wandb
      except ImportError:
        raise UserError("config.log.wandb is on, but wandb is not installed") from None
      self._wandb = wandb.init(project=cfg.wandb_project, dir=str(workdir), resume="allow")
    self.rows = read_rows(self.metrics_path)

  def rewind(self, stage: str, step: int) -> None:
    """Drops every row beyond `step` of `stage`, from both files."""
    keep = until(stage, step)
    self.rows = [row for row in self.rows if keep(row)]
    if not self._writes:
      return
    for path in (self.metrics_path, self.samples_path):
      if path.exists():
        write_rows(path, [row for row in read_rows(path) if keep(row)])

  def metrics(self, stage: str, step: int, values: dict[str, Any]) -> None:
    """Appends one row; values that are not finite are written as null."""
    clean = {name: _plain(value) for name, value in values.items()}
    row = {"stage": stage, "step": step, **clean}
    self.rows.append(row)
    self._append(self.metrics_path, [row])
    if self._tensorboard:
      for name, value in clean.items():
        if isinstance(value, (int, float)):
          self._tensorboard.add_scalar(f"{stage}/{name}", value, step)
      self._tensorboard.flush()
    if self._wandb:
      self._wandb.log({f"{stage}/step": step, **clean})

  def samples(self, stage: str, step: int, rows: list[Row]) -> None:
    """Appends completions to samples.jsonl."""
    self._append(self.samples_path, [{"stage": stage, "step": step, **row} for row in rows])

  def _append(self, path: epath.Path, rows: list[Row]) -> None:
    if not self._writes:
      return
    with path.open("a") as file:
      file.write("".join(json.dumps(row) + "\n" for row in rows))

  def close(self) -> None:
    """Flushes and closes the writers."""
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()


def _plain(value: Any) -> Any:
  """A number that JSON knows; dataclasses become dicts elsewhere."""
  if dataclasses.is_dataclass(value):
    raise TypeError("log the fields of a dataclass, not the dataclass")
  if isinstance(value, (str, bool, int)) or value is None:
    return value
  value = float(value)
  return value if math.isfinite(value) else None
