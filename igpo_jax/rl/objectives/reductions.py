"""Sums over views and positions, and loss terms, that several objectives share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.rl.estimate import Estimate
from igpo_jax.types import Array


def weighted(policy: Estimate, other: Estimate | None, kept: Array) -> Array:
  """Weight times log p (minus that of `other`) where a view scores a kept position; 0 elsewhere.

  Args:
    policy, other: estimates [P,R,G,L] in the same views; `other` may be None.
    kept: bool[P,G,L], positions that are in the loss after the entropy filter.

  Returns:
    f32[P,R,G,L].
  """
  logp = policy.logp if other is None else policy.logp - other.logp
  scored = policy.views.scored & kept[:, None]
  logp = jnp.where(scored, logp, 0.0)
  return logp if policy.views.weights is None else logp * policy.views.weights


def per_row(policy: Estimate, other: Estimate | None, kept: Array) -> Array:
  """The estimate of each completion (minus that of `other`): f32[P,G]. Arguments as `weighted`."""
  return jnp.sum(weighted(policy, other, kept), axis=(1, 3))


def per_draw(policy: Estimate, other: Estimate | None, kept: Array) -> Array:
  """The estimate of each completion by each independent draw: f32[P,D,G].

  `per_row` is their mean over D. Arguments as `weighted`.
  """
  terms = jnp.sum(weighted(policy, other, kept), axis=3)  # [P,R,G]
  p, _, g = terms.shape
  draws = policy.views.draws
  return draws * jnp.sum(terms.reshape(p, draws, -1, g), axis=2)


def k2(logp: Array, other: Array) -> Array:
  """The k2 estimate of a KL, elementwise: (log p - log p')^2 / 2, where p' is `other`."""
  return 0.5 * (logp - other) ** 2


def k3(logp: Array, other: Array) -> Array:
  """The k3 estimate of a KL, elementwise: exp(d) - d - 1 with d = log p' - log p; p' is `other`."""
  d = other - logp
  return jnp.exp(d) - d - 1


def clipped_loss(
  ratio: Array, advantage: Array, eps_low: float, eps_high: float, dual: float | None = None
) -> tuple[Array, Array]:
  """The clipped policy loss -min(rho A, clip(rho) A), elementwise.

  Args:
    ratio: f32[...], rho.
    advantage: f32[...], A; it may be broadcast to the shape of `ratio`.
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
    dual: c > 1: where A < 0 the loss is at most -c A (dual clip). None: no bound.

  Returns:
    (loss f32[...]; bool[...], True where clipping changed it), of the shape of `ratio`.
  """
  advantage = jnp.broadcast_to(advantage, ratio.shape)
  plain = -ratio * advantage
  loss = jnp.maximum(plain, -jnp.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage)
  if dual is not None:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)
  return loss, jax.lax.stop_gradient(loss != plain)
