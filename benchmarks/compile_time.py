"""Time to compile an update for two depths of the model: `python -m benchmarks.compile_time`.

The layers are one scanned block, so 32 layers should compile as fast as 8. Tracing and XLA's
compilation of the policy update are timed, at the width of the bench model, with the two depths in
turns. No program is run. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax

from benchmarks.common import BENCH_MODEL, TINY_MODEL, emit, spread
from igpo_jax import cli
from igpo_jax.config import default_config, freeze
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.train.ahead_of_time import programs

DEPTHS = (8, 32)


def update_program(width: str, layers: int):
  """The policy update of a model with this many layers, ready to be lowered."""
  config = default_config()
  config.stages = ("rl",)
  config.data.rl = "none"
  config.data.prompt_buckets = (128,)
  config.sampler.gen_length = 128
  config.sampler.steps = 64
  config.rl.prompts_per_step = 1
  config = freeze(config)
  model = {"bench": BENCH_MODEL, "tiny": TINY_MODEL}[width]
  model = dataclasses.replace(model, n_layers=layers, remat="full")
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return programs(dataclasses.replace(config, model=model), mesh)["update"]


def seconds_to_compile(width: str, layers: int) -> float:
  """Seconds for tracing, lowering and compiling, with empty caches."""
  program = update_program(width, layers)
  jax.clear_caches()
  began = time.perf_counter()
  program.lower().compile()
  return time.perf_counter() - began


def measure(width: str, repeats: int) -> dict:
  """Seconds for each depth, and the ratio of their medians, deep by shallow."""
  seconds: dict[int, list[float]] = {layers: [] for layers in DEPTHS}
  for _ in range(repeats):
    for layers in DEPTHS:
      seconds[layers].append(seconds_to_compile(width, layers))
  medians = [statistics.median(seconds[layers]) for layers in DEPTHS]
  return {
    "benchmark": "compile_time",
    "model": width,
    "seconds": {str(layers): spread(seconds[layers]) for layers in DEPTHS},
    "ratio": medians[1] / medians[0],
  }


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--model", choices=("bench", "tiny"), default="bench")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--output", help="also write the JSON object to this file")
  args = parser.parse_args()
  emit(measure(args.model, args.repeats), args.output)


if __name__ == "__main__":
  cli.run(main)
