"""Output files of commands: complete or not there at all, and checked before the work begins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO

from etils import epath

from igpo_jax.errors import UserError


class Output:
  """An open output file.

  Attributes:
    path: the path that the finished file will have.
    lines: number of lines written so far.
  """

  def __init__(self, file: TextIO, path: str, flag: str):
    self._file, self.path, self._flag, self.lines = file, path, flag, 0

  def write(self, line: str) -> None:
    """Appends a line; the line end is added.

    Raises:
      UserError: the line cannot be written, for example because the disk is full.
    """
    try:
      self._file.write(f"{line}\n")
      self._file.flush()
    except OSError as error:
      raise _refused(self._flag, self.path, error) from error
    self.lines += 1

  def close(self) -> None:
    """Closes the file.

    Raises:
      UserError: its last lines cannot be written.
    """
    try:
      self._file.close()
    except OSError as error:
      raise _refused(self._flag, self.path, error) from error


def _refused(flag: str, path: str, error: OSError) -> UserError:
  return UserError(f"{flag}: cannot write {path}: {error.strerror or error}")


@contextlib.contextmanager
def output_file(path: Any, flag: str = "--output", source: Any = None) -> Iterator[Output]:
  """Opens a file for lines of text. Enter it before the work, to learn that it can be written.

  Lines are written to PATH.partial, which is renamed to PATH at the end. So an older PATH survives
  a failure, and the lines written before the failure stay in PATH.partial.

  Args:
    path: local or remote. A device or a pipe is written to directly.
    flag: the option that named the file, for messages.
    source: a file that is read meanwhile and must not be overwritten.

  Raises:
    UserError: the file cannot be written, or is the source.
  """
  name = os.fspath(path)
  remote = "://" in name
  try:
    target = epath.Path(name)
  except KeyError:  # epath's for an address of a kind that it does not know
    raise UserError(f"{flag}: cannot write {name}: known are paths, gs:// and s3://") from None
  special = not remote and os.path.exists(name) and not os.path.isfile(name)
  if not name or (special and os.path.isdir(name)):
    raise UserError(f"{flag}: cannot write {name!r}: it is a directory, not a file")
  same = os.fspath(source) == name if source is not None else False
  if source is not None and not remote:
    with contextlib.suppress(OSError):
      same = same or os.path.samefile(source, name)
  if same:
    raise UserError(f"{flag}: {name} is what is read; write elsewhere")
  partial = target if remote or special else target.with_name(f"{target.name}.partial")
  try:
    file = partial.open("w", encoding="utf-8")
  except (OSError, ImportError) as error:
    reason = getattr(error, "strerror", None) or error
    if not remote and not os.path.isdir(os.path.dirname(name) or "."):
      reason = f"there is no folder {os.path.dirname(name)}"
    raise UserError(f"{flag}: cannot write {name}: {reason}") from error
  output = Output(file, name, flag)
  try:
    yield output
    output.close()
    if partial != target:
      os.replace(partial, name)
  except BaseException:
    with contextlib.suppress(UserError):
      output.close()
    if partial != target and not output.lines:
      partial.unlink(missing_ok=True)
    raise
