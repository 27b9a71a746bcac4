"""Files of JSON rows that a run appends to, on a disk or on gs://.

    disk    X.jsonl, appended to row by row
    gs://   X-00000.jsonl, X-00001.jsonl, ... while a run writes; X.jsonl once it is done

Objects on gs:// cannot be appended to. There each part is an object of bounded size that is
replaced as a whole. Rows wait in memory until the last write of the part is FLUSH_SECONDS old, or
until `flush`. Rows are in the order of the run, so a continued run drops rows from the end only.
The file is read backwards, and no further than needed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from igpo_jax.errors import UserError

Row = dict[str, Any]

FLUSH_SECONDS = 30.0  # between two writes of a part: an object may change about once a second
PART_BYTES = 1 << 20
TAIL_BYTES = 1 << 20  # how much of a file on a disk is read at a time, from its end


def can_append(path: epath.PathLike) -> bool:
  """True if files at `path` can be appended to: on a disk, but not on an object store."""
  return "://" not in os.fspath(path)


def resolved(path: epath.PathLike) -> epath.Path:
  """The absolute path with all symbolic links followed; a gs:// path is returned as it is."""
  path = epath.Path(path)
  # epath's own method only makes it absolute.
  return path if "://" in str(path) else epath.Path(os.path.realpath(path))


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a small file atomically: after a kill there is the old file or the new one."""
  if not can_append(path):
    path.write_text(text)  # an object appears when it is complete
    return
  temporary = path.parent / f".{path.name}.tmp"
  try:
    temporary.write_text(text)
    temporary.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def row_file(path: epath.PathLike) -> DiskRows | PartRows:
  """The rows at `path` (X.jsonl), which need not exist. Only one process at a time may write."""
  path = epath.Path(path)
  return DiskRows(path) if can_append(path) else PartRows(path)


def row_parts(path: epath.PathLike) -> Iterator[epath.Path]:
  """The files that hold the rows of X.jsonl, in order: itself, and the parts of a run on gs://.

  Reading them is safe while a run writes; a part that `close` joins meanwhile may be seen twice.
  """
  path = epath.Path(path)
  if path.exists():
    yield path
  if not can_append(path):
    numbered = (_numbered(path, number) for number in itertools.count())
    yield from itertools.takewhile(lambda part: part.exists(), numbered)


def bytes_of_rows(path: epath.PathLike) -> int:
  """The bytes of the rows of X.jsonl that are in files, not of those that wait for `flush`."""
  return sum(part.stat().length for part in row_parts(path))


def _numbered(path: epath.Path, number: int) -> epath.Path:
  return path.parent / f"{path.stem}-{number:05d}{path.suffix}"


class DiskRows:
  """Rows in one file of a file system."""

  def __init__(self, path: epath.Path):
    self.path = path
    self._begun = path.exists()

  def is_removed(self) -> bool:
    """True if there was a file, and is none now: somebody removed it, perhaps with its folder."""
    return self._begun and not self.path.exists()

  def read(self) -> list[Row]:
    """All rows. A last line that a kill cut in half is left out.

    Raises:
      UserError: another line is not JSON.
    """
    return [row for _, row in _parse(self.path, _text(self.path)) if row is not None]

  def add(self, rows: Sequence[Row]) -> None:
    """Appends rows.

    Raises:
      FileNotFoundError: the file was removed. A new one would lack the rows before.
    """
    if self.is_removed():
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
    with self.path.open("a") as file:
      file.write(_lines(rows))
    self._begun = True

  def cut(self, keep: Callable[[Row], bool] = lambda row: True) -> None:
    """Drops the rows after the last one for which `keep` is True, and a half-written last line.

    Raises:
      UserError: a line that is dropped is not JSON, and is not the last.
    """
    if not self.path.exists():
      return
    with open(self.path, "r+b") as file:
      size = start = file.seek(0, os.SEEK_END)
      tail = b""
      while start > 0:
        step = min(start, TAIL_BYTES)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
        # Before the first line's end it may be half a line; more of the file will tell.
        whole = 0 if start == 0 else tail.find(b"\n") + 1
        if start and not whole:
          continue
        kept = _kept(self.path, tail[whole:], keep)
        if kept or start == 0:
          end = start + whole + kept
          if end < size:
            file.truncate(end)
          return

  def flush(self) -> None:
    """Returns once every row that was added is in the file."""

  def close(self) -> None:
    """Finishes the file, for now: `add` may be called again later."""


class PartRows:
  """Rows in objects that can only be replaced as a whole. The methods are those of `DiskRows`."""

  def __init__(self, path: epath.Path):
    self.path = path
    self._forget_merged()
    self._start_part()

  def is_removed(self) -> bool:
    return False  # objects are replaced as a whole

  def read(self) -> list[Row]:
    self.flush()
    files = [self.path, *self._parts()]
    return [row for file in files for _, row in _parse(file, _text(file)) if row is not None]

  def add(self, rows: Sequence[Row]) -> None:
    self._lines.append(_lines(rows))
    self._waiting = True
    if (
      time.monotonic() - self._written >= FLUSH_SECONDS or sum(map(len, self._lines)) >= PART_BYTES
    ):
      self.flush()

  def cut(self, keep: Callable[[Row], bool] = lambda row: True) -> None:
    self.flush()
    for file in reversed([self.path, *self._parts()]):
      data = _text(file).encode()
      kept = _kept(file, data, keep)
      if kept == 0:
        file.unlink(missing_ok=True)
      elif kept < len(data):
        file.write_text(data[:kept].decode())
      if kept:
        break
    self._start_part()

  def flush(self) -> None:
    if not self._waiting:
      return
    text = "".join(self._lines)
    self._part(self._number).write_text(text)
    self._written, self._waiting = time.monotonic(), False
    if len(text) >= PART_BYTES:
      self._number, self._lines = self._number + 1, []

  def close(self) -> None:
    """Joins the parts into the one object X.jsonl."""
    self.flush()
    parts = self._parts()
    if parts:
      self.path.write_text("".join(_text(file) for file in (self.path, *parts)))
      self._remove(parts)
    self._start_part()

  def _part(self, number: int) -> epath.Path:
    return _numbered(self.path, number)

  def _parts(self) -> list[epath.Path]:
    """The parts there are, in order. A part is never missing between two others."""
    return list(itertools.takewhile(lambda part: part.exists(), map(self._part, itertools.count())))

  def _start_part(self) -> None:
    self._number = len(self._parts())
    self._lines: list[str] = []
    self._waiting, self._written = False, -FLUSH_SECONDS

  def _forget_merged(self) -> None:
    """Ends what a kill in `close` left undone: parts that are in the whole file already."""
    parts = self._parts()
    if parts and self.path.exists() and _text(parts[0]) in _text(self.path):
      self._remove(parts)

  def _remove(self, parts: list[epath.Path]) -> None:
    for part in reversed(parts):  # the first one last: by it, unfinished work is seen
      part.unlink()


def _lines(rows: Sequence[Row]) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)


def _text(path: epath.Path) -> str:
  return _decoded(path.read_bytes()) if path.exists() else ""


def _decoded(data: bytes) -> str:
  """Text of which every byte comes back, those that are not UTF-8 included."""
  return data.decode(errors="surrogateescape")


def _parse(path: epath.Path, text: str) -> Iterator[tuple[str, Row | None]]:
  """Lines with their ends, and rows; None for a last line that a kill cut.

  Raises:
    UserError: another line is not a JSON object.
  """
  # At LF only: U+2028 and others that `splitlines` cuts at may stand in a JSON string.
  lines = re.findall(r"[^\n]*\n|[^\n]+", text)
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line.encode()) if line.endswith("\n") else None
    except (ValueError, RecursionError):
      row = None
    if not isinstance(row, dict) and number < len(lines):
      what = "JSON line" if row is None else "JSON object"
      raise UserError(f"{path}: not a {what}: {line[:60]!r}; mend or move the file")
    row = row if isinstance(row, dict) else None
    yield line, row


def _kept(path: epath.Path, data: bytes, keep: Callable[[Row], bool]) -> int:
  """How many bytes of whole lines go up to the last row to keep; 0 if there is none."""
  end = at = 0
  for line, row in _parse(path, _decoded(data)):
    at += len(line.encode(errors="surrogateescape"))
    if row is not None and keep(row):
      end = at
  return end
