"""clipped: the clipped policy loss of GRPO and IGPO (docs/method.md#objective).

    mean_i 1/|o_i| sum_k kept_ik [ -min(rho_ik A_i, clip(rho_ik) A_i) + beta KL_ik ]

`kept` is the loss region without the hint tokens that the entropy filter drops. The loss is a
numerator over a denominator. The denominator is known before any forward pass, since the number of
kept hints does not depend on which ones are kept. So gradients of micro-batches add up to the
gradient of the whole batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from igpo_jax.config import ObjectiveConfig
from igpo_jax.ops.masked import masked_mean, masked_sum
from igpo_jax.rl.estimate import Estimate
from igpo_jax.rl.hint_filter import entropy_filter, filter_metrics, filter_sums, num_kept
from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, given, register_objective
from igpo_jax.rl.objectives.reductions import k2, k3
from igpo_jax.types import AnyArray, Array


def loss_denominator(
  loss_mask: Bool[AnyArray, "B L"], hinted: Bool[AnyArray, "B L"], cfg: ObjectiveConfig
) -> Float[Array, ""]:
  """What the summed loss is divided by, by `cfg.normalize`: the number of rows or of kept tokens.

  Args:
    loss_mask: bool[B,L], the loss region.
    hinted: bool[B,L], True where a token was a hint.
    cfg: see `ObjectiveConfig`.

  Returns:
    f32[], at least 1.
  """
  if cfg.normalize == "row":
    return jnp.float32(max(loss_mask.shape[0], 1))
  kept = jnp.sum(num_kept(jnp.asarray(loss_mask), jnp.asarray(hinted), cfg.entropy_keep))
  return jnp.maximum(kept, 1).astype(jnp.float32)


def policy_ratio(logps: Array, old_logps: Array, loss_mask: Array, kind: str) -> Array:
  """The importance ratio rho f32[B,L] that multiplies a token's advantage.

  Args:
    logps, old_logps: f32[B,L], log-probabilities under the current policy and the one that sampled.
    loss_mask: bool[B,L], the loss region.
    kind: "token": exp(logp - old). "sequence": every token has the row's value, exp of the mean of
      logp - old over the loss region, and the gradient of its own log-probability (GSPO-token).
      "sequence_official": exp of the mean over the whole canvas, differentiated through every token
      of the canvas.
  """
  log_ratio = logps - old_logps
  if kind == "token":
    return jnp.exp(log_ratio)
  if kind == "sequence_official":
    row = jnp.exp(jnp.mean(log_ratio, axis=1, keepdims=True))
    return jnp.broadcast_to(row, logps.shape)
  row = jax.lax.stop_gradient(jnp.exp(masked_mean(log_ratio, loss_mask, axis=1)))
  return row[:, None] * jnp.exp(logps - jax.lax.stop_gradient(logps))


def policy_loss_sums(
  logps: Array,
  entropy: Array,
  old_logps: Array,
  ref_logps: Array | None,
  advantages: Array,
  loss_mask: Array,
  hinted: Array,
  cfg: ObjectiveConfig,
  kept: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The loss's numerator, and sums for metrics. Arguments as `policy_loss`.

  Args:
    kept: bool[B,L], the positions of `loss_mask` that the entropy filter keeps; None: they are
      computed here.

  Returns:
    (numerator f32[], sums {name: f32[]}). Divide the numerator by the `loss_denominator` of the
    whole batch. `metrics_from_sums` turns sums, added up over micro-batches, into means.
  """
  loss_mask, hinted = loss_mask.astype(bool), hinted.astype(bool)
  entropy = jax.lax.stop_gradient(entropy)
  if kept is None:
    kept = entropy_filter(entropy, loss_mask, hinted, cfg.entropy_keep)
  # Outside the region log-probabilities may be any number. In exp they could overflow, and turn the
  # zero gradient of a masked token into a NaN.
  region = jnp.ones_like(loss_mask) if cfg.ratio == "sequence_official" else loss_mask
  logps = jnp.where(region, logps, 0.0)
  old_logps = jnp.where(region, old_logps, 0.0)

  ratio = policy_ratio(logps, old_logps, loss_mask, cfg.ratio)
  advantage = advantages[:, None]
  plain = ratio * advantage
  clipped = jnp.clip(ratio, 1 - cfg.eps_low, 1 + cfg.eps_high) * advantage
  per_token = -jnp.minimum(plain, clipped)
  if cfg.dual_clip is not None:
    bound = jnp.minimum(per_token, -cfg.dual_clip * advantage)
    per_token = jnp.where(advantage < 0, bound, per_token)
  kl = jnp.zeros_like(logps)
  other = old_logps if cfg.kl_to == "old" and cfg.beta else ref_logps
  if other is not None:
    kl = {"k2": k2, "k3": k3}[cfg.kl](logps, jnp.where(region, other, 0.0))
    per_token = per_token + cfg.beta * kl

  if cfg.normalize == "row":
    length = jnp.maximum(jnp.sum(loss_mask, axis=1), 1).astype(jnp.float32)
    numerator = jnp.sum(masked_sum(per_token, kept, axis=1) / length)
  else:
    numerator = masked_sum(per_token, kept)
  sums = {
    "kept": jnp.sum(kept),
    "clipped": masked_sum(plain > clipped, kept),
    "kl": masked_sum(kl, kept),
    "ratio": masked_sum(ratio, kept),
    **filter_sums(entropy, loss_mask, hinted, kept),
  }
  return numerator, {k: v.astype(jnp.float32) for k, v in sums.items()}


