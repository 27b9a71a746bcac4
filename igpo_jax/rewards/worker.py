"""The grading server: forks workers, gives each one item at a time, kills those that take too long.

`pool.Pool` starts it as `python -m igpo_jax.rewards.worker`, in a process of its own that does
not import jax. It imports the parser once and then forks the workers, so replacing a killed
worker takes milliseconds. Every message is one JSON object: text that a model wrote is never
unpickled.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import json
import math
import os
import resource
import signal
import socket
import time
from multiprocessing import connection
from typing import Any

RECYCLE_AFTER = 5000  # items after which a worker is replaced, to bound the parser's caches
GRACE = 2.0  # seconds beyond the timeout after which a worker ends itself if no server killed it


@dataclasses.dataclass
class _Worker:
  pid: int
  link: connection.Connection
  item: int | None = None
  deadline: float = math.inf
  served: int = 0


def _limit(what: int, amount: int) -> None:
  # Some systems have no such limit (macOS), others have set a lower one already.
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(what, (amount, amount))


def _serve_items(link: connection.Connection, timeout: float) -> None:
  """What a worker runs: reads one item, sends one verdict, until the link closes."""
  from igpo_jax.rewards.math import equivalence

  while True:
    try:
      message = json.loads(link.recv_bytes())
    except EOFError:
      return
    # The server kills a worker that is late. If the server is gone, the alarm's default action
    # ends the worker, even inside C code that never returns to the interpreter.
    signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
    try:
      status, equal = equivalence.compare(message["gold"], message["answer"])
      reply = {"status": status, "equal": equal}
    except MemoryError:
      reply = {"status": "timeout", "equal": False}
    except Exception as error:
      # Model output may drive the libraries under the parser to raise anything. A text that
      # cannot be read is no answer. The reason is sent back.
      reply = {"status": "unparseable", "equal": False, "reason": repr(error)[:200]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    link.send_bytes(json.dumps({"id": message["id"], **reply}).encode())


class Server:
  """Owns the workers and serves one client.

  Args:
    client: the connection to the client.
    workers: number of worker processes.
    timeout: seconds per item.
    memory: bytes of address space per worker, 0 for no limit.
  """

  def __init__(self, client: connection.Connection, workers: int, timeout: float, memory: int):
    self._client = client
    self._timeout = timeout
    self._memory = memory
    self._queue: collections.deque[dict] = collections.deque()
    self._workers: list[_Worker] = []
    for _ in range(workers):
      self._workers.append(self._fork())

  def _fork(self) -> _Worker:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
      try:
        ours.close()
        # While a worker holds copies of these, the others do not see them closed (no EOF).
        os.close(self._client.fileno())
        for worker in self._workers:
          if not worker.link.closed:
            os.close(worker.link.fileno())
        _limit(resource.RLIMIT_CORE, 0)
        if self._memory:
          _limit(resource.RLIMIT_AS, self._memory)
        _serve_items(connection.Connection(theirs.detach()), self._timeout)
      finally:
        os._exit(0)
    theirs.close()
    return _Worker(pid, connection.Connection(ours.detach()))

  def _replace(self, worker: _Worker) -> None:
    """Kills a worker, if it is still alive, and forks another in its place."""
    os.kill(worker.pid, signal.SIGKILL)
    worker.link.close()
    os.waitpid(worker.pid, 0)
    self._workers[self._workers.index(worker)] = self._fork()

  def _answer(self, reply: dict) -> None:
    self._client.send_bytes(json.dumps(reply).encode())

  def _give_up(self, worker: _Worker) -> None:
    item, worker.item = worker.item, None
    self._replace(worker)
    if item is not None:
      self._answer({"id": item, "status": "timeout", "equal": False})

  def _dispatch(self) -> None:
    for worker in self._workers:
      if not self._queue:
        return
      if worker.item is None:
        message = self._queue.popleft()
        worker.item, worker.deadline = message["id"], time.monotonic() + self._timeout
        # If the worker died while idle, its closed link wakes the loop, which replaces it.
        with contextlib.suppress(OSError):
          worker.link.send_bytes(json.dumps(message).encode())

  def _collect(self, worker: _Worker) -> None:
    try:
      reply = json.loads(worker.link.recv_bytes())
    except (EOFError, OSError):  # killed by the memory limit, the kernel or the parser
      self._give_up(worker)
      return
    worker.item, worker.deadline, worker.served = None, math.inf, worker.served + 1
    self._answer(reply)
    if worker.served >= RECYCLE_AFTER or reply["status"] == "timeout":
      self._replace(worker)

  def run(self) -> None:
    """Serves until the client closes its end of the connection, then kills all workers."""
    try:
      while True:
        self._dispatch()
        deadline = min(worker.deadline for worker in self._workers)
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        links: dict[Any, _Worker] = {worker.link: worker for worker in self._workers}
        for ready in connection.wait([self._client, *links], wait):
          if ready is self._client:
            self._queue.append(json.loads(self._client.recv_bytes()))
          else:
            self._collect(links[ready])
        now = time.monotonic()
        for worker in list(self._workers):
          if worker.item is not None and worker.deadline <= now:
            self._give_up(worker)
    except (EOFError, OSError):  # the client has gone
      return
    finally:
      for worker in self._workers:
        os.kill(worker.pid, signal.SIGKILL)


def main() -> None:
  """Runs the server with the options that `pool.Pool` gives; returns when the client has gone."""
  parser = argparse.ArgumentParser(description="Grades answers in worker processes.")
  parser.add_argument("--fd", type=int, required=True, help="inherited socket to the client")
  parser.add_argument("--workers", type=int, required=True)
  parser.add_argument("--timeout", type=float, required=True, help="seconds per item")
  parser.add_argument("--memory", type=int, default=0, help="bytes per worker; 0: no limit")
  args = parser.parse_args()
  # A machine that shuts down, or Slurm, sends SIGTERM to every process. The trainer still wants
  # the current step graded, to save it. This process ends when the client closes its socket.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  from igpo_jax.rewards.math import equivalence

  equivalence.warm_up()
  gc.freeze()  # keeps the workers' collector off the pages they share
  Server(connection.Connection(args.fd), args.workers, args.timeout, args.memory).run()


if __name__ == "__main__":
  main()
