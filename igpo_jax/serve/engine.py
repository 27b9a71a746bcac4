"""Rows of all requests through the slots of one model, in a thread of its own.

Rows with equal options and equally long prompts go through one compiled program together. The
oldest waiting row decides whose turn it is. A turn takes all rows of its shape that wait when it
begins, and those that come later as long as no row of another shape waits: no row waits for ever.
Between two slices of a few network calls rows are put into free slots, and given up ones leave.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.arrivals import Arrivals, advance, empty_places
from igpo_jax.diffusion.sampler import NOT_A_NUMBER
from igpo_jax.errors import UserError
from igpo_jax.inference.session import Session
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.serve.refusal import Refusal

CALLS = 4  # network calls of a slice
PROGRAMS = 16  # compiled programs that are kept


class Update(NamedTuple):
  """A row as it is now: completion and commit steps, i32[L], and whether it is done."""

  tokens: np.ndarray
  commit_step: np.ndarray
  done: bool


@dataclasses.dataclass(eq=False)
class Row:
  """One answer to be made.

  Attributes:
    prompt, prompt_valid, canvas, hinted: a row of each array of `inference.requests.batch_arrays`.
    sampler: the options; L is its `gen_length`.
    seed, number: its noise is that of row `number` of `igpo_jax.generate --seed=SEED`.
    deliver: called with an `Update`, or with the exception instead of an answer, from another
      thread.
    watched: whether updates are wanted before the row is done.
    given_up: set by `Engine.give_up`.
  """

  prompt: np.ndarray
  prompt_valid: np.ndarray
  canvas: np.ndarray
  hinted: np.ndarray
  sampler: SamplerConfig
  seed: int
  number: int
  deliver: Callable[[Update | Exception], None]
  watched: bool = False
  given_up: bool = False

  @property
  def shape(self) -> tuple[SamplerConfig, int]:
    """What rows of one program have in common: the options, and the padded length of the prompt."""
    return self.sampler, len(self.prompt)


class Engine:
  """Answers rows.

  Args:
    session: the model.
    slots: rows that are worked at, at a time; rounded up to a multiple of the devices.
    most_waiting: rows that may wait at a time.
  """

  def __init__(self, session: Session, slots: int, most_waiting: int):
    self._session, self._slots, self._most = session, slots, most_waiting
    self._changed = threading.Condition()
    self._waiting: collections.deque[Row] = collections.deque()
    self._at_work: list[Row] = []
    self._closed, self._done = False, 0
    self._known: set[tuple[SamplerConfig, int]] = set()
    self._thread = threading.Thread(target=self._run, daemon=True, name="engine")

  def start(self) -> None:
    """Begins to work."""
    self._thread.start()

  def counts(self) -> dict[str, int]:
    """Numbers of slots, and of rows at work, waiting, and done since the beginning."""
    with self._changed:
      waiting, at_work, done = len(self._waiting), len(self._at_work), self._done
    return {"slots": self._slots, "working": at_work, "waiting": waiting, "done": done}

  def submit(self, rows: Sequence[Row]) -> None:
    """Queues rows: all or none.

    Raises:
      Refusal: too many wait already, or the engine is closed.
    """
    with self._changed:
      if self._closed:
        raise Refusal(503, "the server is about to end", code="shutting_down")
      if len(self._waiting) + len(rows) > self._most:
        raise Refusal(
          429, f"{len(self._waiting)} answers wait already, of {self._most} at most: try again "
          "later", code="queue_full",
        )  # fmt: skip
      self._waiting.extend(rows)
      self._changed.notify()

  def give_up(self, rows: Sequence[Row]) -> None:
    """Rows that nobody waits for any more: they leave the queue now, a slot after its slice."""
    with self._changed:
      for row in rows:
        row.given_up = True
      if any(row in self._waiting for row in rows):
        self._waiting = collections.deque(row for row in self._waiting if not row.given_up)

  def close(self) -> None:
    """Takes no more rows. Those that wait are refused, those at work are finished."""
    with self._changed:
      self._closed = True
      refused, self._waiting = list(self._waiting), collections.deque()
      self._changed.notify()
    for row in refused:
      row.deliver(Refusal(503, "the server is about to end", code="shutting_down"))

  def join(self, seconds: float) -> bool:
    """Whether the thread ended within so many seconds; call `close` before."""
    self._thread.join(seconds)
    return not self._thread.is_alive()

  def _run(self) -> None:
    with self._session.loaded() as pre:
      shards = num_shards("act_batch")
      self._slots = -(-self._slots // shards) * shards
      while True:
        with self._changed:
          self._changed.wait_for(lambda: self._waiting or self._closed)
          if not self._waiting:
            return
          shape = self._waiting[0].shape
        try:
          self._turn(pre, shape)
        except Exception as error:
          # Such as a device that is out of memory: these rows have no answer, others may have.
          self._fail(error)

  def _fail(self, error: Exception) -> None:
    told = Refusal(500, f"no answer: {type(error).__name__}: {str(error)[:300]}")
    if isinstance(error, UserError):
      told = Refusal(500, str(error))
    else:
      traceback.print_exception(error)
    with self._changed:
      rows, self._at_work = self._at_work, []
    for row in rows:
      row.deliver(told)

  def _turn(self, pre: Any, shape: tuple[SamplerConfig, int]) -> None:
    """Answers rows of one shape until none is at work and others may go on."""
    sampler, width = shape
    if shape not in self._known and len(self._known) >= PROGRAMS:
      advance.clear_cache()
      empty_places.clear_cache()
      self._known.clear()
    self._known.add(shape)
    places: list[Row | None] = [None] * self._slots
    with self._changed:
      share = sum(row.shape == shape for row in self._waiting)
    state = None
    while True:
      arrivals = _no_arrivals(pre, self._slots, width + sampler.gen_length)
      share -= self._exchange(places, shape, share, arrivals, pre)
      if not any(places):
        return
      if state is None:
        state = empty_places(pre.lm, pre.params, sampler, self._slots, width + sampler.gen_length)
      state, progress = advance(pre.lm, pre.params, state, sampler, arrivals, np.int32(CALLS))
      tokens, steps, done, finite = jax.device_get(progress)
      for place, row in enumerate(places):
        if row is None or not (done[place] or row.watched):
          continue
        if done[place]:
          places[place] = None
          with self._changed:
            self._at_work.remove(row)
            self._done += 1
        if row.given_up:
          continue
        if done[place] and not finite[place]:
          row.deliver(Refusal(500, NOT_A_NUMBER, code="not_finite"))
        else:
          row.deliver(Update(tokens[place], steps[place], bool(done[place])))

  def _exchange(
    self, places: list[Row | None], shape: Any, share: int, arrivals: Arrivals, pre: Any
  ) -> int:
    """Frees the places of rows that were given up, and puts waiting rows into free places.

    Returns how many rows it put there.
    """
    with self._changed:
      for place, row in enumerate(places):
        if row is not None and row.given_up:
          arrivals.gone[place], places[place] = True, None
          self._at_work.remove(row)
      kept: collections.deque[Row] = collections.deque()
      others = any(row.shape != shape for row in self._waiting)
      free = [place for place, row in enumerate(places) if row is None]
      if others:
        free = free[: max(0, share)]
      taken = []
      for row in self._waiting:
        if row.shape == shape and len(taken) < len(free):
          taken.append(row)
        else:
          kept.append(row)
      self._waiting = kept
      self._at_work.extend(taken)
    for place, row in zip(free, taken, strict=False):
      places[place] = row
      _put(arrivals, place, row)
    return len(taken)


def _no_arrivals(pre: Any, places: int, length: int) -> Arrivals:
  shape = places, length
  return Arrivals(
    np.full(shape, pre.tokenizer.pad_id, np.int32),
    np.ones(shape, bool),
    np.ones(shape, bool),
    np.zeros(places, np.uint32),
    np.zeros(places, np.int32),
    np.zeros(places, bool),
    np.zeros(places, bool),
  )


def _put(arrivals: Arrivals, place: int, row: Row) -> None:
  """Writes a row into the arrays of a free place, where all is valid and fixed."""
  width = len(row.prompt)
  arrivals.tokens[place] = np.concatenate([row.prompt, row.canvas])
  arrivals.valid[place, :width], arrivals.fixed[place, width:] = row.prompt_valid, row.hinted
  arrivals.seeds[place], arrivals.numbers[place], arrivals.new[place] = row.seed, row.number, True
