"""The denoising loop: masks are filled block by block, fixed positions never change.

It is one jitted program (docs/method.md#sampling). Rows wait in a queue until a slot takes them
(`slots`). Each slot works at its row at its own pace, with its own block, step and place in the
cache. Each turn of the loop calls the network (`network`), on the whole canvas unless there is a
cache, and commits each row's share of its most confident candidates (`choose`). When a row is done,
its slot takes the next one.

A row does not depend on its neighbors: its noise comes from its own key and the step, its commits
from its own masks, and its end from its own text (except with `early_stop="batch"`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key, PRNGKeyArray, UInt32

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.calls import call_network, waits_for
from igpo_jax.diffusion.choose import choose_positions, choose_tokens
from igpo_jax.diffusion.network import (
  block_numbers,
  computed_positions,
  find_window,
  head_logits,
  head_sizes,
  init_cache,
  num_blocks,
  overhang,
  programs,
  windows,
)
from igpo_jax.diffusion.schedule import commits_at, commits_until, unmasking_chances
from igpo_jax.diffusion.slots import (
  Queue,
  Slots,
  empty_slots,
  ended,
  exchange,
  flat,
  holds_row,
  in_block,
  make_queue,
  masks,
  next_block,
  unfinished,
)
from igpo_jax.errors import UserError
from igpo_jax.parallel.sharding import constrain, num_shards
from igpo_jax.token_ids import check_ids
from igpo_jax.types import LM, Array, Canvas, Denoised, Params

NOT_A_NUMBER = (
  "the model's logits are not finite (NaN or infinity), so there is no answer: its weights are "
  "damaged (convert or copy them again), or too large for the dtype of the computation "
  "(try float32: --dtype=float32 of a command, --config.model.dtype=float32 of a run)"
)

COUNTS = ("forwards", "refreshes", "worked", "room", "positions")  # see `Denoised`

NoiseFn = Callable[[int, tuple[int, ...]], Array]


def denoise(
  lm: LM,
  params: Params,
  canvas: Canvas,
  key: PRNGKeyArray | Key[Array, " B"] | UInt32[Array, "B 2"],
  cfg: SamplerConfig,
  noise: NoiseFn | None = None,
  slots: int = 0,
) -> Denoised:
  """Fills the masks of a canvas.

  Args:
    lm: the model.
    params: its parameters.
    canvas: i32/bool[B,T]. The completion is the last `cfg.gen_length` columns. The positions to
      fill are those of the completion with `(tokens == lm.mask_id) & ~fixed`.
    key: one PRNG key, or key[B] with a key for each row. Give each row its own key where results
      must not depend on a row's place in the batch.
    cfg: see `SamplerConfig`.
    noise: for tests. `noise(call, (B, T, V))` gives the standard Gumbel noise of the network's
      `call`-th call, counted from 0, instead of what `key` would give. With
      `cfg.remasking="origin"`, `noise(call, (B, T))` gives uniform numbers in [0, 1) instead. All
      rows then go through the blocks together.
    slots: how many rows are worked at, at a time, rounded up to a multiple of the number of
      devices that rows are split over; 0: all rows. It changes memory and speed, not the results.
      With `early_stop="batch"`, whose rule looks at all rows, it is always all of them.

  Returns:
    The filled canvas, and how and when each position was filled: see `Denoised`.

  Raises:
    UserError: shapes do not fit; the canvas is shorter than the completion; the model has no
      embedding for a token id (not checked inside `jax.jit`); or the options do not fit a
      block-causal model (`check_sampler`).
  """
  check_sampler(lm.block_length, cfg)
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
  return _denoise(lm, params, canvas, keys, cfg, noise_table, slots)


def check_sampler(block_length: int, cfg: SamplerConfig) -> None:
  """Checks that the sampler's options fit the model. Only block-causal models restrict them.

  Args:
    block_length: `LM.block_length` of the model; 0 where every position sees all others.
    cfg: see `SamplerConfig`.

  Raises:
    UserError: the model is block-causal, and `block_length` is not its own, the cache is "prefix",
      or `allow_mask` is set.
  """
  if not block_length:
    return
  if cfg.block_length != block_length:
    raise UserError(
      f"sampler.block_length={cfg.block_length}: this model is block-causal and has blocks of "
      f"{block_length} positions; set it to that"
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


class State(flax.struct.PyTreeNode):
  """What the loop carries from one network call to the next."""

  queue: Queue
  slots: Slots
  cache: Any  # of `network.init_cache`: the keys and values of the rows in the slots
  forwards: Array  # i32[], network calls so far
  refreshes: Array  # i32[], how many of them saw the whole canvas
  worked: Array  # i32[], rows that calls worked at while others were waiting; see `Denoised`
  room: Array  # i32[], rows that these calls were made for
  positions: Array  # f32[], positions that all calls computed


@functools.partial(jax.jit, static_argnames=("lm", "cfg", "slots"))
def _denoise(lm, params, canvas, keys, cfg, noise_table, slots) -> Denoised:
  # A table of noise is indexed by the call, so all rows have to be at work in every call.
  state = begin(lm, params, canvas, keys, cfg, slots if noise_table is None else 0)
  return results(fill(lm, params, state, cfg, noise_table=noise_table))


def begin(lm: LM, params: Params, canvas: Canvas, keys: Array, cfg, slots: int = 0) -> State:
  """The state with which `fill` starts: N canvases in queues, and no row at work yet.

  Args: as `denoise`, with a key for each row, key[N].
  """
  n, t = canvas.tokens.shape
  params = lm.unstack(params, t + overhang(cfg, lm))
  shards = num_shards("act_batch")
  shards = shards if n % shards == 0 else 1
  at_once = n if cfg.early_stop == "batch" else min(slots or n, n)
  rows = -(-at_once // shards)  # on each shard
  queue = make_queue(lm, cfg, canvas, keys, shards)
  cache = init_cache(lm, params, cfg, shards * rows, t)
  zeros = [jnp.zeros((), jnp.float32 if name == "positions" else jnp.int32) for name in COUNTS]
  return _placed(State(queue, empty_slots(queue, rows, cfg, lm), cache, *zeros))


def fill(
  lm: LM,
  params: Params,
  state: State,
  cfg: SamplerConfig,
  until: Array | int | None = None,
  noise_table: Array | None = None,
  calls: Array | int | None = None,
) -> State:
  """Continues denoising until `until` rows are done, counted from `begin` on.

  Args:
    lm, params, cfg: those that `begin` was given.
    state: of `begin` or of an earlier `fill`.
    until: i32[], number of rows; those without masks do not count. None: all rows.
    noise_table: `denoise`'s noise as one array, f32[calls,N,T,V], or f32[calls,N,T] for "origin".
    calls: i32[], stops once `state.forwards` is as large. None: no limit.

  Returns:
    The state, of which `results` reads what has been filled so far.
  """
  queue = state.queue
  params = lm.unstack(params, queue.tokens.shape[2] + overhang(cfg, lm))
  shards, rows = len(queue.tokens), len(state.slots.number) // len(queue.tokens)
  together = cfg.early_stop == "batch" or noise_table is not None
  kinds = programs(cfg, lm, rows, together, shards)
  computed = [
    kind.rows * shards * computed_positions(cfg, lm, kind, queue.tokens.shape[2]) for kind in kinds
  ]

  in_time = lambda state: True if calls is None else state.forwards < calls

  def going(state):
    """Whether rows are at work and none of them is done. A row that is done frees its slot."""
    held = holds_row(queue, state.slots)
    ended = jnp.any(held & (state.slots.block >= num_blocks(cfg, lm)))
    return jnp.any(held) & ~ended & in_time(state)

  def step(state):
    """One network call, and the commits of the rows that it was made for."""
    slots = state.slots
    block = jnp.minimum(slots.block, num_blocks(cfg, lm) - 1)
    window = find_window(cfg, lm, block_numbers(cfg, lm, slots.valid), block)
    waits = waits_for(lm, cfg, slots, holds_row(queue, slots), together)
    asked, kind = call_network(lm, params, cfg, kinds, slots, waits, window, state.cache, shards)
    noise = None
    if noise_table is not None:
      place = slots.number + jnp.repeat(jnp.arange(shards), rows) * rows
      noise = jnp.take(noise_table[state.forwards], place, axis=0, mode="clip")
    slots = _commit(lm, params, cfg, asked.h, slots, asked.works, window, noise, shards)
    if cfg.early_stop == "batch":
      slots = _stop_all(lm, cfg, state, slots)
    of_kind = lambda values: jnp.asarray(values, jnp.int32)[kind]
    waiting = jnp.any(state.queue.taken < queue.length)
    return state.replace(
      slots=slots,
      cache=asked.cache,
      forwards=state.forwards + 1,
      refreshes=state.refreshes + of_kind([kind.seen is None for kind in kinds]),
      worked=state.worked + waiting * jnp.sum(asked.works),
      room=state.room + waiting * of_kind([kind.rows * shards for kind in kinds]),
      positions=state.positions + jnp.asarray(computed, jnp.float32)[kind],
    )

  def turn(state):
    queue, slots = exchange(lm, cfg, state.queue, state.slots)
    return jax.lax.while_loop(going, step, state.replace(queue=queue, slots=slots))

  def left(state):
    """Whether a slot holds a row (even if done: it is not written out yet) or can get one."""
    taken, length = state.queue.taken, state.queue.length
    some = (jnp.any(holds_row(queue, state.slots)) | jnp.any(taken < length)) & in_time(state)
    if until is None:
      return some
    never = queue.done.size - jnp.sum(length)
    return some & (jnp.sum(state.queue.done) - never < until)

  return _placed(jax.lax.while_loop(left, turn, state))


def _placed(state: State) -> State:
  """Fixes the shardings of a state, so that `fill` accepts its own result without recompiling."""
  on_rows = lambda x: constrain(x, "act_batch", *(None,) * (x.ndim - 1))
  return state.replace(
    queue=jax.tree.map(on_rows, state.queue),
    slots=jax.tree.map(on_rows, state.slots),
    **{name: constrain(getattr(state, name)) for name in COUNTS},
  )


def results(state: State) -> Denoised:
  """The results of all N rows, in the order of `begin`; rows that are not done are unchanged."""
  queue = state.queue
  names = ("tokens", "commit_step", "commit_logp", "finite", "calls")
  of_rows = {name: flat(getattr(queue, name)) for name in names}
  return Denoised(**{name: getattr(state, name) for name in COUNTS}, **of_rows)


def _predict(lm, params, cfg, h, asked, keys, places, gumbel, shards: int):
  """Applies the head, and chooses tokens, at as few positions as a step needs.

  Committed positions, on average half of a block, need no logits, and neither do rows that the call
  was not made for. So the positions that are asked for are moved to the front, on each shard, and
  only as many are computed as the shard with the most of them has, rounded up to one of a few sizes
  (`head_sizes`).

  Args:
    h: [B,C,width,D], see `Asked`.
    asked: bool[B,width], the positions that matter.
    keys: key[B], each row's key for this step.
    places: i32[B,width], the position of each column in the completion.
    gumbel: f32[B,width,V]; None: noise is drawn from `keys`.
    shards: parts that the rows are split into.

  Returns:
    i32[B,width], f32[B,width] and f32[B,width] or None, see `choose_tokens`. What is not asked for
    has values of other positions.
  """
  b, width = asked.shape
  positions = b // shards * width
  of_shard = lambda x: x.reshape(shards, positions, *x.shape[2:])
  asked, places = of_shard(asked), of_shard(places)
  keys = of_shard(jnp.broadcast_to(keys[:, None], (b, width)))
  gumbel = None if gumbel is None else of_shard(gumbel)
  h = jnp.moveaxis(h, 1, 0)
  h = h.reshape(len(h), shards, positions, h.shape[-1])  # [C,W,positions,D]
  sizes = head_sizes(positions, lm.vocab_size)
  order = jnp.argsort(~asked, axis=1, stable=True)
  rank = jnp.cumsum(asked, axis=1) - 1  # of what is asked for: its place in `order`

  def with_size(size, h):
    pick = lambda x: jax.vmap(lambda x, at: x[at])(x, order[:, :size])
    if size == positions:
      pick = lambda x: x
    logits = head_logits(lm, params, cfg, jnp.stack([pick(x) for x in h]))
    found = choose_tokens(
      lm, cfg, logits, pick(keys), pick(places), None if gumbel is None else pick(gumbel)
    )
    if size < positions:
      back = jax.vmap(lambda x, rank: x[jnp.clip(rank, 0, size - 1)])
      found = jax.tree.map(lambda x: back(x, rank), found)
    return jax.tree.map(lambda x: x.reshape(b, width), found)

  if len(sizes) == 1:
    return with_size(positions, h)
  # The conditional gets h only: if it carried the cache, it would copy it.
  which = jnp.sum(jnp.asarray(sizes) >= jnp.max(jnp.sum(asked, axis=1))) - 1
  return jax.lax.switch(which, [functools.partial(with_size, size) for size in sizes], h)


def _commit(lm, params, cfg, h, slots: Slots, works: Array, window, noise, shards: int) -> Slots:
  """One denoising step after the network's call, for the rows `works` bool[B] only."""
  t = slots.tokens.shape[1]
  start, width = window
  per_block, editing = cfg.steps_per_block, cfg.edit_threshold is not None
  shares = (cfg.schedule, cfg.block_length)
  here, until_end = in_block(cfg, lm, slots)
  now = step_number(cfg, slots.block, slots.step)
  part = lambda x: windows(x, start, width)
  keys = jax.vmap(jax.random.fold_in)(slots.keys, now)
  left = masks(lm, cfg, slots.tokens, slots.fixed)
  candidates = part(left & until_end & works[:, None])
  i = jnp.minimum(slots.step, per_block - 1)
  share = commits_at(slots.had, per_block, i, *shares)
  if cfg.adaptive:  # earlier commits count, so a row ahead of its schedule commits one at least
    committed = slots.had - jnp.sum(left & here, axis=1)
    share = jnp.maximum(commits_until(slots.had, per_block, i, *shares) - committed, 1)
  chance = jnp.asarray(unmasking_chances(per_block))[i] if cfg.remasking == "origin" else None
  first = start - (t - cfg.gen_length)  # noise is keyed by the position in the completion
  places = first[:, None] + jnp.arange(width)
  old, asked, edits = part(slots.tokens), candidates, (None, None)
  if editing:
    active, full = unfinished(lm, cfg, slots, here), ~jnp.any(left & here, axis=1)
    filled = here & ~slots.fixed & (slots.tokens != lm.mask_id)
    editable = part(filled & (works & active)[:, None])
    asked, edits = candidates | editable, (editable, old)
  gumbel = uniform = None
  if noise is not None:
    gumbel, uniform = (None, part(noise)) if cfg.remasking == "origin" else (part(noise), None)
  chosen, logp, sure = _predict(lm, params, cfg, h, asked, keys, places, gumbel, shards)
  commit = choose_positions(
    lm, cfg, chosen, logp, sure, candidates, share, keys, places, chance, uniform, *edits
  )
  finite = jnp.all(jnp.isfinite(logp) | ~asked, axis=1)
  if editing:
    edited = full & works & active
    slots = slots.replace(
      passes=slots.passes + edited,
      settled=slots.settled | (edited & ~jnp.any(commit, axis=1)),
    )

  new = jnp.where(commit, chosen, old)
  filled = commit & (new != lm.mask_id)  # with allow_mask a mask may be chosen: still to fill
  set_part = jax.vmap(lambda x, new, start: jax.lax.dynamic_update_slice(x, new, (start,)))
  put_part = lambda x, new: constrain(set_part(x, new, start), "act_batch", "act_length")
  kept = lambda x, new: jnp.where(filled, new, part(x))
  slots = slots.replace(
    tokens=put_part(slots.tokens, new),
    commit_step=put_part(slots.commit_step, kept(slots.commit_step, now[:, None])),
    commit_logp=put_part(slots.commit_logp, kept(slots.commit_logp, logp)),
    finite=slots.finite & (finite | ~works),
    step=slots.step + works,
    calls=slots.calls + works,
  )
  ends = jnp.zeros_like(works)
  if cfg.early_stop == "row":
    ends = jnp.all((slots.tokens == lm.eos_id) | ~here, axis=1)
    ends = ends & ~unfinished(lm, cfg, slots, here) if editing else ends
  elif cfg.early_stop == "stop_token":
    ends = jnp.any(jnp.isin(slots.tokens, jnp.asarray(lm.stop_ids)) & here, axis=1)
    ends = ends & ~unfinished(lm, cfg, slots, here)
  slots = _end(lm, cfg, slots, works & ends, now)
  return next_block(lm, cfg, slots, works & ended(lm, cfg, slots, here))


