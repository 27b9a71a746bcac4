"""Rounding a float32 master to bfloat16 by chance, so that small updates show in the mean.

Near 0.02 two bfloat16 numbers are 1.2e-4 apart: a weight that starts on one of them, as published
weights do, has to be moved by half of that, a hundred updates at 5e-7, before rounding to the
nearest shows any of it. Rounded up or down by chance, in proportion to where it lies, the copy is
the master in the mean, for some noise (docs/scaling.md has the numbers).

The chance is one threshold for each weight, drawn from a key. While the key stays, a weight's copy
changes exactly when the master crosses its threshold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array

DROPPED = 16  # low bits of a float32 that a bfloat16 does not have


def stochastic_round(x: Array, key: Array) -> Array:
  """x f32[...] as bf16[...]: one of its two neighbours, with x itself as the mean.

  What bfloat16 holds exactly stays as it is; what is not finite is rounded as usual. The same key
  gives the same thresholds, on every device mesh.
  """
  threshold = jax.random.bits(key, x.shape, jnp.uint16)
  # Added to the bits that are cut off it carries into the last one kept, with the chance
  # cut off / 2**16: away from zero, as bits count magnitudes.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + threshold.astype(jnp.uint32)
  kept = (bits >> DROPPED).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


@jax.custom_jvp
def read_as(master: Array, copy: Array) -> Array:
  """The value is `copy`, a rounded `master`; the gradient goes to `master` as through a cast."""
  del master
  return copy


@read_as.defjvp
def _read_as_jvp(primals, tangents):
  _, copy = primals
  return copy, tangents[0].astype(copy.dtype)
