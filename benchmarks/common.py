"""Parts that all benchmarks use: the model, the machine's peak, interleaved timing, JSON.

A number can only be compared with others of its own run. So every benchmark also measures how fast
the machine multiplies matrices. It runs its cases in turns (A B C A B C ...): a machine that slows
down slows all of them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from igpo_jax.config import ModelConfig

# The model all peers were timed with: 60,039,680 parameters.
BENCH_MODEL = ModelConfig(
  d_model=512, n_layers=8, n_heads=8, mlp_hidden=1536, vocab_size=32_000, mask_id=31_999, eos_id=0
)
TINY_MODEL = ModelConfig(
  d_model=16, n_layers=2, n_heads=2, mlp_hidden=32, vocab_size=64, mask_id=63, eos_id=0
)
LLADA_8B = ModelConfig(
  d_model=4096, n_layers=32, n_heads=32, mlp_hidden=12_288, vocab_size=126_464, mask_id=126_336,
  eos_id=126_081, dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
MODELS = {"bench": BENCH_MODEL, "tiny": TINY_MODEL, "8b": LLADA_8B}

# [rows, in, out] of matrix products: those of the bench model and its head, and two large ones.
CPU_SHAPES = (
  (2048, 512, 512), (2048, 512, 1536), (256, 512, 32_000), (1024, 1024, 1024), (2048, 2048, 2048),
)  # fmt: skip
ACCELERATOR_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (16_384, 4096, 12_288))


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options that every benchmark takes."""
  parser.add_argument("--model", choices=sorted(MODELS), default="bench")
  parser.add_argument("--dtype", help="compute and parameters; default: the model's own")
  parser.add_argument("--attention", help="see ModelConfig.attention; default: the model's own")
  parser.add_argument("--repeats", type=int, default=3, help="timed runs of each case")
  parser.add_argument("--output", help="also write the JSON object to this file")


def model_config(args: argparse.Namespace) -> ModelConfig:
  """The model that the options ask for."""
  config = MODELS[args.model]
  if args.dtype:
    config = dataclasses.replace(config, dtype=args.dtype, param_dtype=args.dtype)
  if args.attention:
    config = dataclasses.replace(config, attention=args.attention)
  return config


def spread(values: list[float]) -> dict[str, float]:
  """Minimum, median and maximum."""
  return {"min": min(values), "median": statistics.median(values), "max": max(values)}


class MatmulPeak:
  """The machine's peak for matrix products: the fastest of a few shapes, over all samples.

  Call `sample()` between the cases, so that the peak is measured in the same minutes.

  Args:
    dtype: of the matrices.
    shapes: (rows, in, out) of the products; default: shapes that suit the platform.
    seconds: duration of one sample of one shape.

  Attributes:
    best: "ROWSxINxOUT" -> the highest FLOPs per second so far.
  """

  def __init__(self, dtype: str, shapes=None, seconds: float = 0.1):
    on_cpu = jax.default_backend() == "cpu"
    self.dtype, self.seconds = dtype, seconds
    self.shapes = shapes or (CPU_SHAPES if on_cpu else ACCELERATOR_SHAPES)
    self.best: dict[str, float] = {}
    self._runs = {shape: self._compile(*shape) for shape in self.shapes}

  def _compile(self, rows: int, fan_in: int, fan_out: int):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, fan_in)).astype(self.dtype)
    up = (jax.random.normal(keys[1], (fan_in, fan_out)) / fan_in**0.5).astype(self.dtype)
    down = (jax.random.normal(keys[2], (fan_out, fan_in)) / fan_out**0.5).astype(self.dtype)

    @jax.jit
    def run(times):  # two products, so that the result is an input for the next round
      return jax.lax.fori_loop(0, times, lambda _, x: (x @ up) @ down, x)

    def rate(times: int) -> tuple[float, float]:
      began = time.perf_counter()
      jax.block_until_ready(run(times))
      seconds = time.perf_counter() - began
      return 4 * rows * fan_in * fan_out * times / seconds, seconds

    rate(1)
    times = max(1, int(self.seconds / max(rate(1)[1], 1e-6)))
    return lambda: rate(times)[0]

  def sample(self) -> None:
    """Times every shape once more, for about `seconds` each."""
    for shape, rate in self._runs.items():
      name = "x".join(map(str, shape))
      self.best[name] = max(self.best.get(name, 0.0), rate())

  @property
  def flops_per_second(self) -> float:
    """The highest FLOPs per second of all samples."""
    return max(self.best.values())


