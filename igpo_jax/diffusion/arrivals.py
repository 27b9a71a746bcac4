"""Rows that come and go while others are at work: the sampler of a server.

    places   one for each slot; a row is put into a free place, and leaves it when it is done

`advance` makes a few network calls, so rows can be put in, taken out and looked at between two of
them. A row's tokens are those that `denoise` gives it: what it has in its place decides them, and
neither the rows beside it nor when it came.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.network import num_blocks
from igpo_jax.diffusion.sampler import State, begin, check_sampler, fill
from igpo_jax.diffusion.slots import exchange, flat, in_shards
from igpo_jax.errors import UserError
from igpo_jax.types import LM, Array, Canvas, Params


class Arrivals(NamedTuple):
  """What changes before the next calls. Of the places that are not `new` the rows have no meaning.

  Attributes:
    tokens, fixed, valid: i32/bool[B,T], rows as in `Canvas`.
    seeds, numbers: u32[B] and i32[B]: a row's key is `fold_in(key(seed), number)`.
    new: bool[B], the places that get a row. They have to be free, or in `gone`.
    gone: bool[B], the places whose row is given up.
  """

  tokens: np.ndarray
  fixed: np.ndarray
  valid: np.ndarray
  seeds: np.ndarray
  numbers: np.ndarray
  new: np.ndarray
  gone: np.ndarray


class Progress(NamedTuple):
  """The completions as they are now; `Denoised` describes the first two.

  Attributes:
    tokens, commit_step: i32[B,L].
    done: bool[B], True where a row is done, and where there is none.
    finite: bool[B], False for a row that is done and whose logits were NaN or infinite.
  """

  tokens: Array
  commit_step: Array
  done: Array
  finite: Array


@functools.partial(jax.jit, static_argnames=("lm", "cfg", "places", "length"))
def empty_places(lm: LM, params: Params, cfg: SamplerConfig, places: int, length: int) -> State:
  """The state with which `advance` starts.

  Args:
    lm, params: the model.
    cfg: see `SamplerConfig`.
    places: B, how many rows are worked at, at a time: a multiple of the devices that rows are split
      over.
    length: T, positions of a prompt and its completion.

  Raises:
    UserError: the options do not fit the model, or make a row depend on the rows beside it.
  """
  check_sampler(lm.block_length, cfg)
  if cfg.early_stop == "batch":
    raise UserError("early_stop='batch': answers would depend on each other; choose 'row'")
  some = jnp.ones((places, length), bool)
  canvas = Canvas(jnp.full((places, length), lm.eos_id, jnp.int32), some, some)
  keys = jax.random.split(jax.random.key(0), places)  # of no row yet
  return begin(lm, params, canvas, keys, cfg, places)


@functools.partial(jax.jit, static_argnames=("lm", "cfg"), donate_argnames=("state",))
def advance(
  lm: LM, params: Params, state: State, cfg: SamplerConfig, arrivals: Arrivals, calls: Array | int
) -> tuple[State, Progress]:
  """Takes rows out, puts rows in, and makes at most `calls` network calls. `state` is donated."""
  state = _changed(lm, cfg, state, arrivals).replace(forwards=jnp.int32(0))
  state = fill(lm, params, state, cfg, calls=calls)
  queue, slots = exchange(lm, cfg, state.queue, state.slots)
  shards = len(queue.tokens)
  write = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))
  now = lambda name: write(
    getattr(queue, name),
    in_shards(slots.number, shards),
    in_shards(getattr(slots, name), shards),
  )
  completion = lambda x: flat(x)[:, -cfg.gen_length :]
  progress = Progress(
    completion(now("tokens")), completion(now("commit_step")), flat(queue.done), flat(queue.finite)
  )
  return state.replace(queue=queue, slots=slots), progress


def _changed(lm: LM, cfg: SamplerConfig, state: State, arrivals: Arrivals) -> State:
  queue, slots = state.queue, state.slots
  shards, n = queue.done.shape
  of_shard = lambda x: in_shards(jnp.asarray(x), shards)
  new, gone = of_shard(arrivals.new), of_shard(arrivals.gone)
  number = of_shard(slots.number)
  leaves = (number < n) & jax.vmap(lambda gone, at: gone[at])(gone, jnp.minimum(number, n - 1))
  leaves = flat(leaves)
  slots = slots.replace(
    number=jnp.where(leaves, n, slots.number),
    block=jnp.where(leaves, num_blocks(cfg, lm), slots.block),
  )
  keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(
    arrivals.seeds, arrivals.numbers
  )
  put = lambda given, old: jnp.where(new.reshape(shards, n, *(1,) * (old.ndim - 2)), given, old)
  given = Canvas(arrivals.tokens, arrivals.fixed, arrivals.valid)
  canvas = jax.tree.map(lambda given, old: put(of_shard(given), old), given, queue.canvas)
  queue = queue.replace(
    canvas=canvas,
    keys=put(of_shard(keys), queue.keys),
    order=jnp.argsort(~new, axis=1, stable=True).astype(jnp.int32),
    length=jnp.sum(new, axis=1, dtype=jnp.int32),
    taken=jnp.zeros_like(queue.taken),
    tokens=put(canvas.tokens, queue.tokens),
    commit_step=put(jnp.int32(-1), queue.commit_step),
    finite=put(True, queue.finite),
    done=put(False, queue.done | gone),
  )
  return state.replace(queue=queue, slots=slots)
