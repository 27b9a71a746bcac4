"""Two processes of which one is not as the other: what each says, and whether both end.

"mistake": process 1 has another config, data file, version of jax, files of this package, count or
number; or the coordinator's port is taken. Both have to end within a minute after the first one,
with one line and exit code 2. "clock": process 1's clock is an hour off. "slow": one of them is
stopped for up to 20 seconds at a time. Both have to finish with the uninterrupted run's result.
"reward": one reward of process 1 is no number. Both have to finish, with the same skipped updates
and finite numbers. "weight": so is one weight of process 1, after SFT. Both have to end with exit
code 2 and one line.

What a process has is put into it after a fork (`kills.start`): Python's own `time.time` is off, not
the clock that libraries in C++ read.

    python -m benchmarks.reliability.hosts CASE SEED FOLDER    one case, a JSON object on stdout
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from benchmarks.reliability import kills
from benchmarks.reliability.kills import LEAVE, PATIENCE, Victim, differences, left_by, wait
from benchmarks.reliability.nonfinite import skipped
from benchmarks.reliability.table import SPOILT, Campaign
from igpo_jax.io.jsonl import Row

ROWS = [
  {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(9)
]
RUNS = ("clock/ahead", "clock/behind", "slow/0", "slow/1", "reward/nan", "reward/inf", "weight/nan")


def _config(index: int, folder: pathlib.Path) -> Sequence[str]:
  return [f"--config.rl.steps={12 + index}"]


def _data(index: int, folder: pathlib.Path) -> Sequence[str]:
  own = folder / f"home{index}"
  own.mkdir(exist_ok=True)
  (own / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[index:]))
  os.chdir(own)
  return ["--config.data.rl=jsonl:rows.jsonl?format=gsm8k"]


def _version(index: int, folder: pathlib.Path) -> Sequence[str]:
  real = importlib.metadata.version
  if index == 1:
    importlib.metadata.version = lambda name: "0.0.1" if name == "jax" else real(name)
  return []


def _files(index: int, folder: pathlib.Path) -> Sequence[str]:
  from igpo_jax.parallel import distributed

  distributed.source = lambda: f"digest{index}"
  return []


def _count(index: int, folder: pathlib.Path) -> Sequence[str]:
  os.environ["JAX_NUM_PROCESSES"] = str(2 + index)
  return []


def _number(index: int, folder: pathlib.Path) -> Sequence[str]:
  os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_PROCESS_ID"] = "3", str(min(index, 1))
  return []


# Name -> (what is put into each process, words of the line that each has to say).
MISTAKES: dict[str, tuple[Callable[[int, pathlib.Path], Sequence[str]], str]] = {
  "config": (_config, "was started with another config.rl than process 0"),
  "data": (_data, "what jsonl:rows.jsonl?format=gsm8k holds of process 1 is not that of process 0"),
  "version": (_version, "process 1 runs jax 0.0.1, process 0 jax"),
  "files": (
    _files,
    "process 1 runs igpo_jax's source digest1, process 0 igpo_jax's source digest0",
  ),
  "count": (_count, "JAX_NUM_PROCESSES is 2 for process 0 and 3 for process 1"),
  "number": (_number, "two processes have JAX_PROCESS_ID=1"),
  "port": (lambda index, folder: [], "is another run on"),
}


def one_case(case: str, seed: int, folder: pathlib.Path) -> Row:
  kind, _, name = case.partition("/")
  shared = folder.parent / f"kills-{seed}"
  shared.mkdir(exist_ok=True)
  if kind == "mistake":
    return _mistake(name, folder, shared / "cache")
  if kind == "weight":
    return _weight(name, folder, shared / "cache")
  peace = kills.peace(shared, shared / "cache", 2)
  return _whole(case, random.Random(f"{case} {seed}"), folder, shared / "cache", peace)


def _mistake(name: str, folder: pathlib.Path, cache: pathlib.Path) -> Row:
  put, words = MISTAKES[name]
  port, processes = kills.free_port(), 3 if name == "number" else 2
  with contextlib.ExitStack() as stack:
    if name == "port":
      stack.enter_context(socket.create_server(("127.0.0.1", port)))
    workdir = folder / "run"
    pids = kills.start(workdir, cache, processes, lambda index: put(index, folder), port)
    return _ended(pids, workdir, 2, words)


def _ended(pids: list[int], workdir: pathlib.Path, code: int, words: str) -> Row:
  """What is wrong with how all processes ended by a mistake."""
  victim, ended = Victim(pids, workdir, signal.SIGTERM, 0), {}
  began = time.monotonic()
  while len(ended) < len(pids) and time.monotonic() - began < PATIENCE:
    for pid in pids:
      if pid not in ended and kills.has_ended(pid):
        ended[pid] = time.monotonic()
    if ended and time.monotonic() - min(ended.values()) > LEAVE:
      victim.end()
      return {"lost": [f"one runs on for more than {LEAVE:.0f} s: {victim.said(0)[-300:]}"]}
    time.sleep(0.02)
  codes, lost = wait(pids, 1), []
  if codes != [code] * len(pids):
    lost.append(f"exit codes {codes}")
  for index in range(len(pids)):
    said = kills.log_of(workdir, index).read_text(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or words not in errors[0] or "Traceback" in said:
      lost.append(f"process {index}: {said[-600:]}")
  apart = max(ended.values()) - min(ended.values())
  return {"seconds_apart": round(apart, 1), "lost": lost}


def _weight(value: str, folder: pathlib.Path, cache: pathlib.Path) -> Row:
  def put(index: int) -> Sequence[str]:
    from igpo_jax.train import run

    real = run.train_rl

    def spoilt(run, model, *args, **kwargs):
      if index == 1:
        import jax

        leaves, tree = jax.tree.flatten(model.params)
        own = [np.array(x.addressable_shards[0].data) for x in leaves]
        own[0].flat[0] = float(value)
        own = [jax.device_put(x, jax.local_devices()[0]) for x in own]
        of_all = jax.make_array_from_single_device_arrays
        leaves = [of_all(x.shape, x.sharding, [y]) for x, y in zip(leaves, own, strict=True)]
        model = dataclasses.replace(model, params=jax.tree.unflatten(tree, leaves))
      return real(run, model, *args, **kwargs)

    run.train_rl = spoilt
    return ["--config.log.max_skipped=3"]

  workdir = folder / "run"
  return _ended(kills.start(workdir, cache, 2, put), workdir, 2, "not finite")


def _whole(
  case: str, draw: random.Random, folder: pathlib.Path, cache: pathlib.Path, peace: pathlib.Path
) -> Row:
  kind, _, name = case.partition("/")

  def put(index: int) -> Sequence[str]:
    if index == 1 and kind == "clock":
      real, off = time.time, 3600 if name == "ahead" else -3600
      time.time, time.time_ns = lambda: real() + off, lambda: int((real() + off) * 1e9)
    if index == 1 and kind == "reward":
      os.environ[SPOILT] = f"{draw.randrange(4, 20)} {name}"
    return []

  workdir = folder / "run"
  pids, codes, stops = kills.start(workdir, cache, 2, put), None, 0
  while kind == "slow" and codes is None and stops < 5:
    codes = wait(pids, draw.uniform(0, 8))
    if codes is None:
      chosen, stops = draw.choice(pids), stops + 1
      os.kill(chosen, signal.SIGSTOP)
      time.sleep(draw.uniform(1, 20))
      os.kill(chosen, signal.SIGCONT)
  codes = codes or wait(pids)
  if codes != [0, 0]:
    said = [kills.log_of(workdir, index).read_text()[-400:] for index in range(2)]
    return {"lost": [f"ended with {codes}: {said}"]}
  if kind != "reward":
    return {"stops": stops, "lost": differences(left_by(peace), left_by(workdir))}
  return skipped(workdir)


def cases(seed: int) -> list[str]:
  del seed
  return [*(f"mistake/{name}" for name in MISTAKES), *RUNS]


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  return kills.attempt(case, seed, folder, __name__)


CAMPAIGN = Campaign("hosts", "two processes of which one is not as the other", cases, attempt)

if __name__ == "__main__":
  kills.try_one(one_case)
