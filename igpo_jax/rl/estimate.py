"""Estimates log-probabilities of completions from an estimator's views (docs/method.md#likelihood).

Masks depend only on the rollout's keys and the number of the inner update. So the old, the
reference and the current policy are read under the same masks.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from igpo_jax.config import Config, ModelConfig
from igpo_jax.diffusion.completions import join
from igpo_jax.diffusion.noisy import noisy_hidden
from igpo_jax.ops.load_balance import Balance
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.rl.estimators.base import Estimator, Forwards, Group, Sizes, Views
from igpo_jax.rl.region import completion_length, loss_region
from igpo_jax.types import LM, Array, Params, Rollout


@flax.struct.dataclass
class Estimate:
  """Log-probabilities and entropies that were read in each view.

  Attributes:
    logp: f32[P,R,G,L], log-probability of each token in each view; 0 where the view does not score
      the token.
    entropy: f32[P,R,G,L], entropy in nats of the distribution that the log-probability was read
      from; 0 where the view does not score the token. Without gradient.
    views: the views, [P,R,G,...].
    routers: for a model with experts, how evenly tokens are spread over them, as a mean over the
      views; else None.
  """

  logp: Array
  entropy: Array
  views: Views
  routers: Balance | None = None

  @property
  def tokens(self) -> Array:
    """f32[P,G,L], the weighted sum of each token's log-probabilities over views; 0 if unscored."""
    logp = jnp.where(self.views.scored, self.logp, 0.0)
    return jnp.sum(logp if self.views.weights is None else self.views.weights * logp, axis=1)

  @property
  def scored(self) -> Array:
    """bool[P,G,L], positions that at least one view scores."""
    return jnp.any(self.views.scored, axis=1)

  @property
  def token_entropy(self) -> Array:
    """f32[P,G,L], the mean entropy over the views that score a position; 0 where none does."""
    return self._mean(self.entropy)

  @property
  def token_logp(self) -> Array:
    """f32[P,G,L], the mean log-probability over the views that score a token; 0 where none does."""
    return self._mean(self.logp)

  def _mean(self, x: Array) -> Array:
    count = jnp.sum(self.views.scored, axis=1)
    total = jnp.sum(jnp.where(self.views.scored, x, 0.0), axis=1)
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def largest_part(count: int, most: int) -> int:
  """The largest divisor of `count` that is at most `most`; 0 if `count` is 0."""
  return next((n for n in range(min(count, most), 0, -1) if count % n == 0), 0)


def sizes_of(config: Config, lm: LM | ModelConfig) -> Sizes:
  """The static numbers that estimators may depend on.

  Args:
    config: the whole config.
    lm: the model or its config, for the ids of special tokens.
  """
  return Sizes(
    group=config.rl.group_size,
    length=config.sampler.gen_length,
    steps=config.sampler.steps,
    block_length=config.sampler.block_length,
    inner_updates=config.rl.inner_updates,
    mask_id=lm.mask_id,
    eos_id=lm.eos_id,
    stop_ids=tuple(lm.stop_ids),
  )


def groups_of(rollout: Rollout, stop_ids: tuple[int, ...], region: str) -> Group:
  """The groups of a rollout as estimators get them, [P,...].

  Args:
    rollout: the rollout.
    stop_ids: tokens that end a completion.
    region: `rl.loss_region`.
  """
  return Group(
    prompt=rollout.prompt,
    prompt_valid=rollout.prompt_valid,
    completion=rollout.completion,
    hinted=rollout.hinted,
    commit_step=rollout.commit_step,
    commit_logp=rollout.commit_logp,
    region=loss_region(rollout.completion, stop_ids, region),
    length=completion_length(rollout.completion, stop_ids),
  )


def forwards_of_model(forwards: Forwards, block_length: int) -> Forwards:
  """How many forward passes the model needs for what the estimator declares.

  A block-causal model sees a completion's own clean blocks before each noisy one. So no input is
  the same for a whole group, and shared views become own ones.

  Args:
    forwards: what the estimator declares.
    block_length: of a block-causal model; 0 for others.
  """
  return Forwards(0, forwards.views) if block_length else forwards


def views_of(
  estimator: Estimator, groups: Group, keys: Array, update: Array | int, sizes: Sizes
) -> Views:
  """The views of all groups, [P,R,G,...].

  Args:
    estimator: chooses the views.
    groups: of `groups_of`, [P,...].
    keys: key[P], one for each prompt of the rollout.
    update: i32[], number of the inner update. It changes nothing unless the estimator is `redrawn`.
    sizes: of `sizes_of`.
  """
  number = update if estimator.redrawn else 0

  def of_group(group: Group, key: Array) -> Views:
    return estimator.views(group, jax.random.fold_in(key, number), sizes)

  return jax.vmap(of_group)(groups, keys)


