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

A window of a network that predicts one position ahead begins one position earlier
(`LM.left_context`). Of a block-causal model "dual" is exact: what is cached of earlier blocks
is what it would be, and nothing sees the later ones.

(Fast-dLLM, arXiv 2505.22618.) Hints in later blocks are tokens like any other: their
keys and values are in the cache. Positions that are not `valid` are never seen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.types import LM, Array, Params

PREFIX_PROGRAMS = 4  # widths that the calls of a prefix-cached run are compiled for
HEAD_PROGRAMS = 4  # widths that the head and the choice are compiled for, and
FEW_LOGITS = 2**17  # how many logits a call has at least for that to pay


def span(cfg: SamplerConfig, lm: LM | None = None) -> int:
  """How many columns of the canvas the active block lies in, over all rows.

  A block-causal model counts blocks from each row's own first position, so that those of
  different rows begin in different columns.
  """
  if lm is None or not lm.block_length:
    return cfg.block_length
  return min(2 * cfg.block_length - 1, cfg.gen_length)


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
    return (span(cfg, lm),) * num_blocks(cfg, lm)
  unit = -(-cfg.num_blocks // PREFIX_PROGRAMS)
  left = np.arange(cfg.num_blocks, 0, -1)
  return tuple(int(n) * cfg.block_length for n in -(-left // unit) * unit)


def overhang(cfg: SamplerConfig, lm: LM | None = None) -> int:
  """Positions past the end of the canvas that the widest call of some block reaches."""
  if lm is not None and lm.block_length:
    return 0  # `step_window` stays inside
  ends = [block * cfg.block_length + w for block, w in enumerate(cached_widths(cfg))]
  return max(ends) - cfg.gen_length + (0 if lm is None else lm.left_context)


def init_cache(lm: LM, params: Params, cfg: SamplerConfig, rows: int, length: int) -> Any:
  """An empty cache for a canvas i32[rows, length]; None where none is kept."""
  if cfg.cache == "none":
    return None
  rows = 2 * rows if cfg.cfg_scale else rows
  return lm.init_cache(params, rows, length + overhang(cfg, lm))


def step_window(
  cfg: SamplerConfig, length: int, block: Array, lm: LM | None = None
) -> tuple[Array | int, int]:
  """(start, width) of the positions whose logits a step needs."""
  first = length - cfg.gen_length
  if lm is not None and lm.block_length:
    width = span(cfg, lm)
    start = first + (block + 1) * cfg.block_length - width
    return jnp.clip(start, first, length - width), width
  if cfg.allow_mask and cfg.cache == "none":
    # The model may have left masks in earlier blocks; they compete again.
    return first, cfg.gen_length
  return first + block * cfg.block_length, cfg.block_length


def block_hidden(
  lm: LM,
  params: Params,
  cfg: SamplerConfig,
  tokens: Array,
  fixed: Array,
  valid: Array,
  cache: Any,
  block: Array,
  seen: int | None = None,
) -> tuple[Array, Any]:
  """One call of the network, up to the head.

  Args:
    tokens: i32[B,T].
    fixed: bool[B,T]; with guidance, what the unconditional input hides.
    valid: bool[B,T].
    cache: as `init_cache` or the last call left it.
    block: i32[], the active block.
    seen: how many positions from the block's first on the call sees; None for the whole
      canvas, which renews the cache.

  Returns:
    (h [C,B,width,D] of `step_window`, cache); C is 2 with guidance, the unconditional input
    last, else 1.
  """
  start, width = step_window(cfg, tokens.shape[1], block, lm)
  inputs = 1
  if cfg.cfg_scale:
    # The unconditional input hides all that was given: prompt and hints.
    tokens = jnp.concatenate([tokens, jnp.where(fixed, lm.mask_id, tokens)])
    valid, inputs = jnp.concatenate([valid, valid]), 2
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
    window = jax.lax.dynamic_slice_in_dim(tokens, begin, seen, axis=1)
    h, cache = lm.hidden(params, window, valid, start=begin, cache=cache, read=read)
  return h.reshape(inputs, -1, *h.shape[1:]), cache


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
