"""Rows of a prompt followed by a completion: how they are put together, sampled, and given keys.

`sample_rows` completes one batch in one call. `RowQueue` completes any number of rows, a fixed
number at a time, and hands them back as they are done.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator
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

ROUNDS_QUEUED = 2  # two keep the devices busy, and more would only delay a stop on request


def join(prompt: Array, prompt_valid: Array, completion: Array) -> tuple[Array, Array]:
  """Appends completions to prompts.

  Args:
    prompt: i32[B,Tp], left-padded.
    prompt_valid: bool[B,Tp], False on the padding.
    completion: i32[B,L], clean or with masks. All its positions are valid.

  Returns:
    (tokens i32[B,Tp+L], valid bool[B,Tp+L]).
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
) -> tuple[Array, Array, Array, Array]:
  """Denoises one batch of completions.

  Rows do not depend on each other (except with `early_stop="batch"`), so the completions of a
  prompt may lie on several devices.

  Args:
    lm: the model.
    params: its parameters.
    prompt, prompt_valid: i32/bool[B,Tp], left-padded prompts; False on the padding.
    canvas: i32[B,L], masks, and hints where `hinted` is True; L is `cfg.gen_length`.
    hinted: bool[B,L], positions that are never changed.
    keys: key[B], see `row_keys`.
    cfg: see `SamplerConfig`.

  Returns:
    (completion i32[B,L], commit_step i32[B,L], commit_logp f32[B,L], finite bool[B]), see
    `Denoised`.
  """
  out = denoise(lm, params, _canvas(prompt, prompt_valid, canvas, hinted), keys, cfg)
  first = prompt.shape[1]
  of_canvas = (out.tokens, out.commit_step, out.commit_logp)
  tokens, step, logp = (x[:, first:] for x in of_canvas)
  return tokens, step, logp, out.finite


class Rows(NamedTuple):
  """This process's share of the rows that a `RowQueue` completes: numpy arrays.

  Attributes:
    prompt, prompt_valid: i32/bool[B,Tp], left-padded prompts; False on the padding.
    canvas: i32[B,L], masks, and hints where `hinted` is True.
    hinted: bool[B,L], positions that are never changed.
    prompt_ids, numbers: u32[B] and i32[B], the arguments of `row_keys` that give each row its key.
  """

  prompt: np.ndarray
  prompt_valid: np.ndarray
  canvas: np.ndarray
  hinted: np.ndarray
  prompt_ids: np.ndarray
  numbers: np.ndarray


class Made(NamedTuple):
  """The rows of this process that one round of a `RowQueue` finished: numpy arrays.

  `Denoised` describes the last three.

  Attributes:
    rows: i64[X], indices into the `Rows` that the queue was given, ascending.
    completion: i32[X,L], the completed canvases, without the prompts.
    commit_step: i32[X,L].
    commit_logp: f32[X,L].
    finite: bool[X].
  """

  rows: np.ndarray
  completion: np.ndarray
  commit_step: np.ndarray
  commit_logp: np.ndarray
  finite: np.ndarray


class Counts(NamedTuple):
  """What a `RowQueue` has done so far, over all processes. `Denoised` describes each number."""

  worked: int = 0
  room: int = 0
  positions: float = 0.0

  def plus(self, other: Counts) -> Counts:
    """The sums of both."""
    worked, room = self.worked + other.worked, self.room + other.room
    return Counts(worked, room, self.positions + other.positions)


