"""The network calls of the denoising loop: exact ones, or ones with a cache of keys and values.

    none    every call computes the whole canvas
    prefix  a block's first call computes the whole canvas and fills the cache; the block's other
            calls compute the canvas from the block on, and read the rest from the cache
    dual    as prefix, but the other calls compute the active block only

    canvas     prompt   block 0   block 1   block 2
    active                        ^^^^^^^
    none       fresh    fresh     fresh     fresh
    prefix     cached   cached    fresh     fresh
    dual       cached   cached    fresh     cached

(Fast-dLLM, arXiv 2505.22618.) A cached key or value is the one of the call that wrote it, so it is
out of date once other tokens have changed. Hints in later blocks are tokens like any other: their
keys and values are in the cache. No position attends to one that is not `valid`.

Each row has its own active block, so the windows of the rows lie at different places. A call on the
whole canvas is made for the few rows that begin a block. With "prefix", whose windows also differ
in width, the other calls are made for some rows at a time as well (`programs`).

A window begins `LM.left_context` positions earlier, where what is read depends on them: on one with
a network that predicts one position ahead, on the rest of the block with a block-causal model. For
a block-causal model "dual" is exact: keys and values of earlier blocks do not change any more, and
no position attends to later blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.types import LM, Array, Params

PREFIX_PROGRAMS = 4  # with cache="prefix", calls are compiled for at most this many widths
HEAD_PROGRAMS = 4  # the head and the choice are compiled for at most this many widths ...
FEW_LOGITS = 2**17  # ... but for one width only, if a call has fewer logits than this


def num_blocks(cfg: SamplerConfig, lm: LM | None = None) -> int:
  """The largest number of blocks that a completion may lie in.

  With a block-causal model (`lm`) it may begin within a block, and so reach into one block more.
  """
  return cfg.num_blocks + (lm is not None and lm.block_length > 1)


def cached_widths(cfg: SamplerConfig, lm: LM | None = None) -> tuple[int, ...]:
  """For each block, how many positions from its first on a call that reads the cache computes.

  A program is compiled for each width. With "prefix" and more blocks than `PREFIX_PROGRAMS`, widths
  are rounded up so that they are few; some windows then reach past the end of the canvas.

  Example: for "prefix" with 8 blocks, the widths are 8, 8, 6, 6, 4, 4, 2, 2 blocks.
  """
  if cfg.cache != "prefix":
    return (cfg.block_length,) * num_blocks(cfg, lm)
  unit = -(-cfg.num_blocks // PREFIX_PROGRAMS)
  left = np.arange(cfg.num_blocks, 0, -1)
  return tuple(int(n) * cfg.block_length for n in -(-left // unit) * unit)


def overhang(cfg: SamplerConfig, lm: LM | None = None) -> int:
  """How many positions past the end of the canvas a window may reach; the cache has room there."""
  if lm is not None and lm.block_length:
    return 0  # `find_window` stays inside
  ends = [block * cfg.block_length + w for block, w in enumerate(cached_widths(cfg))]
  return max(ends) - cfg.gen_length + (0 if lm is None else lm.left_context)


def init_cache(lm: LM, params: Params, cfg: SamplerConfig, rows: int, length: int) -> Any:
  """A cache of zeros for canvases i32[rows, length], twice the rows with guidance; None for "none".

  Its arrays have the dimensions [...,B,K,T,E] (see `igpo_jax.types`).
  """
  if cfg.cache == "none":
    return None
  rows = 2 * rows if cfg.cfg_scale else rows
  return lm.init_cache(params, rows, length + overhang(cfg, lm))


class Program(NamedTuple):
  """One kind of network call; each kind is compiled once.

  Attributes:
    seen: how many positions it computes, from the active block's first on. None: the whole canvas,
      which also renews the cache.
    rows: for how many rows it is made, on each shard.
    picked: whether only `rows` of a shard's slots take part, and the cache of the others is kept.
    of_all: whether it is made only when all rows at work wait for this kind of call.
  """

  seen: int | None
  rows: int
  picked: bool = False
  of_all: bool = False


def programs(
  cfg: SamplerConfig, lm: LM, rows: int, together: bool, shards: int = 1
) -> list[Program]:
  """The kinds of network calls of a run, in the order in which the loop prefers them.

  A call on the whole canvas costs as much as many calls on a block. Where rows go at their own
  pace, it is made for an eighth of the slots, as soon as this many rows wait for it. With "prefix"
  rows also need windows of different widths: a call on a window is made for a quarter of the slots,
  or for all slots where their rows keep step, which saves gathering parts of the cache.

  Args:
    cfg: see `SamplerConfig`.
    lm: the model.
    rows: number of slots on each shard.
    together: whether all rows go through the blocks together, so that all need the same call.
    shards: number of shards. All make the same call at a time, so rows on different shards wait for
      each other as rows of one shard do.
  """
  if cfg.cache == "none":
    return [Program(None, rows)]
  apart = not together and rows * shards > 1
  some = lambda parts: min(rows, max(2, -(-rows // parts))) if apart else rows
  windows = sorted(set(cached_widths(cfg, lm)), reverse=True)
  whole = Program(None, some(8), apart)
  if len(windows) == 1:  # all rows may take part: a call on a block changes that block's cache only
    return [whole, Program(windows[0], rows)]
  uneven = cfg.remasking == "origin" or cfg.edit_threshold is not None
  uneven |= cfg.threshold is not None or cfg.factor is not None
  of_all = [Program(seen, rows, of_all=True) for seen in windows if apart and not uneven]
  return [whole, *of_all, *(Program(seen, some(4), apart) for seen in windows)]


def computed_positions(cfg: SamplerConfig, lm: LM, kind: Program, length: int) -> int:
  """How many positions of a row a call computes, on a canvas of `length` (with guidance twice)."""
  seen = length if kind.seen is None else min(kind.seen + lm.left_context, length)
  return seen * (2 if cfg.cfg_scale else 1)


def block_numbers(cfg: SamplerConfig, lm: LM, valid: Array) -> Array:
  """For each position the number of its block, where the completion begins in block 0.

  Earlier blocks have negative numbers. The blocks of a block-causal model are counted from each
  row's first valid position, so block 0 may begin within the prompt.

  Args:
    cfg: see `SamplerConfig`.
    lm: the model.
    valid: bool[B,T], False on padding.

  Returns:
    i32[B,T], or i32[1,T] where blocks are the same in all rows.
  """
  t = valid.shape[1]
  first = t - cfg.gen_length
  if not lm.block_length:
    return ((jnp.arange(t) - first) // cfg.block_length)[None]
  number = (jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1) // lm.block_length
  return number - number[:, first, None]


def find_window(cfg: SamplerConfig, lm: LM, numbers: Array, block: Array) -> tuple[Array, int]:
  """The positions whose logits a step needs: the active block, or with `allow_mask` and no cache
  the whole completion.

  Args:
    cfg: see `SamplerConfig`.
    numbers: i32[B or 1,T], see `block_numbers`.
    block: i32[B], number of each row's active block.

  Returns:
    (start i32[B], width): positions start .. start + width - 1 of the canvas; width is static.
  """
  t = numbers.shape[1]
  first = t - cfg.gen_length
  if cfg.allow_mask and cfg.cache == "none":
    # Steps may have left masks in earlier blocks; these are candidates again.
    return jnp.full_like(block, first), cfg.gen_length
  start = jnp.sum(numbers < block[:, None], axis=1, dtype=jnp.int32)
  return jnp.clip(start, first, t - cfg.block_length), cfg.block_length


def block_hidden(
  lm: LM,
  params: Params,
  cfg: SamplerConfig,
  tokens: Array,
  fixed: Array,
  valid: Array,
  cache: Any,
  window: tuple[Array, int],
  seen: int | None = None,
  shards: int = 1,
) -> tuple[Array, Any]:
  """One network call, up to the head.

  Args:
    lm: the model.
    params: its parameters.
    cfg: see `SamplerConfig`.
    tokens: i32[B,T], the canvases.
    fixed: bool[B,T]. With guidance, the unconditional input has masks at these positions.
    valid: bool[B,T], False on padding.
    cache: of `init_cache` or the last call; None without a cache.
    window: (start, width), see `find_window`.
    seen: how many positions from the window's first on the call computes. None: the whole canvas,
      which also renews the cache.
    shards: W, the number of parts that the rows are split into. With guidance, the network's rows
      (and the cache's) are in this order: for each part, its conditional inputs, then its
      unconditional ones.

  Returns:
    (h [C,B,width,D], the window's hidden states; cache). With guidance C is 2, the conditional
    input first; else 1.
  """
  start, width = window
  inputs = 1
  if cfg.cfg_scale:
    # The unconditional input hides all that was given: prompt and hints.
    tokens = _both(tokens, jnp.where(fixed, lm.mask_id, tokens), shards)
    valid, start, inputs = _both(valid, valid, shards), _both(start, start, shards), 2
  if cfg.cache != "none":
    past_end = ((0, 0), (0, overhang(cfg, lm)))
    valid = jnp.pad(valid, past_end)
  if seen is None:
    h, cache = lm.hidden(params, tokens, valid, cache=cache, read=(start, width))
  else:
    tokens, begin, read = jnp.pad(tokens, past_end), start, (0, width)
    if lm.left_context:
      seen = min(seen + lm.left_context, tokens.shape[1])
      begin = jnp.clip(start - lm.left_context, 0, tokens.shape[1] - seen)
      read = (start - begin, width)
    part = windows(tokens, begin, seen)
    h, cache = lm.hidden(params, part, valid, start=begin, cache=cache, read=read)
  h = h.reshape(shards, inputs, -1, *h.shape[1:])
  return jnp.moveaxis(h, 1, 0).reshape(inputs, -1, *h.shape[3:]), cache


def _both(first: Array, second: Array, shards: int) -> Array:
  """Concatenates two inputs of the same rows [B,...] on each shard: [2*B,...]."""
  in_shards = lambda x: x.reshape(shards, -1, *x.shape[1:])
  both = jnp.concatenate([in_shards(first), in_shards(second)], axis=1)
  return both.reshape(-1, *first.shape[1:])


def windows(x: Array, start: Array, width: int) -> Array:
  """Cuts a window out of each row: of x [B,T] the columns start .. start + width - 1, start i32[B].

  Returns:
    [B,width].
  """
  part = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width)
  return jax.vmap(part)(x, start)


def cache_rows(cfg: SamplerConfig, at: Array, slots: int) -> Array:
  """The rows of the cache that belong to some slots: one for each, or two with guidance.

  Args:
    cfg: see `SamplerConfig`.
    at: i32[W,s], indices of s slots on each of W shards.
    slots: number of slots on each shard.

  Returns:
    i32[W,C*s], indices of rows within each shard of the cache.
  """
  return jnp.concatenate([at, at + slots], axis=1) if cfg.cfg_scale else at


def take_from_cache(cache: Any, at: Array) -> Any:
  """The rows `at` i32[W,s], indices within each of W shards, of a cache: a cache of W*s rows."""

  def take(x):
    axis, x = x.ndim - 4, _in_shards(x, len(at))
    numbers = jax.lax.GatherDimensionNumbers(
      offset_dims=(*range(axis), *range(axis + 2, axis + 5)),
      collapsed_slice_dims=(axis + 1,),
      start_index_map=(axis + 1,),
      operand_batching_dims=(axis,),
      start_indices_batching_dims=(0,),
    )
    sizes = (*x.shape[:axis], 1, 1, *x.shape[axis + 2 :])
    out = jax.lax.gather(x, at[..., None], numbers, sizes, mode="clip")
    return out.reshape(*out.shape[:axis], -1, *out.shape[axis + 2 :])

  return jax.tree.map(take, cache)


def put_into_cache(cache: Any, at: Array, some: Any) -> Any:
  """The inverse of `take_from_cache`: writes `some` to the rows `at` i32[W,s] of the cache.

  An index past the end of a shard writes nothing.
  """

  def put(x, new):
    axis, shape, x = x.ndim - 4, x.shape, _in_shards(x, len(at))
    numbers = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(*range(axis), *range(axis + 2, axis + 5)),
      inserted_window_dims=(axis + 1,),
      scatter_dims_to_operand_dims=(axis + 1,),
      operand_batching_dims=(axis,),
      scatter_indices_batching_dims=(0,),
    )
    new = _in_shards(new, len(at))
    return jax.lax.scatter(x, at[..., None], new, numbers, mode="drop").reshape(shape)

  return jax.tree.map(put, cache, some)


def _in_shards(x: Array, shards: int) -> Array:
  """Splits the rows of an array of the cache: [...,B,K,T,E] -> [...,W,B/W,K,T,E]."""
  return x.reshape(*x.shape[:-4], shards, -1, *x.shape[-3:])


def head_logits(lm: LM, params: Params, cfg: SamplerConfig, h: Array) -> Array:
  """Logits f32[B,w,V] of hidden states [C,B,w,D] from `block_hidden`, with guidance applied."""
  logits = lm.head(params, h.reshape(-1, *h.shape[2:]))
  if cfg.cfg_scale:
    conditional, unconditional = jnp.split(logits, 2)
    logits = unconditional + (cfg.cfg_scale + 1) * (conditional - unconditional)
  return logits


def head_sizes(positions: int, vocab_size: int) -> list[int]:
  """The numbers of positions that the head is compiled for, largest first.

  They are the quarters of `positions`; or `positions` alone, where all of them have few logits.

  Args:
    positions: of all windows on a shard.
    vocab_size: V.

  Example: for 64 rows with windows of 32 and a large vocabulary: 2048, 1536, 1024 and 512.
  """
  if positions * vocab_size < FEW_LOGITS:
    return [positions]
  return sorted({-(-positions * n // HEAD_PROGRAMS) for n in range(1, HEAD_PROGRAMS + 1)})[::-1]
