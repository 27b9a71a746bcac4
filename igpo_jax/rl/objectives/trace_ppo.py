"""trace_ppo: the clipped loss of tokens, each in the views that score it.

It is for trace and autoregressive estimators. `clipped` adds up a token's views before it takes the
ratio. Here each token of each view is a term of its own. The methods differ in how these terms are
averaged (`reduce`): TraceRL (arXiv 2509.06949), CJ-GRPO, RLDF (arXiv 2605.25638), AGRPO, JustGRPO
(arXiv 2601.15165).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from igpo_jax.config import NonNegative, Range, require
from igpo_jax.ops.masked import masked_sum
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, given, register_objective
from igpo_jax.rl.objectives.reductions import clipped_loss, k2, k3
from igpo_jax.types import Array


@register_objective("trace_ppo")
@dataclasses.dataclass(frozen=True)
class TracePPO(Objective):
  """The clipped loss and the KL of every scored token of every view.

  Attributes:
    reduce: how the terms are averaged.
      "view" (TraceRL): over a view's tokens, then over all views of the update that score any.
      "row" (CJ-GRPO's paper): over a view's tokens, a completion's views, completions.
      "step" (CJ-GRPO's released code; RLDF's "token"): over the tokens that the j-th views of all
      completions score, then over j.
      "row_step" (RLDF's "sample"): over a view's tokens, then over completions and views, those
      without terms included.
      "draws" (AGRPO's released code): a sum over all, divided by views times G; it grows with the
      number of prompts.
      "valid_rows" (JustGRPO's released code): a sum over all, divided by L times the number of
      completions with an advantage.
    ratio: "token": the clipped ratio. "none": the loss is -A log p, without the old policy (RLDF
      with one inner update).
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
    dual_clip: with an advantage A < 0, a term is at most -dual_clip * A. None: no bound.
    beta: weight of the KL. 0: none.
    kl: estimate of the KL, "k2" or "k3".
    kl_to: the policy that the KL keeps the current one close to: the "reference", or the "old" one,
      which sampled (TraceRL).
    kl_sum: sum the KL over a view's tokens, although the loss is averaged over them (TraceRL's
      released code). Only for reduce="view".
    threshold: for an estimator that also scores later tokens
      (`estimator.trace_sampled.score="later"`): a later token counts only if the policy that
      sampled gives it at least this probability. Tokens of the view's own step always count. 0: all
      count.
  """

  reduce: Literal["view", "row", "step", "row_step", "draws", "valid_rows"] = "view"
  ratio: Literal["token", "none"] = "token"
  eps_low: NonNegative = 0.2
  eps_high: NonNegative = 0.2
  dual_clip: Annotated[float, Range(1, math.inf, above=True)] | None = None
  beta: NonNegative = 0.01
  kl: Literal["k2", "k3"] = "k3"
  kl_to: Literal["reference", "old"] = "reference"
  kl_sum: bool = False
  threshold: Annotated[float, Range(0, 1, below=True)] = 0.0

  without_reference = (
    "; none is needed with objective.trace_ppo.beta=0, or objective.trace_ppo.kl_to='old'"
  )

  def __post_init__(self):
    super().__post_init__()
    require(
      not self.kl_sum or self.reduce == "view",
      f"objective.trace_ppo.kl_sum is for reduce='view', not {self.reduce!r}; set it to False",
    )

  @property
  def needs_reference(self) -> bool:
    return self.beta > 0 and self.kl_to == "reference"

  @property
  def needs_old(self) -> bool:
    return self.ratio == "token" or self.threshold > 0 or (self.beta > 0 and self.kl_to == "old")

  @property
  def totals_need_old(self) -> bool:
    return self.threshold > 0 and self.reduce in ("step", "view")

  @property
  def drops_zero_advantage(self) -> bool:
    return self.beta == 0 and not self.totals_need_old

  def counted(self, views, region: Array, old: Estimate | None) -> Array:
    """bool[P,R,G,L], the terms of the loss before the entropy filter.

    Args:
      views: the views.
      region: bool[P,G,L], the loss region.
      old: the estimate of the policy that sampled, which `threshold` needs.
    """
    scored = views.scored & region[:, None]
    if not self.threshold or "current" not in views.aux:
      return scored
    sure = jax.lax.stop_gradient(given(old).logp) >= math.log(self.threshold)
    current = views.aux["current"]
    if "of_hints" in views.aux:
      current |= views.aux["of_hints"][..., None]
    return scored & (sure | current)

  def totals(self, batch: Batch, old: Estimate | None = None) -> dict[str, Array]:
    most = lambda x: jnp.maximum(x, 1).astype(jnp.float32)
    p, r, g, length = batch.views.scored.shape
    views = jnp.float32(r)
    if "of_hints" in batch.views.aux:  # The view of hints counts only if there are any.
      views -= 1 - jnp.any(batch.views.scored[:, 0] & batch.region)
    if self.reduce == "view":
      counted = self.counted(batch.views, batch.region, old)
      return {"divisor": most(jnp.sum(jnp.any(counted, axis=-1)))}
    if self.reduce == "step":
      counted = self.counted(batch.views, batch.region, old)
      return {"divisor": most(jnp.sum(counted, axis=(0, 2, 3))) * views}  # [R]
    if self.reduce == "row":
      return {"divisor": jnp.float32(p * g)}
    if self.reduce == "row_step":
      return {"divisor": p * g * views}
    if self.reduce == "draws":
      return {"divisor": g * views}
    valid = jnp.sum(batch.advantages != 0).astype(jnp.float32)
    return {"divisor": length * (valid + 1e-5)}

  def sums(
    self,
    policy: Estimate,
    old: Estimate | None,
    ref: Estimate | None,
    batch: Batch,
    totals: dict[str, Array],
    kept: Array,
  ) -> LossSums:
    advantage = batch.advantages[:, None, :, None]
    counted = self.counted(policy.views, batch.region, old)
    used = counted & kept[:, None]
    logp = jnp.where(used, policy.logp, 0.0)
    at = lambda other: jnp.where(used, other.logp, 0.0)
    ratio = jnp.exp(logp - at(old)) if self.ratio == "token" else jnp.ones_like(logp)
    if self.ratio == "token":
      loss, clipped = clipped_loss(ratio, advantage, self.eps_low, self.eps_high, self.dual_clip)
    else:
      loss, clipped = -logp * advantage, jnp.zeros_like(used)
    if policy.views.weights is not None:
      loss = loss * policy.views.weights
    kl = jnp.zeros_like(loss)
    if self.beta:
      estimate = {"k2": k2, "k3": k3}[self.kl]
      kl = estimate(logp, at(ref if self.kl_to == "reference" else old))

    divisor = totals["divisor"]
    if self.reduce == "step":
      divisor = divisor[:, None, None]
    elif self.reduce != "draws" and self.reduce != "valid_rows":
      tokens = jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)
      divisor = divisor * tokens
      if self.reduce == "row":
        views = jnp.sum(jnp.any(counted, axis=-1), axis=1)[:, None, :, None]
        divisor = divisor * jnp.maximum(views, 1)
    kl_divisor = totals["divisor"] if self.kl_sum else divisor
    numerator = masked_sum(loss / divisor + self.beta * kl / kl_divisor, used)
    number = lambda x: masked_sum(x, used).astype(jnp.float32)
    sums = {
      "kept": jnp.sum(used, dtype=jnp.float32),
      "clipped": number(clipped),
      "ratio": number(ratio),
      "kl": number(kl),
    }
    return LossSums(numerator, None, sums)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    kept = jnp.maximum(sums["kept"], 1)
    return {
      "clip_fraction": sums["clipped"] / kept,
      "ratio": sums["ratio"] / kept,
      "kl": sums["kl"] / kept,
    }
