"""The client of the grading pool: sends pairs of answers to worker processes, returns futures."""

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
  """The number of cores that this process may use: one worker for each."""
  if hasattr(os, "sched_getaffinity"):
    return max(1, len(os.sched_getaffinity(0)))
  return max(1, os.cpu_count() or 1)


class Pool:
  """Compares answers in worker processes, with a hard limit of time and memory per comparison.

  The threads of a process may share a pool. The workers are children of a small server
  process (`rewards.worker`). They are not forked from this process, because forking a process
  that uses jax is not safe.

  Args:
    workers: number of worker processes. Default: `default_workers()`.
    timeout: seconds of wall time per comparison, counted from when a worker begins with it.
      A worker that takes longer is killed and replaced.
    memory: bytes of address space per worker, 0 for no limit. A comparison that needs more
      has the status "timeout" too.

  Raises:
    ValueError: `timeout` is not positive.
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
    # Two locks: a send may block until the reader has made room, and the reader needs `_lock`
    # to hand out what it read. With one lock for both, each would wait for the other.
    self._lock = threading.Lock()  # guards `_pending` and `_broken`; held briefly
    self._sending = threading.Lock()  # keeps one thread's message whole on the link
    self._pending: dict[int, concurrent.futures.Future] = {}
    self._ids = itertools.count()
    self._broken: str | None = None
    self._reader = threading.Thread(target=self._read, name="grading-pool", daemon=True)
    self._reader.start()

  def submit(self, gold: str, answer: str) -> concurrent.futures.Future:
    """Queues one comparison.

    Args:
      gold: the gold answer.
      answer: the answer found in a completion.

    Returns:
      A future. Its result is `(status, equal)`: "ok", "unparseable" or "timeout", and a bool. It
      raises RuntimeError if the pool is closed or its server ends before the comparison is done.

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
    """Ends the server and its workers. Comparisons that are still queued fail."""
    with self._lock:
      self._broken = "the grading pool is closed"
    if self._process.poll() is None:
      # Closing a descriptor does not wake a thread that reads from it; shutting the socket down
      # does. It fails if the server has closed its end already.
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
