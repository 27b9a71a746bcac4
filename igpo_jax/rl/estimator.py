"""Likelihood estimates of a completion under a masked diffusion model (docs/method.md#likelihood).

A diffusion model gives no left-to-right likelihood, so log pi(o_k | q) is read off
one forward pass over a corrupted completion:

  mean_field     every completion position masked. The input is then the same for
                 all completions of a prompt and for all inner updates, so one
                 forward pass per prompt serves the whole group.
  random_ratio   each row masks its positions with a ratio of its own, t ~ U(0,1);
                 masked positions are scored (UniGRPO).
  coupled        a random-ratio mask and its complement: two passes, every position
                 scored once (DiffuCoder's coupled-GRPO).

The corruption is a function of the rollout's keys and the number of the inner
update, so old, reference and policy log-probabilities see the same masks.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from igpo_jax.ops.token_stats import token_stats
from igpo_jax.types import LM, Array, Params


@flax.struct.dataclass
class Estimate:
  """What one pass says of a group's completions.

  Attributes:
    logp: f32[P,G,L].
    entropy: f32[P,G,L], of the distribution each log-probability was read from; no
      gradient.
    scored: bool[P,G,L], where the two are defined; elsewhere they are 0.
  """

  logp: Array
  entropy: Array
  scored: Array


def corruption(estimator: str, keys: Array, update: Array, shape: tuple[int, int, int]) -> Array:
  """Which positions each view of each row masks.

  Args:
    estimator: "random_ratio" or "coupled".
    keys: key[P], the rollout's.
    update: i32[], the number of the inner update.
    shape: (P, G, L).

  Returns:
    bool[R,P,G,L]: R = 1, or 2 complementary views.
  """
  _, g, length = shape

  def of_prompt(key):
    key_t, key_mask = jax.random.split(jax.random.fold_in(key, update))
    t = jax.random.uniform(key_t, (g, 1))
    return jax.random.uniform(key_mask, (g, length)) < t

  masked = jax.vmap(of_prompt)(keys)
  return jnp.stack([masked, ~masked]) if estimator == "coupled" else masked[None]


def scored_positions(
  estimator: str, keys: Array, update: Array, shape: tuple[int, int, int]
) -> Array:
  """bool[P,G,L], where `estimate` will have log-probabilities; arguments as `corruption`."""
  if estimator == "random_ratio":
    return corruption(estimator, keys, update, shape)[0]
  return jnp.ones(shape, bool)


def estimate(
  lm: LM,
  params: Params,
  estimator: str,
  prompt: Array,
  prompt_valid: Array,
  completion: Array,
  keys: Array,
  update: Array,
) -> Estimate:
  """Per-token log-probabilities and entropies of completions.

  Args:
    lm, params: the model.
    estimator: "mean_field", "random_ratio" or "coupled".
    prompt: i32[P,Tp], left-padded; never masked.
    prompt_valid: bool[P,Tp].
    completion: i32[P,G,L].
    keys: key[P]; unused by "mean_field".
    update: i32[], the number of the inner update; unused by "mean_field".
  """
  p, g, length = completion.shape
  if estimator == "mean_field":
    canvas = jnp.full((p, length), lm.mask_id, completion.dtype)
    logp, entropy = _read(lm, params, prompt, prompt_valid, canvas, completion)
    entropy = jnp.broadcast_to(entropy[:, None], (p, g, length))
    return Estimate(logp, entropy, jnp.ones((p, g, length), bool))

  masked = corruption(estimator, keys, update, (p, g, length))
  prompt = jnp.repeat(prompt, g, axis=0)
  prompt_valid = jnp.repeat(prompt_valid, g, axis=0)
  rows = completion.reshape(p * g, length)
  logp = entropy = jnp.zeros((p, g, length), jnp.float32)
  for view in masked:
    canvas = jnp.where(view.reshape(p * g, length), lm.mask_id, rows)
    view_logp, view_entropy = _read(lm, params, prompt, prompt_valid, canvas, rows[:, None])
    logp = jnp.where(view, view_logp.reshape(p, g, length), logp)
    entropy = jnp.where(view, view_entropy.reshape(p, g, length), entropy)
  return Estimate(logp, entropy, jnp.any(masked, axis=0))


def _read(lm, params, prompt, prompt_valid, canvas, targets):
  """One forward over [X,Tp+L]; log p of targets i32[X,G,L] and entropies [X,L]."""
  tokens = jnp.concatenate([prompt, canvas], axis=1)
  valid = jnp.concatenate([prompt_valid, jnp.ones(canvas.shape, bool)], axis=1)
  h, _ = lm.hidden(params, tokens, valid)
  return token_stats(lambda x: lm.head(params, x), h[:, prompt.shape[1] :], targets)


def loss_region(completion: Array, stop_ids: tuple[int, ...], kind: str) -> Array:
  """Which completion positions are in the loss, before the entropy filter.

  Args:
    completion: i32[...,L].
    stop_ids: tokens that end a completion.
    kind: "through_eos": up to and including the first stop token; "all": the canvas
      (official code).

  Returns:
    bool[...,L].
  """
  if kind == "all":
    return jnp.ones(completion.shape, bool)
  stops = jnp.isin(completion, jnp.asarray(stop_ids)).astype(jnp.int32)
  return jnp.cumsum(stops, axis=-1) - stops == 0
