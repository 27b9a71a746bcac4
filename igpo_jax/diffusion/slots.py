"""Rows that wait, rows at work, and rows that are done: what the denoising loop holds.

    queue   n canvases on each of W shards     slots   b rows at work on each shard

A slot is given the next canvas that has masks, works through its blocks at its own pace, and when
it is done the row is written out and the next one takes the slot. Each shard of the devices has a
queue and slots of its own, so rows never move between devices. All of this happens inside the
compiled loop, whose shapes know nothing of how many rows there are to fill.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.network import block_numbers, num_blocks
from igpo_jax.diffusion.schedule import forwards_needed
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import LM, Array, Canvas


class Queue(flax.struct.PyTreeNode):
  """Canvases, and what becomes of them: [W,n,...]."""

  canvas: Canvas  # i32/bool[W,n,T]
  keys: Array  # key[W,n]
  order: Array  # i32[W,n], in which they are taken
  length: Array  # i32[W], how many are taken
  taken: Array  # i32[W], how many were
  tokens: Array  # i32[W,n,T]
  commit_step: Array  # i32[W,n,T]
  commit_logp: Array  # f32[W,n,T]
  finite: Array  # bool[W,n]
  calls: Array  # i32[W,n]
  done: Array  # bool[W,n], nothing is left to fill


class Slots(flax.struct.PyTreeNode):
  """The rows at work, [B,...] with B = W * b; b consecutive ones on each shard."""

  tokens: Array  # i32[B,T]
  commit_step: Array  # i32[B,T]
  commit_logp: Array  # f32[B,T]
  fixed: Array  # bool[B,T]
  valid: Array  # bool[B,T]
  keys: Array  # key[B]
  finite: Array  # bool[B], all logits so far were numbers
  calls: Array  # i32[B], of the network for this row
  number: Array  # i32[B], the row's place in its shard's queue; n: the slot is empty
  block: Array  # i32[B], the active block; `num_blocks`: the row is done
  step: Array  # i32[B], steps made in it
  had: Array  # i32[B], masks that it began with
  passes: Array  # i32[B], calls since it was full, where it is edited
  settled: Array  # bool[B], the last of them changed nothing


def in_shards(x: Array, shards: int) -> Array:
  """[W*b,...] as [W,b,...]."""
  return x.reshape(shards, -1, *x.shape[1:])


def flat(x: Array) -> Array:
  """[W,b,...] as [W*b,...]; the rows stay on their devices."""
  x = x.reshape(-1, *x.shape[2:])
  return constrain(x, "act_batch", *(None,) * (x.ndim - 1))


def take(tree, at: Array):
  """The rows i32[W,s] of each shard, of arrays [W*b,...]: [W*s,...]."""
  pick = lambda x, at: x[at]
  return jax.tree.map(lambda x: flat(jax.vmap(pick)(in_shards(x, len(at)), at)), tree)


def put(tree, at: Array, some):
  """`tree` with the rows i32[W,s] of each shard replaced; a number past the end replaces none."""

  def write(x, new):
    if x is new:
      return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return x  # a row's key never changes
    to = lambda x, at, new: x.at[at].set(new, mode="drop")
    return flat(jax.vmap(to)(in_shards(x, len(at)), at, in_shards(new, len(at))))

  return jax.tree.map(write, tree, some)


def make_queue(lm: LM, cfg: SamplerConfig, canvas: Canvas, keys: Array, shards: int) -> Queue:
  """Canvases i32[N,T] that wait, N / W on each shard; those without masks are done already."""
  todo = in_shards(jnp.any(masks(lm, cfg, canvas.tokens, canvas.fixed), axis=1), shards)
  if cfg.early_stop == "batch":  # which asks about every row
    todo = jnp.ones_like(todo)
  queued = jax.tree.map(
    lambda x: constrain(in_shards(jnp.asarray(x), shards), "act_batch", None, None), canvas
  )
  return Queue(
    canvas=queued,
    keys=in_shards(keys, shards),
    order=jnp.argsort(~todo, axis=1, stable=True).astype(jnp.int32),
    length=jnp.sum(todo, axis=1, dtype=jnp.int32),
    taken=jnp.zeros(shards, jnp.int32),
    tokens=queued.tokens,
    commit_step=jnp.full_like(queued.tokens, -1),
    commit_logp=jnp.zeros_like(queued.tokens, jnp.float32),
    finite=jnp.ones_like(todo),
    calls=jnp.zeros_like(todo, jnp.int32),
    done=~todo,
  )


def empty_slots(queue: Queue, rows: int, cfg: SamplerConfig, lm: LM) -> Slots:
  """`rows` slots on each shard, without a row."""
  shards, n, t = queue.tokens.shape
  size = shards * rows
  zeros = lambda *shape, dtype=jnp.int32: jnp.zeros((size, *shape), dtype)
  return Slots(
    tokens=zeros(t),
    commit_step=zeros(t) - 1,
    commit_logp=zeros(t, dtype=jnp.float32),
    fixed=zeros(t, dtype=bool),
    valid=zeros(t, dtype=bool),
    keys=flat(queue.keys[:, jnp.arange(rows) % n]),
    finite=zeros(dtype=bool),
    calls=zeros(),
    number=zeros() + n,
    block=zeros() + num_blocks(cfg, lm),
    step=zeros(),
    had=zeros(),
    passes=zeros(),
    settled=zeros(dtype=bool),
  )


def holds_row(queue: Queue, slots: Slots) -> Array:
  """bool[B], which slots have a row."""
  return slots.number < queue.tokens.shape[1]


def exchange(lm: LM, cfg: SamplerConfig, queue: Queue, slots: Slots) -> tuple[Queue, Slots]:
  """Writes out the rows that are done, and gives free slots the next ones of their shard."""
  shards, n, _ = queue.tokens.shape
  of_shard = lambda x: in_shards(x, shards)
  done = holds_row(queue, slots) & (slots.block >= num_blocks(cfg, lm))
  number = of_shard(slots.number)
  to = jnp.where(of_shard(done), number, n)
  write = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))
  written = {
    name: write(getattr(queue, name), to, of_shard(getattr(slots, name)))
    for name in ("tokens", "commit_step", "commit_logp", "finite", "calls")
  }

  written["done"] = write(queue.done, to, of_shard(done))
  free = of_shard(done | ~holds_row(queue, slots))
  place = queue.taken[:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
  gets = free & (place < queue.length[:, None])
  pick = jax.vmap(lambda x, at: x[at])
  number = jnp.where(free, n, number)
  number = jnp.where(gets, pick(queue.order, jnp.minimum(place, n - 1)), number)
  fetch = jnp.minimum(number, n - 1)
  gets = flat(gets)

  def new(old, given):
    return jnp.where(gets.reshape(-1, *(1,) * (old.ndim - 1)), given, old)

  rows = {
    name: new(getattr(slots, name), flat(pick(source, fetch)))
    for name, source in (
      ("tokens", queue.canvas.tokens), ("fixed", queue.canvas.fixed),
      ("valid", queue.canvas.valid), ("keys", queue.keys),
    )
  }  # fmt: skip
  begun = {"commit_step": -1, "commit_logp": 0.0, "finite": True, "calls": 0, "block": -1}
  slots = slots.replace(
    number=flat(number),
    **rows,
    **{name: new(getattr(slots, name), jnp.asarray(x)) for name, x in begun.items()},
  )
  queue = queue.replace(
    taken=queue.taken + jnp.sum(of_shard(gets), axis=1, dtype=jnp.int32), **written
  )
  return queue, next_block(lm, cfg, slots, gets)


def masks(lm: LM, cfg: SamplerConfig, tokens: Array, fixed: Array) -> Array:
  """bool[B,T], what is still to be filled."""
  t = tokens.shape[1]
  return (tokens == lm.mask_id) & ~fixed & (jnp.arange(t) >= t - cfg.gen_length)


def in_block(cfg: SamplerConfig, lm: LM, slots: Slots) -> tuple[Array, Array]:
  """(bool[B,T] of the positions of each row's active block, the same of those up to its end)."""
  t = slots.tokens.shape[1]
  numbers, block = block_numbers(cfg, lm, slots.valid), slots.block[:, None]
  return (numbers == block) & (jnp.arange(t) >= t - cfg.gen_length), numbers <= block


def next_block(lm: LM, cfg: SamplerConfig, slots: Slots, which: Array) -> Slots:
  """The rows bool[B] begin their next block that has masks; those without any are done."""
  left = masks(lm, cfg, slots.tokens, slots.fixed)
  numbers, last = block_numbers(cfg, lm, slots.valid), num_blocks(cfg, lm)
  later = left & (numbers > slots.block[:, None])
  block = jnp.min(jnp.where(later, numbers, last), axis=1).astype(jnp.int32)
  had = jnp.sum(later & (numbers == block[:, None]), axis=1, dtype=jnp.int32)
  new = lambda old, given: jnp.where(which, given, old)
  return slots.replace(
    block=new(slots.block, block),
    step=new(slots.step, 0),
    had=new(slots.had, had),
    passes=new(slots.passes, 0),
    settled=new(slots.settled, False),
  )


def unfinished(lm: LM, cfg: SamplerConfig, slots: Slots, here: Array) -> Array:
  """bool[B], whose active block has masks, or is still edited. `here` is of `in_block`."""
  left = jnp.any(masks(lm, cfg, slots.tokens, slots.fixed) & here, axis=1)
  if cfg.edit_threshold is None:
    return left
  return left | (~slots.settled & (slots.passes < cfg.edit_passes))


def ended(lm: LM, cfg: SamplerConfig, slots: Slots, here: Array) -> Array:
  """bool[B], whose active block gets no more calls.

  A threshold may finish a block before its share of steps is used up; `allow_mask` may leave masks
  when it is.
  """
  steps = cfg.steps_per_block
  needed = forwards_needed(slots.had, steps, cfg.schedule, cfg.block_length)
  if cfg.remasking == "origin":  # by chance alone, every step may be needed
    needed = jnp.full_like(needed, steps)
  if cfg.edit_threshold is not None:
    needed = needed + cfg.edit_passes
  return ~unfinished(lm, cfg, slots, here) | (slots.step >= needed)
