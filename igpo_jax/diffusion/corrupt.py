"""Forward masking: which tokens of a row are hidden, for the NELBO and for estimators."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array


def mask_probability(t: Array, eps: float) -> Array:
  """p = (1 - eps) t + eps, never 0, so that 1/p is bounded (LLaDA's training code)."""
  return (1 - eps) * t + eps


def random_masks(key: Array, shape: tuple[int, ...], eps: float = 0.0) -> tuple[Array, Array]:
  """Masks each position of a row independently with the row's own probability.

  Args:
    key: one PRNG key.
    shape: (rows B, positions T).
    eps: see `mask_probability`; t ~ U(0,1) a row. 0: p is t itself.

  Returns:
    (masked bool[B,T], p f32[B,1]).
  """
  key_t, key_mask = jax.random.split(key)
  p = jax.random.uniform(key_t, (shape[0], 1))
  if eps:
    p = mask_probability(p, eps)
  return jax.random.uniform(key_mask, shape) < p, p


def mask_rows(key: Array, tokens: Array, response: Array, mask_id: int, eps: float):
  """`random_masks` of each row's response.

  Args:
    key: one PRNG key.
    tokens: i32[B,T].
    response: bool[B,T], what may be masked; the prompt never is.
    mask_id: the absorbing token.
    eps: see `mask_probability`; t ~ U(0,1) per row.

  Returns:
    (noisy i32[B,T], masked bool[B,T], p f32[B]).
  """
  drawn, p = random_masks(key, tokens.shape, eps)
  masked = response & drawn
  return jnp.where(masked, mask_id, tokens), masked, p[:, 0]
