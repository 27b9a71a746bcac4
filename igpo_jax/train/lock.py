"""One run at a time in a workdir: a lock file that names its holder.

    WORKDIR/lock.json   {"host", "machine", "pid", "started", "token", "beat"}

A kill leaves the file behind, so a run that finds a lock checks whether its holder is alive. If
both are on one machine and in one container, the holder's process id and start time decide.
Otherwise the file decides: a living holder rewrites it every BEAT_SECONDS, and a holder that has
not done so for SILENT_SECONDS, by the clock of the process that waits, is dead. The time in the
file decides nothing, however old: clocks of two machines may be an hour apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import can_append

try:
  import fcntl
except ImportError:  # no Unix
  fcntl = None

FILE = "lock.json"
BEAT_SECONDS = 15.0
SILENT_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # for two that begin at the same moment, where nothing is exclusive (gs://)


@dataclasses.dataclass(frozen=True)
class Holder:
  """The process that holds a lock.

  Attributes:
    host: name of its machine.
    machine: text that is equal for two processes if they see each other's process ids.
    pid: its process id.
    started: the time at which it began, in the system's own format. Process ids are used again.
    token: a random text for this lock.
    beat: time at which it last rewrote the file, in seconds since 1970.
  """

  host: str = "an unknown host"
  machine: str = ""
  pid: int = 0
  started: str = ""
  token: str = ""
  beat: float = 0.0

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}"


class WorkdirLock:
  """A lock on a workdir, held from `take` to `release`. Other runs cannot take it meanwhile.

  Args:
    workdir: made if there is none.
    say: called once with a line for the user if `take` has to wait.
  """

  def __init__(self, workdir: epath.PathLike, say: Callable[[str], None] = lambda line: None):
    self.workdir, self._say = epath.Path(workdir), say
    self.file = self.workdir / FILE
    pid = os.getpid()
    self._holder = Holder(
      socket.gethostname(), _machine(), pid, _started(pid) or "", secrets.token_hex(8)
    )
    self._taken_by: Holder | None = None
    self._released = threading.Event()
    self._released.set()
    self._writing = threading.Lock()

  def take(self) -> None:
    """Takes the lock. It waits if only time can show whether the holder of a found lock is alive.

    Raises:
      UserError: another run holds it.
      OSError: the workdir cannot be written.
    """
    self.workdir.mkdir(parents=True, exist_ok=True)
    dead = None
    while not self._replace(dead):
      text = self._read()
      if text is None:
        continue  # released a moment ago
      holder = _parse(text)
      if self._is_alive(holder, text):
        raise UserError(
          f"workdir {self.workdir} is in use by {holder}: wait until it has finished, stop it, "
          "or choose another --workdir"
        )
      dead = text
    self._released.clear()
    threading.Thread(target=self._keep_beating, daemon=True).start()

  def release(self) -> None:
    """Gives the lock back; does nothing if it is not held."""
    if self._released.is_set():
      return
    self._released.set()
    with self._writing, contextlib.suppress(OSError):
      if self._is_ours():
        self.file.unlink(missing_ok=True)

  @property
  def taken_by(self) -> Holder | None:
    """The process that took the lock because it thought this one dead; None if none did."""
    return self._taken_by

  # --- taking ------------------------------------------------------------------------------

  def _write(self) -> None:
    text = json.dumps(dataclasses.asdict(dataclasses.replace(self._holder, beat=time.time())))
    if not can_append(self.file):
      self.file.write_text(text)
      return
    draft = self.workdir / f".{FILE}-{self._holder.token}"  # others may write at this moment
    draft.write_text(text)
    draft.replace(self.file)

  def _remove_drafts(self) -> None:
    """Removes what kills left between writing a lock and putting it in its place."""
    for draft in self.workdir.glob(f".{FILE}-*"):
      draft.unlink(missing_ok=True)

  def _read(self) -> str | None:
    try:
      return self.file.read_bytes().decode(errors="replace")
    except FileNotFoundError:
      return None

  def _replace(self, dead: str | None) -> bool:
    """Writes the lock if there is none or its holder is dead; returns whether it is ours now."""
    with self._alone() as alone:
      if self._read() not in (None, dead):
        return False
      if alone:
        self._remove_drafts()
      self._write()
    if not alone:  # of two that write it at the same moment the last keeps it
      time.sleep(SETTLE_SECONDS)
    return alone or self._is_ours()

  @contextlib.contextmanager
  def _alone(self) -> Iterator[bool]:
    """Excludes other processes of this machine, if the file system can; yields whether it does."""
    if fcntl is None or not can_append(self.file):
      yield False
      return
    folder = os.open(self.workdir, os.O_RDONLY)
    try:
      try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the kernel forgets it with the process
        alone = True
      except OSError:  # some network disks
        alone = False
      yield alone
    finally:
      os.close(folder)

  def _is_ours(self) -> bool:
    text = self._read()
    return text is not None and _parse(text).token == self._holder.token

  def _is_alive(self, holder: Holder, text: str) -> bool:
    if holder.machine == self._holder.machine:
      started = _started(holder.pid)
      if started is None or (started and holder.started and started != holder.started):
        return False
      if started:
        return True
    self._say(
      f"workdir {self.workdir} was in use by {holder}: waiting up to {SILENT_SECONDS:.0f} s for "
      "a sign of life"
    )
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
      time.sleep(min(1.0, SILENT_SECONDS / 10))
      now = self._read()
      if now is None:
        return False
      if now != text:
        return True
    return False

  # --- holding -----------------------------------------------------------------------------

  def _keep_beating(self) -> None:
    while not self._released.wait(BEAT_SECONDS):
      # A disk that is away for a moment: the next beat will tell.
      with contextlib.suppress(OSError), self._writing:
        if self._released.is_set():
          return
        text = self._read()
        if text is not None and _parse(text).token != self._holder.token:
          self._taken_by = _parse(text)
          return
        self._write()


def _parse(text: str) -> Holder:
  """The holder that a lock file names; an unknown holder if the file cannot be read as one."""
  try:
    values = json.loads(text)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Holder)}
    return Holder(**{name: kind(values[name]) for name, kind in kinds.items()})
  except (ValueError, TypeError, KeyError, RecursionError):
    return Holder()


def _machine() -> str:
  """See `Holder.machine`."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  try:
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _started(pid: int) -> str | None:
  """The time at which a process began; "" if it is not known; None if the process is not alive."""
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:
    pass  # another user's
  if pathlib.Path("/proc/self/stat").exists():
    try:
      # The name, in brackets, may hold anything; the state follows it.
      fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
      return ""  # it ended a moment ago, or is hidden
    return None if fields[0] in "ZX" else fields[19]  # a zombie is dead
  try:
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
  except OSError:
    return ""
