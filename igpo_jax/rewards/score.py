"""From completions to rewards: a verifier's verdict and weighted reward parts."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from igpo_jax.cli import UserError
from igpo_jax.data.records import Record
from igpo_jax.rewards import answers, equivalence
from igpo_jax.rewards.pool import Pool

CACHE_SIZE = 65536  # verdicts of distinct (gold, answer) pairs that are remembered


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a verifier says of one completion.

  Attributes:
    correct: the completion's answer equals the gold answer.
    extracted: the answer as found in the completion; None where there is none.
    status: "ok", "unparseable" (no answer, or one that cannot be read) or "timeout"
      (reading or comparing it ran over the limit of time or memory). Only "ok" can
      be correct.
  """

  correct: bool
  extracted: str | None
  status: str


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of B completions, in the order they were given.

  Attributes:
    reward: f32[B], the weighted sum of the parts.
    correct: bool[B], the verifier's verdict only, never the shaped reward.
    status: B of "ok", "unparseable", "timeout".
    extracted: B extracted answers, None where there is none.
    parts: name -> f32[B], each part before its weight.
  """

  reward: np.ndarray
  correct: np.ndarray
  status: list[str]
  extracted: list[str | None]
  parts: dict[str, np.ndarray]


Verifier = Callable[[str, Record], Verdict]
RewardFn = Callable[[str, Record, Verdict], float]

_VERIFIERS: dict[str, Verifier] = {}
_REWARDS: dict[str, RewardFn] = {}


def register_verifier(name: str) -> Callable[[Verifier], Verifier]:
  """Registers `fn(completion, record) -> Verdict` under `name`, as a decorator."""

  def decorate(fn: Verifier) -> Verifier:
    if name == "math" or name in _VERIFIERS:
      raise ValueError(f"verifier {name!r} is already registered")
    _VERIFIERS[name] = fn
    return fn

  return decorate


def register_reward(name: str) -> Callable[[RewardFn], RewardFn]:
  """Registers `fn(completion, record, verdict) -> float` under `name`, as a decorator."""

  def decorate(fn: RewardFn) -> RewardFn:
    if name in _REWARDS:
      raise ValueError(f"reward part {name!r} is already registered")
    _REWARDS[name] = fn
    return fn

  return decorate


class PendingScores:
  """Scores under way; `result()` waits for the workers."""

  def __init__(self, finish: Callable[[], Scores]):
    self._finish = finish
    self._scores: Scores | None = None

  def result(self) -> Scores:
    """The scores; may be called more than once."""
    if self._scores is None:
      self._scores = self._finish()
    return self._scores


class Scorer:
  """Verifies completions and sums the reward parts.

  Args:
    verifier: "math" (mathematical equality of the final answer, in worker
      processes), "exact", "countdown", "sudoku", or a registered name.
    parts: part name -> weight. "correct" is 1.0 for a correct completion.
    workers: worker processes of the "math" verifier; None: one per core.
    timeout: seconds that one item may take in a worker.

  Raises:
    UserError: an unknown verifier or part.
  """

  def __init__(self, verifier: str = "math", parts: Mapping[str, float] | None = None,
               workers: int | None = None, timeout: float = 5.0):
    if verifier != "math" and verifier not in _VERIFIERS:
      known = ", ".join(sorted([*_VERIFIERS, "math"]))
      raise UserError(f"rewards: no verifier {verifier!r}; known: {known}")
    self._parts = dict(parts or {"correct": 1.0})
    for name in self._parts:
      if name not in _REWARDS:
        raise UserError(f"rewards: no part {name!r}; known: {', '.join(sorted(_REWARDS))}")
    self._verifier = verifier
    self._pool = Pool(workers, timeout) if verifier == "math" else None
    self._cache: collections.OrderedDict[tuple[str, str], tuple[str, bool]] = (
        collections.OrderedDict())

  def __call__(self, completions: Sequence[str], records: Sequence[Record]) -> Scores:
    """Scores `completions[i]` against `records[i]`; waits for all of them."""
    return self.submit(completions, records).result()

  def submit(self, completions: Sequence[str], records: Sequence[Record]) -> PendingScores:
    """Starts scoring in the workers and returns at once."""
    if len(completions) != len(records):
      raise ValueError(f"{len(completions)} completions for {len(records)} records")
    completions, records = list(completions), list(records)
    if self._pool is None:
      verify = _VERIFIERS[self._verifier]
      return PendingScores(lambda: self._score(
          completions, records, [verify(c, r) for c, r in zip(completions, records)]))
    waiting: dict[tuple[str, str], concurrent.futures.Future] = {}
    rows = []
    for completion, record in zip(completions, records):
      extracted = answers.extract_boxed(answers.truncate(completion))
      key = (record.answer, extracted or "")
      rows.append((extracted, key))
      if not extracted or key in self._cache or key in waiting:
        continue
      quick = equivalence.quick(*key)
      if quick is None:
        waiting[key] = self._pool.submit(*key)
      else:
        self._remember(key, ("ok", quick))

    def finish() -> Scores:
      late = {key: future.result() for key, future in waiting.items()}
      verdicts = []
      for extracted, key in rows:
        status, correct = late.get(key) or self._cache.get(key) or ("unparseable", False)
        verdicts.append(Verdict(correct, extracted, status))
      for key, outcome in late.items():
        if outcome[0] != "timeout":  # may be the machine's fault: worth another try
          self._remember(key, outcome)
      return self._score(completions, records, verdicts)

    return PendingScores(finish)

  def _remember(self, key: tuple[str, str], outcome: tuple[str, bool]) -> None:
    self._cache[key] = outcome
    if len(self._cache) > CACHE_SIZE:
      self._cache.popitem(last=False)

  def _score(self, completions: list[str], records: list[Record],
             verdicts: list[Verdict]) -> Scores:
    parts = {
        name: np.array([_REWARDS[name](*row) for row in zip(completions, records, verdicts)],
                       np.float32)
        for name in self._parts}
    reward = np.zeros(len(verdicts), np.float32)
    for name, weight in self._parts.items():
      reward += np.float32(weight) * parts[name]
    return Scores(reward, np.array([v.correct for v in verdicts], bool),
                  [v.status for v in verdicts], [v.extracted for v in verdicts], parts)

  def close(self) -> None:
    """Ends the worker processes; the scorer is of no use afterwards."""
    if self._pool is not None:
      self._pool.close()

  def __enter__(self) -> Scorer:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


@register_verifier("exact")
def _exact(completion: str, record: Record) -> Verdict:
  extracted = answers.extract_marked(completion)
  status = "ok" if extracted else "unparseable"
  return Verdict(bool(extracted) and extracted == record.answer.strip(), extracted, status)


@register_reward("correct")
def _correct(completion: str, record: Record, verdict: Verdict) -> float:
  del completion, record
  return float(verdict.correct)


@register_reward("boxed")
def _boxed(completion: str, record: Record, verdict: Verdict) -> float:
  del record, verdict
  return float(answers.extract_boxed(answers.truncate(completion)) is not None)
