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
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from igpo_jax.errors import UserError

USER_ERROR_EXIT_CODE = 2
# How long Python may take to notice a signal, and then to leave: a compilation of a large
# model, which is not interrupted, takes minutes.
NOTICE_SECONDS, LEAVE_SECONDS = 1.0, 15.0


class Terminated(KeyboardInterrupt):
  """SIGTERM has come in; whatever handles Ctrl-C handles this."""


_farewells: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_leaving(farewell: Callable[[], None]) -> Iterator[None]:
  """Has `farewell` called if `leave` ends the process inside the body."""
  _farewells.append(farewell)
  try:
    yield
  finally:
    _farewells.remove(farewell)


def leave(code: int) -> NoReturn:
  """Ends the process at once, whatever is under way in any thread."""
  for farewell in list(_farewells):
    with contextlib.suppress(Exception):
      farewell()
  os._exit(code)


def say(line: str) -> None:
  """One line of news on standard error: standard output is for results alone."""
  print(line, file=sys.stderr, flush=True)


def fail(message: object) -> NoReturn:
  """Prints `error: message` as one line on stderr and exits with code 2."""
  raise SystemExit(explain(UserError(message)))


def mistake(error: BaseException | None) -> UserError | None:
  """The `UserError` that an error was raised from, however libraries wrapped it, or itself.

  Looks at causes, at what was being handled, and into groups of errors. Of one that was raised
  from another, to say where it is, the outer one.
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
  """Prints what a user should read of an error on stderr; returns the exit code that fits it."""
  known = _known(error)
  if known is None:
    traceback.print_exception(error)
    return 1
  line, code = known
  if line:
    print(line, file=sys.stderr, flush=True)
  return code


def _known(error: BaseException) -> tuple[str, int] | None:
  """The line and the exit code of an error that is not a bug of ours."""
  wrong = mistake(error)
  if wrong is None and isinstance(error, OSError) and error.errno == errno.ENOSPC:
    where = f" for {error.filename}" if error.filename else ""
    wrong = f"no space left on the device{where}: free some, or write elsewhere"
  if wrong is not None:
    return f"error: {' '.join(str(wrong).split())}", USER_ERROR_EXIT_CODE
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
  """argparse that answers a bad option with one line instead of the usage text.

  An option may be written with underscores or with hyphens, however it is declared.
  """

  def __init__(self, **kwargs):
    kwargs.setdefault("allow_abbrev", False)
    super().__init__(**kwargs)

  def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None):
    declared = {underscored([name])[0]: name for name in self._option_string_actions}
    words = []
    for word in underscored(sys.argv[1:] if args is None else args):
      name, equals, value = word.partition("=")
      words.append(f"{declared.get(name, name)}{equals}{value}")
    return super().parse_known_args(words, namespace)

  def error(self, message: str) -> NoReturn:
    error = sys.exc_info()[1]
    known = mistake(error)
    if known is not None:  # what an option's type says of its value (fields.number)
      raise UserError(f"{getattr(error, 'argument_name', 'command line')}={known}") from None
    # Python 3.11 quotes the choices, later versions do not.
    message = re.sub(r"\(choose from .*\)", lambda found: found[0].replace("'", ""), message)
    fail(f"{message} (see --help)")


def underscored(args: Sequence[str]) -> list[str]:
  """The words of a command line, with underscores in the names of options.

  Example: underscored(["--max-tokens=a-b", "x-y"]) == ["--max_tokens=a-b", "x-y"]. What
  follows a lone "--" is no option.
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
  """Runs a command's `main()` and exits with a code that says how it ended (see above)."""
  with _threads() as failures, _signals():
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


def _drop_output() -> None:
  """Nothing more can be written: without this, Python would try, and complain."""
  with contextlib.suppress(OSError, ValueError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _threads() -> Iterator[list[BaseException]]:
  """A mistake that ends a thread ends the program, too; yields the list that will hold it."""
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


@contextlib.contextmanager
def _signals() -> Iterator[None]:
  """Ctrl-C and SIGTERM raise in the main thread, and end a program that does not notice.

  Python looks at signals between its own instructions only, so a thread, which the
  operating system wakes, ends the program where the main thread is in compiled code.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # somebody imported a command and calls it
    return
  noticed = threading.Event()

  def handler(number: int, frame: Any) -> None:
    del frame
    noticed.set()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

  def watch(received: int) -> None:
    while data := os.read(received, 1):
      number = data[0]
      # Another handler is another's business, such as that of the training loop.
      if number not in before or signal.getsignal(number) is not handler:
        continue
      if noticed.wait(NOTICE_SECONDS):
        time.sleep(LEAVE_SECONDS)
      word = "terminated" if number == signal.SIGTERM else "interrupted"
      os.write(2, f"{word}\n".encode())
      leave(128 + number)
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
