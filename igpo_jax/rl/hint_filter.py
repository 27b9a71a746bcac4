"""The entropy filter on hint tokens (docs/method.md#objective), for every objective."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.ops.masked import masked_sum, topk_mask
from igpo_jax.types import Array


def hints_to_keep(num_hints: Array, keep: float, length: int) -> Array:
  """How many of a row's n hint positions stay in the loss: max(1, floor(tau * n)), or 0 if n is 0.

  The values come from a table in double precision: floor(tau * n) in float32 is off by one for some
  tau.

  Args:
    num_hints: i32[...], n.
    keep: tau in [0, 1].
    length: the largest n that is possible.

  Returns:
    i32[...].
  """
  table = [0] + [max(1, int(keep * n + 1e-9)) for n in range(1, length + 1)]
  return jnp.asarray(table, jnp.int32)[num_hints]


def entropy_filter(entropy: Array, loss_mask: Array, hinted: Array, keep: float) -> Array:
  """Keeps the hint positions of highest entropy in the loss, and drops the others.

  Args:
    entropy: f32[B,L], entropy of the policy at each position.
    loss_mask: bool[B,L], the loss region.
    hinted: bool[B,L], True where a token was a hint.
    keep: tau, see `hints_to_keep`.

  Returns:
    bool[B,L]: `loss_mask` without the hint positions that are dropped. All positions that are no
    hints stay.
  """
  hints = loss_mask & hinted
  count = hints_to_keep(jnp.sum(hints, axis=1), keep, entropy.shape[1])
  return (loss_mask & ~hinted) | topk_mask(entropy, hints, count)


def num_kept(loss_mask: Array, hinted: Array, keep: float) -> Array:
  """How many positions of each row `entropy_filter` keeps: i32[B]. It does not depend on entropies.

  Arguments as `entropy_filter`.
  """
  hints = jnp.sum(loss_mask & hinted, axis=1)
  return jnp.sum(loss_mask & ~hinted, axis=1) + hints_to_keep(hints, keep, loss_mask.shape[1])


def filter_sums(entropy: Array, loss_mask: Array, hinted: Array, kept: Array) -> dict[str, Array]:
  """Sums for `filter_metrics`, to be added up over micro-batches: name -> a scalar.

  Args:
    entropy: f32[...], entropy of the policy at each position.
    loss_mask, hinted, kept: bool of the same shape: the loss region, hint tokens, and the result of
      `entropy_filter`.
  """
  hints = loss_mask & hinted
  return {
    "region": jnp.sum(loss_mask),
    "hints": jnp.sum(hints),
    "hints_kept": jnp.sum(hints & kept),
    "entropy": masked_sum(entropy, loss_mask),
    "hint_entropy": masked_sum(entropy, hints),
  }


def filter_metrics(sums: dict[str, Array]) -> dict[str, Array]:
  """Metrics of the filter, from added-up `filter_sums`.

  hints_kept is the share of hint tokens in the loss region that is kept; entropy and hint_entropy
  are mean entropies of the loss region and of the hint tokens in it, in nats.
  """
  share = lambda top, bottom: sums[top] / jnp.maximum(sums[bottom], 1)
  return {
    "hints_kept": share("hints_kept", "hints"),
    "entropy": share("entropy", "region"),
    "hint_entropy": share("hint_entropy", "hints"),
  }
