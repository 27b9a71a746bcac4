"""Grading of gold answers and gold traces, before anything is trained on them.

If the verifier does not find the answer in the gold traces, a policy that learns to write such
traces is never rewarded. This check reports it before the training begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from igpo_jax.config import RewardConfig
from igpo_jax.data.formats import Fields, with_final
from igpo_jax.data.records import Record
from igpo_jax.rewards import answers, registry
from igpo_jax.rewards.registry import POOLED
from igpo_jax.rewards.score import Scorer

MOST_GRADED = 2000  # records of a source; more are sampled, evenly
TRIED = 200  # traces that a remedy is tried on
SHOWN = 3  # examples in a message
FINAL = {POOLED: "The answer is \\boxed{{answer}}", "exact": "=> {answer}"}  # ends that are read


@dataclasses.dataclass(frozen=True)
class Golds:
  """The result of grading the gold answers and traces of a source.

  Attributes:
    graded: number of records that were graded.
    of: number of records of the source.
    unequal: gold answers that the verifier does not find equal to themselves: no answer to these
      problems can be correct.
    traces: number of graded records with a trace.
    passed: number of traces that the verifier calls correct.
    unfound: number of traces in which it finds no answer.
    wrong: number of traces in which it finds another answer than the gold one.
    late: number of traces that exceeded the time limit.
    examples: some traces that failed, such as "ID: gold '36', found None".
    remedies: settings under which most of the failed traces would pass.
  """

  graded: int
  of: int
  unequal: int
  traces: int = 0
  passed: int = 0
  unfound: int = 0
  wrong: int = 0
  late: int = 0
  examples: tuple[str, ...] = ()
  remedies: tuple[str, ...] = ()

  @property
  def share(self) -> float:
    """The share of traces that the verifier calls correct; 1 if there is no trace."""
    return self.passed / self.traces if self.traces else 1.0

  def __str__(self) -> str:
    evenly = f", evenly out of {self.of:,}" if self.graded < self.of else ""
    text = f"{self.graded:,} golds graded{evenly}"
    if self.unequal:
      text += f"; {self.unequal:,} do not equal themselves and cannot be answered"
    if self.traces:
      text += f"; gold traces that pass: {self.passed:,} of {self.traces:,} ({self.share:.1%})"
    why = self.why
    return text + (f"; {why}" if why else "")

  @property
  def why(self) -> str:
    """A text on the failures, with examples; "" if there are none."""
    failed = {"no answer found": self.unfound, "another answer": self.wrong, "timeout": self.late}
    counts = ", ".join(f"{n:,} x {what}" for what, n in failed.items() if n)
    examples = "; ".join(self.examples)
    return ", such as ".join(text for text in (counts, examples) if text)


def as_json(golds: Golds) -> dict[str, Any]:
  """The result as a JSON object."""
  return dataclasses.asdict(golds)


def from_json(value: dict[str, Any]) -> Golds:
  """The result from the JSON object of `as_json`."""
  return Golds(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def sampled(records: Sequence[Record], most: int = MOST_GRADED) -> list[Record]:
  """At most `most` records, evenly spaced."""
  step = -(-len(records) // most) if records else 1
  return list(records[::step])


def check_answers(records: Sequence[Record], scorer: Scorer) -> Golds:
  """Grades the gold answers only, for records whose traces are not trained on."""
  chosen = sampled(records)
  mathematical = [r for r in chosen if registry.verifier_of(r, scorer.verifier) == POOLED]
  equal = scorer.equal_themselves([record.answer for record in mathematical])
  wrong = [record for record, same in zip(mathematical, equal, strict=True) if not same]
  examples = tuple(f"{record.id}: {record.answer!r:.60}" for record in wrong[:SHOWN])
  return Golds(len(chosen), len(records), len(wrong), examples=examples)


def check_traces(records: Sequence[Record], scorer: Scorer, reward: RewardConfig) -> Golds:
  """Grades the gold answers, and the gold traces as if the policy had written them.

  Args:
    records: the records that RL learns from.
    scorer: the run's scorer.
    reward: the options of the scorer, for the remedies.
  """
  chosen = sampled(records)
  golds = check_answers(chosen, scorer)
  traced = [record for record in chosen if record.trace]
  try:
    scores = scorer.submit([record.trace for record in traced], traced, parts=False).result()
  except Exception as error:
    if registry.reads_golds(reward.verifier):
      raise
    # A verifier that is not made to read traces may fail on them. Training may go on all the same.
    return dataclasses.replace(golds, examples=(*golds.examples, f"not graded: {error!r:.200}"))
  failed = [k for k in range(len(traced)) if not scores.correct[k]]
  status = [scores.status[k] for k in failed]
  found = [scores.extracted[k] for k in failed]
  late = status.count("timeout")
  unfound = sum(not text for text in found)
  examples = tuple(
    f"{traced[k].id}: gold {traced[k].answer!r:.40}, found {scores.extracted[k]!r:.40}"
    for k in failed[:SHOWN]
  )
  return dataclasses.replace(
    golds,
    of=len(records),
    traces=len(traced),
    passed=len(traced) - len(failed),
    unfound=unfound,
    late=late,
    wrong=len(failed) - unfound - late,
    examples=golds.examples + examples,
    remedies=tuple(_remedies([traced[k] for k in failed], scorer, reward)) if failed else (),
  )


def _remedies(failed: Sequence[Record], scorer: Scorer, reward: RewardConfig) -> list[str]:
  """Settings under which most of these traces pass. Each is tried."""
  failed = sampled(failed, TRIED)
  out = []

  def passing(texts: Sequence[str | None]) -> int:
    pairs = zip(failed, texts, strict=True)
    return sum(bool(text) and scorer.same_answer(r.answer, text) for r, text in pairs)

  if reward.verifier == POOLED:
    rules = [rule.strip() for rule in reward.extraction.split(",") if rule.strip()]
    rules = rules or list(answers.DEFAULT_RULES)
    for rule in answers.RULES:
      more = ",".join([*rules, rule])
      if rule in rules:
        continue
      passed = passing(
        [answers.find_answer(record.trace, tuple(more.split(","))) for record in failed]
      )
      if 2 * passed > len(failed):
        out.append(f"reward.extraction={more!r} ({passed} of {len(failed)} of them would pass)")
  final = FINAL.get(reward.verifier)
  if final:
    ended = [with_final(_fields(record), final).trace for record in failed]
    passed = int(scorer.submit(ended, failed, parts=False).result().correct.sum())
    if 2 * passed > len(failed):
      out.append(
        f"end each trace as the verifier reads it, with &final={final} in the source's URI"
        f" ({passed} of {len(failed)} of them would pass)"
      )
  return out


def _fields(record: Record) -> Fields:
  return Fields(record.question, record.trace, record.answer, record.answer_span)
