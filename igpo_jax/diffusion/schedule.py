"""How many positions a row commits at each denoising step (docs/method.md#sampling)."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.types import Array


def commits_at(masked: Array, steps: int, i: Array) -> Array:
  """The row's share of its masks at step i of a block's `steps`: i32[B].

  `masked` i32[B] is what the block held when it began. The remainder goes to the
  first steps, so a row with fewer masks than steps commits one at a time and is
  then left alone. Example: 5 masks in 3 steps are committed 2, 2, 1.
  """
  return masked // steps + (i < masked % steps).astype(jnp.int32)


def forwards_needed(masked: Array, steps: int) -> Array:
  """Steps in which any row of the batch commits anything: i32[]."""
  return jnp.minimum(jnp.max(masked), steps)