class RowQueue:
  """Completes any number of rows on the devices, `slots` of them at a time.

  Iterate over it to get each row once, as a `Made` for each round. Every process has to do so, for
  the same number of rounds.

  Rows are dealt out to the devices by their number of masks, those with the most first. So the
  devices have about the same work, and no long row begins last.

  Args:
    lm, params: the model.
    mesh: the device mesh.
    cfg: see `SamplerConfig`.
    rows: this process's rows; every process gives the same number. Rows without masks cost nothing.
    key: see `row_keys`.
    slots: how many rows are worked at, at a time, over all processes: a multiple of the number of
      devices that rows are split over. It is lowered where there are fewer rows.
    keys_of: called as `row_keys` in its place, for callers that key their rows in another way.

  Attributes:
    rounds: number of rounds until all rows have come back, the same on every process. After the
      k-th of them at least k * `slots` rows are done, or all.
    shape: (rows, slots, positions of a prompt). A new shape compiles a new program.
    counts: the `Counts` at the end of the round that was waited for last.

  Raises:
    UserError: the sampler's options do not fit the model (`check_sampler`).
  """

  def __init__(
    self,
    lm: LM,
    params: Params,
    mesh,
    cfg: SamplerConfig,
    rows: Rows,
    key: Array,
    slots: int,
    keys_of: Callable[[Array, Array, Array], Array] | None = None,
  ):
    check_sampler(lm.block_length, cfg)
    self._lm, self._params, self._cfg = lm, params, cfg
    shards, processes = num_shards("act_batch", mesh=mesh), jax.process_count()
    count = len(rows.canvas)
    everyone, multiple = count * processes, math.lcm(shards, processes)
    self._slots = min(slots, -(-everyone // multiple) * multiple)
    self.rounds = -(-everyone // self._slots)
    # The number of rows is rounded up to one of a few sizes, so that few programs compile.
    size = self._slots * 2 ** max(0, self.rounds - 1).bit_length() // processes
    work = np.zeros(size, np.int64)
    work[:count] = (~rows.hinted).sum(axis=1)
    self._order = dealt(work, max(1, shards // processes))
    fill_up = np.minimum(self._order, count - 1)
    arrays = [x[fill_up] for x in rows]
    arrays[3] = np.where((self._order < count)[:, None], arrays[3], True)
    *arrays, ids, numbers = shard_rows(mesh, tuple(arrays))
    keys = (keys_of or row_keys)(key, ids, numbers)
    self._state = begin_rows(lm, params, *arrays, keys, cfg, self._slots)
    self.shape = (size * processes, self._slots, rows.prompt.shape[1])
    self._began, self._seen, self.counts = 0, self._order >= count, Counts()

  def __iter__(self) -> Iterator[Made]:
    """Yields the rows of each round, while the devices already work on the next one."""
    queued = collections.deque(self.go_on() for _ in range(min(ROUNDS_QUEUED, self.rounds)))
    while queued:
      made = self.made(queued.popleft())
      if self._began < self.rounds:
        queued.append(self.go_on())
      yield made

  def go_on(self) -> Any:
    """Starts another round on the devices, without waiting; returns the argument for `made`."""
    self._began += 1
    until = np.int32(self._began * self._slots)
    self._state, out = sample_more(self._lm, self._params, self._state, self._cfg, until)
    return out

  def made(self, round_: Any) -> Made:
    """Waits for a round that `go_on` started; returns the rows that no earlier call returned."""
    of_rows, counts = round_
    *arrays, done = local_rows(of_rows)
    self.counts = Counts(*(x.item() for x in map(np.asarray, counts)))
    new = np.flatnonzero(done & ~self._seen)
    self._seen[new] = True
    rows = self._order[new]
    back = np.argsort(rows)
    return Made(rows[back], *(x[new[back]] for x in arrays))


def dealt(work: np.ndarray, shards: int) -> np.ndarray:
  """Orders rows so that `shards` equal parts of the order have about the same work.

  Args:
    work: [N], the work of each row; N is a multiple of `shards`.
    shards: number of parts.

  Returns:
    i64[N], indices of rows: the first N / shards are the first part's, and so on. Within a part the
    rows with the most work come first.

  Example: `dealt([1, 4, 3, 2], 2).tolist() == [1, 0, 2, 3]`: the parts have 4 + 1 and 3 + 2.
  """
  order = np.argsort(-np.asarray(work), kind="stable").reshape(-1, shards)
  order[1::2] = order[1::2, ::-1]  # there and back again
  return order.T.reshape(-1)


@functools.partial(jax.jit, static_argnames=("lm", "cfg", "slots"))
def begin_rows(lm, params, prompt, prompt_valid, canvas, hinted, keys, cfg, slots):
  """The state with which `sample_more` starts; arguments as `sample_rows`, `slots` as `denoise`."""
  return begin(lm, params, _canvas(prompt, prompt_valid, canvas, hinted), keys, cfg, slots)


@functools.partial(jax.jit, static_argnames=("lm", "cfg"), donate_argnames=("state",))
def sample_more(lm: LM, params: Params, state, cfg: SamplerConfig, until: Array | int):
  """Denoises rows until `until` of them are done, see `sampler.fill`. `state` is donated.

  Returns:
    (state, ((completion, commit_step, commit_logp, finite, done), counts)). The former are arrays
    of all N rows of the queue, which are final where done bool[N] is True; counts are `Counts`.
  """
  state = fill(lm, params, state, cfg, until)
  out = results(state)
  of_canvas = (out.tokens, out.commit_step, out.commit_logp)
  completions = (x[:, -cfg.gen_length :] for x in of_canvas)
  counts = tuple(getattr(out, name) for name in Counts._fields)
  return state, ((*completions, out.finite, flat(state.queue.done)), counts)


@jax.jit
def row_keys(key: Array, prompt_ids: Array, numbers: Array) -> Array:
  """One PRNG key per completion, from (step key, prompt id, index of the completion in its group).

  Args:
    key: the step's PRNG key.
    prompt_ids: u32[B], see `data.pipeline.PromptBatch.row_id`.
    numbers: i32[B], index of each completion in its group.

  Returns:
    key[B].
  """
  return jax.vmap(jax.random.fold_in)(prompt_keys(key, prompt_ids), numbers)


@jax.jit
def prompt_keys(key: Array, prompt_ids: Array) -> Array:
  """key[P] from a step's key and prompt ids u32[P].

  A prompt's key does not depend on its place in the batch.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
