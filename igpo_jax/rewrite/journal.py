"""Writes down each decision at once, and only once: append-only files that survive kills.

OUT.jsonl               accepted traces, ready to be a data source
OUT.rejected.jsonl      the others with their reasons
OUT.settings.json       the settings; other settings need another output
OUT.report.json, .png   lengths before and after (`lengths`)
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from igpo_jax.errors import UserError
from igpo_jax.io.text import read_object

SYNC_EVERY = 1.0  # seconds; a killed process loses nothing, a machine without power this much

Row = dict[str, Any]


class Paths:
  """The files that belong to one output."""

  def __init__(self, output: pathlib.Path):
    stem = output.with_suffix("") if output.suffix == ".jsonl" else output
    beside = lambda suffix: stem.with_name(stem.name + suffix)
    self.accepted = output
    self.rejected = beside(".rejected.jsonl")
    self.settings = beside(".settings.json")
    self.report = beside(".report.json")
    self.picture = beside(".report.png")


class Journal:
  """Accepted and rejected records of one output; use it as a context manager.

  Opening it drops a last line that a kill has cut in half, and continues where the files end.

  Args:
    output: the file of accepted traces.
    settings: the settings that decide the rows. They must be those of the rows that are there.
    notes: further facts for OUT.settings.json, which may differ from run to run.

  Raises:
    UserError: the output has other settings, another process writes it, or a file cannot be used.

  Attributes:
    accepted, rejected: numbers of records.
    reasons: reason -> number of rejected records.
    usage: "prompt_tokens" and "completion_tokens", summed over all rows.
  """

  def __init__(self, output: pathlib.Path, settings: Row, notes: Row | None = None):
    if output.is_dir():
      raise UserError(f"--output: {output} is a directory; give a file, {output / 'aligned.jsonl'}")
    self.paths = Paths(output)
    self.accepted = self.rejected = 0
    self.reasons: collections.Counter[str] = collections.Counter()
    self.usage: collections.Counter[str] = collections.Counter()
    self._ids: set[str] = set()
    self._synced = time.monotonic()
    with contextlib.ExitStack() as opened:
      try:
        output.parent.mkdir(parents=True, exist_ok=True)
        self._files = {
          name: opened.enter_context(open(getattr(self.paths, name), "ab+", buffering=0))
          for name in ("accepted", "rejected")
        }
      except OSError as error:
        raise UserError(f"--output: cannot write {error.filename}: {error.strerror}") from error
      try:
        fcntl.flock(self._files["accepted"], fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        raise UserError(f"--output: another process is writing to {output}") from None
      self._check_settings(settings, notes or {})
      for name, file in self._files.items():
        mend(file)
        for row in read_rows(getattr(self.paths, name)):
          self._count(name, row)
      self._opened = opened.pop_all()

  def __enter__(self) -> Journal:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def __contains__(self, record_id: str) -> bool:
    return record_id in self._ids

  def __len__(self) -> int:
    return len(self._ids)

  def accept(self, row: Row) -> None:
    """Writes an accepted trace. The "id" of `row` must not have been decided before."""
    self._write("accepted", row)

  def reject(self, row: Row) -> None:
    """Writes a rejected record; `row` has "id" and "reasons", the decisive one last."""
    self._write("rejected", row)

  def _write(self, name: str, row: Row) -> None:
    if row["id"] in self._ids:
      raise ValueError(f"{row['id']} was decided before")
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    file = self._files[name]
    while line:  # one call, but for a full disk's last block
      line = line[file.write(line) :]
    self._count(name, row)
    if time.monotonic() - self._synced > SYNC_EVERY:
      self.sync()

  def _count(self, name: str, row: Row) -> None:
    self._ids.add(row["id"])
    setattr(self, name, getattr(self, name) + 1)
    if name == "rejected":
      self.reasons[row["reasons"][-1]] += 1
    self.usage.update(row.get("usage") or {})

  def sync(self) -> None:
    """Makes sure that everything written so far is on the disk."""
    for file in self._files.values():
      os.fsync(file.fileno())
    self._synced = time.monotonic()

  def close(self) -> None:
    """Syncs, closes the files and unlocks them."""
    self.sync()
    self._opened.close()

  def _check_settings(self, settings: Row, notes: Row) -> None:
    path = self.paths.settings
    begun = any(file.seek(0, os.SEEK_END) for file in self._files.values())
    if begun:
      previous = read_settings(path)
      for name, value in settings.items():
        if previous.get(name) != value:
          raise UserError(
            f"--output: {self.paths.accepted} was made with {name}={previous.get(name)!r}, not"
            f" {value!r}; choose another --output, or the same settings"
          )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(settings | notes, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_settings(path: pathlib.Path) -> Row:
  """The contents of OUT.settings.json.

  Raises:
    UserError: it is missing, or is not a JSON object.
  """
  if not path.exists():
    raise UserError(f"{path} is missing, so nothing tells what its rows were made with")
  return read_object(path)


def mend(file: BinaryIO, block: int = 1 << 16) -> None:
  """Cuts a file after its last line end."""
  end = file.seek(0, os.SEEK_END)
  keep = 0
  for start in range(max(end - 1, 0) // block * block, -1, -block):
    file.seek(start)
    found = file.read(block).rfind(b"\n")
    if found >= 0:
      keep = start + found + 1
      break
  if keep < end:
    file.truncate(keep)


def read_rows(path: pathlib.Path) -> Iterator[Row]:
  """Yields the rows of a JSON Lines file. A last line without a line end is left out.

  Raises:
    UserError: a line is not a row of this program.
  """
  if not path.exists():
    return
  with open(path, "rb") as lines:
    for number, line in enumerate(lines, start=1):
      if not line.endswith(b"\n"):
        return
      try:
        row = json.loads(line)
      except ValueError:
        row = None
      if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise UserError(f"{path}, line {number}: not a row of this program; mend or move the file")
      yield row
