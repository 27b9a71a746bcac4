"""Verifiers and reward parts by name. Your own are registered here.

A verifier decides whether a completion is correct. A reward part turns a completion and its
verdict into a number; the reward is the weighted sum of the parts (`score.Scorer`).
"""

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
POOLED = "math"  # the only verifier that runs in worker processes; `score.Scorer` calls it
BY_TASK = "task"  # in place of a verifier's name: grade each record by its own task's verifier


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a verifier says of one completion.

  Attributes:
    correct: whether the completion's answer equals the gold answer.
    extracted: the answer found in the completion, or None.
    status: "ok"; "unparseable" if there is no answer or it cannot be read; "timeout" if reading
      or comparing it exceeded the limit of time or memory. Only "ok" can be correct.
    reason: a short explanation for people who read completions. "": `reason_of` gives one.
  """

  correct: bool
  extracted: str | None
  status: str
  reason: str = ""


def reason_of(verdict: Verdict, record: Record) -> str:
  """A short explanation of a verdict: the verifier's own, or else one made from its fields."""
  if verdict.reason:
    return verdict.reason
  if verdict.status == TIMEOUT:
    return "reading or comparing the answer took too long"
  if verdict.extracted is None:
    return "no answer was found"
  if verdict.status == UNPARSEABLE:
    return "the answer cannot be read"
  if verdict.correct:
    return "the answer is right"
  return f"the answer is not {record.answer}" if record.answer else "the answer is wrong"


Verifier = Callable[[str, Record], Verdict]
RewardFn = Callable[[str, Record, Verdict], float]
ShownFn = Callable[[str, Record], list[Span]]


def _exact(completion: str, record: Record) -> Verdict:
  """Correct if the text after the last "=>" equals the gold answer, character by character.

  Without a "=>" it is the text after the last "#### ".
  """
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
  """Decorator: registers `fn(completion, record) -> Verdict` under `name`.

  The name can then be given as `reward.verifier` and to `igpo_jax.grade --verifier`.

  Args:
    name: of the verifier.
    reads_golds: True if the verifier should call gold traces correct. Then RL does not begin
      unless it calls at least the share `reward.gold_floor` of them correct.
    shown: `fn(text, record) -> [(start, end), ...]`, the ranges of characters in a text that give
      the record's answer away. Default: wherever the value `record.answer` stands, in any spelling.

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
  """Decorator: registers `fn(completion, record, verdict) -> float` under `name`.

  The name can then be given a weight in `reward.weights`.

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
  """Whether this verifier should call gold traces correct (`register_verifier`)."""
  load_built_in()
  return name in _READS_GOLDS


def verifier_names() -> list[str]:
  """Every value that `reward.verifier` may have, except "task"."""
  load_built_in()
  return sorted([*_VERIFIERS, POOLED])


def verifier(name: str) -> Verifier:
  """The verifier registered under `name`.

  Raises:
    UserError: there is none. The message lists all names.
  """
  load_built_in()
  if name not in _VERIFIERS:
    raise UserError(f"rewards: no verifier {name!r}; known: {', '.join(verifier_names())}")
  return _VERIFIERS[name]


def verifier_of(record: Record, name: str) -> str:
  """The name of the verifier that grades a record in a run with `reward.verifier` = `name`.

  With "task" it is the verifier of the record's task. A task that is not registered may also be
  the name of a verifier.

  Raises:
    UserError: with "task", the record has no task or an unknown one.
  """
  if name != BY_TASK:
    return name
  if not record.task:
    raise UserError(
      f"record {record.id!r} has no task, and reward.verifier={BY_TASK!r} grades each record by its"
      " task's verifier: put &task=NAME into the URI of its source, or, to igpo_jax.grade, a field"
      " 'task' into its line"
    )
  task = find_task(record.task)
  found = task.verifier if task else record.task
  known = verifier_names()
  if found not in known:
    tasks = ", ".join(t.name for t in all_tasks())
    raise UserError(
      f"record {record.id!r}: its task {record.task!r} is neither a known task ({tasks}) nor a"
      f" verifier ({', '.join(known)}): correct the name, or register it in a plug-in"
    )
  return found


def shown_spans(text: str, record: Record, name: str) -> list[Span]:
  """The ranges [start, end) of characters in a text that give the record's answer away.

  Args:
    text: a trace, or a piece of one.
    record: the record whose answer is meant.
    name: the run's `reward.verifier`.
  """
  shown = _SHOWN.get(verifier_of(record, name))
  return shown(text, record) if shown else value_spans(text, record.answer)


def reward(name: str) -> RewardFn:
  """The reward part registered under `name`.

  Raises:
    UserError: there is none. The message lists all names.
  """
  load_built_in()
  if name not in _REWARDS:
    raise UserError(f"rewards: no part {name!r}; known: {', '.join(sorted(_REWARDS))}")
  return _REWARDS[name]


known_values("reward.verifier", lambda: [*verifier_names(), BY_TASK])
