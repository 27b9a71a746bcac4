"""Bidirectional attention over grouped key-value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array


def attend(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
  """Bidirectional attention; every query sees every valid key.

  Args:
    q: [B,t,H,E] queries.
    k: [B,T,K,E] keys; key-value head j serves query heads j*H/K .. (j+1)*H/K - 1.
    v: [B,T,K,E] values.
    valid: bool[B,T], False on keys nobody may see; None where all are valid.

  Returns:
    [B,t,H,E]. A row without any valid key gets the mean of its values, not NaN.
  """
  b, t, h, e = q.shape
  kv_heads = k.shape[2]
  q = q.reshape(b, t, kv_heads, h // kv_heads, e) * (e**-0.5)
  scores = jnp.einsum("btkge,bske->bkgts", q, k, preferred_element_type=jnp.float32)
  if valid is not None:
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(valid[:, None, None, None, :], scores, lowest)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bkgts,bske->btkge", weights, v).reshape(b, t, h, e)
