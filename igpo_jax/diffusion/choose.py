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

  Returns:
    (commit bool[B,w], chosen tokens i32[B,w], finite bool[B,w]: the logits give
    probabilities, which NaN and infinity do not).
  """
  scores = logits
  if cfg.temperature > 0:
    if gumbel is None:
      draw = lambda k: jax.random.gumbel(k, logits.shape[2:], jnp.float32, mode="high")
      gumbel = at_places(draw, keys, places, 0)
    scores = logits + cfg.temperature * gumbel
  chosen = argmax_last(scores, None if cfg.allow_mask else lm.mask_id)

  # The probability of the choice under the plain softmax: no noise, nothing suppressed.
  picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  log_confidence = picked - jax.nn.logsumexp(logits, axis=-1)
  if cfg.remasking == "random":
    rank_by = at_places(jax.random.uniform, keys, places, 1)
  else:
    rank_by = log_confidence
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
  return commit, chosen, jnp.isfinite(log_confidence)


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
