"""Masked arithmetic: sums and means over some positions, and the k largest allowed values."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from igpo_jax.types import AnyArray, Array


def masked_sum(
  x: Shaped[AnyArray, "*shape"], mask: Bool[AnyArray, "*shape"], axis: int | None = None
) -> Array:
  """The sum of `x` where `mask` is True; a NaN or infinity elsewhere does not leak in.

  Args:
    x: numbers or booleans of any shape.
    mask: bool, of the shape of `x`.
    axis: the axis to sum over; None sums everything to a scalar.
  """
  return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(
  x: Shaped[AnyArray, "*shape"], mask: Bool[AnyArray, "*shape"], axis: int | None = None
) -> Array:
  """The mean of `x` where `mask` is True; 0 where it is True nowhere. Arguments as `masked_sum`.

  Example: `masked_mean([1., 5., 9.], [True, False, True]) == 5.`
  """
  count = jnp.sum(mask, axis=axis)
  return masked_sum(x, mask, axis) / jnp.maximum(count, 1).astype(jnp.float32)


def topk_mask(
  values: Float[AnyArray, "B L"], allowed: Bool[AnyArray, "B L"], k: Int[AnyArray, " B"]
) -> Bool[Array, "B L"]:
  """Marks the k largest allowed values of each row.

  Args:
    values: f32[B,L].
    allowed: bool[B,L].
    k: i32[B]. A row with fewer than k allowed values has all of them marked.

  Returns:
    bool[B,L]. Of equal values the earlier position is marked first, so the result is deterministic.

  Example: `topk_mask([[3., 9., 5.]], [[True, False, True]], [1]) == [[False, False, True]]`
  """
  order = jnp.argsort(jnp.where(allowed, -values, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1, stable=True)
  return jnp.asarray(allowed) & (rank < k[:, None])
