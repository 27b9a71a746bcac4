"""The data of the denoising loop: a queue of all rows, and the slots whose rows are at work.

    queue   n canvases on each of W shards     slots   b rows at work on each shard

Each of the W parts into which the mesh splits rows (a shard) has its own queue and its own slots,
so rows never move between devices. A slot takes the next canvas of its queue that has masks, and
fills it block by block at its own pace. Once that row is done, its results are written to the
queue and the slot takes the next canvas.

All of this happens inside the compiled loop. Its shapes depend on n and b, but not on how many of
the canvases have masks.
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
  """All canvases, and the results of those that are done: [W,n,...].

  `Denoised` describes the results (`tokens` to `calls`).
  """

  canvas: Canvas  # i32/bool[W,n,T], as they were given
  keys: Array  # key[W,n], one for each row
  order: Array  # i32[W,n], row numbers in the order in which slots take them
  length: Array  # i32[W], how many rows of `order` have something to fill; the rest is not taken
  taken: Array  # i32[W], how many rows slots have taken so far
  tokens: Array  # i32[W,n,T]
  commit_step: Array  # i32[W,n,T]
  commit_logp: Array  # f32[W,n,T]
  finite: Array  # bool[W,n]
  calls: Array  # i32[W,n]
  done: Array  # bool[W,n], True where nothing is left to fill


class Slots(flax.struct.PyTreeNode):
  """The rows at work, [B,...] with B = W * b. Rows w*b .. (w+1)*b - 1 belong to shard w.

  The last two fields are used only with `SamplerConfig.edit_threshold`.
  """

  tokens: Array  # i32[B,T]
  commit_step: Array  # i32[B,T]
  commit_logp: Array  # f32[B,T]
  fixed: Array  # bool[B,T]
  valid: Array  # bool[B,T]
  keys: Array  # key[B]
  finite: Array  # bool[B], False once a logit was NaN or infinite
  calls: Array  # i32[B], how many network calls worked at this row
  number: Array  # i32[B], the row's index in its shard's queue; n: the slot is empty
  block: Array  # i32[B], number of the active block; `num_blocks`: the row is done
  step: Array  # i32[B], steps made so far in the active block
  had: Array  # i32[B], masks in the active block when its first step began
  passes: Array  # i32[B], editing steps made since the active block had no mask left
  settled: Array  # bool[B], True once such a step changed nothing


def in_shards(x: Array, shards: int) -> Array:
  """Splits rows by shard: [W*b,...] -> [W,b,...]."""
  return x.reshape(shards, -1, *x.shape[1:])


def flat(x: Array) -> Array:
  """The inverse of `in_shards`: [W,b,...] -> [W*b,...], with every row on the device it was on."""
  x = x.reshape(-1, *x.shape[2:])
  return constrain(x, "act_batch", *(None,) * (x.ndim - 1))


def take(tree, at: Array):
  """Reads some rows of each shard.

  Args:
    tree: arrays [W*b,...].
    at: i32[W,s], for each shard the indices of s of its b rows.

  Returns:
    The tree with arrays [W*s,...].
  """
  pick = lambda x, at: x[at]
  return jax.tree.map(lambda x: flat(jax.vmap(pick)(in_shards(x, len(at)), at)), tree)


def put(x: Array, at: Array, some: Array) -> Array:
  """Replaces some rows of each shard: the inverse of `take`.

  Args:
    x: [W*b,...].
    at: i32[W,s], for each shard the indices of the rows to replace. Nothing is written for an
      index of b or more.
    some: [W*s,...], the new rows.

  Returns:
    `x` with these rows replaced.
  """
  to = lambda x, at, new: x.at[at].set(new, mode="drop")
  return flat(jax.vmap(to)(in_shards(x, len(at)), at, in_shards(some, len(at))))


def make_queue(lm: LM, cfg: SamplerConfig, canvas: Canvas, keys: Array, shards: int) -> Queue:
  """A queue of N canvases, N / W on each shard.

  Rows without masks count as done from the start, except with `early_stop="batch"`.

  Args:
    lm: the model, for its mask token.
    cfg: see `SamplerConfig`.
    canvas: i32/bool[N,T].
    keys: key[N], one for each row.
    shards: W; divides N.
  """
  to_fill = masks(lm, cfg, jnp.asarray(canvas.tokens), jnp.asarray(canvas.fixed))
  todo = in_shards(jnp.any(to_fill, axis=1), shards)
  if cfg.early_stop == "batch":  # its rule looks at all rows, so slots have to hold all of them
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
  """The state of `rows` slots on each shard, none of which holds a row yet."""
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
  """bool[B], True for the slots that hold a row."""
  return slots.number < queue.tokens.shape[1]


def exchange(lm: LM, cfg: SamplerConfig, queue: Queue, slots: Slots) -> tuple[Queue, Slots]:
  """Writes the rows that are done to the queue, and fills free slots from their shard's queue."""
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
  """bool[B,T], the positions still to be filled: masks in the completion that are not fixed."""
  t = tokens.shape[1]
  return (tokens == lm.mask_id) & ~fixed & (jnp.arange(t) >= t - cfg.gen_length)


def in_block(cfg: SamplerConfig, lm: LM, slots: Slots) -> tuple[Array, Array]:
  """Where each row's active block is.

  Returns:
    (here bool[B,T], the completion's positions in the active block; until_end bool[B,T], all
    positions of the canvas up to the block's end).
  """
  t = slots.tokens.shape[1]
  numbers, block = block_numbers(cfg, lm, slots.valid), slots.block[:, None]
  return (numbers == block) & (jnp.arange(t) >= t - cfg.gen_length), numbers <= block


def next_block(lm: LM, cfg: SamplerConfig, slots: Slots, which: Array) -> Slots:
  """Moves the rows `which` bool[B] on to their next block that has masks.

  Where no later block has masks, the row is done: its block becomes `num_blocks`.
  """
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
  """bool[B], True for rows whose active block has masks or is still being edited.

  Args:
    here: the first result of `in_block`.
  """
  left = jnp.any(masks(lm, cfg, slots.tokens, slots.fixed) & here, axis=1)
  if cfg.edit_threshold is None:
    return left
  return left | (~slots.settled & (slots.passes < cfg.edit_passes))


def ended(lm: LM, cfg: SamplerConfig, slots: Slots, here: Array) -> Array:
  """bool[B], True for rows whose active block gets no more steps.

  It is full, or it has used up its steps. With a threshold a block may be full before that; with
  `allow_mask` it may still have masks after it.

  Args:
    here: the first result of `in_block`.
  """
  steps = cfg.steps_per_block
  needed = forwards_needed(slots.had, steps, cfg.schedule, cfg.block_length)
  if cfg.remasking == "origin":  # positions are filled by chance, so all steps may be needed
    needed = jnp.full_like(needed, steps)
  if cfg.edit_threshold is not None:
    needed = needed + cfg.edit_passes
  return ~unfinished(lm, cfg, slots, here) | (slots.step >= needed)
