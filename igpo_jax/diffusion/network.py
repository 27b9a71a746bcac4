"""How the denoising loop asks the network: exactly, or with a cache of keys and values.

    none    every call sees the whole canvas
    prefix  a block's first call does and fills the cache; the others see the canvas from
            the block on, and what lies before it as it was then
    dual    the others see the active block only; what lies after it is as it was, too

    canvas     prompt   block 0   block 1   block 2
    active                        ^^^^^^^
    none       fresh    fresh     fresh     fresh
    prefix     cached   cached    fresh     fresh
    dual       cached   cached    fresh     cached

Every row has an active block of its own, so its window lies where its block does. Calls that see
the whole canvas are made for a few rows at a time, those whose block begins, and so are those of
"prefix", whose windows differ in width (`programs`).

A window of a network that predicts one position ahead begins one position earlier
(`LM.left_context`). Of a block-causal model "dual" is exact: what is cached of earlier blocks
is what it would be, and nothing sees the later ones.

(Fast-dLLM, arXiv 2505.22618.) Hints in later blocks are tokens like any other: their
keys and values are in the cache. Positions that are not `valid` are never seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.types import LM, Array, Params

PREFIX_PROGRAMS = 4  # widths that the calls of a prefix-cached run are compiled for
HEAD_PROGRAMS = 4  # widths that the head and the choice are compiled for, and
FEW_LOGITS = 2**17  # how many logits a call has at least for that to pay


def num_blocks(cfg: SamplerConfig, lm: LM | None = None) -> int:
  """How many blocks a row may have in the canvas: one more where they need not begin with it."""
  return cfg.num_blocks + (lm is not None and lm.block_length > 1)


def cached_widths(cfg: SamplerConfig, lm: LM | None = None) -> tuple[int, ...]:
  """How many positions, from the active block on, a call with a cache sees in each block.

  A program is compiled for each different one, so with "prefix" they are few: with more
  blocks than `PREFIX_PROGRAMS` they are rounded up, past the end of the canvas.

  Example: "prefix", of 8 blocks: 8, 8, 6, 6, 4, 4, 2, 2 blocks.
  """
  if cfg.cache != "prefix":
    return (cfg.block_length,) * num_blocks(cfg, lm)
  unit = -(-cfg.num_blocks // PREFIX_PROGRAMS)
  left = np.arange(cfg.num_blocks, 0, -1)
  return tuple(int(n) * cfg.block_length for n in -(-left // unit) * unit)


def overhang(cfg: SamplerConfig, lm: LM | None = None) -> int:
  """Positions past the end of the canvas that the widest call of some block reaches."""
  if lm is not None and lm.block_length:
    return 0  # `find_window` stays inside
  ends = [block * cfg.block_length + w for block, w in enumerate(cached_widths(cfg))]
  return max(ends) - cfg.gen_length + (0 if lm is None else lm.left_context)


def init_cache(lm: LM, params: Params, cfg: SamplerConfig, rows: int, length: int) -> Any:
  """An empty cache for a canvas i32[rows, length]; None where none is kept."""
  if cfg.cache == "none":
    return None
  rows = 2 * rows if cfg.cfg_scale else rows
  return lm.init_cache(params, rows, length + overhang(cfg, lm))


class Program(NamedTuple):
  """One kind of call.

  Attributes:
    seen: how many positions it sees, from the active block on; None: the whole canvas, which
      renews a cache.
    rows: how many rows it is made for, on each shard of the slots.
    picked: only rows that wait for such a call take part, and the cache of the others stays.
    of_all: it is made only where all rows wait for such a call.
  """

  seen: int | None
  rows: int
  picked: bool = False
  of_all: bool = False


def programs(cfg: SamplerConfig, lm: LM, rows: int, together: bool) -> list[Program]:
  """The kinds of calls of a run with `rows` slots on each shard; the first that can be is made.

  A call on the whole canvas costs as much as many on a block. So where rows go at their own pace
  it is made for an eighth of them, and the others wait no longer than until so many are due. Nor do
  the rows of a prefix-cached run see equally much: a call is made for a quarter of them, or for all
  where they keep step, which saves putting together their parts of the cache.

  Args:
    together: rows go through the blocks together; then all have the same kind of call.
  """
  if cfg.cache == "none":
    return [Program(None, rows)]
  apart = not together and rows > 1
  some = lambda parts: min(rows, max(2, -(-rows // parts))) if apart else rows
  windows = sorted(set(cached_widths(cfg, lm)), reverse=True)
  whole = Program(None, some(8), apart)
  if len(windows) == 1:  # which every row may take part in: it writes to its own block only
    return [whole, Program(windows[0], rows)]
  uneven = cfg.remasking == "origin" or cfg.edit_threshold is not None
  uneven |= cfg.threshold is not None or cfg.factor is not None
  of_all = [Program(seen, rows, of_all=True) for seen in windows if apart and not uneven]
  return [whole, *of_all, *(Program(seen, some(4), apart) for seen in windows)]


def block_numbers(cfg: SamplerConfig, lm: LM, valid: Array) -> Array:
  """i32[B or 1,T]: the block of the completion that a position lies in; before it, 0 or less.

  A block-causal model counts from each row's own first position: what lies before the completion
  in the block that this begins in has its number, 0.
  """
  t = valid.shape[1]
  first = t - cfg.gen_length
  if not lm.block_length:
    return ((jnp.arange(t) - first) // cfg.block_length)[None]
  number = (jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1) // lm.block_length
  return number - number[:, first, None]


def find_window(cfg: SamplerConfig, lm: LM, numbers: Array, block: Array) -> tuple[Array, int]:
  """(start i32[B], width) of the positions whose logits a step needs.

  Args:
    numbers: see `block_numbers`.
    block: i32[B], each row's active block.
  """
  t = numbers.shape[1]
  first = t - cfg.gen_length
  if cfg.allow_mask and cfg.cache == "none":
    # The model may have left masks in earlier blocks; they compete again.
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
  """One call of the network, up to the head.

  Args:
    tokens: i32[B,T].
    fixed: bool[B,T]; with guidance, what the unconditional input hides.
    valid: bool[B,T].
    cache: as `init_cache` or the last call left it.
    window: see `find_window`.
    seen: how many positions from the window's first on the call sees; None for the whole
      canvas, which renews the cache.
    shards: parts that the rows are split into. With guidance each part has both of its inputs, as
      the rows of the cache do.

  Returns:
    (h [C,B,width,D] of the window, cache); C is 2 with guidance, the unconditional input
    last, else 1.
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
  """Two inputs of the same rows one after the other, on each shard."""
  in_shards = lambda x: x.reshape(shards, -1, *x.shape[1:])
  both = jnp.concatenate([in_shards(first), in_shards(second)], axis=1)
  return both.reshape(-1, *first.shape[1:])


