"""A lower and an upper bound of a completion's log-likelihood (SPG, arXiv 2510.09541).

Per token, in nats. With M_t the positions that view t scores, tau_t = |M_t| / |o| and T views:

    lower = mean_t 1/|M_t| sum_{k in M_t} l_k(t)
    upper = 1/beta mean_k log( 1/T sum_t p_k(t)^beta 1[k in M_t] / tau_t ),  k in any M_t

The upper bound is computed in log space: p^beta would underflow in float32 at log p < -69.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from igpo_jax.config import Positive, Share
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, Objective
from igpo_jax.types import Array


class Bounds(NamedTuple):
  """Both bounds of each completion, f32[P,G], in nats per token."""

  lower: Array
  upper: Array


def lower_bound(estimate: Estimate, batch: Batch, kept: Array) -> Array:
  """The lower bound f32[P,G], in nats per token; arguments as `bounds`.

  Tokens that the entropy filter drops count as 0 in the means.
  """
  scored = estimate.views.scored & batch.region[:, None]
  used = scored & kept[:, None]
  count = jnp.maximum(jnp.sum(scored, axis=-1), 1)
  return jnp.mean(jnp.sum(jnp.where(used, estimate.logp, 0.0), axis=-1) / count, axis=1)


def bounds(estimate: Estimate, batch: Batch, kept: Array, beta: float) -> Bounds:
  """Both bounds of each completion's log-likelihood, in nats per token.

  Args:
    estimate: a policy's estimate, [P,R,G,L].
    batch: the same completions.
    kept: bool[P,G,L], positions that are in the loss after the entropy filter.
    beta: exponent of the upper bound, above 0. The closer it is to 0, the closer the bound is to
      the mean of log p.
  """
  scored = estimate.views.scored & batch.region[:, None]
  length = jnp.maximum(batch.length, 1)[:, None, :, None]
  share = jnp.sum(scored, axis=-1, keepdims=True) / length
  used = scored & kept[:, None]
  terms = beta * estimate.logp - jnp.log(jnp.maximum(share, 1e-9))
  somewhere = jnp.any(used, axis=1)  # [P,G,L]
  # A position that no view uses would be log 0, with a gradient that is no number.
  terms = jnp.where(used, terms, jnp.where(somewhere[:, None], -jnp.inf, 0.0))
  log_mean = jax.nn.logsumexp(terms, axis=1) - jnp.log(float(terms.shape[1]))
  count = jnp.maximum(jnp.sum(jnp.any(scored, axis=1), axis=-1), 1)
  upper = jnp.sum(jnp.where(somewhere, log_mean, 0.0), axis=-1) / count / beta
  return Bounds(lower_bound(estimate, batch, kept), upper)


@dataclasses.dataclass(frozen=True)
class SandwichOptions(Objective):
  """Options for which bound stands for a completion's likelihood. It is the lower one if A > 0.

  Attributes:
    negative: which one it is if A <= 0: a "mix" of both, the "upper" or the "lower" one, or "zero",
      which ignores such completions.
    mix: share of the upper bound in the mix.
    upper_beta: exponent of the upper bound; 1.5 in the published runs, 1.0 for sudoku.
  """

  negative: Literal["mix", "upper", "lower", "zero"] = "mix"
  mix: Share = 0.5
  upper_beta: Positive = 1.5

  def likelihood(self, estimate: Estimate, batch: Batch, kept: Array) -> tuple[Array, Bounds]:
    """(f32[P,G], the bound that stands for each completion's likelihood; both bounds)."""
    both = bounds(estimate, batch, kept, self.upper_beta)
    negative = {
      "mix": self.mix * both.upper + (1 - self.mix) * both.lower,
      "upper": both.upper,
      "lower": both.lower,
      "zero": jnp.zeros_like(both.lower),
    }[self.negative]
    return jnp.where(batch.advantages > 0, both.lower, negative), both
