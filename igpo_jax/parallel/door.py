"""The processes of a run meet at the coordinator's port before jax's service listens there.

Process 0 opens a door: it listens on the port, tells each of the others that it is the one that
they look for, and lets all go on at once when they are complete. So a port at which something else
answers, a number that two processes have, and another count are found before jax is told where to
connect. jax would wait for minutes, or join the other run that listens there and end it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading
import time
from typing import Any

from igpo_jax.errors import UserError

GREETING = "igpo_jax"
ANSWER_SECONDS = 5.0  # in which process 0 answers
# Something else may listen there for so long: the run before this one, which is just ending.
STRANGE_SECONDS = 20.0
RETRY_SECONDS = 0.3


def meet(host: str, port: int, count: int, index: int, names: tuple[str, str, str]) -> None:
  """Returns when all processes of the run are here. It waits without an end of its own.

  Args:
    host, port: of process 0. The port is free again when this returns.
    count, index: the number of processes, and of this one.
    names: what a user calls the address, the count and the index.

  Raises:
    UserError: on process 0, the port is taken; on others, something else answers there; on all,
      two processes have one index, or they were started with different counts.
  """
  if index == 0:
    _wait_for_all(port, count, names)
  else:
    _go_to(host, port, count, index, names)


def listen(port: int) -> socket.socket:
  """A server on all addresses of this machine."""
  if socket.has_dualstack_ipv6():
    try:
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
      if error.errno != errno.EADDRNOTAVAIL:  # else IPv6 is turned off
        raise
  return socket.create_server(("", port))


class _Guests:
  """Who has come to process 0's door; used by a thread for each of them."""

  def __init__(self, count: int, names: tuple[str, str, str]):
    self.count, self.names = count, names
    self.lines: dict[int, socket.socket] = {}
    self.refusal = ""
    self.changed = threading.Condition()

  def greet(self, line: socket.socket) -> None:
    """Answers one that has knocked, and lets it in if it is of this run."""
    line.settimeout(ANSWER_SECONDS)
    try:
      hello = json.loads(line.makefile("r", encoding="utf-8").readline(4096))
      if hello["hello"] != GREETING:
        raise ValueError
      count, index = int(hello["count"]), int(hello["index"])
      _tell(line, {"hello": GREETING})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      line.close()  # a stranger: some scan the ports of their network
      return
    _, called_count, called_index = self.names
    with self.changed:
      if count != self.count:
        self.refusal = (
          f"{called_count} is {self.count} for process 0 and {count} for process {index}: set one "
          "number for all"
        )
      elif index in self.lines and not _is_closed(self.lines[index]):
        self.refusal = f"two processes have {called_index}={index}: give each one a number"
      self.lines[-1 - len(self.lines) if self.refusal else index] = line
      self.changed.notify()

  def are_complete(self) -> bool:
    """Whether all are there, or one is not of this run."""
    here = {index for index, line in self.lines.items() if not _is_closed(line)}
    return bool(self.refusal) or here == set(range(1, self.count))


def _wait_for_all(port: int, count: int, names: tuple[str, str, str]) -> None:
  try:
    door = listen(port)
  except OSError as error:
    raise UserError(
      f"{names[0]}: process 0 cannot listen on port {port} ({error.strerror}); is another run"
      " on this machine? choose another port for all processes"
    ) from error
  guests = _Guests(count, names)

  def open_door() -> None:
    with contextlib.suppress(OSError):  # it is closed
      while True:
        line, _ = door.accept()
        threading.Thread(target=guests.greet, args=(line,), daemon=True).start()

  threading.Thread(target=open_door, daemon=True).start()
  try:
    with guests.changed:
      while not guests.are_complete():
        guests.changed.wait(RETRY_SECONDS)  # a signal is answered in between
  finally:
    with contextlib.suppress(OSError):
      door.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
    door.close()
  for line in guests.lines.values():
    with contextlib.suppress(OSError), line:
      _tell(line, {"refused": guests.refusal} if guests.refusal else {"go": True})
  if guests.refusal:
    raise UserError(guests.refusal)


def _go_to(host: str, port: int, count: int, index: int, names: tuple[str, str, str]) -> None:
  strange_since = None
  while True:
    try:
      line = socket.create_connection((host, port), ANSWER_SECONDS)
    except OSError:
      strange_since = None  # process 0 is not there yet
      time.sleep(RETRY_SECONDS)
      continue
    with line:
      answer = _answer(line, count, index)
    if "go" in answer:
      return
    if "refused" in answer:
      raise UserError(answer["refused"])
    if "hello" in answer:
      strange_since = None  # process 0 has gone before all were there; it may come again
    else:
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
