"""The jitted updates: gradients over micro-batches, one optimizer step, state donated.

A batch is cut into M micro-batches along its first axis and scanned; the gradient
of the sum is the sum of the gradients because every loss is a numerator over a
denominator that is known beforehand. An update whose loss or gradient is not finite
changes nothing but the count of skipped updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from igpo_jax.config import Config, SFTConfig
from igpo_jax.diffusion.corrupt import mask_rows
from igpo_jax.models import lora
from igpo_jax.ops.masked import masked_sum
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.parallel.sharding import constrain
from igpo_jax.rl.estimator import estimate, loss_region, scored_positions
from igpo_jax.rl.objective import loss_denominator, metrics_from_sums, policy_loss_sums
from igpo_jax.types import LM, Array, Params, Rollout, TrainState


def split_micro_batches(tree: Any, count: int) -> Any:
  """[X, ...] -> [M, X/M, ...] for every array, the parts interleaved over devices.

  Taking every M-th row keeps each micro-batch spread over all devices, where
  contiguous slices would sit on a few of them.
  """

  def split(x):
    x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
    return (
      x
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else constrain(x, None, "act_batch", *(None,) * (x.ndim - 2))
    )

  return jax.tree.map(split, tree)


def accumulate(loss_sums: Callable[[Params, Any], tuple[Array, Any]], params, slices):
  """Sums of (numerator, sums) and of the numerator's gradient over M slices.

  Args:
    loss_sums: (params, slice) -> (numerator f32[], dict of f32[] sums).
    params: differentiated.
    slices: tree of [M, ...].

  Returns:
    (numerator, sums, gradient).
  """
  value_and_grad = jax.value_and_grad(loss_sums, has_aux=True)
  first = jax.tree.map(lambda x: x[0], slices)
  if jax.tree.leaves(slices)[0].shape[0] == 1:
    (numerator, sums), grads = value_and_grad(params, first)
    return numerator, sums, grads

  def step(total, part):
    (numerator, sums), grads = value_and_grad(params, part)
    return jax.tree.map(jnp.add, total, (numerator, sums, grads)), None

  shapes = jax.eval_shape(value_and_grad, params, first)
  (numerator, sums), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(step, (numerator, sums, grads), slices)
  return total


def apply_gradient(
  state: TrainState, optimizer: optax.GradientTransformation, loss: Array, grads: Params
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step, or none if the loss or the gradient's norm is not finite."""
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  skipped = 1 - finite.astype(jnp.int32)
  state = TrainState(
    step=state.step + 1,
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
    skipped=state.skipped + skipped,
    skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
  )
  metrics = {
    "loss": loss,
    "grad_norm": norm,
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
  }
  return state, metrics


# --- supervised fine-tuning ----------------------------------------------------------


def nelbo_sum(
  lm: LM, params: Params, noisy, masked, p, tokens, valid, response, dropout_key=None
) -> Array:
  """Sum over rows of sum(masked cross-entropy / p) / response length (docs/method.md#sft).

  Args:
    noisy, tokens: i32[B,T], the corrupted and the clean rows.
    masked, valid: bool[B,T].
    p: f32[B], the probability each row was masked with.
    response: bool[B,W], of the last W columns; the head is applied to these only.
    dropout_key: of the adapters' dropout; None turns it off.
  """
  dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
  h, _ = lm.hidden(params, noisy, valid, **dropout)
  read = lambda x: x[:, -response.shape[1] :]
  logp, _ = token_stats(lambda x: lm.head(params, x), read(h), read(tokens)[:, None])
  per_row = masked_sum(-logp[:, 0], read(masked), axis=1) / p
  return jnp.sum(per_row / jnp.maximum(jnp.sum(response, axis=1), 1))


def shardings_of(state: TrainState) -> TrainState:
  """Where every array of a state lives: an update that hands it back laid out the same way
  is compiled once, and not again for a layout that says the same in other words."""
  return jax.tree.map(lambda x: x.sharding, state)


def make_sft_update(
  lm: LM,
  optimizer: optax.GradientTransformation,
  cfg: SFTConfig,
  shardings: TrainState | None = None,
):
  """update(state, frozen, tokens, valid, response, key) -> (state, metrics), jitted.

  The state is donated. `frozen` is what is not trained: the base under LoRA, else {}. `tokens`
  and `valid` are [B,T], `response` bool[B,W] is of their last W columns: W = T may be, but the
  head is then applied to the prompts, too. Adapters have dropout if `lm` has; its patterns, unlike
  everything else, differ with the number of micro-batches.

  Args:
    shardings: of the state that goes in and comes out; None leaves them to the compiler.
  """

  def update(state: TrainState, frozen: Params, tokens, valid, response, key):
    rows, length = tokens.shape
    # Drawn for the whole batch, so that the masks do not depend on the micro-batches.
    of_row = jnp.pad(response, ((0, 0), (length - response.shape[1], 0)))
    noisy, masked, p = mask_rows(key, tokens, of_row, lm.mask_id, cfg.eps)
    dropout_keys = jax.random.split(jax.random.fold_in(key, 1), rows)
    batch = (noisy, masked, p, tokens, valid, response, dropout_keys)

    def loss_sums(trainable, part):
      *part, keys = part
      return nelbo_sum(lm, lora.combine(frozen, trainable), *part, keys[0]) / rows, {}

    slices = split_micro_batches(batch, cfg.micro_batches)
    loss, _, grads = accumulate(loss_sums, state.params, slices)
    state, metrics = apply_gradient(state, optimizer, loss, grads)
    return state, metrics | {"masked": jnp.sum(masked) / jnp.sum(response)}

  return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


