"""Prompts with completions behind them: the rows that are sampled and scored, and their keys.

`RowQueue` hands any number of rows to the devices, which work at a fixed number of them at a time,
and has them back as they are done.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.sampler import begin, check_sampler, denoise, fill, results
from igpo_jax.diffusion.slots import flat
from igpo_jax.parallel.mesh import local_rows, shard_rows
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.types import LM, Array, Canvas, Params

ROUNDS_QUEUED = 2  # as many keep the devices busy; whoever is told to stop waits for no more


def join(prompt: Array, prompt_valid: Array, completion: Array) -> tuple[Array, Array]:
  """Rows of a prompt and what follows it: (tokens i32[B,Tp+L], valid bool[B,Tp+L]).

  Args:
    prompt: i32[B,Tp], left-padded.
    prompt_valid: bool[B,Tp], False on the padding.
    completion: i32[B,L], clean or with masks; no position of it is padding.
  """
  tokens = jnp.concatenate([prompt, completion], axis=1)
  valid = jnp.concatenate([prompt_valid, jnp.ones(completion.shape, bool)], axis=1)
  return tokens, valid


def _canvas(prompt: Array, prompt_valid: Array, canvas: Array, hinted: Array) -> Canvas:
  tokens, valid = join(prompt, prompt_valid, canvas)
  return Canvas(tokens, jnp.concatenate([jnp.ones_like(prompt_valid), hinted], axis=1), valid)


@functools.partial(jax.jit, static_argnames=("lm", "cfg"))
def sample_rows(
  lm: LM,
  params: Params,
  prompt: Array,
  prompt_valid: Array,
  canvas: Array,
  hinted: Array,
  keys: Array,
  cfg: SamplerConfig,
) -> tuple[Array, Array, Array]:
  """Denoises completions. Rows stand alone, so a group may lie on several devices.

  Args:
    prompt, prompt_valid: i32/bool[B,Tp].
    canvas: i32[B,L], masks and hints.
    hinted: bool[B,L], fixed positions of the canvas.
    keys: key[B], see `row_keys`.

  Returns:
    (completion i32[B,L], commit_step i32[B,L], commit_logp f32[B,L], finite bool[B]), see
    `Denoised`.
  """
  out = denoise(lm, params, _canvas(prompt, prompt_valid, canvas, hinted), keys, cfg)
  first = prompt.shape[1]
  of_canvas = (out.tokens, out.commit_step, out.commit_logp)
  return *(x[:, first:] for x in of_canvas), out.finite


class Rows(NamedTuple):
  """This process's rows of a queue: numpy.

  Attributes:
    prompt, prompt_valid: i32/bool[B,Tp].
    canvas, hinted: i32/bool[B,L], masks and hints, and which positions are fixed.
    prompt_ids, numbers: u32[B] and i32[B] that a row's noise is drawn for, see `row_keys`.
  """

  prompt: np.ndarray
  prompt_valid: np.ndarray
  canvas: np.ndarray
  hinted: np.ndarray
  prompt_ids: np.ndarray
  numbers: np.ndarray


class Made(NamedTuple):
  """Rows that are done.

  Attributes:
    rows: i64[X], which of this process's rows they are, ascending.
    completion, commit_step: i32[X,L].
    commit_logp: f32[X,L].
    finite: bool[X], see `Denoised`.
  """

  rows: np.ndarray
  completion: np.ndarray
  commit_step: np.ndarray
  commit_logp: np.ndarray
  finite: np.ndarray


class RowQueue:
  """Rows on the devices that are completed `slots` at a time, and come back as they are done.

  Each device has its share of the rows. They are dealt out by their masks, those with most first,
  so that the devices have equally much to do and no long row begins last.

  Args:
    lm, params: the model.
    mesh: the device mesh.
    cfg: see `SamplerConfig`.
    rows: this process's rows, as many on every process. Fully hinted ones cost nothing.
    key: see `row_keys`.
    slots: rows worked at, at a time, over all processes; a multiple of the devices that rows are
      split over. Fewer where there are fewer rows.

  Attributes:
    rounds: number of rounds in which all rows come back, the same on every process. In each as
      many are finished as there are slots.
    shape: (rows, slots, positions of a prompt), which decide whether a new program compiles.
  """

  def __init__(
    self, lm: LM, params: Params, mesh, cfg: SamplerConfig, rows: Rows, key: Array, slots: int
  ):
    check_sampler(lm, cfg)
    self._lm, self._params, self._cfg = lm, params, cfg
    shards, processes = num_shards("act_batch", mesh=mesh), jax.process_count()
    count = len(rows.canvas)
    everyone, multiple = count * processes, math.lcm(shards, processes)
    self._slots = min(slots, -(-everyone // multiple) * multiple)
    self.rounds = -(-everyone // self._slots)
    # Few sizes, so that few programs compile, whatever the number of rows.
    size = self._slots * 2 ** max(0, self.rounds - 1).bit_length() // processes
    work = np.zeros(size, np.int64)
    work[:count] = (~rows.hinted).sum(axis=1)
    self._order = dealt(work, max(1, shards // processes))
    fill_up = np.minimum(self._order, count - 1)
    arrays = [x[fill_up] for x in rows]
    arrays[3] = np.where((self._order < count)[:, None], arrays[3], True)
    *arrays, ids, numbers = shard_rows(mesh, tuple(arrays))
    keys = row_keys(key, ids, numbers)
    self._state = begin_rows(lm, params, *arrays, keys, cfg, self._slots)
    self.shape = (size * processes, self._slots, rows.prompt.shape[1])
    self._began, self._seen = 0, self._order >= count

  def __iter__(self) -> Iterator[Made]:
    """Yields the rows of each round; the devices have the next one to do meanwhile."""
    queued = collections.deque(self.go_on() for _ in range(min(ROUNDS_QUEUED, self.rounds)))
    while queued:
      made = self.made(queued.popleft())
      if self._began < self.rounds:
        queued.append(self.go_on())
      yield made

  def go_on(self) -> Any:
    """Gives the devices another round to do; returns what `made` takes. Does not wait."""
    self._began += 1
    until = np.int32(self._began * self._slots)
    self._state, out = sample_more(self._lm, self._params, self._state, self._cfg, until)
    return out

  def made(self, round_: Any) -> Made:
    """The rows that a round finished, those of every round once. Waits for it."""
    *arrays, done = local_rows(round_)
    new = np.flatnonzero(done & ~self._seen)
    self._seen[new] = True
    rows = self._order[new]
    back = np.argsort(rows)
    return Made(rows[back], *(x[new[back]] for x in arrays))


def dealt(work: np.ndarray, shards: int) -> np.ndarray:
  """An order of rows in which each of so many equal parts has about the same work, most first.

  Example: `dealt([1, 4, 3, 2], 2).tolist() == [1, 0, 2, 3]`: 4 + 1 and 3 + 2.
  """
  order = np.argsort(-np.asarray(work), kind="stable").reshape(-1, shards)
  order[1::2] = order[1::2, ::-1]  # there and back again
  return order.T.reshape(-1)


@functools.partial(jax.jit, static_argnames=("lm", "cfg", "slots"))
def begin_rows(lm, params, prompt, prompt_valid, canvas, hinted, keys, cfg, slots):
  """`sampler.begin` for rows as `sample_rows` takes them."""
  return begin(lm, params, _canvas(prompt, prompt_valid, canvas, hinted), keys, cfg, slots)


@functools.partial(jax.jit, static_argnames=("lm", "cfg"), donate_argnames=("state",))
def sample_more(lm: LM, params: Params, state, cfg: SamplerConfig, until: Array | int):
  """Works at a queue's rows until so many were done: (state, what `RowQueue.made` reads)."""
  state = fill(lm, params, state, cfg, until)
  out = results(state)
  of_canvas = (out.tokens, out.commit_step, out.commit_logp)
  completions = (x[:, -cfg.gen_length :] for x in of_canvas)
  return state, (*completions, out.finite, flat(state.queue.done))


@jax.jit
def row_keys(key: Array, prompt_ids: Array, numbers: Array) -> Array:
  """One PRNG key per completion, from (step key, prompt id, index of the completion in its group).

  Args:
    key: of the step.
    prompt_ids: u32[B].
    numbers: i32[B].

  Returns:
    key[B].
  """
  return jax.vmap(jax.random.fold_in)(prompt_keys(key, prompt_ids), numbers)


@jax.jit
def prompt_keys(key: Array, prompt_ids: Array) -> Array:
  """key[P] from a step's key and u32[P] identities: noise follows the prompt, not its place."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
