"""Reads an estimator's views: log-probabilities of completions (docs/method.md#likelihood).

The corruption is a function of the rollout's keys and the number of the inner update, so old,
reference and policy log-probabilities see the same masks.
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
  """What the views say of completions.

  Attributes:
    logp: f32[P,R,G,L], of the token of each completion; 0 where a view does not score it.
    entropy: f32[P,R,G,L], of the distribution that it was read from, in nats; 0 likewise; no
      gradient.
    views: [P,R,G,...], see `Views`.
    routers: of a model with experts, how evenly they worked: the mean over the views.
  """

  logp: Array
  entropy: Array
  views: Views
  routers: Balance | None = None

  @property
  def tokens(self) -> Array:
    """f32[P,G,L], the weighted sum of the views: one number for each token, 0 where unscored."""
    logp = jnp.where(self.views.scored, self.logp, 0.0)
    return jnp.sum(logp if self.views.weights is None else self.views.weights * logp, axis=1)

  @property
  def scored(self) -> Array:
    """bool[P,G,L], positions that any view scores."""
    return jnp.any(self.views.scored, axis=1)

  @property
  def token_entropy(self) -> Array:
    """f32[P,G,L], the mean over the views that score a position."""
    return self._mean(self.entropy)

  @property
  def token_logp(self) -> Array:
    """f32[P,G,L], the mean log-probability over the views that score a token, 0 where none does."""
    return self._mean(self.logp)

  def _mean(self, x: Array) -> Array:
    count = jnp.sum(self.views.scored, axis=1)
    total = jnp.sum(jnp.where(self.views.scored, x, 0.0), axis=1)
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def largest_part(count: int, most: int) -> int:
  """The greatest divisor of `count` that is at most `most`; 0 of 0."""
  return next((n for n in range(min(count, most), 0, -1) if count % n == 0), 0)


def sizes_of(config: Config, lm: LM | ModelConfig) -> Sizes:
  """The static numbers that estimators may depend on.

  Args:
    lm: what has the ids of special tokens: the model, or its config.
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
  """What estimators are given of a rollout, [P,...].

  Args:
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
  """What a model makes of an estimator's forwards.

  Args:
    block_length: of a block-causal model, else 0. Such a model sees a completion's own clean blocks
      before each noisy one, so no input is the same for a whole group.
  """
  return Forwards(0, forwards.views) if block_length else forwards


def views_of(
  estimator: Estimator, groups: Group, keys: Array, update: Array | int, sizes: Sizes
) -> Views:
  """The views of all groups, [P,R,G,...].

  Args:
    groups: [P,...].
    keys: key[P], the rollout's.
    update: i32[], number of the inner update; of no effect unless the estimator is `redrawn`.
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
  """Reads views that are drawn already: per-token log-probabilities and entropies.

  At most `views_at_once` views of a kind (shared by a group, or own) are differentiated together.
  With more of them, each batch of views is computed again in the backward pass, so that memory
  does not grow with their number.

  Args:
    lm, params: the model.
    groups: [P,...], as for `views_of`.
    views: [P,R,G,...].
    views_at_once: at least 1.
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
  """Views that are all shared by groups, or all own: as `_read`, with r in front; None of none.

  Args:
    corruption: (masked [r,P,G,L], prompt_masked [r,P,G,Tp] or None).
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
  """One view: log p and entropy, f32[P,G,L]; of a model with experts, how evenly they worked.

  Args:
    masked: bool[P,G,L].
    prompt_masked: bool[P,G,Tp] or None.
    shared: the input is that of the group's first completion; its G completions are read from it.
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
  # Clean blocks are seen by block-causal models only, of which no view is shared.
  clean = join(known, valid, rows)[0] if lm.block_length else tokens
  h, routers = noisy_hidden(lm, params, tokens, clean, seen)
  head = lambda x: lm.head(params, x)
  if temperature != 1.0:
    head = lambda x: lm.head(params, x) / temperature
  logp, entropy = token_stats(head, h[:, prompt.shape[1] :], targets)
  if shared:
    return logp, jnp.broadcast_to(entropy[:, None], (p, g, length)), routers
  return logp.reshape(p, g, length), entropy.reshape(p, g, length), routers
