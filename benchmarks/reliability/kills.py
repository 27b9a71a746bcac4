"""Kills at random moments of a whole tiny run, and what the run is in the end.

A case starts the run of `tiny_run`, kills it after a time that is uniform over the length of an
uninterrupted run, starts it again, and so on, `KILLS` times; then it lets it finish. A run that
finishes before its kill is compared and another is begun. Lost are differences from the
uninterrupted run, files left over, and exit codes that are neither the signal's nor 0.

Every start is a fork of a process that has imported the package and has not used jax yet: a kill
during an import would be a kill of nothing. Compiled programs are kept from start to start, in a
cache that kills hit as well.

    python -m benchmarks.reliability.kills CASE SEED FOLDER    one case, a JSON object on stdout
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from etils import epath

from benchmarks.reliability.table import Campaign, mixed, untimed
from igpo_jax.checkpoint import STEP_METADATA, kept_sums
from igpo_jax.io.jsonl import Row

COUNTS = {"SIGKILL": 20, "SIGTERM": 6}
KILLS = 5
CONFIG = pathlib.Path(__file__).with_name("tiny_run.py")
PATIENCE = 900.0  # seconds for a start to finish, on a busy machine
# Times of steps and compilations, of which no two runs have the same.
TIMES = ("compile_seconds.json", "report.html", "curves.png", "table.md", "summary.json")


def start(workdir: pathlib.Path, cache: pathlib.Path) -> int:
  """Begins or continues the run in a process of its own; returns the process id."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    os.setsid()
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from igpo_jax import cli
    from igpo_jax import main as training

    words = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.compilation_cache={cache}"]
    cli.run(lambda: training.main(words))
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 1
  finally:
    os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
  """The exit code of a process, negative for a signal; None if it runs on after so long."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.005)
  return None


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
      out[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "resolved"}
    else:
      out[name] = None if name in TIMES else path.read_bytes()
  return out


def peace(folder: pathlib.Path, cache: pathlib.Path) -> tuple[pathlib.Path, float]:
  """The uninterrupted run, made once, and the seconds that it takes with compiled programs."""
  workdir, seconds = folder / "peace", folder / "peace.seconds"
  if not seconds.exists():
    for _ in range(2):  # the first one compiles
      shutil.rmtree(workdir, ignore_errors=True)
      began = time.monotonic()
      if code := wait(start(workdir, cache), PATIENCE):
        raise RuntimeError(f"the uninterrupted run ended with {code}: see {workdir}.log")
    seconds.write_text(str(time.monotonic() - began))
  return workdir, float(seconds.read_text())


def one_case(case: str, seed: int, folder: pathlib.Path) -> Row:
  number = getattr(signal, case.partition("/")[0])
  draw = random.Random(f"{case} {seed}")
  shared = folder.parent / f"kills-{seed}"
  shared.mkdir(exist_ok=True)
  cache = shared / "cache"
  before, length = peace(shared, cache)
  expected, lost, killed, runs = left_by(before), [], 0, 0
  good = {0, -number} | ({128 + number} if number == signal.SIGTERM else set())
  while killed < KILLS:
    workdir = folder / f"run{runs}"
    runs += 1
    code = None
    while code != 0:
      pid = start(workdir, cache)
      if killed < KILLS:
        code = wait(pid, draw.uniform(0, length))
        if code is None:
          os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
          code, killed = wait(pid, PATIENCE), killed + 1
      else:
        code = wait(pid, PATIENCE)
      if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return {"tried": killed, "lost": [*lost, f"{workdir.name} does not end"]}
      if code not in good:
        tail = pathlib.Path(f"{workdir}.log").read_text()[-600:]
        return {"tried": killed, "lost": [*lost, f"exit code {code}: {tail}"]}
    found = left_by(workdir)
    lost += [f"only in {where}: {name}" for where, names in (
      ("the uninterrupted run", expected.keys() - found.keys()),
      ("the killed run", found.keys() - expected.keys())) for name in sorted(names)]  # fmt: skip
    lost += [
      f"another {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]
    ]
  return {"tried": killed, "runs": runs, "length": round(length, 1), "lost": lost}


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  command = [sys.executable, "-m", "benchmarks.reliability.kills", case, str(seed), str(folder)]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    return {"tried": 0, "lost": [done.stderr[-1000:]]}
  return json.loads(done.stdout)


CAMPAIGN = Campaign(
  "kills",
  "a whole tiny run, killed and started again",
  functools.partial(mixed, COUNTS),
  attempt,
)

if __name__ == "__main__":
  import igpo_jax.train.run  # noqa: F401  what a start would import, and no backend

  print(json.dumps(one_case(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))))
