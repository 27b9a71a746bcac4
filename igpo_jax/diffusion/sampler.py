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
from igpo_jax.diffusion.choose import choose
from igpo_jax.diffusion.network import (
  Program,
  block_hidden,
  cache_rows,
  cached_widths,
  find_window,
  head_logits,
  head_widths,
  init_cache,
  num_blocks,
  overhang,
  programs,
  put_into_cache,
  take_from_cache,
  windows,
)
from igpo_jax.diffusion.network import block_numbers as numbers_of
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
  put,
  take,
  unfinished,
)
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
  return _denoise(lm, params, canvas, keys, cfg, noise_table, slots)


def check_sampler(lm: LM, cfg: SamplerConfig) -> None:
  """Checks that the sampler's options fit the model. Only block-causal models restrict them.

  Raises:
    UserError: the model is block-causal, and `block_length` is not its own, the cache is "prefix",
      or `allow_mask` is set.
  """
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


class State(flax.struct.PyTreeNode):
  """What the loop carries from one network call to the next."""

  queue: Queue
  slots: Slots
  cache: Any  # of `network.init_cache`: the keys and values of the rows in the slots
  forwards: Array  # i32[], network calls so far
  refreshes: Array  # i32[], how many of them saw the whole canvas


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
  zero = jnp.int32(0)
  return _placed(State(queue, empty_slots(queue, rows, cfg, lm), cache, zero, zero))


def fill(
  lm: LM,
  params: Params,
  state: State,
  cfg: SamplerConfig,
  until: Array | int | None = None,
  noise_table: Array | None = None,
) -> State:
  """Continues denoising until `until` rows are done, counted from `begin` on.

  Args:
    lm, params, cfg: those that `begin` was given.
    state: of `begin` or of an earlier `fill`.
    until: i32[], number of rows; those without masks do not count. None: all rows.
    noise_table: `denoise`'s noise as one array, f32[calls,N,T,V], or f32[calls,N,T] for "origin".

  Returns:
    The state, of which `results` reads what has been filled so far.
  """
  queue = state.queue
  params = lm.unstack(params, queue.tokens.shape[2] + overhang(cfg, lm))
  shards, rows = len(queue.tokens), len(state.slots.number) // len(queue.tokens)
  together = cfg.early_stop == "batch" or noise_table is not None
  kinds = programs(cfg, lm, rows, together)

  def going(state):
    """Whether rows are at work and none of them is done. A row that is done frees its slot."""
    held = holds_row(queue, state.slots)
    return jnp.any(held) & ~jnp.any(held & (state.slots.block >= num_blocks(cfg, lm)))

  def next_kind(state):
    """The index of the first kind of call that enough rows wait for, else that most wait for."""
    waits = _waits_for(lm, cfg, state, together)
    counts = jnp.stack([jnp.sum(waits == _width(kind)) for kind in kinds])
    of_all = jnp.asarray([kind.of_all for kind in kinds])
    counts = jnp.where(of_all & (counts < jnp.sum(waits >= 0)), -1, counts)
    enough = counts >= jnp.asarray([0 if k.of_all else k.rows * shards for k in kinds])
    return jnp.where(jnp.any(enough), jnp.argmax(enough), jnp.argmax(counts))

  def calls(state):
    # One loop for each kind of call. A conditional inside one loop would copy the whole cache at
    # every step.
    for i, kind in enumerate(kinds):
      call = functools.partial(_call, lm, params, cfg, noise_table, together, shards, kind)
      now = lambda state, i=i: going(state) & (next_kind(state) == i)
      state = jax.lax.while_loop(going if len(kinds) == 1 else now, call, state)
    return state

  def turn(state):
    queue, slots = exchange(lm, cfg, state.queue, state.slots)
    state = state.replace(queue=queue, slots=slots)
    return calls(state) if len(kinds) == 1 else jax.lax.while_loop(going, calls, state)

  def left(state):
    """Whether a slot holds a row (even if done: it is not written out yet) or can get one."""
    taken, length = state.queue.taken, state.queue.length
    some = jnp.any(holds_row(queue, state.slots)) | jnp.any(taken < length)
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
    forwards=constrain(state.forwards),
    refreshes=constrain(state.refreshes),
  )


def results(state: State) -> Denoised:
  """The results of all N rows, in the order of `begin`; rows that are not done are unchanged."""
  queue = state.queue
  names = ("tokens", "commit_step", "commit_logp", "finite", "calls")
  of_rows = {name: flat(getattr(queue, name)) for name in names}
  return Denoised(forwards=state.forwards, refreshes=state.refreshes, **of_rows)


def _width(kind: Program) -> int:
  """How many positions a kind of call sees; 0 stands for the whole canvas."""
  return kind.seen or 0


def _waits_for(lm, cfg, state: State, together: bool) -> Array:
  """i32[B], the kind of call that each row needs next, as its `_width`; -1 where it needs none."""
  slots, blocks = state.slots, num_blocks(cfg, lm)
  due = holds_row(state.queue, slots) & (slots.block < blocks)
  if together:
    due &= slots.block == jnp.min(jnp.where(due, slots.block, blocks))
  if cfg.cache == "none":
    return jnp.where(due, 0, -1)
  of_block = jnp.asarray(cached_widths(cfg, lm))[jnp.minimum(slots.block, blocks - 1)]
  fresh = slots.step % (cfg.refresh_every or cfg.steps_per_block) == 0
  return jnp.where(due, jnp.where(fresh, 0, of_block), -1)


