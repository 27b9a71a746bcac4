"""The processes of a run meet at the coordinator's port before jax's service listens there.

This is their rendezvous: process 0 listens on the port, tells each of the others that it is the one
that they look for, and lets all go on at once when they are complete. So a port at which something
else answers, a number that two processes have, and another count are found before jax is told where
to connect: jax would wait for minutes. The connections stay until the processes watch each other
(`liveness`), so that no death goes unnoticed in between.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.parallel.liveness import LOST

GREETING = "igpo_jax"
ANSWER_SECONDS = 5.0  # in which process 0 answers
# Something else may listen there for so long: the run before this one, which is just ending.
STRANGE_SECONDS = 20.0
RETRY_SECONDS = 0.3
# So long process 0 waits for the others when it has refused one of them, to tell them, too.
REFUSED_SECONDS = 5.0


class Connections:
  """The connections over which the processes of a run met: while they are open, deaths are noticed.

  Args:
    lines: index of a process -> the connection to it. Process 0 has one to each of the others.
    leave: called with an exit code to end this process.
  """

  def __init__(self, lines: dict[int, socket.socket], leave: Callable[[int], Any] = cli.leave):
    self._lines, self._leave, self._closed = lines, leave, False
    for index, line in lines.items():
      line.settimeout(None)
      threading.Thread(target=self._follow, args=(index, line), daemon=True).start()

  def close(self) -> None:
    """Ends the watch. The others have to do the same before this process may end unnoticed."""
    self._closed = True
    for line in self._lines.values():
      with contextlib.suppress(OSError):
        _tell(line, {"done": True})

  def _follow(self, index: int, line: socket.socket) -> None:
    try:
      said = line.recv(1)
    except OSError:
      said = b""
    if not said and not self._closed:
      _say_lost(index)
      self._leave(LOST)


def meet(
  host: str,
  port: int,
  count: int,
  index: int,
  names: tuple[str, str, str],
  leave: Callable[[int], Any] = cli.leave,
) -> Connections:
  """Returns when all processes of the run are here. It waits without an end of its own.

  Args:
    host, port: of process 0. The port is free again when this returns.
    count, index: the number of processes, and of this one.
    names: what a user calls the address, the count and the index.
    leave: see `Connections`.

  Raises:
    UserError: on process 0, the port is taken; on others, something else answers there; on all,
      two processes have one index, or they were started with different counts.
    SystemExit: a process that was here has gone; a line says so.
  """
  if index == 0:
    return Connections(_wait_for_all(port, count, names), leave)
  return Connections({0: _go_to(host, port, count, index, names)}, leave)


def _say_lost(index: int) -> None:
  line = (
    f"error: process {index} was killed or its machine is lost before all processes had joined, and"
    " with it this one ends; start all processes again"
  )
  os.write(2, f"{line}\n".encode())


def listen(port: int) -> socket.socket:
  """A server on all addresses of this machine."""
  if socket.has_dualstack_ipv6():
    try:
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
      if error.errno != errno.EADDRNOTAVAIL:  # else IPv6 is turned off
        raise
  return socket.create_server(("", port))


class _Arrivals:
  """Who has connected to process 0; used by a thread for each of them."""

  def __init__(self, count: int, names: tuple[str, str, str]):
    self.count, self.names = count, names
    self.lines: dict[int, socket.socket] = {}
    self.refused: list[socket.socket] = []
    self.refusal, self.refused_at = "", 0.0
    self.changed = threading.Condition()
    self.decided = False  # whether they have been told how it goes on, or are about to be

  def admit(self, line: socket.socket) -> None:
    """Answers one that has connected, and takes it in if it is of this run."""
    line.settimeout(ANSWER_SECONDS)
    try:
      hello = json.loads(line.makefile("r", encoding="utf-8").readline(4096))
      if hello["hello"] != GREETING:
        raise ValueError
      count, index = int(hello["count"]), int(hello["index"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      line.close()  # another program: some scan the ports of their network
      return
    _, called_count, called_index = self.names
    with self.changed:  # who has been answered is among those who will be told how it goes on
      if self.decided:
        line.close()  # as if it had come when nobody listened any more
        return
      try:
        _tell(line, {"hello": GREETING})
      except OSError:
        line.close()
        return
      refusal = ""
      if count != self.count:
        refusal = (
          f"{called_count} is {self.count} for process 0 and {count} for process {index}: set one "
          "number for all"
        )
      elif index in self.lines:
        refusal = f"two processes have {called_index}={index}: give each one a number"
      if refusal:
        self.refused.append(line)
        self.refusal, self.refused_at = refusal, self.refused_at or time.monotonic()
      else:
        self.lines[index] = line
      self.changed.notify()

  def gone(self) -> list[int]:
    """Who was here and has gone."""
    return [index for index, line in self.lines.items() if _is_closed(line)]

  def are_complete(self) -> bool:
    """Whether nobody is waited for any more: all are here, or one has gone. After a refusal the
    others have some seconds to come and hear it."""
    if len(self.lines) + len(self.refused) >= self.count - 1:
      return True
    if self.refusal:
      return time.monotonic() > self.refused_at + REFUSED_SECONDS
    return bool(self.gone())


def _wait_for_all(port: int, count: int, names: tuple[str, str, str]) -> dict[int, socket.socket]:
  try:
    server = listen(port)
  except OSError as error:
    raise UserError(
      f"{names[0]}: process 0 cannot listen on port {port} ({error.strerror}); is another run"
      " on this machine? choose another port for all processes"
    ) from error
  arrivals = _Arrivals(count, names)

  def accept_all() -> None:
    with contextlib.suppress(OSError):  # it is closed
      while True:
        line, _ = server.accept()
        threading.Thread(target=arrivals.admit, args=(line,), daemon=True).start()

  threading.Thread(target=accept_all, daemon=True).start()
  try:
    with arrivals.changed:
      while not arrivals.are_complete():
        arrivals.changed.wait(RETRY_SECONDS)  # a signal is answered in between
      arrivals.decided = True
  finally:
    with contextlib.suppress(OSError):
      server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
    server.close()
  gone = arrivals.gone()
  if arrivals.refusal:
    message: dict[str, Any] = {"refused": arrivals.refusal}
  else:
    message = {"lost": gone[0]} if gone else {"go": True}
  for line in (*arrivals.lines.values(), *arrivals.refused):
    with contextlib.suppress(OSError):
      _tell(line, message)
  if arrivals.refusal:
    raise UserError(arrivals.refusal)
  if gone:
    _say_lost(gone[0])
    raise SystemExit(LOST)
  return arrivals.lines


def _go_to(
  host: str, port: int, count: int, index: int, names: tuple[str, str, str]
) -> socket.socket:
  strange_since = None
  while True:
    try:
      line = socket.create_connection((host, port), ANSWER_SECONDS)
    except OSError:
      strange_since = None  # process 0 is not there yet
      time.sleep(RETRY_SECONDS)
      continue
    answer = _answer(line, count, index)
    if "go" in answer:
      return line
    line.close()
    if "refused" in answer:
      raise UserError(answer["refused"])
    if answer:
      _say_lost(answer.get("lost", 0))
      raise SystemExit(LOST)
    strange_since = strange_since or time.monotonic()
    if time.monotonic() - strange_since > STRANGE_SECONDS:
      raise UserError(
        f"{names[0]}={host}:{port}: something else answers there, not process 0 of this run; is "
        "another run on that machine? choose another port for all processes"
      )
    time.sleep(RETRY_SECONDS)


def _answer(line: socket.socket, count: int, index: int) -> dict[str, Any]:
  """The last thing that process 0 says; {} if something else is there."""
  answer: dict[str, Any] = {}
  try:
    _tell(line, {"hello": GREETING, "count": count, "index": index})
    messages = line.makefile("r", encoding="utf-8")
    if json.loads(messages.readline(4096)).get("hello") != GREETING:
      return {}
    answer = {"hello": GREETING}
    line.settimeout(None)  # the others may take minutes
    return json.loads(messages.readline(65536))
  except (OSError, ValueError, AttributeError, RecursionError):
    return answer


def _tell(line: socket.socket, message: dict[str, Any]) -> None:
  line.sendall(json.dumps(message).encode() + b"\n")


def _is_closed(line: socket.socket) -> bool:
  """Whether the other end has gone."""
  try:
    line.setblocking(False)
    return line.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True
