"""The jitted programs that learn from a rollout: likelihoods once, then one update after another.

They join an estimator and an objective, and ask both only for what they declare: a new method
needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from igpo_jax.config import Config
from igpo_jax.models import lora
from igpo_jax.models.attention import platform
from igpo_jax.ops.masked import masked_sum
from igpo_jax.ops.rounding import read_as
from igpo_jax.rl.estimate import Estimate, estimate, groups_of, sizes_of, views_of
from igpo_jax.rl.estimators.base import Group
from igpo_jax.rl.hint_filter import entropy_filter, filter_metrics, filter_sums
from igpo_jax.rl.methods import estimator_of, objective_of
from igpo_jax.rl.objectives.base import Batch
from igpo_jax.train.micro_batches import (
  Sums,
  accumulate,
  apply_gradient,
  map_micro_batches,
  split_micro_batches,
)
from igpo_jax.train.setup import compute_copy
from igpo_jax.types import LM, Array, Rollout, TrainState

OWN_MASKS = (
  2**31 - 1
)  # stands for an inner update in the key of masks that are only the old policy's


class RolloutScores(NamedTuple):
  """What is computed once per rollout: U = 1 if it is the same for all inner updates.

  Attributes:
    old: f32[U,P,R,G,L], log-probabilities of the policy that sampled, in every view; None where
      the objective does without.
    ref: f32[U,P,R,G,L], of the reference; None likewise.
    entropy: f32[U,P,R,G,L], of the policy that sampled; None where `old` is.
    totals: f32[U,...] each, see `Objective.totals`.
  """

  old: Array | None
  ref: Array | None
  entropy: Array | None
  totals: dict[str, Array]


class PolicyPrograms(NamedTuple):
  """The jitted programs of a step's learning.

  Attributes:
    totals: (rollout, keys, u i32[], old=None) -> what the objective knows before the policy is
      read; not jitted. `old` is (log-probabilities, entropies) f32[P,R,G,L], for an objective with
      `totals_need_old`.
    score: (params, ref_params or None, rollout, keys, full_batch=None) -> RolloutScores. Where
      `rollout` and `keys` are some groups of a step's batch, `full_batch` is (rollout, keys) of
      all of them: the loss is a mean over the full batch.
    gradient: (trained params, frozen, rollout, scores, keys, u i32[], rounding=None) ->
      (loss, sums, gradient). `rounding`: the key that the scores' parameters were rounded with
      (`compute_copy`); the network then reads the trained ones rounded by the same thresholds.
    update: (state, frozen, rollout, scores, keys, u i32[], rounding=None) -> (state, metrics);
      donates state. `frozen` is what is not trained: the base under LoRA, else {}.
  """

  totals: Callable
  score: Callable
  gradient: Callable
  update: Callable


def corruptions(config: Config) -> int:
  """U: of how many inner updates the masks differ, 1 or all."""
  return config.rl.inner_updates if estimator_of(config).redrawn else 1


def scores_old(config: Config) -> bool:
  """Whether log-probabilities of the policy that sampled are computed once a rollout.

  With a single inner update the policy that is trained is the one that sampled.
  """
  objective = objective_of(config)
  once = config.rl.inner_updates > 1 or objective.old_has_own_masks or objective.totals_need_old
  return objective.needs_old and once


def rounds_alike(config: Config, lm: LM) -> bool:
  """Whether `score` and `update` give the same log-probabilities to the last bit.

  In float32 on a CPU they do. With 16 bits, or products that are tuned for each program, they
  need not; nor where only `update` has use for what the routers of experts say.
  """
  return config.model.dtype == "float32" and platform() == "cpu" and lm.routed is None


def make_policy_programs(
  lm: LM,
  optimizer: optax.GradientTransformation,
  config: Config,
  shardings: TrainState | None = None,
) -> PolicyPrograms:
  """Compiles the estimator and the objective of a config into its programs.

  Args:
    shardings: of the state that `update` takes and gives; None leaves them to the compiler.
  """
  rl = config.rl
  estimator, objective, sizes = estimator_of(config), objective_of(config), sizes_of(config, lm)
  draws = corruptions(config)
  own_masks = objective.old_has_own_masks

  def read(params, groups: Group, keys, u) -> Estimate:
    return estimate(lm, params, estimator, groups, keys, u, sizes, rl.views_at_once)

  def batch_of(rollout: Rollout, groups: Group, views) -> Batch:
    return Batch(
      rollout.completion, rollout.hinted, rollout.commit_step, rollout.advantages,
      groups.region, groups.length, views,
    )  # fmt: skip

  def totals_of(rollout: Rollout, keys, u, old=None):
    groups = groups_of(rollout, lm.stop_ids, rl.loss_region)
    views = views_of(estimator, groups, keys, u, sizes)
    before = (Estimate(*old, views),) if objective.totals_need_old else ()
    return objective.totals(batch_of(rollout, groups, views), *before)

  def score(params, ref_params, rollout: Rollout, keys, full_batch=None) -> RolloutScores:
    groups = groups_of(rollout, lm.stop_ids, rl.loss_region)

    def read_all(params, u):
      def stats(part):
        out = read(params, *part, u)
        return out.logp, out.entropy

      return map_micro_batches(stats, (groups, keys), rl.micro_batches)

    def of_update(u):
      old = entropy = ref = None
      if scores_old(config) and not own_masks:
        old, entropy = read_all(params, u)
      if ref_params is not None:
        ref, _ = read_all(ref_params, u)
      return old, ref, entropy, totals_of(*(full_batch or (rollout, keys)), u, (old, entropy))

    old, ref, entropy, totals = jax.lax.map(of_update, jnp.arange(draws))
    if own_masks and scores_old(config):
      old, entropy = (x[None] for x in read_all(params, OWN_MASKS))
    return RolloutScores(old, ref, entropy, totals)

  def old_estimate(policy: Estimate, old, entropy, groups: Group, keys, u) -> Estimate | None:
    """The estimate of the policy that sampled, where the objective asks for it."""
    if not objective.needs_old:
      return None
    if old is not None and own_masks:
      return Estimate(old, entropy, views_of(estimator, groups, keys, OWN_MASKS, sizes))
    same = jax.lax.stop_gradient(policy)
    if old is None:
      return same
    if rounds_alike(config, lm):
      return Estimate(old, entropy, policy.views)
    # Before the first update the policy is the one that sampled: every ratio is exactly 1, however
    # differently the compiler rounds in two programs.
    first = lambda now, before: jnp.where(u == 0, now, before)
    return Estimate(first(same.logp, old), first(same.entropy, entropy), policy.views)

  def gradient(trained, frozen, rollout: Rollout, scores: RolloutScores, keys, u, rounding=None):
    of_update = lambda tree: jax.tree.map(lambda x: x[jnp.minimum(u, x.shape[0] - 1)], tree)
    old, ref, entropy, totals = of_update(tuple(scores))

    copy = None if rounding is None else compute_copy(trained, config.model.dtype, rounding)

    def loss_sums(trainable, part):
      rollout, (old, ref, entropy), keys = part
      if copy is not None:
        trainable = jax.tree.map(read_as, trainable, copy)
      groups = groups_of(rollout, lm.stop_ids, rl.loss_region)
      policy = read(lora.combine(frozen, trainable), groups, keys, u)
      before = old_estimate(policy, old, entropy, groups, keys, u)
      reference = None if ref is None else Estimate(ref, jnp.zeros_like(ref), policy.views)
      if objective.drops_zero_advantage:
        live = jnp.any(rollout.advantages != 0, axis=1)[:, None, None]
        groups = groups.replace(region=groups.region & live)
      batch = batch_of(rollout, groups, policy.views)
      kept = kept_positions(policy, before, batch)
      out = objective.sums(policy, before, reference, batch, totals, kept)
      # The objective's own apart from what every method has: names may be the same.
      added = {
        "objective": {name: value.astype(jnp.float32) for name, value in out.sums.items()},
        "policy": policy_sums(policy, before, batch, kept),
      }
      most = {"objective": out.most, "policy": policy_most(policy, before, batch)}
      numerator, share = out.numerator, 1 / rl.micro_batches
      if out.denominator is not None:
        share = added["denominator"] = jax.lax.stop_gradient(out.denominator)
      if policy.routers is not None:
        added["routers"] = {k: v / rl.micro_batches for k, v in policy.routers.metrics().items()}
        if lm.router_loss:
          # The mean over micro-batches, weighted by denominators where the sum is divided later.
          numerator += share * lm.router_loss * policy.routers.loss
      return numerator, Sums(added, most)

    def kept_positions(policy: Estimate, before: Estimate | None, batch: Batch) -> Array:
      of_old = before is not None and config.objective.filter_entropy == "old"
      entropy = jax.lax.stop_gradient(before if of_old else policy).token_entropy
      flat = lambda x: x.reshape(-1, x.shape[-1])
      kept = entropy_filter(
        flat(entropy), flat(batch.region & policy.scored), flat(batch.hinted),
        config.objective.entropy_keep,
      )  # fmt: skip
      return kept.reshape(batch.region.shape)

    parts = split_micro_batches((rollout, (old, ref, entropy), keys), rl.micro_batches)
    numerator, sums, grads = accumulate(loss_sums, trained, parts)
    if "denominator" in sums.added:
      bottom = sums.added["denominator"]
      share = lambda x: x / jnp.where(bottom == 0, 1, bottom)
      numerator, grads = share(numerator), jax.tree.map(share, grads)
    return numerator, sums, grads

  def update(state: TrainState, frozen, rollout, scores: RolloutScores, keys, u, rounding=None):
    loss, sums, grads = gradient(state.params, frozen, rollout, scores, keys, u, rounding)
    state, metrics = apply_gradient(state, optimizer, loss, grads)
    shared = policy_metrics(sums.added["policy"], sums.most["policy"])
    own = objective.metrics(sums.added["objective"], sums.most["objective"])
    return state, metrics | shared | own | sums.added.get("routers", {})

  out = (shardings, None)
  return PolicyPrograms(
    totals_of,
    jax.jit(score),
    jax.jit(gradient),
    jax.jit(update, donate_argnums=0, out_shardings=out),
  )


def policy_sums(
  policy: Estimate, old: Estimate | None, batch: Batch, kept: Array
) -> dict[str, Array]:
  """Sums for metrics that every method has: entropies, and how far off the policy hints are."""
  scored = batch.region & policy.scored
  sums = filter_sums(policy.token_entropy, scored, batch.hinted, kept)
  if old is not None:
    views = policy.views.scored
    ratio = jnp.exp(jnp.where(views, policy.logp - old.logp, 0.0))
    every = views & batch.region[:, None]
    sums |= {"ratio2": masked_sum(ratio**2, every)}
    for name, where in (("hint", batch.hinted), ("own", ~batch.hinted)):
      at = views & (batch.region & where)[:, None]
      sums |= {
        f"{name}_ratio": masked_sum(ratio, at),
        f"{name}_logp": masked_sum(policy.logp, at),
        f"{name}_reads": jnp.sum(at),
      }
  return {k: jax.lax.stop_gradient(v).astype(jnp.float32) for k, v in sums.items()}


def policy_most(policy: Estimate, old: Estimate | None, batch: Batch) -> dict[str, Array]:
  """Extremes for metrics that every method has; the least as the greatest of its negative."""
  scored = batch.region & policy.scored
  mean = masked_sum(policy.token_entropy, scored, axis=-1) / jnp.maximum(
    jnp.sum(scored, axis=-1), 1
  )
  most = {"-entropy": jnp.max(jnp.where(jnp.any(scored, axis=-1), -mean, -jnp.inf))}
  if old is not None:
    every = policy.views.scored & batch.region[:, None]
    most["ratio"] = jnp.exp(jnp.max(jnp.where(every, policy.logp - old.logp, -jnp.inf)))
  return jax.tree.map(jax.lax.stop_gradient, most)


def policy_metrics(sums: dict[str, Array], most: dict[str, Array]) -> dict[str, Array]:
  """Metrics from `policy_sums` and `policy_most`, gathered over micro-batches.

  entropy_floor is the least mean entropy of a completion, largest_ratio the greatest of all
  exp(log pi - log pi_old). effective_share is the effective sample size of these ratios as a share
  of their number, (sum)^2 / (n sum of squares): 1 on policy, 1/n where one of them is all.
  hint_ratio and own_ratio are means of exp(log pi - log pi_old) over what is read of hint tokens
  and of the others; hint_logp and own_logp their mean log-probabilities in nats.
  """
  share = lambda top, bottom: sums[top] / jnp.maximum(sums[bottom], 1)
  metrics = filter_metrics(sums)
  metrics["entropy_floor"] = -most["-entropy"]
  if "hint_reads" in sums:
    total, count = (sums[f"hint_{x}"] + sums[f"own_{x}"] for x in ("ratio", "reads"))
    metrics["largest_ratio"] = most["ratio"]
    metrics["effective_share"] = total**2 / jnp.maximum(count * sums["ratio2"], 1e-30)
    for name in ("hint", "own"):
      metrics |= {
        f"{name}_{what}": share(f"{name}_{what}", f"{name}_reads") for what in ("ratio", "logp")
      }
  return metrics
