"""Files that commands write for the user: whole or not at all, and refused before the work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO

from etils import epath

from igpo_jax.errors import UserError


class Output:
  """An open file; `write` tells what stands in the way in one line.

  Attributes:
    path: where the file will be.
    lines: written so far.
  """

  def __init__(self, file: TextIO, path: str, flag: str):
    self._file, self.path, self._flag, self.lines = file, path, flag, 0

  def write(self, line: str) -> None:
    """Appends a line and its end.

    Raises:
      UserError: the disk is full, or whatever else the system says.
    """
    try:
      self._file.write(f"{line}\n")
      self._file.flush()
    except OSError as error:
      raise _refused(self._flag, self.path, error) from error
    self.lines += 1

  def close(self) -> None:
    try:
      self._file.close()
    except OSError as error:
      raise _refused(self._flag, self.path, error) from error


def _refused(flag: str, path: str, error: OSError) -> UserError:
  return UserError(f"{flag}: cannot write {path}: {error.strerror or error}")


@contextlib.contextmanager
def output_file(path: Any, flag: str = "--output", source: Any = None) -> Iterator[Output]:
  """Opens a file for lines of text; enter it before the work, to know that it can be written.

  The lines go to PATH.partial, which becomes PATH at the end: a failure leaves an older PATH
  alone. Lines that were written before a failure stay in PATH.partial.

  Args:
    path: local or remote; a device or a pipe is written to directly.
    flag: the option that named it, for messages.
    source: a file that is read meanwhile.

  Raises:
    UserError: it cannot be written, or is the source.
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
