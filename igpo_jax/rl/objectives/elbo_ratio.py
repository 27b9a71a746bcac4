"""elbo_ratio: one clipped ratio for each completion, of likelihood bounds (ESPO, GDPO, EBPO).

    mean_i w_i [ -min( rho_i A_i, clip(rho_i) A_i ) + beta/2 (E_i - E_i^ref)^2 / n_i ]
    rho_i = exp( (E_i - E_i^old) / n_i )

E is the estimator's weighted sum over views and kept positions. Ratios are clipped in log space, so
one that is cut off never overflows. Sources: arXiv 2512.03759 (ESPO), 2510.08554 (GDPO), the
LLaDA2.1 report (EBPO).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from igpo_jax.config import NonNegative, Range
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, register_objective
from igpo_jax.rl.objectives.reductions import per_row
from igpo_jax.types import Array


@register_objective("elbo_ratio")
@dataclasses.dataclass(frozen=True)
class ElboRatio(Objective):
  """The clipped loss with one ratio for each completion.

  Attributes:
    scale: n, by which the difference of two bounds is divided. "canvas": L (ESPO). "length": |o|.
      "none": 1 (GDPO, EBPO), which makes rho the ratio of whole sequences, for small learning
      rates.
    row_weight: w, the weight of a completion: "one", or "length", which is 1/|o| (GDPO).
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
    beta: weight of the k2 KL to the reference. 0: the reference is not needed.
  """

  scale: Literal["canvas", "length", "none"] = "canvas"
  row_weight: Literal["one", "length"] = "one"
  eps_low: Annotated[float, Range(0, 1, below=True)] = 0.2
  eps_high: NonNegative = 0.2
  beta: NonNegative = 1e-3

  without_reference = "; none is needed with objective.elbo_ratio.beta=0"

  @property
  def needs_reference(self) -> bool:
    return self.beta > 0

  @property
  def drops_zero_advantage(self) -> bool:
    return self.beta == 0

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
    advantage, length = batch.advantages, jnp.maximum(batch.length, 1).astype(jnp.float32)
    scale = {"canvas": float(kept.shape[-1]), "length": length, "none": 1.0}[self.scale]
    # Terms are subtracted before they are summed: the sums are large, and their difference small.
    log_ratio = per_row(policy, old, kept) / scale
    high = jnp.where(advantage >= 0, jnp.log1p(self.eps_high), jnp.inf)
    low = jnp.where(advantage >= 0, -jnp.inf, jnp.log1p(-self.eps_low))
    clipped = (log_ratio > high) | (log_ratio < low)
    loss = -advantage * jnp.exp(jnp.clip(log_ratio, low, high))
    kl = jnp.zeros_like(loss)
    if ref is not None:
      kl = 0.5 * per_row(policy, ref, kept) ** 2 / scale
    weight = 1 / length if self.row_weight == "length" else 1.0
    numerator = jnp.sum(loss * weight + self.beta * kl) / totals["rows"]
    sums = {
      "rows": jnp.float32(advantage.size),
      "clipped": jnp.sum(clipped, dtype=jnp.float32),
      "ratio": jnp.sum(jnp.exp(jax.lax.stop_gradient(log_ratio))),
      "kl": jnp.sum(kl),
      "bound": jnp.sum(per_row(policy, None, kept)),
    }
    return LossSums(numerator, None, sums)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    rows = jnp.maximum(sums["rows"], 1)
    return {
      "clip_fraction": sums["clipped"] / rows,
      "ratio": sums["ratio"] / rows,
      "kl": sums["kl"] / rows,
      "bound": sums["bound"] / rows,
    }