def matmul_peak(args: argparse.Namespace, config: ModelConfig) -> MatmulPeak:
  """The peak for the run's compute dtype. If the model is "tiny", it is that of a small product."""
  return MatmulPeak(config.dtype, ((64, 64, 64),) if args.model == "tiny" else None)


class CompileCounter:
  """Counts the programs that XLA compiles from now on, and the seconds that it takes.

  Attributes:
    count: number of programs.
    seconds: seconds of all compilations.
    names: function -> number of its programs.
  """

  EVENT = "/jax/core/compile/backend_compile_duration"

  def __init__(self):
    self.count, self.seconds = 0, 0.0
    self.names: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration: float, **kwargs) -> None:
    if event == self.EVENT:
      self.names[kwargs.get("fun_name", "")] += 1
      self.count += 1
      self.seconds += duration


def time_cases(
  cases: dict[str, Callable[[], Any]], repeats: int, peak: MatmulPeak, counter: CompileCounter
) -> tuple[dict[str, list[float]], dict[str, Any]]:
  """Times cases in turns. Compile them before.

  Every other round runs backwards, so that a case does not always follow the same other case.

  Args:
    cases: name -> a function that runs the case and returns arrays to wait for.
    repeats: number of rounds.
    peak: is sampled before each round.
    counter: counts compilations.

  Returns:
    (seconds of each run of each case, facts of the run for its JSON). The facts are the machine's
    peak and the number of compilations. Those that happened while timing are counted separately;
    there should be none.
  """
  before = counter.count
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  for number in range(repeats):
    peak.sample()
    for name in reversed(cases) if number % 2 else cases:
      began = time.perf_counter()
      jax.block_until_ready(cases[name]())
      seconds[name].append(time.perf_counter() - began)
  peak.sample()
  return seconds, {
    "peak_flops_per_second": peak.flops_per_second,
    "peak_by_shape": peak.best,
    "compilations": counter.count,
    "compile_seconds": counter.seconds,
    "compilations_while_timing": counter.count - before,
  }


def compile_facts(lower, *args, **kwargs) -> tuple[Any, dict[str, float]]:
  """Compiles ahead of time: (the compiled program, its facts: seconds to compile, bytes of memory).

  Args:
    lower: a jitted function, or the `lower` of one.
    *args, **kwargs: the arguments for which it is lowered.
  """
  began = time.perf_counter()
  compiled = getattr(lower, "lower", lower)(*args, **kwargs).compile()
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  return compiled, {
    "compile_seconds": round(seconds, 3),
    "temp_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "planned_bytes": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  }


def peak_memory() -> dict[str, int]:
  """Peak resident bytes of this process, and peak bytes of the device if it reports them."""
  unit = 1 if sys.platform == "darwin" else 1024
  facts = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
  stats = jax.devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    facts["peak_device_bytes"] = stats["peak_bytes_in_use"]
  return facts


def machine() -> dict[str, Any]:
  """Facts about the machine and the versions, for the JSON."""
  cpu = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else cpu
  return {
    "cpu": cpu,
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "load_at_end": round(os.getloadavg()[0], 2),
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def emit(result: dict[str, Any], output: str | None = None) -> None:
  """Prints a result, with facts about memory and machine, as one JSON object.

  Args:
    result: of the benchmark.
    output: a file to write the object to as well.
  """
  text = json.dumps({**result, "memory": peak_memory(), "machine": machine()}, indent=2)
  print(text)
  if output:
    pathlib.Path(output).write_text(text + "\n")


def count_parameters(params: Any) -> int:
  """The number of parameters in a tree."""
  return sum(x.size for x in jax.tree.leaves(params))


def random_prompts(key: jax.Array, rows: int, length: int, vocab_size: int) -> jax.Array:
  """i32[rows, length] tokens that are neither the first nor the last of the vocabulary."""
  return jax.random.randint(key, (rows, length), 1, vocab_size - 1, jnp.int32)
