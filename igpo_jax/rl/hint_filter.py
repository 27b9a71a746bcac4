"""The entropy filter on hint tokens (docs/method.md#objective), for every objective."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.ops.masked import masked_sum, topk_mask
from igpo_jax.types import Array


def hints_to_keep(num_hints: Array, keep: float, length: int) -> Array:
  """max(1, floor(tau * n)) of n hint positions, and 0 of none: i32, shape of `num_hints`.

  Tabulated in double precision: floor(tau * n) in float32 is off by one for some tau.
  """
  table = [0] + [max(1, int(keep * n + 1e-9)) for n in range(1, length + 1)]
  return jnp.asarray(table, jnp.int32)[num_hints]


def entropy_filter(entropy: Array, loss_mask: Array, hinted: Array, keep: float) -> Array:
  """Of a row's hint positions in the loss, keeps the share of highest entropy.

  Args:
    entropy: f32[B,L], of the policy at each position.
    loss_mask: bool[B,L], the loss region.
    hinted: bool[B,L].
    keep: tau; max(1, floor(tau * n)) of a row's n hint positions are kept.

  Returns:
    bool[B,L]: `loss_mask` less the hint positions that were dropped. Self-generated
    positions are all kept.
  """
  hints = loss_mask & hinted
  count = hints_to_keep(jnp.sum(hints, axis=1), keep, entropy.shape[1])
  return (loss_mask & ~hinted) | topk_mask(entropy, hints, count)


def num_kept(loss_mask: Array, hinted: Array, keep: float) -> Array:
  """How many positions of each row `entropy_filter` keeps, i32[B]; no entropy is needed for it."""
  hints = jnp.sum(loss_mask & hinted, axis=1)
  return jnp.sum(loss_mask & ~hinted, axis=1) + hints_to_keep(hints, keep, loss_mask.shape[1])


def filter_sums(entropy: Array, loss_mask: Array, hinted: Array, kept: Array) -> dict[str, Array]:
  """What `filter_metrics` needs, to be added up over micro-batches; arrays of one shape."""
  hints = loss_mask & hinted
  return {
    "region": jnp.sum(loss_mask),
    "hints": jnp.sum(hints),
    "hints_kept": jnp.sum(hints & kept),
    "entropy": masked_sum(entropy, loss_mask),
    "hint_entropy": masked_sum(entropy, hints),
  }


def filter_metrics(sums: dict[str, Array]) -> dict[str, Array]:
  """The share of hints in the loss region that is kept; the mean entropy there and of its hints."""
  share = lambda top, bottom: sums[top] / jnp.maximum(sums[bottom], 1)
  return {
    "hints_kept": share("hints_kept", "hints"),
    "entropy": share("entropy", "region"),
    "hint_entropy": share("hint_entropy", "hints"),
  }
