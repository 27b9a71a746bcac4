"""What every command shares: one clear line and exit code 2 for a user's mistake.

A traceback is for our bugs. Whatever a user can get wrong (a missing file, an
unknown option, a shape that does not divide) raises `UserError`, which `run`
turns into a single line on stderr that says what is wrong, where, and what to do.
Exit codes: 0 done, 2 a user's mistake, 130 and 143 for Ctrl-C and SIGTERM, 1 a bug.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import gc
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from igpo_jax.errors import UserError

USER_ERROR_EXIT_CODE = 2
LONGEST_LINE = 4000  # characters of an error
# How long Python may take to notice a signal, and then to leave: a compilation of a large
# model, which is not interrupted, takes minutes.
NOTICE_SECONDS, LEAVE_SECONDS = 1.0, 15.0
# Tracing programs makes many small objects, of which few are garbage. Python's own limits, a search
# after every 700 (2,000 since 3.12), cost a third of the time that it takes.
SEARCH_AFTER = (50_000, 10, 10)


class Terminated(KeyboardInterrupt):
  """SIGTERM was received. It is a KeyboardInterrupt, so code that handles Ctrl-C handles it too."""


_farewells: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_leaving(farewell: Callable[[], None]) -> Iterator[None]:
  """Calls `farewell` if `leave` ends the process while the body of the `with` runs."""
  _farewells.append(farewell)
  try:
    yield
  finally:
    _farewells.remove(farewell)


def leave(code: int) -> NoReturn:
  """Ends the process at once with exit code `code`, whatever its threads are doing."""
  for farewell in list(_farewells):
    with contextlib.suppress(Exception):
      farewell()
  os._exit(code)


def say(line: str) -> None:
  """Prints a line on standard error. Standard output is for results alone."""
  print(line, file=sys.stderr, flush=True)


def fail(message: object) -> NoReturn:
  """Prints `error: message` as one line on stderr and exits with code 2."""
  raise SystemExit(explain(UserError(message)))


def mistake(error: BaseException | None) -> UserError | None:
  """The `UserError` behind an error: the error itself, or one that a library wrapped.

  Looks at `__cause__`, `__context__` and the members of exception groups. If a UserError was raised
  from another, to add where it happened, the outer one is returned. None if there is none.
  """
  seen, waiting = set(), [error]
  while waiting:
    error = waiting.pop(0)
    if isinstance(error, UserError):
      return error
    if error is not None and id(error) not in seen:
      seen.add(id(error))
      waiting += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
  return None


def explain(error: BaseException) -> int:
  """Prints an error on stderr and returns the exit code for it.

  A user's mistake is printed as one line, a bug as a traceback.
  """
  known = _known(error)
  if known is None:
    traceback.print_exception(error)
    return 1
  line, code = known
  if line:
    print(line, file=sys.stderr, flush=True)
  return code


def _known(error: BaseException) -> tuple[str, int] | None:
  """The line and the exit code for an error that is not a bug; None for a bug."""
  wrong = mistake(error)
  if wrong is None and isinstance(error, OSError) and error.errno == errno.ENOSPC:
    where = f" for {error.filename}" if error.filename else ""
    wrong = f"no space left on the device{where}: free some, or write elsewhere"
  if wrong is not None:
    line = " ".join(str(wrong).split())
    line = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."  # may quote a file
    return f"error: {line}", USER_ERROR_EXIT_CODE
  if isinstance(error, Terminated):
    return "terminated", 128 + signal.SIGTERM
  if isinstance(error, KeyboardInterrupt):
    return "interrupted", 128 + signal.SIGINT
  if isinstance(error, BrokenPipeError) and _reader_is_gone():
    return "", 128 + signal.SIGPIPE
  return None


def _reader_is_gone() -> bool:
  """Whether standard output is a pipe that nobody reads any more (`| head`)."""
  try:
    poll = select.poll()
    poll.register(sys.__stdout__.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
  except (OSError, ValueError, AttributeError):
    return False


class ArgumentParser(argparse.ArgumentParser):
  """An argparse parser that reports a bad option in one line, without the usage text.

  Every option may be written with underscores or with hyphens.
  """

  def __init__(self, **kwargs):
    kwargs.setdefault("allow_abbrev", False)
    kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
    super().__init__(**kwargs)

  def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None):
    """As argparse does, but options may be written with hyphens or with underscores."""
    declared = {underscored([name])[0]: name for name in self._option_string_actions}
    words = []
    for word in underscored(sys.argv[1:] if args is None else args):
      name, equals, value = word.partition("=")
      words.append(f"{declared.get(name, name)}{equals}{value}")
    return super().parse_known_args(words, namespace)

  def error(self, message: str) -> NoReturn:
    """Raises a `UserError` with one line, where argparse would print and exit."""
    error = sys.exc_info()[1]
    known = mistake(error)
    if known is not None:  # what an option's type says of its value (fields.number)
      raise UserError(f"{getattr(error, 'argument_name', 'command line')}={known}") from None
    # Python 3.11 quotes the choices, later versions do not.
    message = re.sub(r"\(choose from .*\)", lambda found: found[0].replace("'", ""), message)
    fail(f"{message} (see --help)")


def underscored(args: Sequence[str]) -> list[str]:
  """The words of a command line with the hyphens in option names replaced by underscores.

  Words after a lone "--" are not options and stay as they are.
  Example: underscored(["--max-tokens=a-b", "x-y"]) == ["--max_tokens=a-b", "x-y"].
  """
  out, options = [], True
  for word in args:
    options = options and word != "--"
    if options and word.startswith("--"):
      name, equals, value = word[2:].partition("=")
      word = f"--{name.replace('-', '_')}{equals}{value}"
    out.append(word)
  return out


def run(main: Callable[[], int | None]) -> NoReturn:
  """Runs a command's `main()` and exits with one of the exit codes listed above."""
  with few_searches(), _threads() as failures, _signals():
    try:
      code = main() or 0
      sys.stdout.flush()  # a full disk or a closed pipe shows here, not when Python ends
    except SystemExit:
      raise
    except BaseException as error:
      # A thread that failed has interrupted this one.
      cause = failures[0] if failures and isinstance(error, KeyboardInterrupt) else error
      if _known(cause) is None:
        raise
      code = explain(cause)
      if isinstance(cause, OSError):
        _drop_output()
    if failures and not code:
      code = explain(failures[0])
  raise SystemExit(code)


