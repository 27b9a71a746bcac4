"""Rewrites the records of a source: each is decided exactly once, and few are in memory.

`concurrency` coroutines each take a record from the source, have its trace rewritten and judged,
and enter the decision into the journal. Only the records at work are in memory, and the ids in the
journal.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.rewrite import trim
from igpo_jax.rewrite.client import ChatClient, Failed, Refused, Reply, Stopped
from igpo_jax.rewrite.journal import Journal
from igpo_jax.rewrite.judge import Judge
from igpo_jax.rewrite.prompts import Attempt, messages

NO_TRACE = "no trace"
NOT_GRADABLE = "gold answer cannot be graded"
REFUSED = "refused by the endpoint"
FAILED = "endpoint failed"


class Writer(Protocol):
  """Writes a concise trace.

  Attributes:
    attempts: how often it is called for one record, at most.
    made_by: a label that every row gets.
  """

  attempts: int
  made_by: str

  async def __call__(self, record: Record, earlier: Sequence[Attempt]) -> Reply: ...


class Rewriter:
  """Asks a language model, and a second time with the reason why the first text was refused."""

  attempts = 2

  def __init__(self, client: ChatClient, max_tokens: int):
    self.client, self.max_tokens = client, max_tokens
    self.made_by = f"rewritten by {client.model}"

  async def __call__(self, record: Record, earlier: Sequence[Attempt]) -> Reply:
    return await self.client.complete(messages(record, self.max_tokens, earlier))


class Trimmer:
  """Removes sentences by rules (`trim`), without a language model."""

  attempts = 1

  def __init__(self, rules: str, count: Callable[[str], int], max_tokens: int):
    self.rules, self.count, self.max_tokens = trim.rules(rules), count, max_tokens
    self.made_by = f"rule-based trim ({rules}), no language model"

  async def __call__(self, record: Record, earlier: Sequence[Attempt]) -> Reply:
    return Reply(self.rules(record.trace, record.answer, self.count, self.max_tokens))


class Engine:
  """Decides every record of a source.

  Args:
    write: writes concise traces.
    judge: accepts or refuses them.
    journal: keeps the decisions.
    concurrency: how many records are worked on at a time.
    max_failures: stop after this many records in a row for which the endpoint failed. They are
      entered only once another record succeeds, so that otherwise a later run tries them again.
    progress: called after each decision.
  """

  def __init__(
    self,
    write: Writer,
    judge: Judge,
    journal: Journal,
    concurrency: int,
    max_failures: int = 10,
    progress: Callable[[], Any] = lambda: None,
  ):
    self.write, self.judge, self.journal = write, judge, journal
    self.concurrency, self.max_failures, self.progress = concurrency, max_failures, progress
    self.stopping = asyncio.Event()
    self._reading = asyncio.Lock()
    self._running: set[str] = set()
    self._failed: list[tuple[dict, list[str], list[Attempt], dict]] = []
    self._error: UserError | None = None
    self._tasks: list[asyncio.Task] = []

  def stop(self) -> None:
    """Takes no further record. Those that are being worked on are finished."""
    self.stopping.set()
    if isinstance(self.write, Rewriter):
      self.write.client.stop.set()

  def cancel(self) -> None:
    """Also drops the records that are being worked on. A later run decides them."""
    self.stop()
    for task in self._tasks:
      task.cancel()

  async def run(self, records: Iterable[Record], limit: int | None = None) -> None:
    """Decides the records of a source that are not in the journal.

    Args:
      records: in any number; they are read as there is room for them.
      limit: look at so many, those decided earlier included.

    Raises:
      UserError: the endpoint, or the source, needs the user; what was decided is kept.
    """
    undecided = self._undecided(itertools.islice(records, limit))
    with concurrent.futures.ThreadPoolExecutor(1, "source") as reader:
      self._tasks = [
        asyncio.create_task(self._work(undecided, reader)) for _ in range(self.concurrency)
      ]
      results = await asyncio.gather(*self._tasks, return_exceptions=True)
    for result in results:
      if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
        raise result
    if self._error:
      raise self._error
    if not self.stopping.is_set():
      self._enter_failed()

  def _undecided(self, records: Iterable[Record]) -> Iterator[Record]:
    for record in records:
      if record.id not in self.journal and record.id not in self._running:
        self._running.add(record.id)
        yield record

  async def _work(self, undecided: Iterator[Record], reader: concurrent.futures.Executor) -> None:
    loop = asyncio.get_running_loop()
    while not self.stopping.is_set():
      try:
        async with self._reading:
          # In a thread: reading a file must not hold up the requests.
          record = await loop.run_in_executor(reader, next, undecided, None)
        if record is None:
          return
        await self._decide(record)
      except Stopped:
        return
      except UserError as error:
        self._fail(error)
      except BaseException:
        self.stop()  # a bug, or a cancellation: the others finish what they have
        raise
      else:
        self._running.discard(record.id)

  def _fail(self, error: UserError) -> None:
    self._error = self._error or error
    self.stop()

  async def _decide(self, record: Record) -> None:
    row = {"id": record.id, "question": record.question, "answer": record.answer,
           "source_tokens": self.judge.count(record.trace)}  # fmt: skip
    row |= {"task": record.task} if record.task else {}
    row |= {"gold": record.gold} if record.gold is not None else {}
    if not record.trace:
      return self._reject(row, [NO_TRACE])
    if not await self.judge.gradable(record):
      return self._reject(row, [NOT_GRADABLE])
    earlier: list[Attempt] = []
    reasons: list[str] = []
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    for attempt in range(1, self.write.attempts + 1):
      try:
        reply = await self.write(record, earlier)
      except Refused as error:
        reasons.append(REFUSED)
        earlier.append(Attempt("", str(error)))
        break
      except Failed as error:
        return self._hold_failed(row, earlier, reasons, str(error), usage)
      self._enter_failed()
      usage["prompt_tokens"] += reply.prompt_tokens
      usage["completion_tokens"] += reply.completion_tokens
      verdict = await self.judge(record, reply.text, reply.cut_off)
      if verdict.reason is None:
        return self._accept(row, reply.text, verdict.tokens, attempt, usage)
      reasons.append(verdict.reason)
      earlier.append(Attempt(reply.text, verdict.complaint))
    return self._reject(row, reasons, earlier, usage)

  def _accept(self, row: dict, text: str, tokens: int, attempts: int, usage: dict) -> None:
    row |= {"trace": text, "tokens": tokens, "made_by": self.write.made_by, "attempts": attempts}
    self.journal.accept(row | ({"usage": usage} if any(usage.values()) else {}))
    self.progress()

  def _reject(
    self, row: dict, reasons: list[str], attempts: Sequence[Attempt] = (), usage: dict | None = None
  ) -> None:
    row |= {"reasons": reasons, "made_by": self.write.made_by}
    row |= {"attempts": [attempt._asdict() for attempt in attempts]}
    self.journal.reject(row | ({"usage": usage} if usage and any(usage.values()) else {}))
    self.progress()

  def _hold_failed(self, row, earlier, reasons, last: str, usage) -> None:
    """Keeps a failed record back until another request shows whether the endpoint works at all."""
    self._failed.append((row, [*reasons, FAILED], [*earlier, Attempt("", last)], usage))
    if len(self._failed) >= self.max_failures:
      self._fail(UserError(
        f"{len(self._failed)} records in a row failed at the endpoint (last: {last}); what was"
        " decided is kept: the same command goes on from here"
      ))  # fmt: skip

  def _enter_failed(self) -> None:
    for failed in self._failed:
      self._reject(*failed)
    self._failed.clear()