def read_views(
  lm: LM,
  params: Params,
  estimator: Estimator,
  groups: Group,
  views: Views,
  sizes: Sizes,
  views_at_once: int = 2,
) -> Estimate:
  """Reads per-token log-probabilities and entropies in views that are given.

  At most `views_at_once` views of a kind (shared by a group, or own) are differentiated together.
  With more of them, each batch of views is computed again in the backward pass, so that memory
  does not grow with their number.

  Args:
    lm: the model.
    params: its parameters.
    estimator: the one that made the views.
    groups: [P,...], as for `views_of`.
    views: of `views_of`, [P,R,G,...].
    sizes: of `sizes_of`.
    views_at_once: at least 1.

  Raises:
    ValueError: the estimator made another number of views than it declares.
  """
  shared, own = forwards_of_model(estimator.forwards(sizes), lm.block_length)
  if views.masked.shape[1] != shared + own:
    raise ValueError(
      f"estimator {estimator.name!r} made {views.masked.shape[1]} views and declares {shared + own}"
    )
  corruption = (views.masked, views.prompt_masked)
  parts = []
  for first, count, is_shared in ((0, shared, True), (shared, own, False)):
    of_kind = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[first : first + count], corruption)  # noqa: B023
    parts.append(_read_kind(lm, params, groups, of_kind, is_shared, views_at_once, estimator))
  parts = [part for part in parts if part is not None]
  logp, entropy, routers = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  only = lambda x: jnp.where(views.scored, jnp.moveaxis(x, 0, 1), 0.0)
  routers = jax.tree.map(lambda x: jnp.mean(x, axis=0), routers)
  return Estimate(only(logp), only(entropy), views, routers)


def _read_kind(
  lm: LM,
  params: Params,
  groups: Group,
  corruption: tuple[Array, Array | None],
  shared: bool,
  views_at_once: int,
  estimator: Estimator,
) -> tuple[Array, Array, Balance | None] | None:
  """Reads r views of one kind: all shared by groups, or all own.

  Args:
    corruption: (masked bool[r,P,G,L], prompt_masked bool[r,P,G,Tp] or None).

  Returns:
    The results of `_read`, with r as their first dimension; None if there are no such views.
  """
  count = corruption[0].shape[0]
  at_once = largest_part(count, views_at_once)

  def read(params, chunk):
    out = []
    for k in range(chunk[0].shape[0]):
      masked, prompt_masked = jax.tree.map(lambda x, k=k: x[k], chunk)
      out.append(_read(lm, params, groups, masked, prompt_masked, shared, estimator.temperature))
    return jax.tree.map(lambda *x: jnp.stack(x), *out)

  if count == 0:
    return None
  if count == at_once:
    return read(params, corruption)
  chunks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), corruption)
  again = jax.checkpoint(read)
  out = jax.lax.map(lambda chunk: again(params, chunk), chunks)
  return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


def estimate(
  lm: LM,
  params: Params,
  estimator: Estimator,
  groups: Group,
  keys: Array,
  update: Array | int,
  sizes: Sizes,
  views_at_once: int = 2,
) -> Estimate:
  """Draws the views of an inner update and reads them; arguments as `views_of`, `read_views`."""
  views = views_of(estimator, groups, keys, update, sizes)
  return read_views(lm, params, estimator, groups, views, sizes, views_at_once)


def _read(
  lm: LM,
  params: Params,
  groups: Group,
  masked: Array,
  prompt_masked: Array | None,
  shared: bool,
  temperature: float,
) -> tuple[Array, Array, Balance | None]:
  """Reads one view.

  Args:
    masked: bool[P,G,L].
    prompt_masked: bool[P,G,Tp] or None.
    shared: whether the input is the same for a group. It is then made from the group's first
      completion, and all G completions are read from it.

  Returns:
    (log-probabilities f32[P,G,L], entropies f32[P,G,L], see `Estimate.routers`).
  """
  p, g, length = masked.shape
  prompt, valid, completion = groups.prompt, groups.prompt_valid, groups.completion
  if shared:
    canvas = jnp.where(masked[:, 0], lm.mask_id, completion[:, 0])
    targets, hide = completion, None if prompt_masked is None else prompt_masked[:, 0]
  else:
    prompt, valid = jnp.repeat(prompt, g, axis=0), jnp.repeat(valid, g, axis=0)
    rows = completion.reshape(p * g, length)
    canvas = jnp.where(masked.reshape(p * g, length), lm.mask_id, rows)
    targets = rows[:, None]
    hide = None if prompt_masked is None else prompt_masked.reshape(p * g, -1)
  known = prompt
  if hide is not None:
    prompt = jnp.where(hide & valid, lm.mask_id, prompt)
  tokens, seen = join(prompt, valid, canvas)
  # Only block-causal models read the clean rows, and they have no shared views.
  clean = join(known, valid, rows)[0] if lm.block_length else tokens
  h, routers = noisy_hidden(lm, params, tokens, clean, seen)
  head = lambda x: lm.head(params, x)
  if temperature != 1.0:
    head = lambda x: lm.head(params, x) / temperature
  logp, entropy = token_stats(head, h[:, prompt.shape[1] :], targets)
  if shared:
    return logp, jnp.broadcast_to(entropy[:, None], (p, g, length)), routers
  return logp.reshape(p, g, length), entropy.reshape(p, g, length), routers
