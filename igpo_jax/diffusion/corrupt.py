"""Forward masking: which response tokens are hidden, for the NELBO and for estimators."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array


def mask_probability(t: Array, eps: float) -> Array:
  """p = (1 - eps) t + eps, never 0, so that 1/p is bounded (LLaDA's training code)."""
  return (1 - eps) * t + eps


def mask_rows(key: Array, tokens: Array, response: Array, mask_id: int, eps: float):
  """Masks each response token of a row independently with the row's own probability.

  Args:
    key: one PRNG key.
    tokens: i32[B,T].
    response: bool[B,T], what may be masked; the prompt never is.
    mask_id: the absorbing token.
    eps: see `mask_probability`; t ~ U(0,1) per row.

  Returns:
    (noisy i32[B,T], masked bool[B,T], p f32[B]).
  """
  key_t, key_mask = jax.random.split(key)
  p = mask_probability(jax.random.uniform(key_t, (tokens.shape[0],)), eps)
  masked = response & (jax.random.uniform(key_mask, tokens.shape) < p[:, None])
  return jnp.where(masked, mask_id, tokens), masked, p
