"""From completions to rewards: verdicts of a verifier, and the weighted sum of reward parts."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from igpo_jax.config import RewardConfig
from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers, registry
from igpo_jax.rewards.math import equivalence
from igpo_jax.rewards.math.spelling import MAX_LENGTH
from igpo_jax.rewards.pool import Pool
from igpo_jax.rewards.registry import RewardFn, Verdict, register_reward, register_verifier

__all__ = ["PendingScores", "Scorer", "Scores", "Verdict", "register_reward", "register_verifier"]

CACHE_SIZE = 65536  # number of (gold, answer) pairs whose verdict is remembered


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of B completions, in the order in which the completions were given.

  Attributes:
    reward: f32[B], the weighted sum of the parts.
    correct: bool[B], the verifier's verdict. It does not depend on the reward parts.
    status: B strings, each "ok", "unparseable" or "timeout" (`Verdict`).
    extracted: B extracted answers, None where there is none.
    parts: name -> f32[B], the values of each part before they are weighted.
    reason: B short explanations of the verdicts (`registry.reason_of`); [] if they were not made.
  """

  reward: np.ndarray
  correct: np.ndarray
  status: list[str]
  extracted: list[str | None]
  parts: dict[str, np.ndarray]
  reason: list[str] = dataclasses.field(default_factory=list)


class PendingScores:
  """Scores that are being computed; `result()` waits for them."""

  def __init__(self, finish: Callable[[], Scores]):
    self._finish = finish
    self._scores: Scores | None = None

  def result(self) -> Scores:
    """The scores. Waits for the workers at the first call; later calls return the same scores."""
    if self._scores is None:
      self._scores = self._finish()
    return self._scores


