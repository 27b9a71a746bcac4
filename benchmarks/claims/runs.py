"""The runs of the study: each (arm, seed) once, several at a time, continued after a kill.

A finished run leaves `seedS/ARM.json` with the numbers for tables and plots. If the command is
started again, only missing runs are made, and an interrupted run continues from its last
checkpoint.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time

from etils import epath

from benchmarks.claims.arms import ARMS, LONG, make_config, sft_config
from benchmarks.claims.theorem import measure
from benchmarks.explorations import run_arm
from igpo_jax.config import Config, SamplerConfig
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import write_whole
from igpo_jax.main import train
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.train.continued import as_json

THEOREM = "theorem"  # the run of claim 11
CURVES = ("rl/reward", "rl/all_wrong_before", "rl/all_wrong_after", "rl/extra_correct",
          "rl/answer_shown", "rl/grad_norm", "rl/entropy", "rl/hints_kept")  # fmt: skip
# By default glibc returns freed memory to the system at once. A training step then spends a third
# of its time on page faults (docs/LOG.md). A process reads these variables when it starts.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "33554432",
          "MALLOC_TOP_PAD_": "200000000"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
  """One run: an SFT stage ("sft:aligned"), an arm, or the measurement for the theorem.

  Attributes:
    name: name of the run.
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
    """The directory of the seed."""
    return self.workdir / f"seed{self.seed}"

  @property
  def result(self) -> epath.Path:
    """The file of the result."""
    return self.root / f"{self.name.replace(':', '_')}.json"

  @property
  def sft(self) -> str:
    """The SFT run that this is, or whose checkpoint it starts from."""
    stage, _, sft = self.name.partition(":")
    return sft if stage == "sft" else ARMS[self.name].sft

  @property
  def config(self) -> Config:
    """The config of the run."""
    stage, _, sft = self.name.partition(":")
    if stage == "sft":
      return sft_config(sft, self.seed, self.smoke)
    return make_config("igpo" if self.name == THEOREM else self.name, self.seed, self.smoke)


def finished(task: Task) -> dict | None:
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


def perform(task: Task) -> dict:
  """Runs or continues a task, writes its result to `task.result` and returns it."""
  began = time.perf_counter()
  config = task.config
  stage, _, sft = task.name.partition(":")
  if stage == "sft":
    result = run_sft(config, task.root / f"sft_{sft}", sft)
  elif task.name == THEOREM:
    result = measure(config, task.root / "sft_aligned", task.smoke)
  else:
    run = task.root / task.name
    summary = run_arm(config, run, task.root / f"sft_{task.sft}")
    result = {"eval": summary["eval"], "rl": summary["rl"], **curves(run)}
  result |= {"config": as_json(config), "seconds": time.perf_counter() - began}
  write_whole(task.result, json.dumps(result) + "\n")
  return result


def run_sft(config: Config, workdir: epath.Path, sft: str) -> dict:
  """Runs SFT. After SFT on verbose traces it is also evaluated on a canvas that is long enough."""
  result = {"eval": train(config, workdir)["eval"]}
  if sft == "verbose":
    longer = SamplerConfig(gen_length=LONG, block_length=config.sampler.block_length + 1,
                           steps=LONG)  # fmt: skip
    # In a copy: RL continues the run itself, and a workdir keeps only one last evaluation.
    copy = workdir.parent / f"{workdir.name}_long"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy)
    whole = train(dataclasses.replace(config, stages=("eval",), sampler=longer), copy)
    result["long"] = whole["eval"]["eval/test"]
    shutil.rmtree(copy)
  return result


def curves(workdir: epath.Path) -> dict:
  """The curves of a run, read from its metrics.jsonl.

  Returns:
    "curves": metric -> a value for each RL step; "accuracy": [[step, accuracy], ...];
    "step_seconds": seconds of all RL steps.
  """
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rl = [row for row in rows if row["stage"] == "rl"]
  name = "eval/test/accuracy"
  start = [[0, row[name]] for row in rows if row["stage"] == "sft" and name in row]
  accuracy = start[-1:] + [[row["step"], row[name]] for row in rl if name in row]
  return {
    "curves": {metric: [row.get(metric) for row in rl] for metric in CURVES},
    "accuracy": accuracy,
    "step_seconds": sum(row["time/step_seconds"] for row in rl),
  }


def run_all(tasks: list[Task], jobs: int) -> dict[tuple[str, int], dict]:
  """Runs all tasks that are not finished, SFT runs first, `jobs` at a time.

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
      phase = [task for task in open_ if task.name.startswith("sft:") is first]
      futures = {pool.submit(perform, task): task for task in phase}
      for done in concurrent.futures.as_completed(futures):
        task = futures[done]
        result = results[task.name, task.seed] = done.result()
        left = sum(value is None for value in results.values())
        print(f"{task.name}, seed {task.seed}: {result['seconds']:.0f} s; {left} runs left",
              flush=True)  # fmt: skip
  return results


def begin_worker(numbers, cores: list[int], jobs: int, parent: int) -> None:
  """Starts a worker process: gives it its own cores, and ends it when its parent ends."""
  number = numbers.get()
  if cores and jobs > 1:
    os.sched_setaffinity(0, cores[number % len(cores) :: jobs])

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # the parent was killed; a new command may now write to the workdir

  threading.Thread(target=watch, daemon=True).start()
  use_cache()
