"""The progress display of a stage: its steps, the slices of a rollout, programs being compiled.

On a terminal it is a bar of at most 80 columns. Elsewhere, such as in the log of a job, it is plain
lines, at most one every LINE_SECONDS. Only process 0 prints.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from igpo_jax.config import Config, ModelConfig, SamplerConfig
from igpo_jax.io.amounts import in_time
from igpo_jax.models.flops import forward_flops
from igpo_jax.parallel.tpu import CHIPS
from igpo_jax.rl.sampling import DeviceClock
from igpo_jax.train.runlog import print_once
from igpo_jax.train.stop import StopSignal

LINE_SECONDS = 30.0
RECENT_STEPS = 20  # whose median is the rate
BAR = "{name} {{n_fmt}}/{{total_fmt}} |{{bar:8}}| {text}"


class Display:
  """A progress bar on a terminal; elsewhere a line now and then.

  Args:
    name: name of the items that are counted.
    total: number of items.
    done: number of items that are done already.
    leave: whether a finished bar stays on the screen.
  """

  def __init__(self, name: str, total: int, done: int = 0, leave: bool = True):
    self.name, self.total, self.done = name, total, done
    writes = jax.process_index() == 0
    self._lines = writes and not sys.stderr.isatty()
    self._bar = tqdm(
      total=total, initial=done, file=sys.stderr, leave=leave, ncols=self._columns(),
      bar_format=BAR.format(name=name, text=""), disable=not writes or self._lines,
    )  # fmt: skip
    self._said = time.perf_counter()

  def show(self, text: str, done: int | None = None) -> None:
    """Shows `text` and the items done. A line is printed every LINE_SECONDS and at the end only."""
    moved, self.done = done is not None and done != self.done, self.done if done is None else done
    self._bar.bar_format = BAR.format(name=self.name, text=re.sub(r"[{}]", r"\g<0>\g<0>", text))
    self._bar.n, self._bar.ncols = self.done, self._columns()
    self._bar.refresh()
    finished = moved and self.done == self.total
    if self._lines and (finished or time.perf_counter() - self._said >= LINE_SECONDS):
      self._said = time.perf_counter()
      print_once(f"{self.name} {self.done}/{self.total}: {text}")

  @staticmethod
  def _columns() -> int:
    return shutil.get_terminal_size((80, 24)).columns - 1

  def close(self) -> None:
    """Ends the line of the bar."""
    self._bar.close()


def track(items: Iterable[Any], name: str, first: str = "") -> Iterator[Any]:
  """Yields the items of a sized iterable and shows the progress.

  Args:
    items: the items.
    name: name for the display.
    first: printed before the first item, which compiles a program; "" for nothing.
  """
  items = list(items)
  if first and items:
    print_once(first)
  display = Display(name, len(items), leave=False)
  seconds: list[float] = []
  with contextlib.closing(display):
    for number, item in enumerate(items, start=1):
      began = time.perf_counter()
      yield item
      seconds.append(time.perf_counter() - began)
      display.show(pace(seconds, len(items) - number, "batch", bool(first)), number)


def pace(seconds: list[float], left: int, unit: str, compiles: bool = True) -> str:
  """The median time of an item, and the time that the items left will take, as text.

  Args:
    seconds: times of the items so far.
    left: number of items left.
    unit: name of an item.
    compiles: whether the first item compiles a program. Then it is not counted once there is
      another.

  Example: `pace([60.0, 2.0, 2.0], 5, "step") == "2 s/step, 10 s left"`.
  """
  if not seconds:
    return ""
  usual = statistics.median(seconds[compiles:][-RECENT_STEPS:] or seconds)
  warm = " (with compiling)" if compiles and len(seconds) == 1 else ""
  return f"{usual:.3g} s/{unit}{warm}, {in_time(usual * left)} left"


def denoising_flops(
  model: ModelConfig, sampler: SamplerConfig, rows: int, prompt_length: int, commit_step: np.ndarray
) -> int:
  """FLOPs of denoising, counted from the steps in which each row committed tokens.

  Exact without a cache. With one, a call on the whole canvas is counted for each of a row's blocks,
  and calls on the block's window for its other steps.

  Args:
    model, sampler: the options.
    rows: number of rows, over all processes.
    prompt_length: positions of the padded prompts.
    commit_step: i32[B,L], of those of them that stand for all.
  """
  if not len(commit_step):
    return 0
  of_row = lambda x: sum(len(np.unique(row[row >= 0])) for row in x)
  steps = of_row(commit_step)
  blocks = of_row(np.where(commit_step < 0, -1, commit_step // sampler.steps_per_block))
  block, total = sampler.block_length, prompt_length + sampler.gen_length
  call = lambda width: forward_flops(model, 1, width, total, block, read=block)
  window = block if sampler.cache == "dual" else (sampler.gen_length + block) // 2
  if sampler.cache == "none":
    flops = steps * call(total)
  else:
    flops = blocks * call(total) + (steps - blocks) * call(window)
  return (2 if sampler.cfg_scale > 0 else 1) * flops * rows // len(commit_step)


class Progress:
  """The progress of a run: the steps of a stage, and what happens within a step.

  Args:
    config: gives the shapes from which FLOPs are counted.
    workdir: the times of compilations are kept there (`compile_seconds.json`).
  """

  def __init__(self, config: Config, workdir: epath.Path):
    self.config = config
    self._file = workdir / "compile_seconds.json"
    self._compiled: dict[str, float] = {}
    self._last_time: dict[str, float] | None = None
    self._display: Display | None = None
    self._seconds: list[float] = []
    self._expected = 0
    self._rows = self._rows_done = self._tokens = self._flops = 0
    self._began = 0.0

  def begin(self, name: str, total: int, done: int, programs: int) -> None:
    """Call it when a stage begins at step `done`; its first step compiles `programs` programs."""
    self._display, self._seconds = Display(name, total, done), []
    self._expected, self._compiled = programs, {}

  def close(self) -> None:
    """Call it when the stage has ended."""
    if self._display:
      self._display.close()
    self._display = None

  def step(self, done: int, seconds: float, shown: dict[str, float]) -> None:
    """Call it after a step of `seconds`; `shown` are the metrics to display."""
    self._seconds.append(seconds)
    if self._display:
      metrics = [f"{name}={value:.3g}" for name, value in shown.items()]
      left = self._display.total - done
      self._display.show(", ".join([pace(self._seconds, left, "step"), *metrics]), done)

  @contextlib.contextmanager
  def program(self, name: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Put it around a call of a jitted program: if the shape is new, it prints that it compiles."""
    key = f"{name} {'x'.join(map(str, shape))}"
    if key in self._compiled or not self._display:
      yield
      return
    number, began = len(self._compiled) + 1, time.perf_counter()
    usual = self._usual(key)
    of = f" of {self._expected} or more" if number <= self._expected else ""
    last = f", took {in_time(usual)} last time" if usual else ""
    print_once(f"{self._display.name}: compiling {key} (program {number}{of}){last}")
    yield
    self._compiled[key] = time.perf_counter() - began
    self._began += self._compiled[key]  # no part of how fast a rollout is
    self._keep()

  def _usual(self, key: str) -> float:
    """Seconds that the compilation took in an earlier start; 0 if there was none."""
    if self._last_time is None:
      try:
        found = json.loads(self._file.read_text()) if jax.process_index() == 0 else {}
      except (OSError, ValueError):
        found = {}
      self._last_time = found if isinstance(found, dict) else {}
    value = self._last_time.get(key, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0

  def _keep(self) -> None:
    if jax.process_index() == 0:
      known = {**(self._last_time or {}), **self._compiled}
      # A run does not end because this could not be written.
      with contextlib.suppress(OSError):
        self._file.write_text(json.dumps(known, indent=1))

  def sampling(self, rows: int) -> None:
    """Call it before a rollout of `rows` rows, over all processes."""
    self._rows, self._rows_done, self._tokens, self._flops = rows, 0, 0, 0
    self._began = time.perf_counter()

  def sampled(self, commit_step: np.ndarray, prompt_length: int) -> None:
    """Call it when rows of a rollout are done; `commit_step` is i32[B,L] of this process's."""
    processes = jax.process_count()
    rows = len(commit_step) * processes
    self._rows_done += rows
    self._tokens += int(np.sum(commit_step >= 0)) * processes
    self._flops += denoising_flops(
      self.config.model, self.config.sampler, rows, prompt_length, commit_step
    )
    if self._display:
      self._display.show(self.slice_text(time.perf_counter() - self._began))

  def slice_text(self, seconds: float) -> str:
    """The text for a rollout that has taken `seconds` so far."""
    seconds = max(seconds, 1e-9)
    left = seconds * max(self._rows - self._rows_done, 0) / max(self._rows_done, 1)
    rate = self._flops / seconds
    device = jax.devices()[0]
    chip = CHIPS.get(device.device_kind)
    peak = f" ({rate / jax.device_count() / chip.flops:.0%} of peak)" if chip else ""
    return (
      f"rollout {self._rows_done}/{self._rows} rows, {self._tokens / seconds:.3g} tokens/s,"
      f" {in_time(left)} left, {rate / 1e12:.3g} TFLOP/s{peak}"
    )


class StepClock(DeviceClock):
  """Shows the progress of a step, and stops it between two slices of its rollout on a signal."""

  def __init__(self, stop: StopSignal, progress: Progress):
    super().__init__()
    self.stop, self.progress = stop, progress

  def program(self, name, shape):
    return self.progress.program(name, shape)

  def sampling(self, rows):
    self.progress.sampling(rows)

  def sampled(self, commit_step, prompt_length):
    self.progress.sampled(commit_step, prompt_length)
    self.stop.check_soon()


def device_memory() -> dict[str, float]:
  """Memory in use and at the peak, in GiB, of this process's fullest device; {} if not known."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  names = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
  return {
    ours: max(s[theirs] for s in stats) / 2**30
    for ours, theirs in names.items()
    if all(theirs in s for s in stats)
  }


class Profiler:
  """Writes an xprof trace of some steps of a stage to WORKDIR/profile/STAGE.

  Args:
    folder: folder for the trace.
    steps: number of steps to trace; 0: none. The stage's first two steps in this process, which
      compile programs, are left out.
  """

  SKIPPED = 2

  def __init__(self, folder: epath.Path, steps: int):
    self.folder, self.steps = folder, steps
    self._made, self._on = 0, False

  def step(self) -> None:
    """Call it before each step of the stage."""
    if self.steps and self._made == self.SKIPPED:
      jax.profiler.start_trace(str(self.folder))
      self._on = True
    elif self._made == self.SKIPPED + self.steps:
      self.close()
    self._made += 1

  def close(self) -> None:
    """Ends the trace, if one is being written."""
    if self._on:
      jax.profiler.stop_trace()
      print_once(f"profile written to {self.folder}")
    self._on = False