def step_number(cfg: SamplerConfig, block: Array, step: Array) -> Array:
  """i32[B], what `Denoised.commit_step` calls step i32[B] of block i32[B]; noise is keyed by it."""
  editing = cfg.edit_threshold is not None
  return block * (cfg.steps_per_block + cfg.edit_passes * editing) + step


def _end(lm, cfg, slots: Slots, which: Array, now: Array) -> Slots:
  """Fills all remaining masks of the rows `which` bool[B] with end-of-text."""
  rest = masks(lm, cfg, slots.tokens, slots.fixed) & which[:, None]
  return slots.replace(
    tokens=jnp.where(rest, lm.eos_id, slots.tokens),
    commit_step=jnp.where(rest, now[:, None], slots.commit_step),
  )


def _stop_all(lm, cfg, before: State, slots: Slots) -> Slots:
  """`early_stop="batch"`, the official code's rule: all rows end together.

  When a block has ended and is all end-of-text in every row, so is the rest of every row. Rows that
  had nothing to fill in this block count as well.
  """
  blocks = num_blocks(cfg, lm)
  held = holds_row(before.queue, slots)
  lowest = lambda slots: jnp.min(jnp.where(held, slots.block, blocks))
  block, was = lowest(before.slots), before.slots
  of_block = slots.replace(block=jnp.broadcast_to(block, slots.block.shape))
  here, _ = in_block(cfg, lm, of_block)
  ends = (lowest(slots) > block) & jnp.all((slots.tokens == lm.eos_id) | ~here)
  step = jnp.max(jnp.where(held & (was.block == block), was.step, 0))
  now = jnp.broadcast_to(step_number(cfg, block, step), slots.block.shape)
  which = jnp.broadcast_to(ends, slots.block.shape)
  slots = _end(lm, cfg, slots, which, now)
  return slots.replace(block=jnp.where(which, blocks, slots.block))
