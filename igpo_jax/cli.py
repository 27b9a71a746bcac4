"""What every command shares: one clear line and exit code 2 for a user's mistake.

A traceback is for our bugs. Whatever a user can get wrong (a missing file, an
unknown option, a shape that does not divide) raises `UserError`, which `run`
turns into a single line on stderr that says what is wrong, where, and what to do.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
  """A mistake that the user can mend; its text is the one line they will read."""


def fail(message: object) -> NoReturn:
  """Prints `error: message` as one line on stderr and exits with code 2."""
  raise SystemExit(explain(UserError(message)))


def explain(error: BaseException) -> int:
  """Prints what a user should read of an error on stderr; returns the exit code that fits it."""
  if isinstance(error, UserError):
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return USER_ERROR_EXIT_CODE
  if isinstance(error, KeyboardInterrupt):
    print("interrupted", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT
  traceback.print_exception(error)
  return 1


class ArgumentParser(argparse.ArgumentParser):
  """argparse that answers a bad option with one line instead of the usage text."""

  def __init__(self, **kwargs):
    kwargs.setdefault("allow_abbrev", False)
    super().__init__(**kwargs)

  def error(self, message: str) -> NoReturn:
    fail(f"{message} (see --help)")


def run(main: Callable[[], int | None]) -> NoReturn:
  """Runs a command's `main()` and exits: 0 on success, 2 on a `UserError`."""
  try:
    code = main()
  except (UserError, KeyboardInterrupt) as error:
    raise SystemExit(explain(error)) from None
  raise SystemExit(code or 0)
