"""Groups of completions: sampled on the devices, while the host decodes and grades.

Prompts are sorted by length and cut into slices, each padded only as far as it needs. So one long
prompt does not make every row long. The rows of all slices of one padded length wait in one queue.
The devices work at as many rows at a time as a slice has, each at its own pace, and rows come back
in rounds. Two rounds are started ahead: while the devices sample, the host decodes what came back
before and hands it to the graders. Slices have a few sizes and lengths, so that few programs are
compiled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptBatch
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.diffusion.completions import ROUNDS_QUEUED, RowQueue, Rows
from igpo_jax.parallel.mesh import check_sample_slices, over_processes
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rewards.score import PendingScores, Scorer, Scores
from igpo_jax.types import LM, Array, Params


@dataclasses.dataclass
class Samples:
  """Sampled and graded groups of completions, for this process's prompts. Arrays are numpy.

  Attributes:
    completion: i32[P,G,L], token ids.
    commit_step: i32[P,G,L], see `Denoised`.
    commit_logp: f32[P,G,L], see `Denoised`.
    hinted: bool[P,G,L], True where a token was a hint.
    finite: bool[P,G], whether all logits that a completion was sampled from were numbers.
    texts: the decoded completions; like the other lists P lists of G.
    reward: f32[P,G].
    correct: bool[P,G].
    status: "ok", "unparseable" or "timeout".
    extracted: the answer that the verifier found; None if it found none.
    reason: why the verdict is what it is, in words.
    parts: {name: value} of the parts of the reward, before their weights.
  """

  completion: np.ndarray
  commit_step: np.ndarray
  commit_logp: np.ndarray
  hinted: np.ndarray
  finite: np.ndarray
  texts: list[list[str]]
  reward: np.ndarray
  correct: np.ndarray
  status: list[list[str]]
  extracted: list[list[str | None]]
  reason: list[list[str]]
  parts: list[list[dict[str, float]]]

  ARRAYS = ("completion", "commit_step", "commit_logp", "hinted", "finite", "reward", "correct")
  LISTS = ("texts", "status", "extracted", "reason", "parts")

  def copy(self) -> Samples:
    """A copy that `put` may change."""
    copies: dict[str, Any] = {name: getattr(self, name).copy() for name in self.ARRAYS}
    copies |= {name: [list(group) for group in getattr(self, name)] for name in self.LISTS}
    return Samples(**copies)

  def put(self, group: int, row: int, other: Samples, other_group: int, other_row: int) -> None:
    """Replaces completion `row` of group `group` by a completion of `other`."""
    for name in self.ARRAYS:
      getattr(self, name)[group, row] = getattr(other, name)[other_group, other_row]
    for name in self.LISTS:
      getattr(self, name)[group][row] = getattr(other, name)[other_group][other_row]

  def take(self, groups: np.ndarray) -> Samples:
    """The groups with indices `groups` i[X], in this order."""
    taken: dict[str, Any] = {name: getattr(self, name)[groups] for name in self.ARRAYS}
    taken |= {name: [getattr(self, name)[k] for k in groups] for name in self.LISTS}
    return Samples(**taken)

  @staticmethod
  def join(parts: Sequence[Samples]) -> Samples:
    """All groups of all parts, in order."""
    joined: dict[str, Any] = {
      name: np.concatenate([getattr(part, name) for part in parts]) for name in Samples.ARRAYS
    }
    joined |= {
      name: [group for part in parts for group in getattr(part, name)] for name in Samples.LISTS
    }
    return Samples(**joined)


class DeviceClock:
  """Measures how long the devices wait for this host.

  `program`, `sampling` and `sampled` do nothing here. A subclass learns from them how far a step is
  (`train.progress.StepProgress`).

  Attributes:
    idle_seconds: seconds in which no program was queued.
    positions: positions that the network computed for all rows that were sampled, over all
      processes.
  """

  def __init__(self):
    self.idle_seconds = self.positions = 0.0
    self._idle_since: float | None = time.perf_counter()

  def dispatched(self) -> None:
    """A program was queued."""
    if self._idle_since is not None:
      self.idle_seconds += time.perf_counter() - self._idle_since
      self._idle_since = None

  def drained(self) -> None:
    """The last queued program's results have arrived."""
    self._idle_since = time.perf_counter()

  def program(self, name: str, shape: tuple[int, ...]) -> contextlib.AbstractContextManager:
    """A context for a call of a jitted program. With a new shape the call compiles the program."""
    del name, shape
    return contextlib.nullcontext()

  def sampling(self, rows: int) -> None:
    """`rows` rows are going to be sampled, over all processes."""

  def sampled(self, commit_step: np.ndarray, prompt_length: int) -> None:
    """Some rows have come back. It may raise, to end the step, if it does so on every process.

    Args:
      commit_step: i32[B,L], of this process's rows.
      prompt_length: positions of the padded prompts.
    """


