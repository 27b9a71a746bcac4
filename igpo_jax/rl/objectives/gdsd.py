"""gdsd: regression of the change in likelihood on the advantage (GDSD, arXiv 2605.29398).

    1/B sum_i sum_j ( clip(S_ij - S_ij^old, log(1 - eps), log(1 + eps)) / L - psi A_i )^2
      + beta / (B D L) sum_ij (S_ij - S_ij^ref)^2 / 2

over the D draws j of each completion. As in the released code, the first term is a sum over draws
and the second a mean. The clipping window is for the SUM of a completion's log-probabilities, and
outside the window the first term has no gradient, whatever the advantage. With the released
eps = 4e-4 this concerns every completion after the first inner update. Raise `eps` to learn from
later updates.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp

from igpo_jax.config import NonNegative, Positive, Range
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, register_objective
from igpo_jax.rl.objectives.reductions import per_draw
from igpo_jax.types import Array


@register_objective("gdsd")
@dataclasses.dataclass(frozen=True)
class GDSD(Objective):
  """The squared distance of the change in likelihood to psi times the advantage.

  Attributes:
    psi: slope of the regression; 10 in the published GSM8K runs.
    eps: half the width of the window, which is [1 - eps, 1 + eps] for the ratio.
    beta: weight of the k2 KL to the reference. 0: the reference is not needed.
  """

  psi: Positive = 1.0
  eps: Annotated[float, Range(0, 1, above=True, below=True)] = 4e-4
  beta: NonNegative = 1e-3

  without_reference = "; none is needed with objective.gdsd.beta=0"

  @property
  def needs_reference(self) -> bool:
    return self.beta > 0

  def totals(self, batch: Batch) -> dict[str, Array]:
    return {"rows": jnp.float32(batch.advantages.size)}

  def sums(
    self,
    policy: Estimate,
    old: Estimate | None,
    ref: Estimate | None,
    batch: Batch,
    totals: dict[str, Array],
    kept: Array,
  ) -> LossSums:
    canvas, draws = kept.shape[-1], policy.views.draws
    change = per_draw(policy, old, kept)  # [P,D,G]
    low, high = math.log1p(-self.eps), math.log1p(self.eps)
    inside = (change >= low) & (change <= high)
    distance = jnp.clip(change, low, high) / canvas - self.psi * batch.advantages[:, None]
    kl = jnp.zeros_like(change)
    if ref is not None:
      kl = 0.5 * per_draw(policy, ref, kept) ** 2 / canvas
    numerator = (jnp.sum(distance**2) + self.beta * jnp.sum(kl) / draws) / totals["rows"]
    sums = {
      "draws": jnp.float32(change.size),
      "clipped": jnp.sum(~inside, dtype=jnp.float32),
      "kl": jnp.sum(kl),
      "change": jnp.sum(jnp.abs(change)),
    }
    return LossSums(numerator, None, sums)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    draws = jnp.maximum(sums["draws"], 1)
    return {
      "clip_fraction": sums["clipped"] / draws,
      "kl": sums["kl"] / draws,
      "change": sums["change"] / draws,
    }