# --- policy optimization --------------------------------------------------------------


class RolloutScores(NamedTuple):
  """What is computed once per rollout: U = 1 if it is the same for all inner updates.

  Attributes:
    old: f32[U,P,G,L], log-probabilities of the policy that sampled.
    ref: f32[U,P,G,L], of the reference; None where beta is 0.
    entropy: f32[U,P,G,L], of the policy that sampled.
    denominator: f32[U], what the summed loss is divided by.
  """

  old: Array
  ref: Array | None
  entropy: Array
  denominator: Array


class PolicyPrograms(NamedTuple):
  """The jitted programs of a step's learning.

  Attributes:
    score: (params, ref_params or None, rollout, keys, whole=None) -> RolloutScores. Where
      `rollout` and `keys` are some groups of a step's batch, `whole` is (rollout, keys) of
      all: the loss is a mean over the whole batch.
    gradient: (trained params, frozen, rollout, scores, keys, u i32[]) -> (loss, sums, gradient).
    update: (state, frozen, rollout, scores, keys, u i32[]) -> (state, metrics); donates
      state. `frozen` is what is not trained: the base under LoRA, else {}.
  """

  score: Callable
  gradient: Callable
  update: Callable


def make_policy_programs(
  lm: LM,
  optimizer: optax.GradientTransformation,
  config: Config,
  shardings: TrainState | None = None,
) -> PolicyPrograms:
  """Compiles the estimator and the objective of a config into its programs.

  Without a KL term a group whose advantages are all zero adds nothing to the loss: its
  share is exactly 0, it is left out of the metrics, and it may be left out of the rollout.

  Args:
    shardings: of the state that `update` takes and gives; None leaves them to the compiler.
  """
  rl, objective = config.rl, config.objective
  corruptions = 1 if rl.estimator == "mean_field" else rl.inner_updates

  def estimate_of(params, rollout: Rollout, keys, u):
    return estimate(
      lm, params, rl.estimator,
      rollout.prompt, rollout.prompt_valid, rollout.completion, keys, u,
    )  # fmt: skip

  def in_slices(fn, rollout, keys):
    """Maps fn over micro-batches of prompts, to bound the memory of the forward pass."""
    if rl.micro_batches == 1:
      return fn((rollout, keys))
    out = jax.lax.map(fn, split_micro_batches((rollout, keys), rl.micro_batches))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), out)

  flat = lambda x: x.reshape(-1, x.shape[-1])

  def denominator_of(rollout: Rollout, keys, u):
    region = loss_region(rollout.completion, lm.stop_ids, rl.region)
    region &= scored_positions(rl.estimator, keys, u, region.shape)
    return loss_denominator(flat(region), flat(rollout.hinted), objective)

  def score(params, ref_params, rollout: Rollout, keys, whole=None) -> RolloutScores:
    def of_update(u):
      denominator = denominator_of(*(whole or (rollout, keys)), u)
      old = in_slices(lambda part: estimate_of(params, *part, u), rollout, keys)
      if ref_params is None:
        return old.logp, None, old.entropy, denominator
      ref = in_slices(lambda part: estimate_of(ref_params, *part, u), rollout, keys)
      return old.logp, ref.logp, old.entropy, denominator

    return RolloutScores(*jax.lax.map(of_update, jnp.arange(corruptions)))

  def gradient(trained, frozen, rollout: Rollout, scores: RolloutScores, keys, u):
    now = jax.tree.map(lambda x: x[jnp.minimum(u, corruptions - 1)], scores)

    def loss_sums(trainable, part):
      rollout, (old, ref, old_entropy), keys = part
      policy = estimate_of(lora.combine(frozen, trainable), rollout, keys, u)
      entropy = policy.entropy if rl.entropy == "current" else old_entropy
      region = loss_region(rollout.completion, lm.stop_ids, rl.region) & policy.scored
      if objective.beta == 0:
        region &= jnp.any(rollout.advantages != 0, axis=1)[:, None, None]
      numerator, sums = policy_loss_sums(
        flat(policy.logp),
        flat(entropy),
        flat(old),
        None if ref is None else flat(ref),
        rollout.advantages.reshape(-1),
        flat(region),
        flat(rollout.hinted),
        objective,
      )
      return numerator / now.denominator, sums

    parts = (rollout, (now.old, now.ref, now.entropy), keys)
    return accumulate(loss_sums, trained, split_micro_batches(parts, rl.micro_batches))

  def update(state: TrainState, frozen, rollout: Rollout, scores: RolloutScores, keys, u):
    loss, sums, grads = gradient(state.params, frozen, rollout, scores, keys, u)
    state, metrics = apply_gradient(state, optimizer, loss, grads)
    return state, metrics | metrics_from_sums(sums)

  out = (shardings, None)
  return PolicyPrograms(
    jax.jit(score), jax.jit(gradient), jax.jit(update, donate_argnums=0, out_shardings=out)
  )
