"""What studies over seeds share: runs that are done once, across kills, and their tables.

A study has `Task`s. A finished one leaves `seedS/NAME.json` with what tables and plots need.
Started again, only what is not there is run, and what was cut goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import stats

from igpo_jax import cli
from igpo_jax.config import Config
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import write_whole
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.train.continued import as_json

# By default glibc returns freed memory to the system at once. A training step then spends a third
# of its time on page faults (docs/LOG.md). A process reads these variables when it starts.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "33554432",
          "MALLOC_TOP_PAD_": "200000000"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
  """One run of a study.

  Attributes:
    name: name of the run, the same for all seeds.
    seed: its seed.
    workdir: the directory of the study.
    smoke: whether it has tiny settings, for a test.
  """

  name: str
  seed: int
  workdir: epath.Path
  smoke: bool

  @property
  def root(self) -> epath.Path:
    """The folder of its seed."""
    return self.workdir / f"seed{self.seed}"

  @property
  def result(self) -> epath.Path:
    """The file with what it leaves."""
    return self.root / f"{self.name.replace(':', '_')}.json"

  @property
  def config(self) -> Config:
    """A result that was made with another config is refused."""
    raise NotImplementedError

  @property
  def comes_first(self) -> bool:
    """Whether others start from what it leaves."""
    return False

  def run(self) -> dict[str, Any]:
    """Runs, or continues, and returns what tables and plots need, as JSON values."""
    raise NotImplementedError


def finished(task: Task) -> dict[str, Any] | None:
  """The result of a finished run; None if it is not finished.

  Raises:
    UserError: the run had other settings.
  """
  if not task.result.exists():
    return None
  result = json.loads(task.result.read_text())
  if result["config"] != as_json(task.config):
    raise UserError(
      f"{task.result} is of a run with other settings than these; give another --workdir"
    )
  return result


def perform(task: Task, run: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
  """Runs or continues a task, writes its result to `task.result` and returns it.

  Args:
    task: what is run.
    run: called in place of `task.run`, for runs that share what lives in this process.
  """
  began = time.perf_counter()
  result = (run or task.run)()
  result |= {"config": as_json(task.config), "seconds": time.perf_counter() - began}
  write_whole(task.result, json.dumps(result) + "\n")
  return result


def run_all(tasks: Sequence[Task], jobs: int) -> dict[tuple[str, int], dict[str, Any]]:
  """Runs all tasks that are not finished, `jobs` at a time, first those that others start from.

  Returns:
    (name, seed) -> result.

  Raises:
    UserError: a finished run had other settings.
  """
  results = {(task.name, task.seed): finished(task) for task in tasks}
  open_ = [task for task in tasks if results[task.name, task.seed] is None]
  os.environ.update({k: v for k, v in MALLOC.items() if k not in os.environ})
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
  numbers = context.Queue()
  for number in range(jobs):
    numbers.put(number)
  with concurrent.futures.ProcessPoolExecutor(
    jobs, context, initializer=begin_worker, initargs=(numbers, cores, jobs, os.getpid())
  ) as pool:
    for first in (True, False):
      phase = [task for task in open_ if task.comes_first is first]
      futures = {pool.submit(perform, task): task for task in phase}
      for done in concurrent.futures.as_completed(futures):
        task = futures[done]
        result = results[task.name, task.seed] = done.result()
        left = sum(value is None for value in results.values())
        print(f"{task.name}, seed {task.seed}: {result['seconds']:.0f} s; {left} runs left",
              flush=True)  # fmt: skip
  return {key: result for key, result in results.items() if result is not None}


def begin_worker(numbers, cores: list[int], jobs: int, parent: int) -> None:
  """Starts a worker process: gives it its own cores, and ends it when its parent ends."""
  number = numbers.get()
  gc.set_threshold(*cli.SEARCH_AFTER)  # as every command
  if cores and jobs > 1:
    os.sched_setaffinity(0, cores[number % len(cores) :: jobs])

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # the parent was killed; a new command may now write to the workdir

  threading.Thread(target=watch, daemon=True).start()
  use_cache()


# --- the command of a study that is made in one process -------------------------------------


def read_command(
  description: str, option: str, known: Iterable[str], seeds: int = 5, first: int = 0
) -> argparse.Namespace:
  """Reads the command line: --OPTION=NAME,... or --all, --smoke, --workdir, --seeds and --first.

  Args:
    description: of the command.
    option: what is chosen from, such as "methods".
    known: the names that there are.
    seeds, first: how many seeds there are by default, and the first of them.

  Returns:
    `names` that were chosen, `smoke`, `workdir`, and `seeds`, a range.

  Raises:
    UserError: neither names nor --all, an unknown name, or a negative number of seeds.
  """
  known = list(known)
  parser = cli.ArgumentParser(
    description=description, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(f"--{option}", default="", help=f"of {','.join(known)}")
  parser.add_argument("--all", action="store_true")
  parser.add_argument("--smoke", action="store_true", help="on next to nothing")
  parser.add_argument("--workdir", type=epath.Path, required=True)
  parser.add_argument("--seeds", type=int, default=0, help=f"default: {seeds}")
  parser.add_argument("--first", type=int, default=first, help=f"first seed; default: {first}")
  args = parser.parse_args()
  chosen = getattr(args, option)
  if bool(chosen) == args.all:
    raise UserError(f"give --{option}=NAME,... or --all")
  if args.seeds < 0 or args.first < 0:
    raise UserError("--seeds must be positive, and --first not negative")
  args.names = chosen.split(",") if chosen else known
  for name in args.names:
    if name not in known:
      raise UserError(f"--{option}: {name!r} is not one of {', '.join(known)}")
  args.seeds = range(args.first, args.first + (args.seeds or (1 if args.smoke else seeds)))
  return args


def write_results(
  workdir: epath.Path, table: str, rows: Any, results: dict, settings: dict[str, Any]
) -> str:
  """Writes table.md and results.json; returns what to print.

  Args:
    workdir: the directory of the study.
    table, rows: what came out, in Markdown and as JSON values.
    results: the results of the runs so far.
    settings: what else results.json says, as JSON values.
  """
  minutes = sum(result["cpu_seconds"] for result in results.values()) / 60
  write_whole(workdir / "table.md", table + "\n")
  report = {**settings, "cpu_minutes": minutes, "rows": rows}
  write_whole(workdir / "results.json", json.dumps(report, indent=2) + "\n")
  return f"\n{table}\n\n{len(results)} runs took {minutes:.1f} CPU minutes."


# --- tables ---------------------------------------------------------------------------------


def largest_fall(result: dict[str, Any]) -> float:
  """The largest fall of a run's accuracy below the best evaluation before."""
  values = np.array([accuracy for _, accuracy in result["accuracy"]])
  return float(np.max(np.maximum.accumulate(values) - values))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
  """(mean, half the width of its interval by Student's t); nan as width for one value."""
  n = len(values)
  if n < 2:
    return float(np.mean(values)), math.nan
  width = stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
  return float(np.mean(values)), float(width)


def bounds(values: Sequence[float]) -> dict[str, float | None]:
  """ "mean", and "low" and "high" of its 95% interval; these are None for one value."""
  mean, width = interval(values)
  known = not math.isnan(width)
  return {"mean": mean, "low": mean - width if known else None,
          "high": mean + width if known else None}  # fmt: skip


def in_words(values: Sequence[float], signed: bool = False, digits: int = 3) -> str:
  """The mean and half of the interval: "0.312 ± 0.041", or "+0.312" for one value, signed."""
  mean, width = interval(values)
  text = f"{mean:{'+' if signed else ''}.{digits}f}"
  return text if math.isnan(width) else f"{text} ± {width:.{digits}f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A Markdown table."""
  lines = [head, *rows]
  text = [f"| {' | '.join(map(str, line))} |" for line in lines]
  return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])
