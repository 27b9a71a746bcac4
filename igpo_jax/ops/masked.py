"""Masked arithmetic, once: means over what counts, and the k best of what is allowed."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.types import Array


def masked_sum(x: Array, mask: Array, axis=None) -> Array:
  """Sum of x where mask; a NaN or infinity outside the mask does not leak in."""
  return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: Array, mask: Array, axis=None) -> Array:
  """Mean of x where mask; 0 where the mask is empty.

  Example: `masked_mean([1., 5., 9.], [True, False, True]) == 5.`
  """
  count = jnp.sum(mask, axis=axis)
  return masked_sum(x, mask, axis) / jnp.maximum(count, 1).astype(jnp.float32)


def topk_mask(values: Array, allowed: Array, k: Array) -> Array:
  """The k largest allowed values of each row.

  Args:
    values: f32[B,L].
    allowed: bool[B,L].
    k: i32[B]; more than the row allows takes all that it allows.

  Returns:
    bool[B,L]. Ties go to the earlier position, so the result is deterministic.

  Example: `topk_mask([[3., 9., 5.]], [[True, False, True]], [1]) == [[False, False, True]]`
  """
  order = jnp.argsort(jnp.where(allowed, -values, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1, stable=True)
  return allowed & (rank < k[:, None])
