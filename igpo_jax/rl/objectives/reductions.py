"""Sums over views and positions that several objectives take."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.rl.estimate import Estimate
from igpo_jax.types import Array


def weighted(policy: Estimate, other: Estimate | None, kept: Array) -> Array:
  """Weight times log p (less `other`'s), where a view scores a kept position; else 0.

  Args:
    policy, other: [P,R,G,L] under the same views.
    kept: bool[P,G,L].

  Returns:
    f32[P,R,G,L].
  """
  logp = policy.logp if other is None else policy.logp - other.logp
  scored = policy.views.scored & kept[:, None]
  logp = jnp.where(scored, logp, 0.0)
  return logp if policy.views.weights is None else logp * policy.views.weights


def per_row(policy: Estimate, other: Estimate | None, kept: Array) -> Array:
  """A completion's estimate (less `other`'s), f32[P,G]."""
  return jnp.sum(weighted(policy, other, kept), axis=(1, 3))


def per_draw(policy: Estimate, other: Estimate | None, kept: Array) -> Array:
  """The estimate of each independent draw alone, f32[P,D,G]: `per_row` is their mean."""
  terms = jnp.sum(weighted(policy, other, kept), axis=3)  # [P,R,G]
  p, _, g = terms.shape
  draws = policy.views.draws
  return draws * jnp.sum(terms.reshape(p, draws, -1, g), axis=2)


def k2(logp: Array, other: Array) -> Array:
  """(log p - log p')^2 / 2."""
  return 0.5 * (logp - other) ** 2


def k3(logp: Array, other: Array) -> Array:
  """exp(d) - d - 1 with d = log p' - log p."""
  d = other - logp
  return jnp.exp(d) - d - 1


def clipped_loss(
  ratio: Array, advantage: Array, eps_low: float, eps_high: float, dual: float | None = None
) -> tuple[Array, Array]:
  """(-min(rho A, clip(rho) A), which of them are cut off), elementwise.

  Args:
    dual: c > 1; where A < 0 the loss is at most -c A (dual clip). None: unbounded.
  """
  advantage = jnp.broadcast_to(advantage, ratio.shape)
  plain = -ratio * advantage
  loss = jnp.maximum(plain, -jnp.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage)
  if dual is not None:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)
  return loss, jax.lax.stop_gradient(loss != plain)
