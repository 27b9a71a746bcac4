"""The denoising loop: masks are filled block by block, fixed positions never change.

One jitted program (METHOD 2). An outer `while_loop` walks the blocks from left to
right; an inner one makes the denoising steps of a block, no more than its fullest
row needs. Each step runs the network on the whole canvas, the head on the active
block only, and commits every row's share of its most confident candidates.

Nothing about a row depends on its neighbours: its noise comes from its own key
and the step, its commits from its own masks, and (with `early_stop="row"`) its
end from its own text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpo_jax.cli import UserError
from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.schedule import commits_at, forwards_needed
from igpo_jax.ops.masked import topk_mask
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import LM, Array, Canvas, Denoised, Params

NoiseFn = Callable[[int, tuple[int, int, int]], Array]


def denoise(
  lm: LM,
  params: Params,
  canvas: Canvas,
  key: Array,
  cfg: SamplerConfig,
  noise: NoiseFn | None = None,
) -> Denoised:
  """Fills the masks of a canvas.

  Args:
    lm: the model.
    params: its parameters.
    canvas: i32/bool[B,T]; the completion is the last `cfg.gen_length` columns, and
      what is to be filled is `(tokens == lm.mask_id) & ~fixed` there.
    key: one PRNG key, or key[B] with a key for each row. Give rows keys of their
      own where results must not depend on a row's place in the batch.
    cfg: see `SamplerConfig`.
    noise: for tests. `noise(call, (B, T, V))` gives the standard Gumbel noise of the
      call-th forward, in place of what `key` would give.

  Returns:
    The filled canvas, the step at which each position was committed (-1 where
    fixed), and the number of forwards made.

  Raises:
    UserError: shapes that do not fit, or a canvas shorter than the completion.
  """
  b, t = canvas.tokens.shape
  if canvas.fixed.shape != (b, t) or canvas.valid.shape != (b, t):
    raise UserError(
      f"canvas: tokens {canvas.tokens.shape}, fixed {canvas.fixed.shape} and valid "
      f"{canvas.valid.shape} must have one shape [B,T]"
    )
  if t < cfg.gen_length:
    raise UserError(f"canvas of {t} positions is shorter than sampler.gen_length={cfg.gen_length}")
  keys = _row_keys(key, b)
  noise_table = None
  if noise is not None:
    # Tabulated up front, so that `noise` may be any function of Python integers.
    calls = [jnp.asarray(noise(c, (b, t, lm.vocab_size)), jnp.float32) for c in range(cfg.steps)]
    noise_table = jnp.stack(calls)
  return _denoise(lm, params, canvas, keys, cfg, noise_table)


def _row_keys(key: Array, rows: int) -> Array:
  """One typed key per row, from one key or from a key for each row."""
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  if key.ndim == 0:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
  if key.shape != (rows,):
    raise UserError(f"key has shape {key.shape}: give one key, or one for each of {rows} rows")
  return key


class _Carry(NamedTuple):
  """What the loops hand from step to step."""

  tokens: Array  # i32[B,T]
  commit_step: Array  # i32[B,T]
  forwards: Array  # i32[]
  stopped: Array  # bool[]: early_stop="batch" has ended the run


@functools.partial(jax.jit, static_argnames=("lm", "cfg"))
def _denoise(lm, params, canvas, keys, cfg, noise_table) -> Denoised:
  b, t = canvas.tokens.shape
  first = t - cfg.gen_length  # where the completion begins
  per_block = cfg.steps_per_block
  position = jnp.arange(t)
  fillable = ~canvas.fixed & (position >= first)

  def masks_of(tokens):
    return (tokens == lm.mask_id) & fillable

  def in_block(block):
    begin = first + block * cfg.block_length
    return (position >= begin) & (position < begin + cfg.block_length)

  def run_block(block, carry: _Carry) -> _Carry:
    here = in_block(block)
    had = jnp.sum(masks_of(carry.tokens) & here, axis=1)  # i32[B]
    needed = forwards_needed(had, per_block)

    def unfinished(state):
      i, carry = state
      # A threshold may finish a block before its share of steps is used up.
      return (i < needed) & jnp.any(masks_of(carry.tokens) & here)

    def step(state):
      i, carry = state
      now = block * per_block + i
      commit, chosen = _choose(
        lm, params, canvas, keys, cfg, noise_table, carry, masks_of(carry.tokens), block, now,
        commits_at(had, per_block, i),
      )  # fmt: skip
      tokens = jnp.where(commit, chosen, carry.tokens)
      filled = commit & (tokens != lm.mask_id)  # allow_mask may commit a mask: still to do
      commit_step = jnp.where(filled, now, carry.commit_step)
      carry = carry._replace(
        tokens=constrain(tokens, "act_batch", "act_length"),
        commit_step=commit_step,
        forwards=carry.forwards + 1,
      )
      if cfg.early_stop == "row":
        ends = (had > 0) & jnp.all((carry.tokens == lm.eos_id) | ~here, axis=1)
        carry = fill(carry, ends, now)
      return i + 1, carry

    def fill(carry: _Carry, rows, now) -> _Carry:
      rest = masks_of(carry.tokens) & rows[:, None]
      return carry._replace(
        tokens=jnp.where(rest, lm.eos_id, carry.tokens),
        commit_step=jnp.where(rest, now, carry.commit_step),
      )

    steps, carry = jax.lax.while_loop(unfinished, step, (jnp.int32(0), carry))
    if cfg.early_stop == "batch":
      ends = jnp.any(had > 0) & jnp.all((carry.tokens == lm.eos_id) | ~here)
      carry = fill(carry, jnp.broadcast_to(ends, (b,)), block * per_block + steps - 1)
      carry = carry._replace(stopped=ends)
    return carry

  def blocks_left(state):
    block, carry = state
    return (block < cfg.num_blocks) & ~carry.stopped & jnp.any(masks_of(carry.tokens))

  carry = _Carry(
    tokens=constrain(canvas.tokens, "act_batch", "act_length"),
    commit_step=jnp.full((b, t), -1, jnp.int32),
    forwards=jnp.int32(0),
    stopped=jnp.bool_(False),
  )
  _, carry = jax.lax.while_loop(
    blocks_left, lambda s: (s[0] + 1, run_block(*s)), (jnp.int32(0), carry)
  )
  return Denoised(carry.tokens, carry.commit_step, carry.forwards)


def _choose(lm, params, canvas, keys, cfg, noise_table, carry, masked, block, now, count):
  """One step's decision: (commit bool[B,T], chosen tokens i32[B,T]).

  Args:
    masked: bool[B,T], what is still to be filled anywhere.
    block: i32[], the active block.
    now: i32[], the step's number in the whole run: it seeds the noise.
    count: i32[B], how many positions each row commits.
  """
  b, t = carry.tokens.shape
  first = t - cfg.gen_length
  begin = first + block * cfg.block_length
  if cfg.allow_mask:
    # The model may have left masks in earlier blocks; they compete again.
    start, width = first, cfg.gen_length
  else:
    start, width = begin, cfg.block_length

  def region(x):
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)

  logits = _guided_logits(lm, params, canvas, cfg, carry.tokens, region)  # f32[B,width,V]
  step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, now)
  scores = logits
  if cfg.temperature > 0:
    if noise_table is not None:
      gumbel = region(noise_table[carry.forwards])
    else:
      draw = lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32, mode="high")
      gumbel = jax.vmap(draw)(step_keys)
    scores = logits + cfg.temperature * gumbel
  if not cfg.allow_mask:
    scores = jnp.where(jnp.arange(lm.vocab_size) == lm.mask_id, -jnp.inf, scores)
  chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)

  # The probability of the choice under the plain softmax: no noise, nothing suppressed.
  picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
  log_confidence = picked - jax.nn.logsumexp(logits, axis=-1)
  if cfg.remasking == "random":
    uniform = lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (width,))
    rank_by = jax.vmap(uniform)(step_keys)
  else:
    rank_by = log_confidence
  if cfg.suppress_eos:
    stops = jnp.isin(chosen, jnp.asarray(lm.stop_ids))
    rank_by = jnp.where(stops, rank_by - 1e4, rank_by)  # last, but still in order

  candidates = region(masked) & (start + jnp.arange(width) < begin + cfg.block_length)
  commit = topk_mask(rank_by, candidates, count)
  if cfg.threshold is not None:
    # Never less than the schedule's share, so a run still ends in `steps` steps.
    commit |= candidates & (jnp.exp(log_confidence) > cfg.threshold)

  def scatter(x, fill):
    return jax.lax.dynamic_update_slice_in_dim(jnp.full((b, t), fill, x.dtype), x, start, axis=1)

  return scatter(commit, False), scatter(chosen, 0)


def _guided_logits(lm, params, canvas, cfg, tokens, region) -> Array:
  """Logits f32[B,width,V] of a region, with classifier-free guidance if asked for."""
  if cfg.cfg_scale == 0:
    h, _ = lm.hidden(params, tokens, canvas.valid)
    return lm.head(params, region(h))
  # The unconditional input hides all that was given: prompt and hints.
  hidden_prompt = jnp.where(canvas.fixed, lm.mask_id, tokens)
  both = jnp.concatenate([tokens, hidden_prompt])
  h, _ = lm.hidden(params, both, jnp.concatenate([canvas.valid, canvas.valid]))
  conditional, unconditional = jnp.split(lm.head(params, region(h)), 2)
  return unconditional + (cfg.cfg_scale + 1) * (conditional - unconditional)
