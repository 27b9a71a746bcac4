"""The client's side of the grading pool: futures here, worker processes elsewhere."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from multiprocessing import connection

DEFAULT_MEMORY = 4 << 30  # bytes of address space per worker
ENDED = "the grading server has ended; its own message is on stderr"


def default_workers() -> int:
  """One worker per core that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return max(1, len(os.sched_getaffinity(0)))
  return max(1, os.cpu_count() or 1)


class Pool:
  """Compares answers in worker processes under a hard time limit per item.

  Threads of one process may share it. The workers are children of a small server
  process (`rewards.worker`), never forks of this one, which may hold jax.

  Args:
    workers: number of worker processes.
    timeout: seconds of wall time per item, counted from when a worker takes it;
      a worker that exceeds it is killed and replaced.
    memory: bytes of address space per worker, 0 for no limit; exceeding it counts
      as exceeding the time.
  """

  def __init__(
    self, workers: int | None = None, timeout: float = 5.0, memory: int = DEFAULT_MEMORY
  ):
    if timeout <= 0:
      raise ValueError(f"timeout: {timeout} seconds; give a positive number")
    ours, theirs = socket.socketpair()
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [
      sys.executable,
      "-m",
      "igpo_jax.rewards.worker",
      f"--fd={theirs.fileno()}",
      f"--workers={workers or default_workers()}",
      f"--timeout={timeout}",
      f"--memory={memory}",
    ]
    # A session of its own: Ctrl-C reaches the program, which closes the pool.
    self._process = subprocess.Popen(
      command,
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      env={**os.environ, "PYTHONPATH": path},
      start_new_session=True,
    )
    theirs.close()
    self._link = connection.Connection(ours.detach())
    # Two locks: a send may block until the reader has made room, and the reader needs
    # `_lock` to hand out what it read. One lock for both would wait for itself.
    self._lock = threading.Lock()  # of `_pending` and `_broken`, held for moments only
    self._sending = threading.Lock()  # keeps one thread's message whole on the link
    self._pending: dict[int, concurrent.futures.Future] = {}
    self._ids = itertools.count()
    self._broken: str | None = None
    self._reader = threading.Thread(target=self._read, name="grading-pool", daemon=True)
    self._reader.start()

  def submit(self, gold: str, answer: str) -> concurrent.futures.Future:
    """Queues one comparison; the future's result is `(status, equal)`.

    Raises:
      RuntimeError: the pool is closed, or its server process has ended.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()
    with self._lock:
      if self._broken:
        raise RuntimeError(self._broken)
      item = next(self._ids)
      self._pending[item] = future
    message = json.dumps({"id": item, "gold": gold, "answer": answer}).encode()
    try:
      with self._sending:
        self._link.send_bytes(message)
    except (OSError, ValueError) as error:  # the server, or this end, is closed
      with self._lock:
        self._pending.pop(item, None)
        broken = self._broken or ENDED
      raise RuntimeError(broken) from error
    return future

  def _read(self) -> None:
    while True:
      try:
        reply = json.loads(self._link.recv_bytes())
      except (EOFError, OSError):
        break
      with self._lock:
        future = self._pending.pop(reply["id"])
      future.set_result((reply["status"], reply["equal"]))
    with self._lock:
      self._broken = self._broken or ENDED
      left, self._pending = list(self._pending.values()), {}
    for future in left:
      future.set_exception(RuntimeError(self._broken))

  def close(self) -> None:
    """Ends the server and its workers; what is still queued fails."""
    with self._lock:
      self._broken = "the grading pool is closed"
    if self._process.poll() is None:
      # Closing a descriptor does not wake a reader; shutting the socket down does. It
      # fails where the server went first.
      with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._link.fileno())) as half:
        half.shutdown(socket.SHUT_RDWR)
    self._process.wait()
    self._reader.join()
    with self._sending:
      self._link.close()

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()
