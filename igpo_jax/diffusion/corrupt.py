"""Forward masking: tokens of a row are replaced by masks, for the NELBO and for estimators."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array


def mask_probability(t: Array, eps: float) -> Array:
  """The masking probability at time t: p = (1 - eps) t + eps (LLaDA's training code).

  It is at least eps, so the loss's factor 1/p is bounded.
  """
  return (1 - eps) * t + eps


def random_masks(key: Array, shape: tuple[int, ...], eps: float = 0.0) -> tuple[Array, Array]:
  """Masks each position of a row independently with the row's own probability.

  Args:
    key: one PRNG key.
    shape: (rows B, positions T).
    eps: see `mask_probability`. Each row draws its own t ~ U(0,1); with eps=0, p is t itself.

  Returns:
    (masked bool[B,T]; p f32[B,1], the probability of each row).
  """
  key_t, key_mask = jax.random.split(key)
  p = jax.random.uniform(key_t, (shape[0], 1))
  if eps:
    p = mask_probability(p, eps)
  return jax.random.uniform(key_mask, shape) < p, p


def mask_rows(key: Array, tokens: Array, response: Array, mask_id: int, eps: float):
  """Masks the response of each row at random, as in SFT.

  Args:
    key: one PRNG key.
    tokens: i32[B,T], the clean rows.
    response: bool[B,T], the positions that may be masked; False on the prompt.
    mask_id: id of the mask token.
    eps: see `mask_probability`. Each row draws its own t ~ U(0,1).

  Returns:
    (noisy i32[B,T], the rows with masks; masked bool[B,T], where they are; p f32[B], the
    probability of each row).
  """
  drawn, p = random_masks(key, tokens.shape, eps)
  masked = response & drawn
  return jnp.where(masked, mask_id, tokens), masked, p[:, 0]
