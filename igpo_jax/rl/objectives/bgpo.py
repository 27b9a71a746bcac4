"""bgpo: a bound of the loss that is a sum over draws (BGPO, as implemented by DARE).

For each draw j of a completion, D_ij = (E_ij - E_ij^old) / L, and

    rho_ij = 1 + D_ij where A_i > 0, exp(D_ij) else        (first order; Jensen)
    loss = mean_j [ sum_i |o_i| c(rho_ij, A_i) / sum_i |o_i| ]

with c the clipped loss. Each draw has its own ratio, while `elbo_ratio` takes the ratio of their
mean. The released code computes 1 + D as exp(log(1 + D)), which is NaN for D <= -1; here it is
1 + D.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp

from igpo_jax.config import NonNegative, Range
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, register_objective
from igpo_jax.rl.objectives.reductions import clipped_loss, per_draw
from igpo_jax.types import Array


@register_objective("bgpo")
@dataclasses.dataclass(frozen=True)
class BGPO(Objective):
  """The clipped loss of each draw's bound.

  Attributes:
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
    dual_clip: with an advantage A < 0, the loss is at most -dual_clip * A. None: no bound.
  """

  eps_low: NonNegative = 0.2
  eps_high: NonNegative = 0.2
  dual_clip: Annotated[float, Range(1, math.inf, above=True)] | None = 3.0

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
    change = per_draw(policy, old, kept) / kept.shape[-1]  # [P,D,G]
    advantage = batch.advantages[:, None]
    # The branch that is not taken must not overflow: its gradient would be 0 times infinity.
    ratio = jnp.where(advantage > 0, 1 + change, jnp.exp(jnp.where(advantage > 0, 0.0, change)))
    loss, clipped = clipped_loss(ratio, advantage, self.eps_low, self.eps_high, self.dual_clip)
    draws = policy.views.draws
    numerator = jnp.sum(loss * batch.length[:, None]) / (totals["length"] * draws)
    sums = {
      "draws": jnp.float32(loss.size),
      "clipped": jnp.sum(clipped, dtype=jnp.float32),
      "ratio": jnp.sum(ratio),
    }
    return LossSums(numerator, None, sums)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    draws = jnp.maximum(sums["draws"], 1)
    return {"clip_fraction": sums["clipped"] / draws, "ratio": sums["ratio"] / draws}