class Scorer:
  """Verifies completions and sums the reward parts.

  Close it after use, or use it in a `with` statement: "math" starts worker processes.

  Args:
    verifier: "math" compares final answers by mathematical equality, in worker processes. Other
      registered names, such as "exact" or "countdown", run in this process. "task" grades each
      record by the verifier of its own task (`registry.verifier_of`).
    parts: name of a reward part -> its weight. Default: "correct" with weight 1, which is 1.0 for
      a correct completion and 0.0 for any other.
    workers: number of worker processes. Default: one per core.
    timeout: seconds that one comparison may take in a worker.
    rules: how "math" finds the answer in a completion, in order of preference (`answers.RULES`).

  Raises:
    UserError: an unknown verifier, part or rule.

  Attributes:
    pool: the worker processes; None for a verifier that runs in this process. With "task" they
      are started when the first record needs them.
  """

  def __init__(
    self,
    verifier: str = "math",
    parts: Mapping[str, float] | None = None,
    workers: int | None = None,
    timeout: float = 5.0,
    rules: tuple[str, ...] = answers.DEFAULT_RULES,
  ):
    if verifier not in (registry.POOLED, registry.BY_TASK):
      registry.verifier(verifier)
    self.verifier = verifier
    weights = dict(parts) if parts is not None else {"correct": 1.0}
    self._parts = {name: (registry.reward(name), weight) for name, weight in weights.items()}
    unknown = [rule for rule in rules if rule not in answers.RULES]
    if unknown:
      raise UserError(
        f"rewards: no extraction rule {unknown[0]!r}; known: {', '.join(answers.RULES)}"
      )
    self._rules = tuple(rules)
    self._workers, self._timeout = workers, timeout
    self.pool: Pool | None = Pool(workers, timeout) if verifier == registry.POOLED else None
    self._cache: collections.OrderedDict[tuple[str, str], tuple[str, bool]] = (
      collections.OrderedDict()
    )

  def __call__(self, completions: Sequence[str], records: Sequence[Record]) -> Scores:
    """Scores `completions[i]` against `records[i]` and waits for the result."""
    return self.submit(completions, records).result()

  def submit(
    self, completions: Sequence[str], records: Sequence[Record], *, parts: bool = True
  ) -> PendingScores:
    """Starts scoring `completions[i]` against `records[i]`; the workers go on in the background.

    Verifiers other than "math" run before this returns.

    Args:
      completions: texts as the model wrote them.
      records: one per completion.
      parts: whether to compute the reward parts. Without them all rewards are 0.

    Raises:
      ValueError: not as many records as completions.
      UserError: with "task", a record without a known task.
    """
    weighted = self._parts if parts else {}
    if len(completions) != len(records):
      raise ValueError(f"{len(completions)} completions for {len(records)} records")
    completions, records = list(completions), list(records)
    waiting: dict[tuple[str, str], concurrent.futures.Future] = {}
    known: dict[tuple[str, str], tuple[str, bool]] = {}  # the cache may forget before `finish`
    rows: list[Verdict | tuple[str | None, tuple[str, str]]] = []
    for completion, record in zip(completions, records, strict=True):
      name = registry.verifier_of(record, self.verifier)
      if name != registry.POOLED:
        rows.append(registry.verifier(name)(completion, record))
        continue
      extracted = answers.find_answer(completion, self._rules)
      key = (record.answer, extracted or "")
      rows.append((extracted, key))
      if not extracted or key in known or key in waiting:
        continue
      outcome = self._cache.get(key) or equivalence.quick(*key)
      if outcome is None:
        waiting[key] = self._compared(key)
      else:
        known[key] = outcome
        self._remember(key, outcome)

    def finish() -> Scores:
      late = {key: future.result() for key, future in waiting.items()}
      verdicts = []
      for row in rows:
        if not isinstance(row, Verdict):
          extracted, key = row
          status, correct = late.get(key) or known.get(key) or ("unparseable", False)
          row = Verdict(correct, extracted, status)
        verdicts.append(row)
      for key, outcome in late.items():
        if outcome[0] != "timeout":  # the machine may have been busy: try again next time
          self._remember(key, outcome)
      return self._score(completions, records, verdicts, weighted)

    return PendingScores(finish)

  def _compared(self, key: tuple[str, str]) -> concurrent.futures.Future:
    """Starts the comparison of (gold, answer) in a worker."""
    if self.pool is None:
      self.pool = Pool(self._workers, self._timeout)
    return self.pool.submit(*key)

  def same_answer(self, first: str, second: str) -> bool:
    """Whether two extracted answers are equal. May wait for a worker.

    "math" compares them by mathematical equality, every other verifier character by character.
    """
    if first.strip() == second.strip():
      return True
    if self.verifier != registry.POOLED:
      return False
    key = (first, second)
    outcome = self._cache.get(key) or equivalence.quick(*key)
    if outcome is None:
      outcome = self._compared(key).result()
    if outcome[0] != "timeout":
      self._remember(key, outcome)
    return outcome[1]

  def equal_themselves(self, golds: Sequence[str]) -> list[bool]:
    """Whether "math" calls each gold answer equal to itself.

    A gold answer that is not equal to itself cannot be read, so no completion can be correct.

    Args:
      golds: gold answers. With "task", only those of records that "math" grades.

    Returns:
      One bool per gold answer. All are True if the scorer has another verifier than "math".
    """
    if self.verifier not in (registry.POOLED, registry.BY_TASK):
      return [True] * len(golds)
    known: dict[str, tuple[str, bool]] = {}
    late = {}
    for gold in set(golds):
      outcome = self._cache.get((gold, gold)) or equivalence.quick(gold, gold)
      if outcome is None:
        late[gold] = self._compared((gold, gold))
      else:
        known[gold] = outcome
    known |= {gold: future.result() for gold, future in late.items()}
    return [known[gold][1] for gold in golds]

  def _remember(self, key: tuple[str, str], outcome: tuple[str, bool]) -> None:
    if max(map(len, key)) > MAX_LENGTH:
      return  # is told apart at once, and would fill the memory
    self._cache[key] = outcome
    if len(self._cache) > CACHE_SIZE:
      self._cache.popitem(last=False)

  def _score(
    self,
    completions: list[str],
    records: list[Record],
    verdicts: list[Verdict],
    weighted: Mapping[str, tuple[RewardFn, float]],
  ) -> Scores:
    rows = list(zip(completions, records, verdicts, strict=True))
    parts = {
      name: np.array([fn(*row) for row in rows], np.float32) for name, (fn, _) in weighted.items()
    }
    reward = np.zeros(len(rows), np.float32)
    for name, (_, weight) in weighted.items():
      reward += np.float32(weight) * parts[name]
    return Scores(
      reward,
      np.array([v.correct for v in verdicts], bool),
      [v.status for v in verdicts],
      [v.extracted for v in verdicts],
      parts,
      [registry.reason_of(v, record) for record, v in zip(records, verdicts, strict=True)],
    )

  def close(self) -> None:
    """Ends the worker processes. The scorer cannot be used afterwards."""
    if self.pool is not None:
      self.pool.close()

  def __enter__(self) -> Scorer:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def make_scorer(reward: RewardConfig) -> Scorer:
  """The scorer that a config's `reward` section describes. Close it after use.

  Raises:
    UserError: an unknown verifier, part or extraction rule.
  """
  rules = tuple(rule.strip() for rule in reward.extraction.split(",") if rule.strip())
  return Scorer(
    reward.verifier,
    dict(reward.weights),
    reward.workers,
    reward.timeout,
    rules or answers.DEFAULT_RULES,
  )
