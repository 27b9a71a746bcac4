"""spg: a policy gradient between two bounds of the likelihood (SPG, arXiv 2510.09541).

    - sum_i A_i |o_i| l_i / sum_i |o_i|

If A_i > 0, l_i is the lower bound: pushing it up pushes the likelihood up. If A_i <= 0, l_i is the
upper bound, or a mix with it: pushing it down pushes the likelihood down. There is no ratio, no
clipping and no KL.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, register_objective
from igpo_jax.rl.objectives.bounds import SandwichOptions
from igpo_jax.types import Array


@register_objective("spg")
@dataclasses.dataclass(frozen=True)
class SPG(SandwichOptions):
  """The sandwiched policy gradient. It is made for the estimator block_random."""

  needs_old = False
  drops_zero_advantage = True

  def totals(self, batch: Batch) -> dict[str, Array]:
    return {"length": jnp.maximum(jnp.sum(batch.length), 1).astype(jnp.float32)}

  def sums(
    self,
    policy: Estimate,
    old: Estimate | None,
    ref: Estimate | None,
    batch: Batch,
    totals: dict[str, Array],
    kept: Array,
  ) -> LossSums:
    likelihood, both = self.likelihood(policy, batch, kept)
    numerator = -jnp.sum(batch.advantages * likelihood * batch.length) / totals["length"]
    sums = {
      "rows": jnp.float32(likelihood.size),
      "lower": jnp.sum(both.lower),
      "upper": jnp.sum(both.upper),
    }
    return LossSums(numerator, None, sums)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    rows = jnp.maximum(sums["rows"], 1)
    return {"lower_bound": sums["lower"] / rows, "upper_bound": sums["upper"] / rows}
