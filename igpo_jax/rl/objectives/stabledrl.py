"""stabledrl: SPG's bounds with self-normalized, clamped weights (StableDRL, arXiv 2603.06743).

    - sum_i w_i A_i l_i / sum_i w_i,   w_i = min( exp(E_i - E_i^old), c ), without gradient

E is the lower bound of `spg`, a mean over masked tokens, so w is a ratio per token. It is clamped
from above only. Weights compete over the whole update batch: a completion without advantage takes
weight away from the others, so none may be left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from igpo_jax.config import Positive
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, given, register_objective
from igpo_jax.rl.objectives.bounds import SandwichOptions, lower_bound
from igpo_jax.types import Array


@register_objective("stabledrl")
@dataclasses.dataclass(frozen=True)
class StableDRL(SandwichOptions):
  """Self-normalized importance weights. It is made for the estimator block_random.

  Attributes:
    largest: c, the largest weight; higher ones are clamped to it.
    old_masks: the masks under which E^old is read. "same": those of the policy, so that all weights
      are 1 at the first inner update. "own": other masks, drawn once per rollout (released code);
      weights then differ by the noise of the two draws, even before the policy has changed.
  """

  largest: Positive = 5.0
  old_masks: Literal["same", "own"] = "same"

  @property
  def old_has_own_masks(self) -> bool:
    return self.old_masks == "own"

  def totals(self, batch: Batch) -> dict[str, Array]:
    return {}

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
    # With its own masks, the old policy is read at other positions than the current one.
    before = lower_bound(given(old), batch, kept | (batch.region & ~policy.scored))
    log_weight = jax.lax.stop_gradient(both.lower - before)
    clamped = log_weight > math.log(self.largest)
    weight = jnp.exp(jnp.minimum(log_weight, math.log(self.largest)))
    sums = {
      "rows": jnp.float32(weight.size),
      "weight": jnp.sum(weight),
      "square": jnp.sum(weight**2),
      "clamped": jnp.sum(clamped, dtype=jnp.float32),
      "lower": jnp.sum(both.lower),
      "upper": jnp.sum(both.upper),
    }
    most = {"weight": jnp.max(weight)}
    return LossSums(-jnp.sum(weight * batch.advantages * likelihood), sums["weight"], sums, most)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    rows, tiny = jnp.maximum(sums["rows"], 1), 1e-30
    return {
      "clip_fraction": sums["clamped"] / rows,
      "ratio": sums["weight"] / rows,
      "largest_weight": most["weight"] / jnp.maximum(sums["weight"], tiny),
      # Kish's effective sample size, as a share of all completions.
      "effective_share": sums["weight"] ** 2 / jnp.maximum(sums["square"], tiny) / rows,
      "lower_bound": sums["lower"] / rows,
      "upper_bound": sums["upper"] / rows,
    }
