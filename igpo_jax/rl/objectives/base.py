"""The interface of objectives: what one declares, what it is given, and what it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.struct

from igpo_jax.config import check_section, registry
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.estimators.base import Views
from igpo_jax.types import Array

# The options of an objective NAME are `config.objective.NAME.*`.
register_objective: Callable[[str], Callable[[type], type]] = functools.partial(
  registry.register, "objective"
)


@flax.struct.dataclass
class Batch:
  """What is known about completions before any forward pass.

  Attributes:
    completion: i32[P,G,L].
    hinted: bool[P,G,L], True where a token was a hint.
    commit_step: i32[P,G,L], the step at which the sampler committed a token; -1 on hints.
    advantages: f32[P,G].
    region: bool[P,G,L], the loss region (`rl.loss_region`).
    length: i32[P,G], |o_i|: tokens up to and including the first stop token.
    views: the views of the inner update.
  """

  completion: Array
  hinted: Array
  commit_step: Array
  advantages: Array
  region: Array
  length: Array
  views: Views


class LossSums(NamedTuple):
  """What one micro-batch adds to the loss and to the metrics.

  The loss of an update is the sum of its numerators over the sum of its denominators.

  Attributes:
    numerator: f32[].
    denominator: f32[], without gradient, if it is only known after the forward pass. None: the
      numerator is already divided, by a number from `Objective.totals`.
    sums: name -> f32[], added up over micro-batches.
    most: name -> f32[], of which the largest over micro-batches is kept.
  """

  numerator: Array
  denominator: Array | None
  sums: dict[str, Array]
  most: dict[str, Array] = {}  # noqa: RUF012  a NamedTuple's default, never changed


def given(estimate: Estimate | None) -> Estimate:
  """Asserts that an estimate, the old or the reference one, was computed, and returns it.

  Raises:
    ValueError: it is None, since the objective does not declare to need it.
  """
  if estimate is None:
    raise ValueError("the objective reads an estimate that it does not declare to need")
  return estimate


class Objective:
  """Base of all objectives. They are frozen dataclasses, and their fields are their options.

  Attributes:
    name: the name under which it is registered.
    needs_reference: whether `sums` needs log-probabilities under the reference policy.
    without_reference: how a user can avoid that, for messages: "; none is needed with beta=0".
    needs_old: whether `sums` needs log-probabilities under the policy that sampled.
    totals_need_old: whether `totals` needs the old policy's estimate. It is one of the update's
      groups, which then have to be all groups of the batch: `drops_zero_advantage` must be False.
    old_has_own_masks: whether the old policy is read under its own masks, drawn once per rollout,
      as some official code does. Ratios are then not 1 at the first inner update.
    drops_zero_advantage: whether a group whose advantages are all 0 adds exactly no gradient. Such
      groups are left out of the metrics, and may be left out of the update.
  """

  name: ClassVar[str] = ""
  needs_reference: bool = False
  without_reference: str = ""
  needs_old: bool = True
  totals_need_old: bool = False
  old_has_own_masks: bool = False
  drops_zero_advantage: bool = False

  def __post_init__(self):
    check_section(self, f"objective.{self.name}")

  def totals(self, batch: Batch, old: Estimate | None = None) -> dict[str, Array]:
    """Numbers of an update's whole batch that are known before the policy is read.

    These are mostly denominators: with them the gradients of micro-batches add up to the gradient
    of the whole batch.

    Args:
      batch: all groups of the batch, including those that are left out of the update.
      old: the estimate of the policy that sampled; only with `totals_need_old`.

    Returns:
      name -> f32[...], which `sums` is given for each micro-batch.
    """
    raise NotImplementedError

  def sums(
    self,
    policy: Estimate,
    old: Estimate | None,
    ref: Estimate | None,
    batch: Batch,
    totals: dict[str, Array],
    kept: Array,
  ) -> LossSums:
    """The loss of one micro-batch.

    Args:
      policy: the current policy's estimate; gradients flow through `policy.logp` only.
      old: the estimate of the policy that sampled; None unless `needs_old`. At the first inner
        update its log-probabilities are those of `policy`, bit for bit.
      ref: the estimate of the reference, without entropies; None unless `needs_reference`.
      batch: the completions of this micro-batch.
      totals: the result of `totals` for the whole batch.
      kept: bool[P,G,L], positions of the region that some view scores, without the hint tokens that
        the entropy filter drops.
    """
    raise NotImplementedError

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    """Metrics of an update, from `LossSums.sums` and `LossSums.most` over all its micro-batches."""
    del most
    return dict(sums)
