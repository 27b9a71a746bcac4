"""How much of small updates survives in a bfloat16 copy of float32 weights, for two roundings.

    python -m benchmarks.rounding [--width=4096] [--outputs=4096] [--rows=256] [--seeds=4]
        [--updates=4,20,100,800] [--rate=5e-7] [--scale=0.02] [--weights=bfloat16]

Full fine-tuning updates float32 weights, the master. Sampling and scoring read a copy that is
rounded to bfloat16. Take y = x W with W ~ N(0, scale) of shape [width, outputs]. W is moved by
`updates` steps of size `rate` in one direction: a random sign for each weight, as in Adam's first
steps. This compares the change of y through the rounded weights with the change through the
master. There are two kinds of rows x. "other" rows are independent of the update. The signs of
"own" rows are those of the update, as for the activations that the gradient came from, so every
weight changes y in the same direction.

  share        share of the master's change that the copy makes: regression of one on the other
  noise        root mean square of the rest of the copy's change, in units of y
  signal       root mean square of the master's change, in units of y
  rounding     root mean square of the error of y from rounding the weights, before any update
  activations  root mean square of the error from rounding y itself to bfloat16

"nearest" rounds to the nearest number. "stochastic" rounds up or down at random, unbiased, with the
same random numbers before and after the change; "fresh" draws new ones. --weights=bfloat16 begins
with numbers that bfloat16 can represent, as in published weights; --weights=float32 begins with any
numbers, as after training. Prints one JSON object with the mean, the least and the largest value
over seeds 0 to seeds - 1.
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.padding import numbers
from igpo_jax import cli
from igpo_jax.ops.rounding import stochastic_round

BF16 = jnp.bfloat16


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, shape, on_grid, scale):
  """f32[shape] normal weights with standard deviation `scale`; `on_grid`: rounded to bfloat16."""
  w = scale * jax.random.normal(key, shape)
  return w.astype(BF16).astype(jnp.float32) if on_grid else w


def measure(seed: int, args: argparse.Namespace) -> dict:
  """All numbers for one seed: kind of rows -> rounding -> number of updates -> values."""
  shape = (args.width, args.outputs)
  keys = jax.random.split(jax.random.key(seed), 6)
  w = draw(keys[0], shape, args.weights == "bfloat16", args.scale)
  column = jax.random.rademacher(keys[1], (args.width, 1), jnp.float32)
  row = jax.random.rademacher(keys[2], (1, args.outputs), jnp.float32)
  direction = column * row  # rank one, as the sign of a gradient x^T g of one row
  x = jax.random.normal(keys[3], (args.rows, args.width))
  inputs = {"other": x, "own": jnp.abs(x) * column.T}
  exact = lambda x, w: jnp.matmul(x, w, precision="highest")
  copies = {
    "nearest": (lambda w: w.astype(BF16), lambda w: w.astype(BF16)),
    "stochastic": (lambda w: stochastic_round(w, keys[4]),) * 2,
    "fresh": (lambda w: stochastic_round(w, keys[4]), lambda w: stochastic_round(w, keys[5])),
  }
  rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
  out = {}
  for name, x in inputs.items():
    y = exact(x, w)
    out[name] = {"y": rms(y), "activations": rms(y.astype(BF16).astype(jnp.float32) - y)}
    for how, (before, after) in copies.items():
      first = exact(x, before(w).astype(jnp.float32))
      found = {"rounding": rms(first - y)}
      for n in args.updates:
        moved = w + n * args.rate * direction
        effect = exact(x, moved - w)
        made = exact(x, after(moved).astype(jnp.float32)) - first
        share = jnp.sum(made * effect) / jnp.sum(effect**2)
        found[n] = {
          "share": float(share), "signal": rms(effect), "noise": rms(made - share * effect)
        }  # fmt: skip
      out[name][how] = found
  return out


def spread(values: list) -> object:
  """[mean, least, largest] for each leaf of several trees of the same structure."""
  if isinstance(values[0], dict):
    return {key: spread([value[key] for value in values]) for key in values[0]}
  digits = lambda x: float(f"{x:.4g}")
  return [digits(np.mean(values)), digits(min(values)), digits(max(values))]


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--width", type=int, default=4096)
  parser.add_argument("--outputs", type=int, default=4096)
  parser.add_argument("--rows", type=int, default=256)
  parser.add_argument("--seeds", type=int, default=4)
  parser.add_argument("--updates", default="4,20,100,800")
  parser.add_argument("--rate", type=float, default=5e-7)
  parser.add_argument("--scale", type=float, default=0.02)
  parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
  args = parser.parse_args()
  args.updates = numbers("updates", args.updates)
  found = spread([measure(seed, args) for seed in range(args.seeds)])
  print(json.dumps({"benchmark": "rounding", **vars(args), "mean_least_largest": found}, indent=2))


if __name__ == "__main__":
  cli.run(main)
