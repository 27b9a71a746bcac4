"""The jitted programs that learn from a rollout: likelihoods once, then one update after another.

They combine an estimator with an objective, and use only what these two declare. So a new method
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

# Takes the place of an inner update's number in the keys of masks that only the old policy is read
# under (`Objective.old_has_own_masks`).
OWN_MASKS = 2**31 - 1


class RolloutScores(NamedTuple):
  """What is computed once per rollout. U is 1 if it is the same for all inner updates.

  Attributes:
    old: f32[U,P,R,G,L], log-probabilities under the policy that sampled, in every view; None if
      the objective does not need them, or if the policy of the only update is the one that sampled.
    ref: f32[U,P,R,G,L], log-probabilities under the reference; None if it is not needed.
    entropy: f32[U,P,R,G,L], entropies of the policy that sampled, in nats; None if `old` is None.
    totals: name -> f32[U,...], see `Objective.totals`.
  """

  old: Array | None
  ref: Array | None
  entropy: Array | None
  totals: dict[str, Array]


class PolicyPrograms(NamedTuple):
  """The programs of a step's learning. All but `totals` are jitted.

  Arguments that several of them take:
    rollout: the groups to learn from.
    keys: key[P], one for each prompt of the rollout; views are drawn from it.
    u: i32[], number of the inner update, from 0 on.
    frozen: the parameters that are not trained: the base model under LoRA, else {}.
    rounding: the key with which parameters were rounded for `score` (`compute_copy`); the network
      then reads the trained ones rounded by the same thresholds. None: nothing is rounded so.

  Attributes:
    totals: `totals(rollout, keys, u, old=None) -> dict`: what the objective knows before the policy
      is read (`Objective.totals`). `old` is (log-probabilities, entropies) f32[P,R,G,L], for an
      objective with `totals_need_old`.
    score: `score(params, ref_params, rollout, keys, full_batch=None) -> RolloutScores`.
      `ref_params` is None where no reference is needed. If `rollout` and `keys` are only some
      groups of the step's batch, `full_batch` is (rollout, keys) of all groups: the loss is a mean
      over them.
    gradient: `gradient(trained_params, frozen, rollout, scores, keys, u, rounding=None) -> (loss,
      sums, gradient)`.
    update: `update(state, frozen, rollout, scores, keys, u, rounding=None) -> (state, metrics)`.
      `state` is donated.
  """

  totals: Callable
  score: Callable
  gradient: Callable
  update: Callable


def corruptions(config: Config) -> int:
  """U: the number of inner updates if each of them draws its own masks, else 1."""
  return config.rl.inner_updates if estimator_of(config).redrawn else 1


def scores_old(config: Config) -> bool:
  """Whether log-probabilities under the policy that sampled are computed, once per rollout.

  With a single inner update they are not needed: the policy that is trained is the one that
  sampled. Some objectives need them in any case.
  """
  objective = objective_of(config)
  once = config.rl.inner_updates > 1 or objective.old_has_own_masks or objective.totals_need_old
  return objective.needs_old and once


def rounds_alike(config: Config, lm: LM) -> bool:
  """Whether `score` and `update` compute the same log-probabilities to the last bit.

  In float32 on a CPU they do. They need not with 16 bits, with products that the compiler tunes for
  each program, or with experts, whose routers only `update` has a loss for.
  """
  return config.model.dtype == "float32" and platform() == "cpu" and lm.routed is None


def make_policy_programs(
  lm: LM,
  optimizer: optax.GradientTransformation,
  config: Config,
  shardings: TrainState | None = None,
) -> PolicyPrograms:
  """Makes the programs for the estimator and the objective of a config.

  Args:
    lm: the model.
    optimizer: makes an update of the trained parameters from a gradient.
    config: the whole config; it names the estimator and the objective.
    shardings: shardings of the state that `update` returns (`micro_batches.shardings_of`); None
      leaves them to the compiler.
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
      # The objective's sums are kept apart from those of every method: names may be the same.
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
  """Sums for metrics that every method has: entropies, and how far off the policy hints are.

  Args:
    policy: the current policy's estimate.
    old: that of the policy that sampled; None where it is not known.
    batch: the completions.
    kept: bool[P,G,L], positions that are in the loss after the entropy filter.

  Returns:
    name -> f32[], to be added up over micro-batches. Without gradient.
  """
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
  """Maxima for metrics that every method has; a minimum is the maximum of negative values.

  Arguments as `policy_sums`. Returns name -> f32[], of which the largest over micro-batches counts.
  """
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
  """Metrics from `policy_sums` and `policy_most`, combined over micro-batches.

  Besides those of `filter_metrics`, with ratio = exp(log pi - log pi_old) of a scored token:
    entropy_floor: the lowest mean entropy of a completion, in nats.
    largest_ratio: the largest ratio.
    effective_share: effective sample size of the ratios as a share of their number n,
      (sum)^2 / (n sum of squares): 1 if all are equal, 1/n if one outweighs all others.
    hint_ratio, own_ratio: mean ratio of hint tokens, and of all others.
    hint_logp, own_logp: mean log-probability of hint tokens, and of all others, in nats.
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
