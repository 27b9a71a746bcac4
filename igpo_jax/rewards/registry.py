"""Verifiers and reward parts by name: what a user's own reward function plugs into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import all_tasks, find_task
from igpo_jax.data.values import Span, value_spans
from igpo_jax.errors import UserError
from igpo_jax.plugins import known_values, load_built_in
from igpo_jax.rewards import answers

OK, UNPARSEABLE, TIMEOUT = "ok", "unparseable", "timeout"
POOLED = "math"  # the one verifier that runs in worker processes, by `score.Scorer`
BY_TASK = "task"  # in the place of a verifier's name: each record is graded by its task's


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


Verifier = Callable[[str, Record], Verdict]
RewardFn = Callable[[str, Record, Verdict], float]
ShownFn = Callable[[str, Record], list[Span]]


def _exact(completion: str, record: Record) -> Verdict:
  """The text after the last "=>", or else after the last "#### ", is the gold answer."""
  extracted = answers.extract_marked(completion)
  if extracted is None:
    extracted = answers.extract_marked(completion, "#### ")
  status = OK if extracted else UNPARSEABLE
  return Verdict(bool(extracted) and extracted == record.answer.strip(), extracted, status)


def _correct(completion: str, record: Record, verdict: Verdict) -> float:
  del completion, record
  return float(verdict.correct)


def _answer_tag(completion: str, record: Record, verdict: Verdict) -> float:
  del record, verdict
  text = answers.truncate(completion)
  return float(text.count("<answer>") == 1 and text.rstrip().endswith("</answer>"))


def _boxed(completion: str, record: Record, verdict: Verdict) -> float:
  del record, verdict
  return float(bool(answers.extract_boxed(answers.truncate(completion))))


_VERIFIERS: dict[str, Verifier] = {"exact": _exact}
_READS_GOLDS = {POOLED, BY_TASK, "exact"}
_SHOWN: dict[str, ShownFn] = {}
_REWARDS: dict[str, RewardFn] = {"correct": _correct, "answer_tag": _answer_tag, "boxed": _boxed}


def register_verifier(
  name: str, *, reads_golds: bool = False, shown: ShownFn | None = None
) -> Callable[[Verifier], Verifier]:
  """Registers `fn(completion, record) -> Verdict` under `name`, as a decorator.

  Args:
    reads_golds: a gold trace is a completion that it should call correct. Then RL does not begin
      if it calls fewer of them correct than `reward.gold_floor` asks for.
    shown: `fn(text, record) -> [(start, end), ...]`, the characters of a text that give the
      record's answer away. None: where the value `record.answer` stands, in any spelling.

  Raises:
    ValueError: the name is taken.
  """

  def decorate(fn: Verifier) -> Verifier:
    load_built_in()
    if name in (POOLED, BY_TASK) or name in _VERIFIERS:
      raise ValueError(f"verifier {name!r} is already registered")
    _VERIFIERS[name] = fn
    if reads_golds:
      _READS_GOLDS.add(name)
    if shown is not None:
      _SHOWN[name] = shown
    return fn

  return decorate


def register_reward(name: str) -> Callable[[RewardFn], RewardFn]:
  """Registers `fn(completion, record, verdict) -> float` under `name`, as a decorator.

  Raises:
    ValueError: the name is taken.
  """

  def decorate(fn: RewardFn) -> RewardFn:
    load_built_in()
    if name in _REWARDS:
      raise ValueError(f"reward part {name!r} is already registered")
    _REWARDS[name] = fn
    return fn

  return decorate


def reads_golds(name: str) -> bool:
  """Whether a verifier is one that should call gold traces correct."""
  load_built_in()
  return name in _READS_GOLDS


def verifier_names() -> list[str]:
  """Every name that `reward.verifier` may have, "task" aside."""
  load_built_in()
  return sorted([*_VERIFIERS, POOLED])


def verifier(name: str) -> Verifier:
  """The verifier of that name; a `UserError` names those there are."""
  load_built_in()
  if name not in _VERIFIERS:
    raise UserError(f"rewards: no verifier {name!r}; known: {', '.join(verifier_names())}")
  return _VERIFIERS[name]


def verifier_of(record: Record, name: str) -> str:
  """The name of the verifier that grades a record in a run with `reward.verifier` = `name`.

  With "task" it is the verifier of the record's task; a task that is not registered may also be
  the name of a verifier.

  Raises:
    UserError: the record has no task, or one that is not known; says what to do.
  """
  if name != BY_TASK:
    return name
  if not record.task:
    raise UserError(
      f"record {record.id!r} has no task, and reward.verifier={BY_TASK!r} grades each record by its"
      " task's verifier: put &task=NAME into the URI of its source"
    )
  task = find_task(record.task)
  found = task.verifier if task else record.task
  known = verifier_names()
  if found not in known:
    tasks = ", ".join(t.name for t in all_tasks())
    raise UserError(
      f"record {record.id!r}: its task {record.task!r} is no task ({tasks}) and no verifier"
      f" ({', '.join(known)})"
    )
  return found


def shown_spans(text: str, record: Record, name: str) -> list[Span]:
  """Characters [start, end) of a text that give the record's answer away.

  Args:
    text: a trace, or a piece of one.
    record: with its answer and its gold.
    name: the run's `reward.verifier`.
  """
  shown = _SHOWN.get(verifier_of(record, name))
  return shown(text, record) if shown else value_spans(text, record.answer)


def reward(name: str) -> RewardFn:
  """The reward part of that name; a `UserError` names those there are."""
  load_built_in()
  if name not in _REWARDS:
    raise UserError(f"rewards: no part {name!r}; known: {', '.join(sorted(_REWARDS))}")
  return _REWARDS[name]


known_values("reward.verifier", lambda: [*verifier_names(), BY_TASK])