def windows(x: Array, start: Array, width: int) -> Array:
  """The `width` columns of x [B,T] from each row's own start i32[B] on."""
  part = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width)
  return jax.vmap(part)(x, start)


def cache_rows(cfg: SamplerConfig, at: Array, slots: int) -> Array:
  """Where the rows of slots i32[W,s] are in a cache of W shards of `slots`: i32[W,C*s]."""
  return jnp.concatenate([at, at + slots], axis=1) if cfg.cfg_scale else at


def take_from_cache(cache: Any, at: Array) -> Any:
  """The rows i32[W,s] of W shards of a cache, as a cache of W*s rows."""

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
  """Writes a cache of W*s rows to the rows i32[W,s] of W shards; none for a number past the end."""

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
  """[...,B,K,T,E] as [...,W,B/W,K,T,E]."""
  return x.reshape(*x.shape[:-4], shards, -1, *x.shape[-3:])


def head_logits(lm: LM, params: Params, cfg: SamplerConfig, h: Array) -> Array:
  """Logits f32[B,w,V] of h [C,B,w,D] from `block_hidden`, guided if the config says so."""
  logits = lm.head(params, h.reshape(-1, *h.shape[2:]))
  if cfg.cfg_scale:
    conditional, unconditional = jnp.split(logits, 2)
    logits = unconditional + (cfg.cfg_scale + 1) * (conditional - unconditional)
  return logits


def head_widths(rows: int, width: int, vocab_size: int) -> list[int]:
  """To how many positions of a row the head may be applied, largest first.

  A program is compiled for each, so they are few: quarters of `width`, and all of it
  where the logits of a call are few. Example: of 32 positions 32, 24, 16 and 8.
  """
  if rows * width * vocab_size < FEW_LOGITS:
    return [width]
  return sorted({-(-width * n // HEAD_PROGRAMS) for n in range(1, HEAD_PROGRAMS + 1)})[::-1]
