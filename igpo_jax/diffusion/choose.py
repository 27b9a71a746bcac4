"""The choice of a denoising step: which masked positions are committed, and to which tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.config import SamplerConfig
from igpo_jax.ops.masked import topk_mask
from igpo_jax.types import LM, Array

SURENESS = ("maskgit_plus", "topk_margin", "entropy")  # rules of `cfg.remasking` that rank by it
ARGMAX_RUN = 512  # the longest run of elements that `argmax_last` searches in its second pass


def choose_tokens(
  lm: LM,
  cfg: SamplerConfig,
  logits: Array,
  keys: Array,
  places: Array,
  gumbel: Array | None = None,
) -> tuple[Array, Array, Array | None]:
  """Chooses a token for each of some positions, whichever rows they are of.

  (docs/method.md#sampling)

  Args:
    lm: the model, for its special tokens.
    cfg: see `SamplerConfig`.
    logits: f32[...,V].
    keys: key[...], the key of each position's row for this step.
    places: i32[...], the position in the completion. Noise is keyed by it, so a position draws the
      same noise whichever others are decided with it.
    gumbel: f32[...,V], standard Gumbel noise instead of what `keys` would give; for tests.

  Returns:
    (chosen tokens i32[...]; their log-probabilities f32[...] under softmax(logits), at temperature
    1, which are not finite where a logit is NaN or +infinity; `sureness` f32[...], None where
    `cfg.remasking` does not rank positions by it).
  """
  kept = logits
  if cfg.top_p < 1:
    if not cfg.allow_mask:
      kept = logits.at[..., lm.mask_id].set(-jnp.inf)
    kept = keep_likeliest(kept, cfg.top_p, cfg.temperature)
  scores = kept
  if cfg.temperature > 0:
    if gumbel is None:
      draw = lambda k: jax.random.gumbel(k, logits.shape[-1:], jnp.float32, mode="high")
      gumbel = at_places(draw, keys, places, 0)
    scores = kept + cfg.temperature * gumbel
  chosen = argmax_last(scores, None if cfg.allow_mask else lm.mask_id)

  # The confidence goes by the plain softmax: without noise, and over all tokens.
  picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  log_confidence = picked - jax.nn.logsumexp(logits, axis=-1)
  sure = None
  if cfg.remasking in SURENESS:
    sure = sureness(cfg.remasking, kept / (cfg.temperature or 1.0), chosen)
  return chosen, log_confidence, sure


def choose_positions(
  lm: LM,
  cfg: SamplerConfig,
  chosen: Array,
  log_confidence: Array,
  sure: Array | None,
  candidates: Array,
  count: Array,
  keys: Array,
  places: Array,
  chance: Array | None = None,
  uniform: Array | None = None,
  editable: Array | None = None,
  old: Array | None = None,
) -> Array:
  """Chooses which of w positions of each row to commit now.

  Args:
    lm: the model, for its special tokens.
    cfg: see `SamplerConfig`.
    chosen, log_confidence, sure: i32[B,w], f32[B,w] and f32[B,w] or None, see `choose_tokens`. What
      they are at positions that are neither candidates nor editable does not matter.
    candidates: bool[B,w], the positions that may be committed.
    count: i32[B], how many candidates each row commits at least (all, if it has fewer). Not used
      with "origin".
    keys: key[B], each row's key for this step.
    places: i32[B,w], the position of each column in the completion, ascending.
    chance: f32[B], the probability with which "origin" commits each candidate of a row. Needed
      with "origin", not used otherwise.
    uniform: f32[B,w], uniform numbers in [0, 1) instead of what `keys` would give "origin"; for
      tests.
    editable: bool[B,w], positions that are filled but may get another token
      (`cfg.edit_threshold`); None: there are none.
    old: i32[B,w], the present tokens, where `editable` is given.

  Returns:
    bool[B,w].
  """
  of_places = lambda draw, stream: at_places(
    draw, jnp.broadcast_to(keys[:, None], places.shape), places, stream
  )
  if cfg.remasking == "origin":
    if uniform is None:
      uniform = of_places(jax.random.uniform, 1)
    assert chance is not None
    return candidates & (uniform < chance[:, None])
  if cfg.remasking == "low_confidence":
    rank_by = log_confidence if not cfg.alg_temp else jnp.exp(log_confidence)
  elif cfg.remasking == "random":
    rank_by = of_places(jax.random.uniform, 1)
  elif cfg.remasking == "sequential":
    rank_by = -places.astype(jnp.float32)
  else:
    assert sure is not None
    rank_by = sure
  if cfg.alg_temp:  # the largest values with Gumbel noise added are a draw without replacement
    draw = lambda k: jax.random.gumbel(k, (), jnp.float32, mode="high")
    rank_by = rank_by / cfg.alg_temp + of_places(draw, 2)
  if cfg.suppress_eos:
    stops = jnp.isin(chosen, jnp.asarray(lm.stop_ids))
    rank_by = jnp.where(stops, rank_by - 1e4, rank_by)  # last, but still in order

  # Always at least the schedule's share, so that `steps` steps are enough.
  commit = topk_mask(rank_by, candidates, count)
  if cfg.threshold is not None:
    commit |= candidates & (jnp.exp(log_confidence) > cfg.threshold)
  if cfg.factor is not None:
    sure_ones = factor_count(log_confidence, candidates, cfg.factor)
    commit |= topk_mask(log_confidence, candidates, sure_ones)
  if editable is not None and cfg.edit_threshold is not None:
    commit |= editable & (chosen != old) & (jnp.exp(log_confidence) > cfg.edit_threshold)
  return commit


def keep_likeliest(logits: Array, share: float, temperature: float) -> Array:
  """Top-p filtering: keeps the fewest likeliest tokens whose probabilities sum to `share` or more.

  Args:
    logits: f32[...,V].
    share: in (0, 1]. At least one token is always kept.
    temperature: probabilities are softmax(logits / temperature); 0 counts as 1.

  Returns:
    f32[...,V], the logits, with -inf for the tokens that are not kept.

  Example: probabilities 0.5, 0.3, 0.2 and share 0.6 keep the first two.
  """
  p = jax.nn.softmax(logits / (temperature or 1.0), axis=-1)
  falling = -jnp.sort(-p, axis=-1)
  before = jnp.cumsum(falling, axis=-1) - falling
  last = jnp.sum(before < share, axis=-1, keepdims=True) - 1
  return jnp.where(p >= jnp.take_along_axis(falling, last, axis=-1), logits, -jnp.inf)


def sureness(rule: str, logits: Array, chosen: Array) -> Array:
  """Ranks positions by how sure the model is of them, by one of Dream's rules.

  Args:
    rule: "maskgit_plus": the probability of the chosen token. "topk_margin": the probability of the
      likeliest token minus that of the second. "entropy": the negative entropy in nats, with 1e-10
      added before the logarithm, as in Dream's code.
    logits: f32[...,V]; probabilities are softmax(logits).
    chosen: i32[...], the chosen tokens.

  Returns:
    f32[...], higher where the model is surer.
  """
  p = jax.nn.softmax(logits, axis=-1)
  if rule == "maskgit_plus":
    return jnp.take_along_axis(p, chosen[..., None], axis=-1)[..., 0]
  if rule == "topk_margin":
    first, second = jnp.split(jax.lax.top_k(p, 2)[0], 2, axis=-1)
    return (first - second)[..., 0]
  return jnp.sum(p * jnp.log(p + 1e-10), axis=-1)


def at_places(draw, keys: Array, places: Array, stream: int) -> Array:
  """Draws noise for each position, with a key made from (row key, stream, position).

  Args:
    draw: `draw(key) -> [*]`, the noise of one position.
    keys: key[...], the key of each position's row.
    places: i32[...], positions.
    stream: a number for each use of noise within a step, so that the uses are independent.

  Returns:
    [...,*].
  """
  one = lambda key, place: draw(jax.random.fold_in(jax.random.fold_in(key, stream), place))
  for _ in places.shape:
    one = jax.vmap(one)
  return one(keys, places)


def factor_count(log_confidence: Array, candidates: Array, factor: float) -> Array:
  """How many candidates may be committed together, by Fast-dLLM's factor rule.

  It is the largest n with (n + 1) (1 - c_(n)) < factor, where c_(n) is the n-th highest
  confidence. With factor 1, the n tokens that are likeliest each by itself are then also likeliest
  together (arXiv 2505.22618, section 3.3: factor-based parallel decoding).

  Args:
    log_confidence: f32[B,w], logarithms of the confidences.
    candidates: bool[B,w], the positions that count.
    factor: a higher one commits more at once.

  Returns:
    i32[B], 0 where even the surest candidate does not pass.

  Example: confidences 0.95, 0.8, 0.6 and factor 1 give 2 x 0.05, 3 x 0.2 and 4 x 0.4,
  of which the first two are below 1: n = 2.
  """
  doubt = -jnp.expm1(jnp.where(candidates, log_confidence, -jnp.inf))  # 1 - c, 1 elsewhere
  doubt = jnp.sort(doubt, axis=-1)
  n = jnp.arange(1, doubt.shape[-1] + 1)
  passes = ((n + 1) * doubt < factor) & (n <= jnp.sum(candidates, axis=-1, keepdims=True))
  return jnp.sum(passes, axis=-1).astype(jnp.int32)  # both factors grow with n: a prefix


def argmax_last(x: Array, but: int | None = None) -> Array:
  """`jnp.argmax(x, axis=-1)`, but faster on CPU; of equal values the first one wins.

  It takes the maxima of runs of elements, and then searches the best run only. XLA's CPU backend
  needs ten times as long for one argmax over a whole vocabulary (docs/LOG.md).

  Args:
    x: f32[...,V].
    but: an index that is never chosen; None: every index may be.

  Returns:
    i32[...].
  """
  size = x.shape[-1]
  run = max(n for n in range(1, min(size, ARGMAX_RUN) + 1) if size % n == 0)
  runs = x.reshape(*x.shape[:-1], size // run, run)
  highest = jnp.max(runs, axis=-1)
  if but is not None:  # only the run of `but` is read again: masking all of x would cost more
    there = jnp.where(jnp.arange(run) == but % run, -jnp.inf, runs[..., but // run, :])
    highest = highest.at[..., but // run].set(jnp.max(there, axis=-1))
  best = jnp.argmax(highest, axis=-1)
  inside = jnp.take_along_axis(runs, best[..., None, None], axis=-2)[..., 0, :]
  place = best[..., None] * run + jnp.arange(run)
  if but is not None:
    inside = jnp.where(place == but, -jnp.inf, inside)
  return (best * run + jnp.argmax(inside, axis=-1)).astype(jnp.int32)