def metrics_from_sums(sums: dict[str, Array]) -> dict[str, Array]:
  """Means over the batch, from the sums of `policy_loss_sums` added up over micro-batches."""
  share = lambda top, bottom: sums[top] / jnp.maximum(sums[bottom], 1)
  return {
    "clip_fraction": share("clipped", "kept"),
    "kl": share("kl", "kept"),
    "ratio": share("ratio", "kept"),
    **filter_metrics(sums),
  }


def policy_loss(
  logps: Float[AnyArray, "B L"],
  entropy: Float[AnyArray, "B L"],
  old_logps: Float[AnyArray, "B L"],
  ref_logps: Float[AnyArray, "B L"] | None,
  advantages: Float[AnyArray, " B"],
  loss_mask: Bool[AnyArray, "B L"],
  hinted: Bool[AnyArray, "B L"],
  cfg: ObjectiveConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The loss of one batch.

  Args:
    logps: f32[B,L], log-probabilities of the completions' tokens under the current policy.
      Gradients flow through them only.
    entropy: f32[B,L], entropy of the current policy at each position, in nats.
    old_logps: f32[B,L], log-probabilities under the policy that sampled.
    ref_logps: f32[B,L], log-probabilities under the reference; None leaves the KL to it out.
    advantages: f32[B].
    loss_mask: bool[B,L], the loss region |o_i|, before the entropy filter.
    hinted: bool[B,L], True where a token was a hint.
    cfg: see `ObjectiveConfig`.

  Returns:
    (loss f32[], metrics). The metrics are clip_fraction, kl and ratio, means over the tokens that
    the filter keeps; hints_kept, the share of hint tokens in the loss region that it keeps; and
    entropy and hint_entropy in nats.
  """
  mask, hints = jnp.asarray(loss_mask, bool), jnp.asarray(hinted, bool)
  logps, entropy, old_logps = map(jnp.asarray, (logps, entropy, old_logps))
  ref_logps = None if ref_logps is None else jnp.asarray(ref_logps)
  numerator, sums = policy_loss_sums(
    logps, entropy, old_logps, ref_logps, jnp.asarray(advantages), mask, hints, cfg
  )
  denominator = loss_denominator(mask, hints, cfg)
  return numerator / denominator, metrics_from_sums(sums)


@register_objective("clipped")
@dataclasses.dataclass(frozen=True)
class Clipped(ObjectiveConfig, Objective):
  """The clipped policy loss; its options are those of the section `objective` itself."""

  without_reference = "; none is needed with objective.beta=0, or objective.kl_to='old'"

  @property
  def needs_reference(self) -> bool:
    return self.beta > 0 and self.kl_to == "reference"

  @property
  def drops_zero_advantage(self) -> bool:
    return self.beta == 0

  def totals(self, batch: Batch) -> dict[str, Array]:
    scored = batch.region & jnp.any(batch.views.scored, axis=1)
    return {"denominator": loss_denominator(_rows(scored), _rows(batch.hinted), self)}

  def sums(
    self,
    policy: Estimate,
    old: Estimate | None,
    ref: Estimate | None,
    batch: Batch,
    totals: dict[str, Array],
    kept: Array,
  ) -> LossSums:
    numerator, sums = policy_loss_sums(
      _rows(policy.tokens),
      _rows(policy.token_entropy),
      _rows(given(old).tokens),
      None if ref is None else _rows(ref.tokens),
      batch.advantages.reshape(-1),
      _rows(batch.region & policy.scored),
      _rows(batch.hinted),
      self,
      _rows(kept),
    )
    return LossSums(numerator / totals["denominator"], None, sums)

  def metrics(self, sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
    return metrics_from_sums(sums)


def _rows(x: Array) -> Array:
  """[P,G,L] -> [B,L]."""
  return x.reshape(-1, x.shape[-1])
