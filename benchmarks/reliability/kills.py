"""Kills at random moments of a whole tiny run, and what the run is in the end.

A case starts the run of `tiny_run`, kills it at a time that is uniform over the length of an
uninterrupted run, starts it again, and so on, `KILLS` times; then it lets it finish. A run that
finishes before its kill is compared and another is begun. Lost are differences from the
uninterrupted run, files left over, and exit codes that are neither the signal's nor 0. Times are
CPU seconds of the process that is killed: other programs that use the machine do not move them.

The run is one process, or two of which a random one is killed, or stopped (SIGSTOP). Then the other
one has to end by itself within a minute, with one line and exit code 1; one that was stopped has to
end, too, when it goes on. One that is killed before it has met the others is waited for, as they
cannot know whether it was ever started: such a start is ended, and begun again. One that was
stopped then goes on, and the run with it.

Every start is a fork of a process that has imported the package and has not used jax yet: a kill
during an import would be a kill of nothing. Compiled programs are kept from start to start, in a
cache that is full; where the case says "compiling", in one that begins empty and that kills hit.

    python -m benchmarks.reliability.kills CASE SEED FOLDER    one case, a JSON object on stdout
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath

from benchmarks.reliability.table import Campaign, mixed, untimed
from igpo_jax.checkpoint import STEP_METADATA, kept_sums
from igpo_jax.io.jsonl import Row

# Cases of each kind: a signal, and of how many processes it is sent to one.
COUNTS = {
  "SIGKILL": 20,
  "SIGKILL compiling": 2,
  "SIGTERM": 6,
  "SIGKILL 1 of 2": 8,
  "SIGTERM 1 of 2": 2,
  "SIGSTOP 1 of 2": 1,
}
KILLS = 5
LEAVE = 60.0  # seconds for the other process to notice, and to end
WATCHED = "[Gloo]"  # what the first collective prints, in which the processes begin to watch
CONFIG = pathlib.Path(__file__).with_name("tiny_run.py")
PATIENCE = 400.0  # seconds for a start to finish, on a busy machine
# Times of steps and compilations, of which no two runs have the same.
TIMES = ("compile_seconds.json", "report.html", "curves.png", "table.md", "summary.json")


def start(
  workdir: pathlib.Path,
  cache: pathlib.Path,
  processes: int = 1,
  before: Callable[[int], Sequence[str]] = lambda index: (),
  port: int = 0,
) -> list[int]:
  """Begins or continues the run in processes of their own; returns the process ids.

  Args:
    before: called in process `index` before the run; returns further words of its command line.
    port: the coordinator's; 0 for a free one.
  """
  port = port or free_port()
  pids = []
  for index in range(processes):
    pid = os.fork()
    if pid == 0:
      if processes > 1:
        os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_PROCESS_ID"] = f"{processes}", f"{index}"
      _run(workdir, cache, log_of(workdir, index), lambda index=index: before(index))
    pids.append(pid)
  return pids


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def log_of(workdir: pathlib.Path, index: int) -> pathlib.Path:
  """Where process `index` of a run writes what a user would see."""
  return workdir.with_name(f"{workdir.name}.{index}.log")


def _run(
  workdir: pathlib.Path, cache: pathlib.Path, log: pathlib.Path, before: Callable[[], Sequence[str]]
) -> NoReturn:
  """The run, in a process that was just forked."""
  code = 1
  try:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from igpo_jax import cli
    from igpo_jax import main as training

    words = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.compilation_cache={cache}"]
    cli.run(lambda: training.main([*words, *before()]))
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 1
  except BaseException:
    traceback.print_exc()  # as Python does when it ends
  finally:
    os._exit(code)


def wait(
  pids: list[int], seconds: float = PATIENCE, chosen: int = 0, cpu: float = math.inf
) -> list[int] | None:
  """The exit codes of processes, negative for a signal; None if they run on.

  Args:
    seconds: how long it waits.
    chosen, cpu: it also ends once this one of the processes has used so many seconds of CPU time.
  """
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    if all(map(has_ended, pids)):
      return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if cpu_seconds(pids[chosen]) >= cpu:
      return None
    time.sleep(0.005)
  return None


def cpu_seconds(pid: int) -> float:
  """The CPU time that a child has used; it may have ended, but not be waited for."""
  fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_ended(pid: int) -> bool:
  """Whether a child has ended; its exit code stays for `waitpid`."""
  found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
  return found is not None


def left_by(workdir: pathlib.Path) -> dict[str, object]:
  """What a finished run left: names of all files, and the contents that do not tell the time."""
  out: dict[str, object] = {}
  for path in sorted(path for path in workdir.rglob("*") if path.is_file()):
    name = str(path.relative_to(workdir))
    if "/checkpoints/" in f"/{name}":  # Orbax names the files of arrays at random
      stage, step = path.relative_to(workdir / "checkpoints").parts[:2]
      if path.name == STEP_METADATA and path.parent.name == step:
        out[f"{stage} {step}"] = kept_sums(epath.Path(path.parent))
      else:
        out.setdefault(f"{stage} {step}", None)
    elif name.endswith(".jsonl"):
      out[name] = untimed(path)
    elif name == "config.json":
      values = json.loads(path.read_text())
      out[name] = {k: v for k, v in values.items() if k not in ("resolved", "compilation_cache")}
    else:
      out[name] = None if name in TIMES else path.read_bytes()
  return out


def peace(folder: pathlib.Path, cache: pathlib.Path, processes: int) -> pathlib.Path:
  """The uninterrupted run, made once; its length is in a file beside it (`length_of`)."""
  workdir = folder / f"peace{processes}"
  for name in ("compiling", "compiled"):  # the first one fills the cache
    file = _length_file(workdir, name)
    if not file.exists():
      shutil.rmtree(workdir, ignore_errors=True)
      pids = start(workdir, cache, processes)
      while not all(map(has_ended, pids)):
        time.sleep(0.05)
      used = cpu_seconds(pids[0])
      codes = wait(pids)
      if codes != [0] * processes:
        raise RuntimeError(f"the uninterrupted run ended with {codes}: see {log_of(workdir, 0)}")
      file.write_text(str(used))
  return workdir


def length_of(workdir: pathlib.Path, name: str) -> float:
  """CPU seconds of process 0 of the uninterrupted run, "compiling" or "compiled"."""
  return float(_length_file(workdir, name).read_text())


def _length_file(workdir: pathlib.Path, name: str) -> pathlib.Path:
  return workdir.with_name(f"{workdir.name}.{name}")


def reached(workdir: pathlib.Path, said: str) -> str:
  """Where a run was when it was killed: its last row, whether it was saving, its last line."""
  file = workdir / "metrics.jsonl"
  rows = file.read_text(errors="replace").split("\n")[:-1] if file.exists() else []
  row = json.loads(rows[-1]) if rows else {"stage": "start", "step": 0}
  saving = any(workdir.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))
  last = (said.split("\n") or [""])[-2 if said.endswith("\n") else -1]
  return f"{row['stage']} {row['step']}{', saving' if saving else ''}; {last[:40]}"


class Victim:
  """One start of a run, of which one process gets a signal."""

  def __init__(self, pids: list[int], workdir: pathlib.Path, number: int, chosen: int):
    self.pids, self.workdir, self.number, self.chosen = pids, workdir, number, chosen
    self._before = [self._log(index) for index in range(len(pids))]

  def said(self, index: int) -> str:
    """What a process has written since this start."""
    return self._log(index)[len(self._before[index]) :]

  def _log(self, index: int) -> str:
    path = log_of(self.workdir, index)
    return path.read_text(errors="replace") if path.exists() else ""

  def strike(self) -> tuple[list[int], list[str]]:
    """Sends the signal and waits for the end of all: (exit codes, what should not have been)."""
    pid = self.pids[self.chosen]
    others = [other for other in self.pids if other != pid]
    with contextlib.suppress(ProcessLookupError):  # it has ended just now
      os.kill(pid, self.number)
    if self.number == signal.SIGSTOP:
      first = wait(others, LEAVE)
      met = self._met()
      os.kill(pid, signal.SIGCONT)
      if first is None and not met:
        codes = wait(self.pids)
        if codes is None:
          return self.end(), ["a run whose process was stopped at its start does not go on"]
        return codes, self._complaints(codes)
      if first is None:
        return self.end(), ["the other process did not notice that one was stopped"]
      (last,) = wait([pid], LEAVE) or [None]
      if last is None:
        return self.end(), ["a process that was stopped does not end when it goes on"]
      codes = first
      codes.insert(self.chosen, last)
    else:
      # After SIGTERM the step under way is finished, and may have to be compiled first.
      codes = wait(self.pids, LEAVE if others and self.number == signal.SIGKILL else PATIENCE)
      if codes is None and not self._met():
        return self.end(), []  # it was killed before the others could know it, and is waited for
      if codes is None:
        return self.end(), [f"{self.workdir.name} does not end"]
    return codes, self._complaints(codes)

  def _met(self) -> bool:
    """Whether the processes have begun to watch one another."""
    return any(WATCHED in self.said(index) for index in range(len(self.pids)))

  def end(self) -> list[int]:
    """Ends what still runs."""
    for pid in self.pids:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for pid in self.pids:
      with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return [1] * len(self.pids)

  def _complaints(self, codes: list[int]) -> list[str]:
    """What is wrong with how all processes ended."""
    good = {0, -self.number}
    if self.number == signal.SIGTERM:
      good.add(128 + self.number)
    lost = []
    for index, code in enumerate(codes):
      # One that goes on after process 0, and jax's service in it, have gone: either its own watch
      # sees that first or jax does, which aborts with lines of its own.
      if self.number == signal.SIGSTOP and index == self.chosen and code == -signal.SIGABRT:
        continue
      new = self.said(index)
      errors = [line for line in new.splitlines() if line.startswith("error: ")]
      by_another = len(codes) > 1 and code == 1 and len(errors) == 1
      if not (code in good or by_another) or "Traceback" in new:
        lost.append(f"process {index} of {len(codes)}: exit code {code}: {new[-600:]}")
    return lost


def one_case(case: str, seed: int, folder: pathlib.Path) -> Row:
  kind = case.partition("/")[0].split()
  compiling = "compiling" in kind
  number, processes = getattr(signal, kind[0]), int(kind[-1]) if "of" in kind else 1
  draw = random.Random(f"{case} {seed}")
  shared = folder.parent / f"kills-{seed}"
  shared.mkdir(exist_ok=True)
  before = peace(shared, shared / "cache", processes)
  cache = folder / "cache" if compiling else shared / "cache"
  length = length_of(before, "compiling" if compiling else "compiled")
  expected, lost, places, runs = left_by(before), [], [], 0
  while len(places) < KILLS and not lost:
    workdir = folder / f"run{runs}"
    runs += 1
    codes: list[int] = []
    while codes != [0] * processes and not lost:
      pids = start(workdir, cache, processes)
      victim = Victim(pids, workdir, number, draw.randrange(processes))
      if len(places) < KILLS:
        found = wait(pids, PATIENCE, victim.chosen, draw.uniform(0, length))
        if found is None:
          said = victim.said(0)
          codes, lost = victim.strike()
          places.append(reached(workdir, said))
          continue
      else:
        found = wait(pids)
      if found is None:
        codes, lost = victim.end(), [f"{workdir.name} does not end"]
      elif found != [0] * processes:
        codes, lost = found, [f"ended with {found}: {log_of(workdir, 0).read_text()[-600:]}"]
      else:
        codes = found
    if not lost:
      lost = differences(expected, left_by(workdir))
  return {
    "tried": len(places), "runs": runs, "length": round(length, 1), "places": places, "lost": lost
  }  # fmt: skip


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
  """What two runs left in different ways, one line for each."""
  lost = [f"only in {where}: {name}" for where, names in (
    ("the uninterrupted run", expected.keys() - found.keys()),
    ("the killed run", found.keys() - expected.keys())) for name in sorted(names)]  # fmt: skip
  both = expected.keys() & found.keys()
  return lost + [f"another {name}" for name in sorted(both) if expected[name] != found[name]]


def attempt(case: str, seed: int, folder: epath.Path, module: str = __name__) -> Row:
  """Tries a case of a module in a process that has not used jax."""
  command = [sys.executable, "-m", module, case, str(seed), str(folder)]
  environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  if done.returncode:
    return {"tried": 0, "lost": [done.stderr[-1000:]]}
  return json.loads(done.stdout)


def try_one(one_case: Callable[[str, int, pathlib.Path], Row]) -> None:
  """The other side of `attempt`: the case of the command line, and its row on stdout."""
  # What a run would import, and no backend.

  import igpo_jax.train.run  # noqa: F401

  print(json.dumps(one_case(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))))


CAMPAIGN = Campaign(
  "kills",
  "a whole tiny run, killed and started again",
  # One process first: they cost less.
  lambda seed: sorted(mixed(COUNTS, seed), key=lambda case: " of " in case),
  attempt,
)

if __name__ == "__main__":
  try_one(one_case)
