"""The denoising loop: masks are filled block by block, fixed positions never change.

One jitted program (docs/method.md#sampling). An outer `while_loop` walks the blocks from left to
right; an inner one makes the denoising steps of a block, no more than its fullest
row needs. Each step asks the network (`network`), on the whole canvas unless there is a
cache, and commits every row's share of its most confident candidates (`choose`).
Rows that are finished leave the batch between blocks, where enough of them are.

Nothing about a row depends on its neighbours: its noise comes from its own key
and the step, its commits from its own masks, and (with `early_stop="row"`) its
end from its own text.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key, PRNGKeyArray, UInt32

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.choose import choose
from igpo_jax.diffusion.network import (
  block_hidden,
  cached_widths,
  head_logits,
  head_widths,
  init_cache,
  num_blocks,
  overhang,
  step_window,
)
from igpo_jax.diffusion.schedule import commits_at, forwards_needed, unmasking_chances
from igpo_jax.errors import UserError
from igpo_jax.parallel.sharding import constrain, num_shards
from igpo_jax.token_ids import check_ids
from igpo_jax.types import LM, Array, Canvas, Denoised, Params

NOT_A_NUMBER = (
  "the model's logits are not finite (NaN or infinity), so there is no answer: its weights are "
  "damaged, or too large for the dtype of the computation"
)

NoiseFn = Callable[[int, tuple[int, ...]], Array]


def denoise(
  lm: LM,
  params: Params,
  canvas: Canvas,
  key: PRNGKeyArray | Key[Array, " B"] | UInt32[Array, "B 2"],
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
      call-th forward, in place of what `key` would give; with `cfg.remasking="origin"`
      `noise(call, (B, T))` gives the uniform draws by which positions are filled.

  Returns:
    The filled canvas, the step at which each position was committed (-1 where
    fixed), the number of calls of the network, and whether its logits were numbers.

  Raises:
    UserError: shapes that do not fit, a canvas shorter than the completion, token ids that
      the model has no embedding for (not looked at inside `jax.jit`), or options that a
      block-causal model has no place for.
  """
  check_sampler(lm, cfg)
  b, t = canvas.tokens.shape
  if canvas.fixed.shape != (b, t) or canvas.valid.shape != (b, t):
    raise UserError(
      f"canvas: tokens {canvas.tokens.shape}, fixed {canvas.fixed.shape} and valid "
      f"{canvas.valid.shape} must have one shape [B,T]"
    )
  if t < cfg.gen_length:
    raise UserError(f"canvas of {t} positions is shorter than sampler.gen_length={cfg.gen_length}")
  if not isinstance(canvas.tokens, jax.core.Tracer) and (
    isinstance(canvas.tokens, np.ndarray) or canvas.tokens.is_fully_addressable
  ):
    check_ids(canvas.tokens, lm.vocab_size, "the canvas")
  keys = _row_keys(key, b)
  noise_table = None
  if noise is not None:
    # Tabulated up front, so that `noise` may be any function of Python integers.
    shape = (b, t) if cfg.remasking == "origin" else (b, t, lm.vocab_size)
    most = num_blocks(cfg, lm) * cfg.steps_per_block
    calls = [jnp.asarray(noise(c, shape), jnp.float32) for c in range(most)]
    noise_table = jnp.stack(calls)
  return _denoise(lm, params, canvas, keys, cfg, noise_table)


def check_sampler(lm: LM, cfg: SamplerConfig) -> None:
  """Raises `UserError` where a model cannot be sampled from like this."""
  if not lm.block_length:
    return
  if cfg.block_length != lm.block_length:
    raise UserError(
      f"sampler.block_length={cfg.block_length}: this model is block-causal and has blocks of "
      f"{lm.block_length} positions; set it to that"
    )
  if cfg.cache == "prefix" or cfg.allow_mask:
    raise UserError(
      "sampler.cache='prefix' and sampler.allow_mask are for models whose positions see all "
      "others; this one is block-causal: sampler.cache='dual' is exact for it"
    )


def _row_keys(key: Array, rows: int) -> Array:
  """One typed key per row, from one key or from a key for each row."""
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  if key.ndim == 0:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
  if key.shape != (rows,):
    raise UserError(f"key has shape {key.shape}: give one key, or one for each of {rows} rows")
  return key