def group_buckets(prompts: int, multiple: int) -> list[int]:
  """The sizes that a number of groups is padded to. They are few, so that few programs compile.

  Args:
    prompts: the largest number of groups.
    multiple: all sizes but the largest are multiples of this number.

  Returns:
    Growing sizes, each twice the one before; the last is `prompts`.

  Example: group_buckets(8, 1) == [1, 2, 4, 8]; group_buckets(8, 4) == [4, 8].
  """
  buckets, size = [], multiple
  while size < prompts:
    buckets.append(size)
    size *= 2
  return [*buckets, prompts]


class Cut(NamedTuple):
  """One slice: the groups begin .. end - 1, longest prompts first, padded to `positions`."""

  begin: int
  end: int
  positions: int


def cut_by_length(
  lengths: Sequence[int], size: int, buckets: Sequence[int], completion: int = 0
) -> list[Cut]:
  """Cuts groups into slices of `size` and one smaller slice for the rest.

  Each slice is padded to the smallest bucket that holds its longest prompt. The smaller
  slice takes the place in the order where it saves most: first, if a few prompts are much
  longer than all others, else last.

  Example: `cut_by_length([90, 12, 11, 10, 9], 4, (16, 128)) == [Cut(0, 1, 128), Cut(1, 5, 16)]`.

  Args:
    lengths: tokens of each group's prompt, in falling order.
    size: number of groups of a full slice.
    buckets: growing lengths; the last one holds every prompt.
    completion: number of positions that a row has in addition to its prompt.
  """
  full, rest = divmod(len(lengths), size)

  def with_rest_at(place: int) -> list[Cut]:
    sizes = [size] * full
    sizes[place:place] = [rest] if rest else []
    ends = list(itertools.accumulate(sizes))
    begins = [end - n for end, n in zip(ends, sizes, strict=True)]
    fits = lambda length: next(bucket for bucket in buckets if bucket >= length)
    return [Cut(a, b, fits(lengths[a])) for a, b in zip(begins, ends, strict=True)]

  work = lambda cuts: sum((cut.end - cut.begin) * (cut.positions + completion) for cut in cuts)
  return min((with_rest_at(place) for place in range(full, -1, -1)), key=work)


def one_for_each_length(cuts: Sequence[Cut]) -> list[Cut]:
  """Joins neighboring slices that are padded to the same length."""
  out: list[Cut] = []
  for cut in cuts:
    if out and out[-1].positions == cut.positions:
      out[-1] = Cut(out[-1].begin, cut.end, cut.positions)
    else:
      out.append(cut)
  return out


