"""From records to batches of fixed shapes: deterministic, resumable, split over processes.

The batch of a step is a pure function of (records, seed, step), so a run can resume at any step.
Every process tokenizes all records and computes the order and the padded length of the whole batch,
then builds its own rows only. So processes agree on shapes without communication.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from igpo_jax.data.lengths import Lengths, rounded
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import Offsets, Tokenizer
from igpo_jax.errors import UserError
from igpo_jax.token_ids import check_ids

PROMPT_TOO_LONG = "prompt longer than the longest bucket"
RESPONSE_TOO_LONG = "response too long"
TRACE_TOO_LONG = "trace too long"
EMPTY_TRACE = "empty trace"
NO_SPAN = "answer span unknown"
BROKEN_TEXT = "broken character"


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """The prompts of one step: this process's share, P rows.

  Attributes:
    tokens: i32[P,Tp], left-padded with `pad_id`.
    valid: bool[P,Tp], False on the padding.
    records: the P records.
    traces: P arrays i32[n], the token ids of the traces. Empty for a record without a trace.
    answer_spans: P token ranges [start, end) in `traces`, from the start of the final answer to the
      end of the trace; None where the answer was not found.
    row_id: u32[P], a number made from the record's id and the epoch (`row_identity`). A row's
      random numbers are keyed by it, so that they do not depend on its place in the batch.
    real: bool[P], False on rows that only fill up the last batch of an evaluation.
    tasks: names of the tasks of all records of the stream, the same on every process.
  """

  tokens: np.ndarray
  valid: np.ndarray
  records: list[Record]
  traces: list[np.ndarray]
  answer_spans: list[tuple[int, int] | None]
  row_id: np.ndarray
  real: np.ndarray
  tasks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SFTBatch:
  """Prompts with responses: this process's share, B rows of T = prompt + response positions.

  Attributes:
    tokens: i32[B,T], the prompt left-padded with `pad_id`, then the trace, the end of turn, and
      end-of-text tokens up to the response length.
    valid: bool[B,T], False on the prompt's padding only.
    response: bool[B,T], True on the response including its end-of-text padding. Its sum over a row
      is the response length in the SFT loss (docs/method.md#sft).
    length: i32[B], number of tokens of the trace and the end of turn, without padding.
    row_id: u32[B], as in `PromptBatch`.
  """

  tokens: np.ndarray
  valid: np.ndarray
  response: np.ndarray
  length: np.ndarray
  row_id: np.ndarray

  @property
  def response_length(self) -> int:
    """The number of last columns that are the response; it is the same in every row."""
    return int(self.response[0].sum())


@dataclasses.dataclass(frozen=True)
class _Item:
  record: Record
  prompt: np.ndarray
  trace: np.ndarray
  answer_span: tuple[int, int] | None


def token_span(offsets: Offsets, span: tuple[int, int]) -> tuple[int, int]:
  """The token range [start, end) from the first token of an answer to the end of the text.

  A token that covers the answer's first character belongs to the answer, even if it begins before:
  a hint with it would give away a piece of the answer. Worked example: offsets [(0, 3), (3, 5),
  (5, 6)] and the characters [4, 6) give the tokens (1, 3).

  Args:
    offsets: characters [start, end) of each token of the text.
    span: characters [start, end) of the answer.
  """
  start = next((k for k, (_, end) in enumerate(offsets) if end > span[0]), len(offsets))
  return start, len(offsets)


def row_identity(record_id: str, epoch: int) -> int:
  """A number below 2^32 for a record and an epoch; it is the same on every machine and run."""
  text = record_id if epoch == 0 else f"{record_id}#epoch{epoch}"
  return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "little")


class _Stream:
  """What prompt and SFT streams share: tokenized items, their order, and the processes' shares.

  Attributes:
    prompt_lengths, trace_lengths: lengths in tokens of all records, including those left out.
  """

  def __init__(
    self,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    process_index: int,
    process_count: int,
    embedding_rows: int | None,
  ):
    if not buckets or any(b <= 0 for b in buckets) or list(buckets) != sorted(set(buckets)):
      raise UserError(f"prompt buckets {tuple(buckets)}: give increasing lengths above 0")
    if batch_size <= 0 or batch_size % process_count:
      raise UserError(
        f"a batch of {batch_size} rows cannot be shared by {process_count}"
        f" processes: it should be a multiple of their number"
      )
    self.tokenizer, self.batch_size, self.buckets = tokenizer, batch_size, tuple(buckets)
    self.seed, self.process_index, self.process_count = seed, process_index, process_count
    # Ids need no check if the embedding has a row for every id of the tokenizer.
    self._rows = embedding_rows if (embedding_rows or 0) < tokenizer.vocab_size else None
    self._dropped: collections.Counter[str] = collections.Counter()
    self._notes: collections.Counter[str] = collections.Counter()
    self._items = self._measured(records)
    if not self._items:
      counts = ", ".join(f"{n} x {reason}" for reason, n in self.dropped.items())
      advice = "".join(f"; {text}" for text in self.advice())
      raise UserError(
        f"none of {len(records)} records can be used: {counts or 'there are none'}{advice}"
      )
    self._order = None

  def _measured(self, records: Sequence[Record]) -> list[_Item]:
    """The items that are used. Sets `prompt_lengths` and `trace_lengths`, from all records."""
    kept, prompts, traces = [], [], []
    for item in self._tokenize(records):
      prompts.append(len(item.prompt))
      traces.append(len(item.trace))
      if self._keep(item):
        kept.append(item)
        record = item.record
        if any("\ufffd" in text for text in (record.question, record.trace, record.answer)):
          self._notes[BROKEN_TEXT] += 1
    self.prompt_lengths, self.trace_lengths = Lengths.of(prompts), Lengths.of(traces)
    return kept

  def advice(self) -> list[str]:
    """For each limit that was too short for some records: the longest one, and what would hold all.

    These are lines for the user.
    """
    if not self._dropped[PROMPT_TOO_LONG]:
      return []
    longest = self.prompt_lengths.longest
    return [
      f"longest prompt {longest} tokens, longest bucket {self.buckets[-1]}: a bucket of"
      f" {rounded(longest)} in data.prompt_buckets keeps them all"
    ]

  @property
  def dropped(self) -> dict[str, int]:
    """Reason -> the number of records that were left out for it."""
    return dict(self._dropped)

  @property
  def notes(self) -> dict[str, int]:
    """What a record lacks, such as "empty trace" -> the number of records used all the same."""
    return dict(self._notes)

  def __len__(self) -> int:
    """The number of records that are used."""
    return len(self._items)

  @property
  def ids(self) -> list[str]:
    """The ids of the records that are used, in their order."""
    return [item.record.id for item in self._items]

  @property
  def local_batch_size(self) -> int:
    """The number of rows of a batch that this process has."""
    return self.batch_size // self.process_count

  def _tokenize(self, records: Sequence[Record], chunk: int = 1024) -> Iterator[_Item]:
    ids: set[str] = set()
    for first in range(0, len(records), chunk):
      part = records[first : first + chunk]
      traces = self.tokenizer.encode_batch_with_offsets([r.trace for r in part])
      for record, (trace, offsets) in zip(part, traces, strict=True):
        if record.id in ids:
          raise UserError(
            f"two records have the id {record.id!r}: give each an id of its own, or leave out the "
            "field with the ids, and the rows are numbered"
          )
        ids.add(record.id)
        span = record.answer_span
        prompt = np.asarray(self.tokenizer.encode_prompt(record.prompt), np.int32)
        trace = np.asarray(trace, np.int32)
        if self._rows is not None:
          check_ids(prompt, self._rows, f"the prompt of record {record.id!r}")
          check_ids(trace, self._rows, f"the trace of record {record.id!r}")
        yield _Item(record, prompt, trace, span and token_span(offsets, span))

  def _keep(self, item: _Item) -> bool:
    """Whether the item is used; counts it under its reason if not."""
    if len(item.prompt) > self.buckets[-1]:
      self._dropped[PROMPT_TOO_LONG] += 1
      return False
    return True

  def _global_rows(self, step: int) -> list[tuple[int, int]]:
    """(item, epoch) of every row of the whole batch of a step. Each epoch has its own order."""
    if self._order is None:
      import grain  # it imports jax, which reading this module must not

      indices = grain.MapDataset.range(len(self._items)).seed(self.seed % 2**32)
      self._order = indices.shuffle().repeat()
    first = step * self.batch_size
    return [
      (int(self._order[k]), k // len(self._items)) for k in range(first, first + self.batch_size)
    ]

  def _share(self, rows: list) -> list:
    size = len(rows) // self.process_count
    return rows[self.process_index * size : (self.process_index + 1) * size]

  def _bucket(self, rows: Sequence[tuple[int, int]]) -> int:
    """The smallest bucket that holds the longest prompt of the whole batch."""
    longest = max(len(self._items[i].prompt) for i, _ in rows)
    return next(b for b in self.buckets if b >= longest)

  def _pad_prompts(self, items: Sequence[_Item], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(items), length), self.tokenizer.pad_id, np.int32)
    valid = np.zeros((len(items), length), bool)
    for row, item in enumerate(items):
      tokens[row, length - len(item.prompt) :] = item.prompt
      valid[row, length - len(item.prompt) :] = True
    return tokens, valid


def _row_ids(items: Sequence[_Item], rows: Sequence[tuple[int, int]]) -> np.ndarray:
  return np.array(
    [row_identity(item.record.id, epoch) for item, (_, epoch) in zip(items, rows, strict=True)],
    np.uint32,
  )


class PromptStream(_Stream):
  """Batches of prompts with their traces, for RL and evaluation.

  Args:
    records: the records; no two have the same id.
    tokenizer: encodes prompts in its chat format.
    batch_size: rows of a batch, over all processes.
    buckets: prompt lengths in tokens, increasing. A batch is padded to the smallest that fits.
    seed: decides the order; every epoch is shuffled anew.
    process_index, process_count: this process and the number of processes; it builds its share.
    max_trace: records with a longer trace, in tokens, are left out; None keeps all of them.
      (Exploration cuts a trace to the canvas.)
    embedding_rows: rows of the model's embedding. A token id beyond them is an error. None: they
      are not known, and nothing is checked.

  Raises:
    UserError: no record can be used, two have one id, the batch does not divide over the processes,
      or the model has no embedding for a token.
  """

  def __init__(
    self,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    max_trace: int | None = None,
    embedding_rows: int | None = None,
  ):
    self.max_trace = max_trace
    super().__init__(
      records, tokenizer, batch_size, buckets, seed, process_index, process_count, embedding_rows
    )
    self.tasks = tuple(sorted({item.record.task for item in self._items} - {""}))

  def _keep(self, item: _Item) -> bool:
    keep = super()._keep(item)
    if keep and self.max_trace is not None and len(item.trace) > self.max_trace:
      self._dropped[TRACE_TOO_LONG] += 1
      return False
    if keep and not len(item.trace):
      self._notes[EMPTY_TRACE] += 1
    elif keep and item.answer_span is None:
      self._notes[NO_SPAN] += 1
    return keep

  def batch(self, step: int) -> PromptBatch:
    """This process's rows of the batch of `step`."""
    return self._build(self._global_rows(step), self.batch_size)

  def prompts_digest(self) -> str:
    """A hexadecimal digest of all prompts as the model reads them: their token ids, in order."""
    digest = hashlib.blake2s(digest_size=8)
    for item in self._items:
      digest.update(np.int64(len(item.prompt)).tobytes() + item.prompt.astype(np.int64).tobytes())
    return digest.hexdigest()

  def num_ordered_batches(self) -> int:
    """The number of batches that `ordered_batches` yields."""
    return -(-len(self) // self.batch_size)

  def ordered_batches(self, start: int = 0) -> Iterator[PromptBatch]:
    """Yields every record once, in order, from batch number `start` on.

    The last batch is filled up with the first records; in these rows `real` is False.
    """
    for index in range(start, self.num_ordered_batches()):
      first = index * self.batch_size
      rows = [((first + k) % len(self), 0) for k in range(self.batch_size)]
      yield self._build(rows, min(self.batch_size, len(self) - first))

  def batch_of(self, numbers: Sequence[int], size: int) -> PromptBatch:
    """A batch of the records with these numbers, in this order: this process's share.

    Args:
      numbers: indices of records that are used.
      size: rows over all processes, a multiple of the number of processes. If it is larger than the
        number of records, they are repeated from the first on; in these rows `real` is False.
    """
    rows = [(int(numbers[k % len(numbers)]), 0) for k in range(size)]
    return self._build(rows, len(numbers))

  def buckets_of(self, numbers: Sequence[int]) -> list[int]:
    """The length, in tokens, that the prompt of each of these records is padded to."""
    return [self._bucket([(number, 0)]) for number in numbers]

  def _build(self, rows: list[tuple[int, int]], num_real: int) -> PromptBatch:
    bucket = self._bucket(rows)
    real = self._share([k < num_real for k in range(len(rows))])
    rows = self._share(rows)
    items = [self._items[i] for i, _ in rows]
    tokens, valid = self._pad_prompts(items, bucket)
    return PromptBatch(
      tokens=tokens,
      valid=valid,
      records=[i.record for i in items],
      traces=[i.trace for i in items],
      answer_spans=[i.answer_span for i in items],
      row_id=_row_ids(items, rows),
      real=np.array(real, bool),
      tasks=self.tasks,
    )


class SFTStream(_Stream):
  """Batches of prompts with their traces as responses, for fine-tuning.

  With several response lengths, the rows of every `group_batches` batches are sorted by the length
  they need and cut into batches again, and these batches are shuffled. So short responses are not
  padded to the length of long ones. Every record still comes once per epoch, and the batch of a
  step is still a function of (records, seed, step).

  Args:
    response_length: length of the padded response, in tokens, or several increasing lengths; a
      batch takes the smallest that fits. The token that ends the response counts. A record whose
      trace is empty, or too long for the largest length, is left out and counted.
    group_batches: number of batches that are sorted together.
    records, tokenizer, ...: the other arguments are those of `PromptStream`.
  """

  def __init__(
    self,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    response_length: int | Sequence[int],
    process_index: int = 0,
    process_count: int = 1,
    *,
    group_batches: int = 16,
    embedding_rows: int | None = None,
  ):
    single = isinstance(response_length, int)
    self.response_lengths = (response_length,) if single else tuple(response_length)
    self.group_batches = group_batches
    self._group: tuple[int, list[list[tuple[int, int]]]] = (-1, [])
    super().__init__(
      records, tokenizer, batch_size, buckets, seed, process_index, process_count, embedding_rows
    )

  def num_steps(self, epochs: float) -> int:
    """The number of steps in which every record is seen `epochs` times on average, rounded up."""
    return math.ceil(epochs * len(self) / self.batch_size)

  def _keep(self, item: _Item) -> bool:
    if not super()._keep(item):
      return False
    reason = (
      EMPTY_TRACE
      if not len(item.trace)
      else RESPONSE_TOO_LONG
      if len(item.trace) + 1 > self.response_lengths[-1]
      else None
    )
    if reason:
      self._dropped[reason] += 1
    return reason is None

  def advice(self) -> list[str]:
    if not self._dropped[RESPONSE_TOO_LONG]:
      return super().advice()
    longest = self.trace_lengths.longest + 1
    return [
      *super().advice(),
      f"longest response {longest} tokens with the one that ends it, longest length"
      f" {self.response_lengths[-1]}: {rounded(longest)} in sft.response_lengths (or as"
      " sampler.gen_length) keeps them all",
    ]

  def _padded(self, rows: Sequence[tuple[int, int]]) -> int:
    """The smallest response length that holds every trace of the rows, and its end."""
    longest = max(len(self._items[i].trace) + 1 for i, _ in rows)
    return next(length for length in self.response_lengths if length >= longest)

  def _global_rows(self, step: int) -> list[tuple[int, int]]:
    if len(self.response_lengths) == 1:
      return super()._global_rows(step)
    group, place = divmod(step, self.group_batches)
    if self._group[0] != group:
      self._group = (group, self._grouped(group))
    return self._group[1][place]

  def _grouped(self, group: int) -> list[list[tuple[int, int]]]:
    """The batches of a group: rows sorted by padded length, batches in a random order."""
    steps = range(group * self.group_batches, (group + 1) * self.group_batches)
    rows = [row for step in steps for row in super(SFTStream, self)._global_rows(step)]
    rows.sort(key=lambda row: (self._padded([row]), self._bucket([row])))
    order = np.random.default_rng([self.seed % 2**32, group]).permutation(self.group_batches)
    return [rows[k * self.batch_size : (k + 1) * self.batch_size] for k in order]

  def batch(self, step: int) -> SFTBatch:
    """This process's rows of the batch of `step`."""
    rows = self._global_rows(step)
    bucket, room = self._bucket(rows), self._padded(rows)
    rows = self._share(rows)
    items = [self._items[i] for i, _ in rows]
    prompts, valid = self._pad_prompts(items, bucket)
    responses = np.full((len(items), room), self.tokenizer.eos_id, np.int32)
    length = np.array([len(item.trace) + 1 for item in items], np.int32)
    for row, item in enumerate(items):
      responses[row, : length[row]] = [*item.trace, self.tokenizer.turn_id]
    on_response = np.zeros((len(items), bucket + room), bool)
    on_response[:, bucket:] = True
    return SFTBatch(
      tokens=np.concatenate([prompts, responses], axis=1),
      valid=np.concatenate([valid, np.ones_like(responses, bool)], axis=1),
      response=on_response,
      length=length,
      row_id=_row_ids(items, rows),
    )