class _Rows(flax.struct.PyTreeNode):
  """All that belongs to a row, and goes with it into a smaller batch."""

  tokens: Array  # i32[B,T]
  commit_step: Array  # i32[B,T]
  commit_logp: Array  # f32[B,T]
  fixed: Array  # bool[B,T]
  valid: Array  # bool[B,T]
  finite: Array  # bool[B], all logits so far were numbers
  keys: Array  # key[B]
  number: Array  # i32[B], the row's place in the canvas
  passes: Array | None = None  # i32[B], calls since the active block was full, where it is edited
  settled: Array | None = None  # bool[B], the last of them changed nothing


class _Count(NamedTuple):
  """What the loops hand from step to step beside the rows."""

  forwards: Array  # i32[]
  refreshes: Array  # i32[]
  stopped: Array  # bool[]: early_stop="batch" has ended the run


def batch_sizes(rows: int, cfg: SamplerConfig) -> list[int]:
  """Static sizes that the rows which are not finished are batched in, largest first.

  Each half of the one before, as long as it divides over the devices. Example: of 64
  rows on 8 devices with `cfg.batch_sizes=3` they are 64, 32 and 16.
  """
  sizes, ways = [rows], num_shards("act_batch")
  # What the batch as a whole decides needs the whole batch.
  most = 1 if cfg.early_stop == "batch" else cfg.batch_sizes
  while len(sizes) < most and sizes[-1] % (2 * ways) == 0:
    sizes.append(sizes[-1] // 2)
  return sizes


@functools.partial(jax.jit, static_argnames=("lm", "cfg"))
def _denoise(lm, params, canvas, keys, cfg, noise_table) -> Denoised:
  b, t = canvas.tokens.shape
  params = lm.unstack(params, t + overhang(cfg, lm))
  rows = _Rows(
    tokens=constrain(canvas.tokens, "act_batch", "act_length"),
    commit_step=jnp.full((b, t), -1, jnp.int32),
    commit_logp=jnp.zeros((b, t), jnp.float32),
    fixed=canvas.fixed,
    valid=canvas.valid,
    finite=jnp.ones(b, bool),
    keys=keys,
    number=jnp.arange(b),
  )
  zero = jnp.int32(0)
  count = _Count(zero, zero, jnp.bool_(False))
  sizes, widths = batch_sizes(b, cfg), cached_widths(cfg, lm)
  programs = list(itertools.product(sizes, sorted(set(widths))))

  def blocks_left(state):
    block, rows, count = state
    return (block < num_blocks(cfg, lm)) & ~count.stopped & jnp.any(_masks(lm, cfg, rows))

  def run_block(state):
    block, rows, count = state
    unfinished = jnp.any(_masks(lm, cfg, rows), axis=1)
    order = jnp.argsort(~unfinished, stable=True)

    def with_program(size, seen, rows, count):
      run = functools.partial(_run_block, lm, params, cfg, noise_table, block, seen)
      if size == b:
        return run(rows, count)
      chosen = order[:size]
      some, count = run(jax.tree.map(lambda x: x[chosen], rows), count)
      put = lambda x, new: constrain(x.at[chosen].set(new), "act_batch", "act_length")
      return rows.replace(
        tokens=put(rows.tokens, some.tokens),
        commit_step=put(rows.commit_step, some.commit_step),
        commit_logp=put(rows.commit_logp, some.commit_logp),
        finite=rows.finite.at[chosen].set(some.finite),
      ), count

    # The smallest batch that holds the unfinished rows, and the block's width.
    fits = jnp.asarray([size for size, _ in programs]) >= jnp.sum(unfinished)
    fits &= jnp.asarray([seen for _, seen in programs]) == jnp.asarray(widths)[block]
    which = jnp.max(jnp.where(fits, jnp.arange(len(programs)), 0))
    branches = [functools.partial(with_program, *program) for program in programs]
    return block + 1, *jax.lax.switch(which, branches, rows, count)

  _, rows, count = jax.lax.while_loop(blocks_left, run_block, (zero, rows, count))
  return Denoised(
    tokens=rows.tokens,
    commit_step=rows.commit_step,
    forwards=count.forwards,
    refreshes=count.refreshes,
    finite=rows.finite,
    commit_logp=rows.commit_logp,
  )


def _masks(lm, cfg, rows: _Rows) -> Array:
  """bool[B,T], what is still to be filled."""
  t = rows.tokens.shape[1]
  return (rows.tokens == lm.mask_id) & ~rows.fixed & (jnp.arange(t) >= t - cfg.gen_length)


def _in_block(lm, cfg, rows: _Rows, block: Array) -> tuple[Array, Array]:
  """(bool[B or 1,T] of the block's positions, the same of those up to its end)."""
  t = rows.tokens.shape[1]
  position = jnp.arange(t)
  first = t - cfg.gen_length
  if lm.block_length:
    number = (jnp.cumsum(rows.valid, axis=1, dtype=jnp.int32) - 1) // lm.block_length
    number = number - number[:, first, None]
    return (number == block) & (position >= first), number <= block
  begin = first + block * cfg.block_length
  end = position < begin + cfg.block_length
  return (position >= begin) & end, end


def _decide(lm, params, cfg, h, candidates, share, keys, first, noise, chance, edits=None):
  """Head and choice where it matters.

  What is committed needs no logits, on average half of a block. Each row's candidates
  come first, and as many positions are decided as the row with the most of them has,
  rounded up to a few widths.

  Args:
    h: [C,B,width,D] from `block_hidden`.
    candidates: bool[B,width].
    share, keys: see `choose`.
    first: the place of the first position in the completion.
    noise: f32[B,width,V] or, for "origin", f32[B,width]; or None.
    chance: see `choose`.
    edits: (editable bool[B,width], old i32[B,width]) of `choose`; None where nothing is edited.

  Returns:
    (commit bool[B,width], chosen i32[B,width], log p of what is chosen f32[B,width], finite
    bool[B]).
  """
  b, width = candidates.shape
  order = jnp.argsort(~candidates, axis=1, stable=True)  # i32[B,width]
  sizes = [width] if edits else head_widths(b, width, lm.vocab_size)

  def with_width(size, h):
    at = order[:, :size]
    take = lambda x: jnp.take_along_axis(x, at, axis=1)
    some = lambda x: jnp.take_along_axis(x, at[..., None], axis=1)
    given = noise
    if size < width:
      h = jax.vmap(some)(h)
      given = None if noise is None else some(noise) if noise.ndim == 3 else take(noise)
    else:
      at, take = jnp.broadcast_to(jnp.arange(width), (b, width)), lambda x: x
    logits = head_logits(lm, params, cfg, h)
    asked = take(candidates)
    if edits:
      asked = asked | edits[0]
    drawn = {"uniform" if cfg.remasking == "origin" else "gumbel": given}
    commit, chosen, logp = choose(
      lm, cfg, logits, take(candidates), share, keys, first + at, chance=chance,
      **drawn, **dict(zip(("editable", "old"), edits or (), strict=False)),
    )  # fmt: skip
    finite = jnp.all(jnp.isfinite(logp) | ~asked, axis=1)
    if size == width:
      return commit, chosen, logp, finite
    put = lambda x: jax.vmap(lambda at, x: jnp.zeros(width, x.dtype).at[at].set(x))(at, x)
    return put(commit), put(chosen), put(logp), finite

  if len(sizes) == 1:
    return with_width(width, h)
  # Only h goes in: a conditional that carried the cache would copy it.
  most = jnp.max(jnp.sum(candidates, axis=1))
  which = jnp.sum(jnp.asarray(sizes) >= most) - 1
  return jax.lax.switch(which, [functools.partial(with_width, size) for size in sizes], h)


def _run_block(lm, params, cfg, noise_table, block, seen: int, rows: _Rows, count: _Count):
  """All steps of one block, in which calls with a cache see `seen` positions: (rows, count)."""
  b, t = rows.tokens.shape
  per_block = cfg.steps_per_block
  editing = cfg.edit_threshold is not None
  stride = per_block + cfg.edit_passes * editing  # numbers of steps from block to block
  shares = (cfg.schedule, cfg.block_length)
  here, until_end = _in_block(lm, cfg, rows, block)
  masks_of = functools.partial(_masks, lm, cfg)
  had = jnp.sum(masks_of(rows) & here, axis=1)  # i32[B]
  # By chance alone, every step may be needed.
  needed = per_block if cfg.remasking == "origin" else forwards_needed(had, per_block, *shares)

  if editing:
    rows = rows.replace(passes=jnp.zeros(b, jnp.int32), settled=had == 0)
    needed += cfg.edit_passes

  def active(rows):
    left = jnp.any(masks_of(rows) & here, axis=1)
    return left | (~rows.settled & (rows.passes < cfg.edit_passes)) if editing else left

  def unfinished(state):
    i, rows, *_ = state
    # A threshold may finish a block before its share of steps is used up.
    return (i < needed) & jnp.any(active(rows))

  def fill(rows, which, now) -> _Rows:
    rest = masks_of(rows) & which[:, None]
    return rows.replace(
      tokens=jnp.where(rest, lm.eos_id, rows.tokens),
      commit_step=jnp.where(rest, now, rows.commit_step),
    )

  def step(state, seen=None):
    i, rows, count, cache = state
    now = block * stride + i
    h, cache = block_hidden(
      lm, params, cfg, rows.tokens, rows.fixed, rows.valid, cache, block, seen
    )
    start, width = step_window(cfg, t, block, lm)
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
    noise = None if noise_table is None else part(noise_table[count.forwards, rows.number])
    keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, now)
    candidates = part(masks_of(rows) & until_end)
    share = commits_at(had, per_block, jnp.minimum(i, per_block - 1) if editing else i, *shares)
    chance = jnp.asarray(unmasking_chances(per_block))[i] if cfg.remasking == "origin" else None
    first = start - (t - cfg.gen_length)  # noise is named by places in the completion
    old, edits = part(rows.tokens), None
    works = full = jnp.zeros(b, bool)
    if editing:
      works, full = active(rows), ~jnp.any(masks_of(rows) & here, axis=1)
      filled = here & ~rows.fixed & (rows.tokens != lm.mask_id)
      edits = part(filled & works[:, None]), old
    commit, chosen, logp, finite = _decide(
      lm, params, cfg, h, candidates, share, keys, first, noise, chance, edits
    )
    if editing:
      changed = jnp.any(commit, axis=1)
      rows = rows.replace(
        passes=rows.passes + (full & works), settled=rows.settled | (full & works & ~changed)
      )

    new = jnp.where(commit, chosen, old)
    filled = commit & (new != lm.mask_id)  # allow_mask may commit a mask: still to do
    put = lambda x, new: constrain(
      jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=1), "act_batch", "act_length"
    )
    rows = rows.replace(
      tokens=put(rows.tokens, new),
      commit_step=put(rows.commit_step, jnp.where(filled, now, part(rows.commit_step))),
      commit_logp=put(rows.commit_logp, jnp.where(filled, logp, part(rows.commit_logp))),
      finite=rows.finite & finite,
    )
    count = count._replace(forwards=count.forwards + 1, refreshes=count.refreshes + (seen is None))
    if cfg.early_stop == "row":
      ends = (had > 0) & jnp.all((rows.tokens == lm.eos_id) | ~here, axis=1)
      ends = ends & ~active(rows) if editing else ends
      rows = fill(rows, ends, now)
    elif cfg.early_stop == "stop_token":
      stops = jnp.any(jnp.isin(rows.tokens, jnp.asarray(lm.stop_ids)) & here, axis=1)
      ends = (had > 0) & stops & ~active(rows)
      rows = fill(rows, ends, now)
    return i + 1, rows, count, cache

  def with_cache(state):
    """One call that fills a cache, and those that use it."""
    i, rows, count = state
    state = step((i, rows, count, init_cache(lm, params, cfg, b, t)))
    fresh = lambda state: state[0] % (cfg.refresh_every or per_block) != 0
    state = jax.lax.while_loop(
      lambda state: unfinished(state) & fresh(state), functools.partial(step, seen=seen), state
    )
    return state[:3]

  # A loop for each kind of call: a conditional would copy the whole cache at every step.
  once = with_cache if cfg.cache != "none" else lambda state: step((*state, None))[:3]
  steps, rows, count = jax.lax.while_loop(unfinished, once, (jnp.int32(0), rows, count))
  if cfg.early_stop == "batch":
    ends = jnp.any(had > 0) & jnp.all((rows.tokens == lm.eos_id) | ~here)
    rows = fill(rows, jnp.broadcast_to(ends, (b,)), block * stride + steps - 1)
    count = count._replace(stopped=ends)
  # The loop over blocks carries nothing of a block's own.
  return rows.replace(passes=None, settled=None), count
