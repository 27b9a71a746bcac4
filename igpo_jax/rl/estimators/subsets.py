"""Random subsets of positions and spread-out counts, which several estimators draw."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from igpo_jax.ops.masked import topk_mask
from igpo_jax.types import Array


def random_subset(key: Array, allowed: Array, count: Array) -> Array:
  """Draws `count` of the allowed positions of each row; every such subset is equally likely.

  Args:
    key: one PRNG key.
    allowed: bool[...,L].
    count: i32[...]. A row with fewer allowed positions has all of them drawn.

  Returns:
    bool[...,L].
  """
  flat = allowed.reshape(-1, allowed.shape[-1])
  values = jax.random.uniform(key, flat.shape)
  return topk_mask(values, flat, count.reshape(-1)).reshape(allowed.shape)


def prompt_holes(key: Array, probability: float, shape: tuple[int, ...], length: int) -> Array:
  """Draws prompt positions to mask, each with the given probability.

  Draws are keyed by the distance from the prompt's end, so that padding on the left does not change
  them.

  Args:
    key: one PRNG key.
    probability: in [0, 1].
    shape: the leading dimensions of the result.
    length: Tp, positions of the padded prompt.

  Returns:
    bool[*shape,Tp].
  """
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(length)[::-1])
  drawn = jax.vmap(lambda k: jax.random.bernoulli(k, probability, shape))(keys)
  return jnp.moveaxis(drawn, 0, -1)


def spread(key: Array, cells: int) -> Array:
  """f32[cells] in [0,1): one random offset, then equal steps around the circle.

  Each number alone is uniform, and together they cover [0,1) evenly: a stratified draw.
  """
  offset = jax.random.uniform(key)
  return jnp.minimum((offset + jnp.arange(cells) / cells) % 1.0, 1.0 - 2.0**-24)


def table(length: int, value: Callable[[int], float]) -> list[float]:
  """[value(0), ..., value(length)] in double precision, a table to be indexed by |o|.

  It is there because floor(t * n) in float32 is off by one for some t.
  """
  return [value(n) for n in range(length + 1)]