class GroupSampler:
  """Samples and grades groups, a slice of prompts at a time.

  Completions depend neither on the slices nor on their order, except with
  `sampler.early_stop="batch"` (official code), which looks at all rows of a slice.

  Args:
    lm: the model.
    tokenizer: its tokenizer.
    scorer: grades completions.
    config: the whole config.
    mesh: the device mesh.

  Attributes:
    slice_size: number of this process's prompts in a full slice.
    buckets: sizes that the last slice may have, growing up to `slice_size`.

  Raises:
    UserError: the slices do not divide over the devices.
  """

  def __init__(self, lm: LM, tokenizer: Tokenizer, scorer: Scorer, config: Config, mesh):
    self.lm, self.tokenizer, self.scorer, self.mesh = lm, tokenizer, scorer, mesh
    self.sampler_config, self.group_size = config.sampler, config.rl.group_size
    self.prompt_buckets = config.data.prompt_buckets
    ways, processes = num_shards("act_batch", mesh=mesh), jax.process_count()
    prompts, slices = config.rl.prompts_per_step, config.rl.sample_slices
    check_sample_slices(mesh, prompts, self.group_size, slices, processes)
    self.slice_size = prompts // slices // processes
    # The smallest bucket has a row for every device.
    rows = processes * self.group_size
    self.buckets = group_buckets(self.slice_size, ways // math.gcd(ways, rows))

  def padded(self, groups: int) -> int:
    """The number of groups to sample if `groups` are wanted: the last slice is padded."""
    full = groups // self.slice_size * self.slice_size
    rest = groups - full
    return full + next(b for b in self.buckets if b >= rest) if rest else full

  def cuts(self, batch: PromptBatch, groups, hinted) -> tuple[np.ndarray, list[Cut]]:
    """Sorts groups by length and cuts them into slices. A collective.

    The slices are the same on every process: they follow from the longest prompt that any process
    has at each place of the order. Arguments as `__call__`.

    Returns:
      (i64[X], the order in which `groups` are sampled; the slices in this order).
    """
    lengths = batch.valid.sum(axis=1)[groups]
    # A group without masks is not sampled, so its prompt need not fit.
    lengths = np.where(hinted.all(axis=(1, 2)), 0, lengths)
    order = np.argsort(-lengths, kind="stable")
    longest = over_processes(lengths[order], np.max)
    width = batch.tokens.shape[1]
    buckets = [*(b for b in self.prompt_buckets if b < width), width]
    length = hinted.shape[-1]
    return order, cut_by_length(longest.tolist(), self.slice_size, buckets, length)

  def __call__(
    self, params: Params, batch: PromptBatch, groups, canvas, hinted, key: Array, clock: DeviceClock
  ) -> Samples:
    """Samples, decodes and grades groups. Every process has to call it at the same time.

    Args:
      params: the policy's parameters, in the dtype of the computation.
      batch: this process's prompts.
      groups: i[X], indices of prompts of the batch; X is a result of `padded`, and the same on
        every process.
      canvas: i32[X,G,L], masks, and hints where `hinted` is True.
      hinted: bool[X,G,L], positions that are never changed.
      key: the step's PRNG key.
      clock: is told when the devices get work, and when they have none left.

    Returns:
      [X,G,...], in the order of `groups`.
    """
    order, cuts = self.cuts(batch, groups, hinted)
    if self.sampler_config.early_stop != "batch":  # that rule needs the slices as they are
      cuts = one_for_each_length(cuts)
    rows = len(groups) * self.group_size
    clock.sampling(rows * jax.process_count())
    graded: list[tuple[np.ndarray, PendingScores]] = []
    texts = [""] * rows
    arrays: dict[str, np.ndarray] = {}

    def rounds():
      """Yields rounds, each of which it starts on the devices when it is asked for it."""
      for cut in cuts:
        part = order[cut.begin : cut.end]
        queue = self._queue(
          params, batch, groups[part], cut.positions, canvas[part], hinted[part], key
        )
        for _ in range(queue.rounds):
          with clock.program("rollout", queue.shape):
            begun = queue.go_on()
          clock.dispatched()
          yield part, cut.positions, queue, begun

    left = rounds()
    begun = collections.deque(itertools.islice(left, ROUNDS_QUEUED))
    while begun:
      part, positions, queue, round_ = begun.popleft()
      before, made = queue.counts.positions, queue.made(round_)
      clock.positions += queue.counts.positions - before
      clock.sampled(made.commit_step, positions)
      begun.extend(itertools.islice(left, 1))
      if not begun:
        clock.drained()
      group, number = np.divmod(made.rows, self.group_size)
      at = part[group] * self.group_size + number  # indices among all rows that were asked for
      for name, x in zip(made._fields[1:], made[1:], strict=True):
        arrays.setdefault(name, np.zeros((rows, *x.shape[1:]), x.dtype))[at] = x
      said = [self.tokenizer.decode(row) for row in made.completion]
      for k, text in zip(at, said, strict=True):
        texts[k] = text
      records = [batch.records[groups[k // self.group_size]] for k in at]
      graded.append((at, self.scorer.submit(said, records)))
    return self._samples(hinted, arrays, texts, graded)

  def _queue(self, params, batch: PromptBatch, groups, positions: int, canvas, hinted, key):
    """A queue of the rows of groups i[X] of the batch, with prompts padded to `positions`."""
    rows = np.repeat(groups, self.group_size)
    begin = batch.tokens.shape[1] - positions
    flat = lambda x: x.reshape(-1, x.shape[-1])
    numbers = np.tile(np.arange(self.group_size), len(groups))
    of_queue = Rows(
      batch.tokens[rows, begin:], batch.valid[rows, begin:], flat(canvas), flat(hinted),
      batch.row_id[rows], numbers,
    )  # fmt: skip
    slots = self.slice_size * self.group_size * jax.process_count()
    return RowQueue(self.lm, params, self.mesh, self.sampler_config, of_queue, key, slots)

  def _samples(self, hinted, arrays, texts, graded) -> Samples:
    shape = hinted.shape[:2]
    reward, correct = np.zeros(len(texts), np.float32), np.zeros(len(texts), bool)
    of_rows: dict[str, list] = {
      name: [None] * len(texts) for name in ("status", "extracted", "reason", "parts")
    }
    for at, pending in graded:
      scores: Scores = pending.result()
      reward[at], correct[at] = scores.reward, scores.correct
      for i, k in enumerate(at):
        of_rows["status"][k] = scores.status[i]
        of_rows["extracted"][k] = scores.extracted[i]
        of_rows["reason"][k] = scores.reason[i] if scores.reason else ""
        of_rows["parts"][k] = {name: float(x[i]) for name, x in scores.parts.items()}
    in_groups = lambda items: [
      list(items[i * shape[1] : (i + 1) * shape[1]]) for i in range(shape[0])
    ]
    return Samples(
      **{name: x.reshape(*shape, *x.shape[1:]) for name, x in arrays.items()},
      hinted=np.array(hinted),
      texts=in_groups(texts),
      reward=reward.reshape(shape),
      correct=correct.reshape(shape),
      status=in_groups(of_rows["status"]),
      extracted=in_groups(of_rows["extracted"]),
      reason=in_groups(of_rows["reason"]),
      parts=in_groups(of_rows["parts"]),
    )