def _call(
  lm, params, cfg, noise_table, together: bool, shards: int, kind: Program, state: State
) -> State:
  """One network call for the rows that wait for this kind of call, and the step that follows."""
  queue, slots, cache = state.queue, state.slots, state.cache
  rows = len(slots.number) // shards
  works = _waits_for(lm, cfg, state, together) == _width(kind)
  at = None
  if kind.picked:  # only some rows take part; those that wait for such a call come first
    of_shard = works.reshape(shards, rows)
    at = jnp.argsort(~of_shard, axis=1, stable=True)[:, : kind.rows].astype(jnp.int32)
    works = take(works, at)
    in_cache = cache_rows(cfg, at, rows)
    slots = take(slots, at)
    if kind.seen is None:
      some = init_cache(lm, params, cfg, shards * kind.rows, slots.tokens.shape[1])
    else:
      some = take_from_cache(cache, in_cache)
  else:
    some = cache
  numbers = numbers_of(cfg, lm, slots.valid)
  window = find_window(cfg, lm, numbers, jnp.minimum(slots.block, num_blocks(cfg, lm) - 1))
  h, some = block_hidden(
    lm, params, cfg, slots.tokens, slots.fixed, slots.valid, some, window, kind.seen, shards
  )
  noise = None
  if noise_table is not None:
    place = slots.number + jnp.repeat(jnp.arange(shards), rows) * rows
    noise = jnp.take(noise_table[state.forwards], place, axis=0, mode="clip")
  slots = _commit(lm, params, cfg, h, slots, works, window, noise)
  if at is None:
    cache = some
  else:
    past_end = lambda x, works: jnp.where(works, x, 2 * rows)
    works = works.reshape(at.shape)
    slots = put(state.slots, past_end(at, works), slots)
    in_cache = past_end(in_cache, jnp.tile(works, (1, in_cache.shape[1] // works.shape[1])))
    cache = put_into_cache(cache, in_cache, some)
  if cfg.early_stop == "batch":
    slots = _stop_all(lm, cfg, state, slots)
  return State(queue, slots, cache, state.forwards + 1, state.refreshes + (kind.seen is None))


def _decide(lm, params, cfg, h, candidates, share, keys, first, noise, chance, edits=None):
  """Applies the head and `choose`, to as few positions as a step needs.

  Committed positions, on average half of a block, need no logits. So each row's candidates are
  moved to the front, and only the first columns are computed: as many as the row with the most
  candidates has, rounded up to one of a few widths (`head_widths`).

  Args:
    h: [C,B,width,D] from `block_hidden`.
    candidates, share, keys: bool[B,width], i32[B] and key[B], see `choose` (`share` is `count`).
    first: i32[B], position in the completion of each row's first column.
    noise: f32[B,width,V] or, for "origin", f32[B,width]; None: noise is drawn from `keys`.
    chance: f32[B], see `choose`.
    edits: (editable bool[B,width], old i32[B,width]) of `choose`; None where nothing is edited.

  Returns:
    (commit bool[B,width]; chosen i32[B,width]; log-probability f32[B,width] of each chosen token;
    finite bool[B], whether all these log-probabilities were numbers).
  """
  b, width = candidates.shape
  order = jnp.argsort(~candidates, axis=1, stable=True)  # i32[B,width]
  sizes = [width] if edits else head_widths(b, width, lm.vocab_size)

  def with_width(size, h):
    at = order[:, :size]
    pick = lambda x: jnp.take_along_axis(x, at, axis=1)
    some = lambda x: jnp.take_along_axis(x, at[..., None], axis=1)
    given = noise
    if size < width:
      h = jax.vmap(some)(h)
      given = None if noise is None else some(noise) if noise.ndim == 3 else pick(noise)
    else:
      at, pick = jnp.broadcast_to(jnp.arange(width), (b, width)), lambda x: x
    logits = head_logits(lm, params, cfg, h)
    asked = pick(candidates)
    if edits:
      asked = asked | edits[0]
    drawn = {"uniform" if cfg.remasking == "origin" else "gumbel": given}
    commit, chosen, logp = choose(
      lm, cfg, logits, pick(candidates), share, keys, first[:, None] + at, chance=chance,
      **drawn, **dict(zip(("editable", "old"), edits or (), strict=False)),
    )  # fmt: skip
    finite = jnp.all(jnp.isfinite(logp) | ~asked, axis=1)
    if size == width:
      return commit, chosen, logp, finite
    put = lambda x: jax.vmap(lambda at, x: jnp.zeros(width, x.dtype).at[at].set(x))(at, x)
    return put(commit), put(chosen), put(logp), finite

  if len(sizes) == 1:
    return with_width(width, h)
  # The conditional gets h only: if it carried the cache, it would copy it.
  most = jnp.max(jnp.sum(candidates, axis=1))
  which = jnp.sum(jnp.asarray(sizes) >= most) - 1
  return jax.lax.switch(which, [functools.partial(with_width, size) for size in sizes], h)


def _commit(lm, params, cfg, h, slots: Slots, works: Array, window, noise) -> Slots:
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
  old, edits = part(slots.tokens), None
  if editing:
    active, full = unfinished(lm, cfg, slots, here), ~jnp.any(left & here, axis=1)
    filled = here & ~slots.fixed & (slots.tokens != lm.mask_id)
    edits = part(filled & (works & active)[:, None]), old
  commit, chosen, logp, finite = _decide(
    lm, params, cfg, h, candidates, share, keys, first, None if noise is None else part(noise),
    chance, edits,
  )  # fmt: skip
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
