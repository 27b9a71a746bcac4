"""One decision of the denoising loop: which candidates are committed, and to what."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.config import SamplerConfig
from igpo_jax.ops.masked import topk_mask
from igpo_jax.types import LM, Array

ARGMAX_RUN = 512  # the longest run that is searched element by element


def choose(
  lm: LM,
  cfg: SamplerConfig,
  logits: Array,
  candidates: Array,
  count: Array,
  keys: Array,
  places: Array,
  gumbel: Array | None = None,
  chance: Array | None = None,
  uniform: Array | None = None,
  editable: Array | None = None,
  old: Array | None = None,
) -> tuple[Array, Array, Array]:
  """Decides a step for w positions of each row (docs/method.md#sampling).

  Noise belongs to a position: the same for it whichever others are decided with it.

  Args:
    lm: the model, for its special tokens.
    cfg: see `SamplerConfig`.
    logits: f32[B,w,V].
    candidates: bool[B,w], what may be committed.
    count: i32[B], how many positions each row commits at least.
    keys: key[B] of this step.
    places: i32[B,w], names of the positions, ascending: what their noise is drawn for.
    gumbel: f32[B,w,V] standard noise in place of what `keys` would give; for tests.
    chance: f32[B], with which "origin" fills each of a row's candidates.
    uniform: f32[B,w], the same for what "origin" draws.
    editable: bool[B,w], what may be replaced though it is filled.
    old: i32[B,w], what it is filled with.

  Returns:
    (commit bool[B,w], chosen tokens i32[B,w], their log-probabilities f32[B,w] under the plain
    softmax: no numbers where the logits are NaN or infinite).
  """
  kept = logits
  if cfg.top_p < 1:
    if not cfg.allow_mask:
      kept = logits.at[..., lm.mask_id].set(-jnp.inf)
    kept = keep_likeliest(kept, cfg.top_p, cfg.temperature)
  scores = kept
  if cfg.temperature > 0:
    if gumbel is None:
      draw = lambda k: jax.random.gumbel(k, logits.shape[2:], jnp.float32, mode="high")
      gumbel = at_places(draw, keys, places, 0)
    scores = kept + cfg.temperature * gumbel
  chosen = argmax_last(scores, None if cfg.allow_mask else lm.mask_id)

  # The probability of the choice under the plain softmax: no noise, nothing suppressed.
  picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  log_confidence = picked - jax.nn.logsumexp(logits, axis=-1)
  if cfg.remasking == "origin":
    if uniform is None:
      uniform = at_places(jax.random.uniform, keys, places, 1)
    assert chance is not None
    return candidates & (uniform < chance[:, None]), chosen, log_confidence
  if cfg.remasking == "low_confidence":
    rank_by = log_confidence if not cfg.alg_temp else jnp.exp(log_confidence)
  elif cfg.remasking == "random":
    rank_by = at_places(jax.random.uniform, keys, places, 1)
  elif cfg.remasking == "sequential":
    rank_by = jnp.broadcast_to(-places.astype(jnp.float32), candidates.shape)
  else:
    rank_by = sureness(cfg.remasking, kept / (cfg.temperature or 1.0), chosen)
  if cfg.alg_temp:  # the best of noisy values: a draw without replacement
    draw = lambda k: jax.random.gumbel(k, (), jnp.float32, mode="high")
    rank_by = rank_by / cfg.alg_temp + at_places(draw, keys, places, 2)
  if cfg.suppress_eos:
    stops = jnp.isin(chosen, jnp.asarray(lm.stop_ids))
    rank_by = jnp.where(stops, rank_by - 1e4, rank_by)  # last, but still in order

  # Never less than the schedule's share, so a run ends in `steps` steps whatever else.
  commit = topk_mask(rank_by, candidates, count)
  if cfg.threshold is not None:
    commit |= candidates & (jnp.exp(log_confidence) > cfg.threshold)
  if cfg.factor is not None:
    sure = factor_count(log_confidence, candidates, cfg.factor)
    commit |= topk_mask(log_confidence, candidates, sure)
  if editable is not None and cfg.edit_threshold is not None:
    commit |= editable & (chosen != old) & (jnp.exp(log_confidence) > cfg.edit_threshold)
  return commit, chosen, log_confidence


def keep_likeliest(logits: Array, share: float, temperature: float) -> Array:
  """`logits` f32[...,V], -inf but for the likeliest tokens that have `share` of the probability.

  The token that completes the share stays, so one always does. Under softmax(logits /
  temperature), of temperature 0 as of 1.

  Example: probabilities 0.5, 0.3, 0.2 and share 0.6 keep the first two.
  """
  p = jax.nn.softmax(logits / (temperature or 1.0), axis=-1)
  falling = -jnp.sort(-p, axis=-1)
  before = jnp.cumsum(falling, axis=-1) - falling
  last = jnp.sum(before < share, axis=-1, keepdims=True) - 1
  return jnp.where(p >= jnp.take_along_axis(falling, last, axis=-1), logits, -jnp.inf)


def sureness(rule: str, logits: Array, chosen: Array) -> Array:
  """How sure each position is, f32[...], under softmax(logits) f32[...,V]; higher is surer.

  Args:
    rule: "maskgit_plus": the probability of the chosen token; "topk_margin": that of the
      likeliest less that of the second; "entropy": the negative entropy, with 1e-10 added
      before the logarithm, as Dream's code has it.
  """
  p = jax.nn.softmax(logits, axis=-1)
  if rule == "maskgit_plus":
    return jnp.take_along_axis(p, chosen[..., None], axis=-1)[..., 0]
  if rule == "topk_margin":
    first, second = jnp.split(jax.lax.top_k(p, 2)[0], 2, axis=-1)
    return (first - second)[..., 0]
  return jnp.sum(p * jnp.log(p + 1e-10), axis=-1)


def at_places(draw, keys: Array, places: Array, stream: int) -> Array:
  """`draw(key)` with a key for each of places i32[B,w], from key[B]: [B,w,...]."""

  def of_row(key, places):
    key = jax.random.fold_in(key, stream)
    return jax.vmap(lambda place: draw(jax.random.fold_in(key, place)))(places)

  return jax.vmap(of_row)(keys, places)


def factor_count(log_confidence: Array, candidates: Array, factor: float) -> Array:
  """The largest n with (n + 1) (1 - c_(n)) < factor, c_(n) the n-th highest confidence.

  So many may be committed together that their joint choice is still the likeliest one
  (Fast-dLLM, arXiv 2505.22618, section 3.3: factor-based parallel decoding).

  Args:
    log_confidence: f32[B,w].
    candidates: bool[B,w], the positions that count.
    factor: higher commits more at once.

  Returns:
    i32[B], 0 where not even the surest candidate passes.

  Example: confidences 0.95, 0.8, 0.6 and factor 1 give 2 x 0.05, 3 x 0.2 and 4 x 0.4,
  of which the first two are below 1: n = 2.
  """
  doubt = -jnp.expm1(jnp.where(candidates, log_confidence, -jnp.inf))  # 1 - c, 1 elsewhere
  doubt = jnp.sort(doubt, axis=-1)
  n = jnp.arange(1, doubt.shape[-1] + 1)
  passes = ((n + 1) * doubt < factor) & (n <= jnp.sum(candidates, axis=-1, keepdims=True))
  return jnp.sum(passes, axis=-1).astype(jnp.int32)  # both factors grow with n: a prefix


def argmax_last(x: Array, but: int | None = None) -> Array:
  """`jnp.argmax(x, axis=-1)` as i32, the first of equals; never `but`.

  Maxima of runs first, then the place within the best run: XLA's CPU backend takes ten
  times as long for one argmax over a whole vocabulary (docs/LOG.md).
  """
  size = x.shape[-1]
  run = max(n for n in range(1, min(size, ARGMAX_RUN) + 1) if size % n == 0)
  runs = x.reshape(*x.shape[:-1], size // run, run)
  highest = jnp.max(runs, axis=-1)
  if but is not None:  # its run is looked at again: a pass over all of x would cost more
    there = jnp.where(jnp.arange(run) == but % run, -jnp.inf, runs[..., but // run, :])
    highest = highest.at[..., but // run].set(jnp.max(there, axis=-1))
  best = jnp.argmax(highest, axis=-1)
  inside = jnp.take_along_axis(runs, best[..., None, None], axis=-2)[..., 0, :]
  place = best[..., None] * run + jnp.arange(run)
  if but is not None:
    inside = jnp.where(place == but, -jnp.inf, inside)
  return (best * run + jnp.argmax(inside, axis=-1)).astype(jnp.int32)
