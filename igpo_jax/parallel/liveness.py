"""Failure propagation: a TCP connection from process 0 to every other process of a run.

When one process fails, each of the others prints the reason and exits at once. Without this, a
collective with a dead process hangs (TPU, GPU) or fails with words about sockets (CPU), until jax's
heartbeats stop everything with a stack trace. A process that fails sends the reason first. When a
process is killed, the kernel closes its connection. A process that is stopped (SIGSTOP, a debugger)
or hangs, and one whose machine is lost, say nothing: so all say at times that they are alive.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from igpo_jax.cli import leave as leave_now

CONNECT_SECONDS = 10.0
PARTING_SECONDS = 5.0
# A process says that it is alive every PING seconds. One that says nothing for SILENT seconds is
# given up, before jax's own heartbeats (`distributed.HEARTBEAT_SECONDS`) would notice.
PING_SECONDS, SILENT_SECONDS = 5.0, 35.0
LOST = 1  # the exit code of a process that another one's death ends


@dataclasses.dataclass(frozen=True)
class Ending:
  """How a process ended.

  Attributes:
    index: number of the process.
    host: name of its machine.
    code: exit code with which all processes end.
    text: the error that it printed; "" if it was killed.
    silent: after how many seconds of silence it was given up; 0 if its connection was closed.
  """

  index: int
  host: str
  code: int = LOST
  text: str = ""
  silent: float = 0.0

  def __str__(self) -> str:
    who = f"process {self.index} on {self.host}"
    if self.text:
      return f"error: {who} failed, and with it this one: {self.text}"
    what = "was killed or its machine is lost"
    if self.silent:
      what = f"has said nothing for {self.silent:g} s (stopped, hanging, or its machine is lost)"
    return (
      f"error: {who} {what}, and with it this one ends; "
      "start all processes again to continue from the last checkpoint"
    )


class Watch:
  """One process's side of the connections. Making one is a collective: it connects all processes.

  Args:
    index: number of this process.
    count: number of processes.
    share: a collective that gives every process the JSON values of all (`distributed.share`).
    near: a host name of process 0 that the other processes can reach; "" if none is known.
    leave: called with an exit code to end this process.
  """

  def __init__(
    self,
    index: int,
    count: int,
    share: Callable[[list[Any]], list[Any]],
    near: str = "",
    leave: Callable[[int], Any] = leave_now,
  ):
    self.index, self.host, self._leave = index, socket.gethostname(), leave
    self._lines: dict[int, socket.socket] = {}
    self._done: set[int] = set()
    self._closed: set[int] = set()
    self._lock = threading.Lock()
    self._ending = False
    _thread(self._ping)  # first: while others are waited for below, this one is not silent
    if index == 0:
      server = socket.create_server(("", 0), backlog=count)
      token = secrets.token_hex(16)
      names = [name for name in (near, _own_address(), self.host) if name]
      share([{"names": names, "port": server.getsockname()[1], "token": token}])
      _thread(self._accept, server, token)
    else:
      self._connect(share([])[0])
    share([])  # all are connected

  # --- called by the main thread ---------------------------------------------------------

  def done(self) -> None:
    """Tells the other processes that this one has finished, so that its end alarms nobody."""
    self._tell({"done": True})

  def fail(self, explain: Callable[[], int], text: str) -> None:
    """Tells the other processes why this one failed, and exits; all exit with the same code.

    Args:
      explain: prints the error and returns the exit code. It is not called if this process is
        ending already because of another one, whose reason it has printed.
      text: the error, for the other processes.
    """
    if self._is_first():
      self._pass_on(Ending(self.index, self.host, explain(), text))
    time.sleep(2 * PARTING_SECONDS)  # another thread is leaving already
    self._leave(LOST)

  # --- the connections ----------------------------------------------------------------------

  def _accept(self, server: socket.socket, token: str) -> None:
    while True:
      line, _ = server.accept()
      _thread(self._greet, line, token)

  def _greet(self, line: socket.socket, token: str) -> None:
    line.settimeout(CONNECT_SECONDS)
    messages = line.makefile("r", encoding="utf-8")
    try:
      hello = json.loads(messages.readline(4096))
      known = secrets.compare_digest(hello["token"], token)
    except (OSError, ValueError, KeyError, TypeError):
      known = False
    if not known:  # a stranger: some scan the ports of their network
      line.close()
      return
    self._follow(line, messages, hello["index"], hello["host"])

  def _connect(self, where: dict[str, Any]) -> None:
    for name in where["names"]:
      try:
        line = socket.create_connection((name, where["port"]), CONNECT_SECONDS)
        hello = {"token": where["token"], "index": self.index, "host": self.host}
        line.sendall(json.dumps(hello).encode() + b"\n")
      except OSError:
        continue
      self._lines[0] = line
      messages = line.makefile("r", encoding="utf-8")
      _thread(self._follow, line, messages, 0, where["names"][-1])
      return
    _print(
      f"process {self.index}: process 0 cannot be reached on port {where['port']} of "
      f"{', '.join(where['names'])}; if a process is lost, it takes longer to notice"
    )

  def _ping(self) -> None:
    while not self._ending:
      time.sleep(PING_SECONDS)
      self._tell({"alive": True})

  def _follow(self, line: socket.socket, messages, index: int, host: str) -> None:
    """Reads the messages of process `index` until its connection is closed, or says nothing."""
    line.settimeout(SILENT_SECONDS)
    self._lines[index] = line
    ending = Ending(index, host)
    try:
      for text in messages:
        message = json.loads(text)
        if "done" in message:
          self._done.add(index)
        elif "alive" not in message:
          ending = Ending(**message)
          break
    except TimeoutError:
      ending = Ending(index, host, silent=SILENT_SECONDS)
    except (OSError, ValueError):
      pass  # cut off: the same as closed
    if index not in self._done or ending.text:
      self._end(ending)
    self._closed.add(index)

  def _tell(self, message: dict[str, Any], but: int = -1) -> None:
    """Sends to process 0, or from process 0 to all others."""
    data = json.dumps(message).encode() + b"\n"
    for index, line in list(self._lines.items()):
      if index != but:
        try:
          line.sendall(data)
        except OSError:
          self._closed.add(index)

  def _is_first(self) -> bool:
    """True for the first thread that asks: it ends this process. Others leave that to it."""
    with self._lock:
      second, self._ending = self._ending, True
    return not second

  def _end(self, ending: Ending) -> None:
    """Prints how another process ended, passes it on and exits."""
    if self._is_first():
      _print(str(ending))
      self._pass_on(ending)

  def _pass_on(self, ending: Ending) -> None:
    """Tells the other processes how one of them ended, and exits."""
    self._tell(dataclasses.asdict(ending), but=ending.index)
    if self.index == 0:
      # jax's coordination service is in this process: the others should be gone before it.
      until = time.monotonic() + PARTING_SECONDS
      others = set(self._lines) - {ending.index}
      while others - self._closed - self._done and time.monotonic() < until:
        time.sleep(0.01)
    self._leave(ending.code)


def _own_address() -> str:
  """This machine's address in its network; "" without a network."""
  try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
      probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
      return probe.getsockname()[0]
  except OSError:
    return ""


def _thread(function: Callable, *args) -> None:
  threading.Thread(target=function, args=args, daemon=True).start()


def _print(line: str) -> None:
  # A line of its own below any progress bar; no lock that a thread under way could hold.
  os.write(2, f"\n{line}\n".encode())
