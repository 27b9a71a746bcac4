"""What an objective declares, and the arrays that it is given and gives."""

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
  """What is known of completions before any forward pass.

  Attributes:
    completion: i32[P,G,L].
    hinted: bool[P,G,L].
    commit_step: i32[P,G,L], -1 on hints.
    advantages: f32[P,G].
    region: bool[P,G,L], the loss region (`rl.loss_region`).
    length: i32[P,G], |o_i|: tokens through the first stop token.
    views: of the inner update.
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
    denominator: f32[], a number without gradient, for one that is only known after the forward
      pass. None: the numerator is divided already, by what `Objective.totals` told.
    sums: added up over micro-batches.
    most: of each, the greatest over micro-batches is kept.
  """

  numerator: Array
  denominator: Array | None
  sums: dict[str, Array]
  most: dict[str, Array] = {}  # noqa: RUF012  a NamedTuple's default, never changed


def given(estimate: Estimate | None) -> Estimate:
  """The old or the reference estimate, where the objective has declared that it needs it."""
  if estimate is None:
    raise ValueError("the objective reads an estimate that it does not declare to need")
  return estimate


class Objective:
  """Base of all objectives, which are frozen dataclasses: their fields are their options.

  Attributes:
    name: the registered one.
    needs_reference: log-probabilities of the reference policy are computed, for `sums`.
    without_reference: how the user does without one, for messages: "; none with beta=0".
    needs_old: log-probabilities of the policy that sampled are computed, for `sums`.
    totals_need_old: `totals` is given the old policy's estimate of the update's groups, which are
      then all groups of the batch: `drops_zero_advantage` must be False.
    old_has_own_masks: the old policy is read under masks of its own, drawn once a rollout. A
      departure of official code: ratios are then not 1 at the first inner update.
    drops_zero_advantage: a group whose advantages are all 0 adds exactly no gradient. It is left
      out of the metrics, and may be left out of the update.
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
    """Numbers of a whole update's batch that are known before the policy is read.

    Denominators above all: gradients of micro-batches then add up to that of the whole batch.

    Args:
      batch: also of groups that are left out of the update.
      old: of the policy that sampled; None, or left out, unless `totals_need_old`.
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
      old: of the policy that sampled. At the first inner update its log-probabilities are those
        of `policy`, bit for bit. None unless `needs_old`.
      ref: of the reference; its entropy is not computed. None unless `needs_reference`.
      batch: of this micro-batch.
      totals: of the whole batch.
      kept: bool[P,G,L], positions of the region that some view scores, less the hint tokens that
        the entropy filter drops.
    """
    raise NotImplementedError

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    """Metrics of an update, from what its micro-batches added up to."""
    del most
    return dict(sums)
