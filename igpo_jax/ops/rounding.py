"""Stochastic rounding of float32 parameters to bfloat16, so that small updates show on average.

Near 0.02, neighboring bfloat16 numbers are 1.2e-4 apart. A weight that starts at one of them, as
published weights do, has to move by half of that, a hundred updates at 5e-7, before rounding to the
nearest number shows any change. If it is rounded up or down by chance, in proportion to where it
lies between its neighbors, the copy equals the weight on average, at the price of some noise
(docs/scaling.md has the numbers).

Each weight has one threshold, drawn from a key. As long as the key stays the same, the copy of a
weight changes exactly when the weight crosses its threshold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array

DROPPED = 16  # low bits of a float32 that a bfloat16 does not have


def stochastic_round(x: Array, key: Array) -> Array:
  """Rounds each number to one of its two bfloat16 neighbors at random, so that the mean is x.

  Args:
    x: f32[...]. Numbers that bfloat16 can represent do not change. NaN and infinity stay so.
    key: one PRNG key. The same key gives the same thresholds on every device mesh.

  Returns:
    bf16[...].
  """
  threshold = jax.random.bits(key, x.shape, jnp.uint16)
  # Added to the bits that are cut off, the threshold carries into the last bit that is kept with
  # probability (bits cut off) / 2**16. That rounds away from zero, since bits count magnitudes.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + threshold.astype(jnp.uint32)
  kept = (bits >> DROPPED).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


@jax.custom_jvp
def read_as(master: Array, copy: Array) -> Array:
  """Returns `copy`, a rounded `master`, but passes the gradient to `master` as a cast would."""
  del master
  return copy


@read_as.defjvp
def _read_as_jvp(primals, tangents):
  _, copy = primals
  return copy, tangents[0].astype(copy.dtype)