@contextlib.contextmanager
def few_searches() -> Iterator[None]:
  """Makes Python search for garbage after `SEARCH_AFTER` while the body of the `with` runs."""
  before = gc.get_threshold()
  gc.set_threshold(*SEARCH_AFTER)
  try:
    yield
  finally:
    gc.set_threshold(*before)


def _drop_output() -> None:
  """Discards output that cannot be written any more. Python would try it again, and complain."""
  with contextlib.suppress(OSError, ValueError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _threads() -> Iterator[list[BaseException]]:
  """Makes a UserError that ends a thread interrupt the main thread, too.

  Yields the list that the error will be put into.
  """
  failures: list[BaseException] = []

  def hook(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or mistake(args.exc_value) is None:
      before(args)
      return
    failures.append(args.exc_value)
    _thread.interrupt_main()

  before, threading.excepthook = threading.excepthook, hook
  try:
    yield failures
  finally:
    threading.excepthook = before


def _imports(frame: types.FrameType | None) -> bool:
  """Whether a command that `run` called is importing a module where `frame` stands."""
  while frame is not None and frame.f_code is not run.__code__:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      return True
    frame = frame.f_back
  return False


@contextlib.contextmanager
def _signals() -> Iterator[None]:
  """Makes Ctrl-C and SIGTERM raise in the main thread, and end a program that does not react.

  Python handles signals between two of its own instructions only. While the main thread is inside
  compiled code, a second thread, which the operating system wakes, ends the program. So does the
  handler while a module is imported: an exception that meets the compiled code of an import, such
  as jax's, may abort the process.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # somebody imported a command and calls it
    return
  noticed = threading.Event()

  def end(number: int) -> NoReturn:
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    os.write(2, f"{word}\n".encode())
    leave(128 + number)

  def handler(number: int, frame: types.FrameType | None) -> None:
    noticed.set()
    if _imports(frame):
      end(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

  def watch(received: int) -> None:
    while data := os.read(received, 1):
      number = data[0]
      # Another handler is another's business, such as that of the training loop.
      if number not in before or signal.getsignal(number) is not handler:
        continue
      if noticed.wait(NOTICE_SECONDS):
        time.sleep(LEAVE_SECONDS)
      end(number)
    os.close(received)

  before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
  received, sent = os.pipe()
  os.set_blocking(sent, False)
  wakeup = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
  threading.Thread(target=watch, args=(received,), daemon=True).start()
  try:
    yield
  finally:
    if not noticed.is_set():  # else the thread still sees to it that the program ends
      signal.set_wakeup_fd(wakeup)
      for number, previous in before.items():
        signal.signal(number, previous)
      os.close(sent)
