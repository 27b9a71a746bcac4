"""Ctrl-C and SIGTERM while a stage runs: the step under way is finished and the state saved.

Python runs a signal's handler between two of its own instructions, so not while a program is being
compiled. The message for the user therefore comes from a thread, which the operating system wakes
at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import jax
import numpy as np

from igpo_jax.cli import leave
from igpo_jax.parallel.mesh import max_over_processes, over_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE_SECONDS, LEAVE_SECONDS = 1.0, 10.0  # after a second Ctrl-C
FINISHING = "finishing this step; press again to stop now"
TERMINATING = "SIGTERM: finishing this step, then saving"


class Stopped(Exception):
  """All processes have agreed to stop here.

  Attributes:
    signal: the number of the signal that one of them received.
  """

  def __init__(self, number: int):
    super().__init__(f"stopped by {signal.Signals(number).name}")
    self.signal = number


class StopSignal:
  """A context manager in which Ctrl-C and SIGTERM are requests to stop.

  A second Ctrl-C raises KeyboardInterrupt in the main thread. If that thread does not react, the
  process ends.

  Attributes:
    received: the number of the signal that this process has received; 0 for none.
    next_start: a text on what the next start of the run will do, for the message at a second
      Ctrl-C.
  """

  def __init__(self):
    self.received, self.next_start = 0, ""
    self._asked: jax.Array | None = None
    self._restore: dict[int, Any] = {}

  def __enter__(self) -> StopSignal:
    self.received, self._asked = 0, None
    if threading.current_thread() is not threading.main_thread():
      return self  # a notebook's or a test's: signals are not ours
    self._raised, self._closed = threading.Event(), threading.Event()
    self._restore = {number: signal.signal(number, self._handle) for number in SIGNALS}
    reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    threading.Thread(target=self._answer, args=(reader,), daemon=True).start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if not self._restore:
      return
    self._closed.set()
    signal.set_wakeup_fd(self._wakeup)
    for number, handler in self._restore.items():
      signal.signal(number, handler)
    self._restore = {}
    os.close(self._writer)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    again, self.received = self.received, self.received or number
    if again and number == signal.SIGINT:
      self._raised.set()
      raise KeyboardInterrupt

  def _answer(self, reader: int) -> None:
    """Prints what a signal will lead to, and makes sure that a second Ctrl-C ends the process."""
    begun = False
    while data := os.read(reader, 1):
      number = data[0]
      if number not in SIGNALS:
        continue
      if not begun:
        _print(FINISHING if number == signal.SIGINT else TERMINATING)
      elif number == signal.SIGINT:
        _print(f"stopping now; {self.next_start}".rstrip("; "))
        if not self._raised.wait(NOTICE_SECONDS) or not self._closed.wait(LEAVE_SECONDS):
          leave(128 + signal.SIGINT)
      begun = True
    os.close(reader)

  # --- agreement between processes ------------------------------------------------------------

  def agreed(self, *flags: bool) -> list[int]:
    """[number of a signal that some process has received, or 0] + [1 if some process set the flag].

    A collective: all processes get the same list.
    """
    return over_processes(np.array([self.received, *flags], np.int32), np.max).tolist()

  def check(self) -> None:
    """A collective that raises `Stopped` if some process has received a signal."""
    if number := self.agreed()[0]:
      raise Stopped(number)

  def check_soon(self) -> None:
    """As `check`, but by what was known at the previous call, so it does not wait for devices."""
    if jax.process_count() == 1:
      asked: Any = self.received
    else:
      asked, self._asked = self._asked, max_over_processes(self.received)
    if asked is not None and int(asked):
      raise Stopped(int(asked))


def _print(line: str) -> None:
  # No lock that the main thread could hold; on a terminal, below the bar.
  start = "\n" if sys.stderr.isatty() else ""
  os.write(2, f"{start}{line}\n".encode())
