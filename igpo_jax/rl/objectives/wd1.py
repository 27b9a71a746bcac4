"""wd1: log-likelihoods weighted by softmaxes of the advantages (wd1, arXiv 2507.08838).

    sum_i ( w-_i - w+_i ) S_i,   w+ = softmax(A), w- = softmax(-A),   S_i = sum_k log p(o_i^k)

It needs no ratio, no clipping, and neither the old nor a reference policy.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, register_objective
from igpo_jax.rl.objectives.reductions import per_row
from igpo_jax.types import Array


@register_objective("wd1")
@dataclasses.dataclass(frozen=True)
class WD1(Objective):
  """The weighted log-likelihood.

  Attributes:
    softmax: the completions among which weights compete. "group": those of a group, with a mean
      over groups; a group whose rewards are all equal adds nothing. "batch": all completions of an
      update, as in the released code, where it is the rows of one device. A weight then depends on
      completions of other prompts, and groups with equal rewards have a gradient.
  """

  softmax: Literal["group", "batch"] = "group"

  needs_old = False

  @property
  def drops_zero_advantage(self) -> bool:
    return self.softmax == "group"

  def totals(self, batch: Batch) -> dict[str, Array]:
    if self.softmax == "group":
      return {"groups": jnp.float32(batch.advantages.shape[0])}
    log_sum = lambda x: jax.scipy.special.logsumexp(x)
    return {"plus": log_sum(batch.advantages), "minus": log_sum(-batch.advantages)}

  def sums(
    self,
    policy: Estimate,
    old: Estimate | None,
    ref: Estimate | None,
    batch: Batch,
    totals: dict[str, Array],
    kept: Array,
  ) -> LossSums:
    advantage = batch.advantages
    if self.softmax == "group":
      plus, minus = jax.nn.softmax(advantage, axis=1), jax.nn.softmax(-advantage, axis=1)
      weight = (plus - minus) / totals["groups"]
    else:
      plus, minus = jnp.exp(advantage - totals["plus"]), jnp.exp(-advantage - totals["minus"])
      weight = plus - minus
    likelihood = per_row(policy, None, kept)
    sums = {
      "rows": jnp.float32(advantage.size),
      "likelihood": jnp.sum(likelihood),
      "weight": jnp.sum(jnp.abs(weight)),
    }
    most = {"weight": jnp.max(jnp.abs(weight))}
    return LossSums(-jnp.sum(weight * likelihood), None, sums, most)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    return {
      "likelihood": sums["likelihood"] / jnp.maximum(sums["rows"], 1),
      "weight_sum": sums["weight"],
      "largest_weight": most["weight"],
    }
