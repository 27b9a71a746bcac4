"""The next network call: of which kind it is, for which rows, and the call itself.

`network.programs` has the kinds. With a cache there are several, of which one is made at a step,
and what follows the call (`sampler`) is compiled once for all of them.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.network import (
  Program,
  block_hidden,
  cache_rows,
  cached_widths,
  init_cache,
  num_blocks,
  put_into_cache,
  take_from_cache,
)
from igpo_jax.diffusion.slots import Slots, flat, in_shards, put, take
from igpo_jax.types import LM, Array, Params


class Asked(flax.struct.PyTreeNode):
  """What a network call gives."""

  cache: Any  # as `network.init_cache` has it
  h: Any = None  # [B,C,width,D], of each row's window; see `block_hidden`
  works: Any = (
    None  # bool[B], the rows that the call was made for; `h` of the others has no meaning
  )
  made: Any = None  # bool[], whether there was a call yet


def waits_for(lm: LM, cfg: SamplerConfig, slots: Slots, held: Array, together: bool) -> Array:
  """The kind of call that each row needs next, as its `width_of`.

  Args:
    lm: the model.
    cfg: see `SamplerConfig`.
    slots: the rows at work.
    held: bool[B], the slots that hold a row.
    together: whether rows go through the blocks together.

  Returns:
    i32[B]; -1 where no call is needed.
  """
  blocks = num_blocks(cfg, lm)
  due = held & (slots.block < blocks)
  if together:
    due &= slots.block == jnp.min(jnp.where(due, slots.block, blocks))
  if cfg.cache == "none":
    return jnp.where(due, 0, -1)
  of_block = jnp.asarray(cached_widths(cfg, lm))[jnp.minimum(slots.block, blocks - 1)]
  fresh = slots.step % (cfg.refresh_every or cfg.steps_per_block) == 0
  return jnp.where(due, jnp.where(fresh, 0, of_block), -1)


def width_of(kind: Program) -> int:
  """How many positions a kind of call sees; 0 stands for the whole canvas."""
  return kind.seen or 0


def next_kind(kinds: list[Program], waits: Array, shards: int) -> Array:
  """i32[], the index of the first kind that enough rows wait for, else of what most wait for."""
  counts = jnp.stack([jnp.sum(waits == width_of(kind)) for kind in kinds])
  of_all = jnp.asarray([kind.of_all for kind in kinds])
  counts = jnp.where(of_all & (counts < jnp.sum(waits >= 0)), -1, counts)
  enough = counts >= jnp.asarray([0 if k.of_all else k.rows * shards for k in kinds])
  return jnp.where(jnp.any(enough), jnp.argmax(enough), jnp.argmax(counts))


def call_network(
  lm: LM,
  params: Params,
  cfg: SamplerConfig,
  kinds: list[Program],
  slots: Slots,
  waits: Array,
  window: tuple[Array, int],
  cache: Any,
  shards: int,
) -> tuple[Asked, Array]:
  """Makes the next call.

  Args:
    lm, params: the model.
    cfg: see `SamplerConfig`.
    kinds: see `network.programs`.
    slots: the rows at work, B of them.
    waits: i32[B], see `waits_for`.
    window: see `find_window`.
    cache: as the last call left it.
    shards: parts that the rows are split into.

  Returns:
    (what it gives; i32[], the index of its kind).
  """
  ask = functools.partial(_ask, lm, params, cfg, shards, slots, waits, window)
  if len(kinds) == 1:
    return ask(kinds[0], Asked(cache)), jnp.int32(0)
  which = next_kind(kinds, waits, shards)
  for_all = functools.partial(ask, kinds[0]._replace(picked=False))
  none_yet = jax.tree.map(jnp.zeros_like, jax.eval_shape(for_all, Asked(cache)))
  asked = none_yet.replace(cache=cache)
  for i, kind in enumerate(kinds):
    # A loop that is entered once at most. A conditional would copy the whole cache.
    now = lambda asked, i=i: (which == i) & ~asked.made
    asked = jax.lax.while_loop(now, functools.partial(ask, kind), asked)
  return asked, which


def _ask(
  lm, params, cfg, shards: int, slots: Slots, waits, window, kind: Program, asked: Asked
) -> Asked:
  """One call for the rows that wait for this kind, or for the first of them if it takes fewer."""
  works, tokens = waits == width_of(kind), slots.tokens
  if asked.made is not None:
    # The call depends on the state of its own loop. Else XLA moves it out of that loop, and makes
    # it at every step.
    works, tokens = works & ~asked.made, jnp.where(asked.made, lm.mask_id, tokens)
  start, width = window
  inputs = tokens, slots.fixed, slots.valid
  if not kind.picked:
    h, cache = block_hidden(lm, params, cfg, *inputs, asked.cache, window, kind.seen, shards)
    return Asked(cache, jnp.moveaxis(h, 0, 1), works, jnp.bool_(True))
  rows = len(slots.number) // shards
  of_shard = in_shards(works, shards)
  at = jnp.argsort(~of_shard, axis=1, stable=True)[:, : kind.rows].astype(jnp.int32)
  in_cache = cache_rows(cfg, at, rows)
  tokens, fixed, valid, start, takes_part = take((*inputs, start, works), at)
  if kind.seen is None:
    some = init_cache(lm, params, cfg, shards * kind.rows, tokens.shape[1])
  else:
    some = take_from_cache(asked.cache, in_cache)
  window = (start, width)
  h, some = block_hidden(lm, params, cfg, tokens, fixed, valid, some, window, kind.seen, shards)
  takes_part = in_shards(takes_part, shards)
  past_end = lambda x, keep: jnp.where(keep, x, 2 * rows)
  in_cache = past_end(in_cache, jnp.tile(takes_part, (1, in_cache.shape[1] // at.shape[1])))
  return Asked(
    cache=put_into_cache(asked.cache, in_cache, some),
    h=put(asked.h, past_end(at, takes_part), jnp.moveaxis(h, 0, 1)),
    works=flat(of_shard & (jnp.cumsum(of_shard, axis=1) <= kind.rows)),
    made=jnp.bool_(True),
  )
