"""Reads a run's files for viewers: all versions, files that are being written, parts on gs://."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import Row, can_append, row_parts
from igpo_jax.io.text import read_object

NEWEST = 2  # the newest version of a sample's row that is known here (docs/samples.md)


def open_run(workdir: str, flag: str = "--workdir=") -> epath.Path:
  """The workdir of a run, after a check that it is one.

  Args:
    workdir: a path.
    flag: the command-line flag that gave it, for messages.

  Raises:
    UserError: there is no such folder, or it holds no run.
  """
  path = epath.Path(workdir)
  if not workdir or not path.is_dir():
    raise UserError(f"{flag}{workdir}: no such directory")
  if "stages" not in config_of(path) and not any(row_parts(path / "metrics.jsonl")):
    raise UserError(f"{flag}{workdir} holds no run: neither its config.json nor metrics.jsonl")
  return path


def config_of(workdir: epath.Path) -> dict[str, Any]:
  """The contents of config.json; {} if there is none."""
  return read_object(workdir / "config.json", missing={})


def each_row(path: epath.Path) -> Iterator[Row]:
  """Yields the rows of X.jsonl one by one, so that a large file does not fill the memory.

  A last line that is half-written is left out, since a run may be writing it.

  Raises:
    UserError: another line is not a JSON object.
  """
  for part in row_parts(path):
    with part.open("rb") as file:
      before: bytes | None = None
      for number, line in enumerate(file, start=1):
        row = _object(line) if line.endswith(b"\n") else None
        if before is not None:
          raise UserError(f"{part}, line {number - 1}: not a row: {before[:60]!r}")
        if row is None:
          before = line
          continue
        yield row


def _object(line: bytes) -> Row | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def metric_rows(workdir: epath.Path) -> list[Row]:
  """The rows of metrics.jsonl."""
  return list(each_row(workdir / "metrics.jsonl"))


def sample_rows(workdir: epath.Path, keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
  """The rows of samples.jsonl for which `keep` is True, with all fields of version 2.

  A row of version 1 gets None for the fields that it lacks.

  Raises:
    UserError: a row is of a newer version than this program knows.
  """
  path = workdir / "samples.jsonl"
  return [upgraded(row, path) for row in each_row(path) if keep(row)]


def wanted(row: Row, id: str | None, number: int | None) -> bool:
  """Whether the options --id and --number of a command select this row. None selects any."""
  return id in (None, str(row.get("id"))) and number in (None, row.get("number"))


def place_of(row: Row) -> tuple[int, str, int]:
  """What identifies a completion within a step: (group, try, number in its try)."""
  return row["group"], row["phase"], row["number"]


# Fields that version 1 does not have.
ADDED = ("tokens", "pieces", "commit_logp", "parts", "extracted", "reason", "advantage")


def upgraded(row: Row, path: Any = "samples.jsonl") -> Row:
  """The row with all fields of version 2; those that it lacks are None.

  Raises:
    UserError: it is of a newer version than this program knows; `path` is its file.
  """
  version = row.get("version", 1)
  if not isinstance(version, int) or version > NEWEST:
    raise UserError(
      f"{path} has rows of version {version}; this program reads up to {NEWEST}: use a newer one"
    )
  return {name: None for name in ADDED} | row


class Follower:
  """Follows a file that a run is writing.

  Args:
    path: X.jsonl, which need not exist yet.
  """

  def __init__(self, path: epath.Path):
    self.path = path
    self._at = 0  # bytes of the file, or rows of the parts on gs://, that were read

  def new_rows(self) -> list[Row]:
    """The rows that were added since the last call.

    If the file has become shorter, since the run was continued from a checkpoint, reading goes on
    from its new end.
    """
    if not can_append(self.path):
      rows = list(each_row(self.path))
      new, self._at = rows[min(self._at, len(rows)) :], len(rows)
      return new
    if not self.path.exists():
      return []
    with self.path.open("rb") as file:
      if self._at > file.seek(0, os.SEEK_END):
        self._at = file.tell()
      file.seek(self._at)
      data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    self._at += len(whole)
    return [row for row in map(_object, whole.split(b"\n")) if row is not None]
