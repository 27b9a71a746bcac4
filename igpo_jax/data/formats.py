"""How the rows of known datasets become records: one small function per dataset.

A format takes one row (a dict of plain values) and gives `Fields`, or raises `Drop`
with the reason for which the row is counted instead of used.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from igpo_jax.cli import UserError
from igpo_jax.data import spans

Row = Mapping[str, Any]


class Drop(Exception):
  """A row that cannot be used; its text is the reason it is counted under."""


@dataclasses.dataclass(frozen=True)
class Fields:
  """What a format reads out of a row.

  Attributes:
    question: the problem, without any prompt template.
    trace: reasoning that ends in the answer, "" where there is none.
    answer: gold answer.
    answer_span: characters of the answer in `trace`, None where not known.
    key: identity of the row within its source, None for its number.
  """

  question: str
  trace: str
  answer: str
  answer_span: tuple[int, int] | None = None
  key: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may set about reading rows.

  Attributes:
    question, answer, trace, id: names of the fields, "" for the format's own.
    strip_calculator: gsm8k: take the marks <<48/2=24>> out of traces.
    final: text that replaces the end of a trace from the answer on, "{answer}" in it
      standing for the answer; "" leaves traces as they are.
    solution: openr1: "solution" (the short reference) or "generation" (a verified
      long chain of thought) as trace.
  """

  question: str = ""
  answer: str = ""
  trace: str = ""
  id: str = ""
  strip_calculator: bool = False
  final: str = ""
  solution: str = "solution"


def text_of(row: Row, *names: str) -> str:
  """The first of the named fields that the row has, as stripped text, else "".

  A whole number is written without ".0"; lists and objects as JSON.
  """
  for name in names:
    value = row.get(name)
    if value is None:
      continue
    if isinstance(value, float) and value.is_integer():
      value = int(value)
    if isinstance(value, dict | list):
      value = json.dumps(value)
    return str(value).strip()
  return ""


def plain(row: Row, options: Options) -> Fields:
  """Rows with a question, an answer and perhaps a trace, under any names.

  A field `answer_span`, [start, end) characters of the trace, says where its answer is;
  else it is looked for (`spans.find_answer_span`).
  """
  trace = text_of(row, options.trace or "trace")
  answer = text_of(row, options.answer or "answer")
  span = row.get("answer_span")
  if span is None:
    span = spans.find_answer_span(trace, answer)
  else:
    trace = str(row.get(options.trace or "trace"))  # not stripped: the span counts from its start
    span = tuple(span)
    if len(span) != 2 or not 0 <= span[0] < span[1] <= len(trace):
      raise Drop("answer_span outside the trace")
  return Fields(
    question=text_of(row, options.question or "question"),
    trace=trace,
    answer=answer,
    answer_span=span,
    key=text_of(row, options.id or "id") or None,
  )


_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def gsm8k(row: Row, options: Options) -> Fields:
  """GSM8K: the answer field is a trace that ends in a line "#### 72"."""
  trace = text_of(row, options.answer or "answer")
  if options.strip_calculator:
    trace = _CALCULATOR.sub("", trace)
  start = trace.rfind("####")
  if start < 0:
    raise Drop("no #### answer")
  answer = trace[start + len("####") :].strip().replace(",", "")
  return Fields(
    question=text_of(row, options.question or "question"),
    trace=trace,
    answer=answer,
    answer_span=(start, len(trace)),
    key=text_of(row, options.id or "id") or None,
  )


def metamath(row: Row, options: Options) -> Fields:
  """MetaMathQA: the AnsAug rows, answered after "The answer is:"."""
  kind = text_of(row, "type")
  if not kind.endswith("AnsAug"):
    raise Drop("not an AnsAug type")
  trace = text_of(row, options.trace or "response")
  start = trace.rfind("The answer is:")
  if start < 0:
    raise Drop('no "The answer is:"')
  answer = trace[start + len("The answer is:") :].strip()
  # The solution before that line often has the answer in a box: that is the answer too.
  span = spans.find_answer_span(trace, answer) or (start, len(trace))
  return Fields(
    question=text_of(row, options.question or "query"),
    trace=trace,
    answer=answer,
    answer_span=(min(start, span[0]), len(trace)),
  )


def _list(row: Row, name: str) -> list:
  value = row.get(name)
  return [] if value is None else list(value)


def openr1(row: Row, options: Options) -> Fields:
  """OpenR1-Math: reference solution or a generation that was verified, and an answer.

  Verified is what math-verify or, where that could not read the answer, a language model
  found correct; a generation that was cut off does not count.
  """
  if options.solution == "generation":
    verdicts = itertools.zip_longest(
      *(_list(row, f"correctness_{judge}") for judge in ("math_verify", "llama"))
    )
    good = (
      generation
      for generation, judged, complete in itertools.zip_longest(
        _list(row, "generations"), verdicts, _list(row, "is_reasoning_complete")
      )
      if generation and judged and any(judged) and complete is not False
    )
    trace = str(next(good, "")).strip()
    if not trace:
      raise Drop("no generation that was verified")
  elif options.solution == "solution":
    trace = text_of(row, options.trace or "solution")
  else:
    raise UserError(f"solution={options.solution!r}: expected solution or generation")
  answer = text_of(row, options.answer or "answer")
  return Fields(
    question=text_of(row, options.question or "problem"),
    trace=trace,
    answer=answer,
    answer_span=spans.find_answer_span(trace, answer),
    key=text_of(row, "uuid") or None,
  )


def math(row: Row, options: Options) -> Fields:
  """MATH-500: problem, answer, and in some copies a solution."""
  trace = text_of(row, options.trace or "solution")
  answer = text_of(row, options.answer or "answer")
  return Fields(
    question=text_of(row, options.question or "problem"),
    trace=trace,
    answer=answer,
    answer_span=spans.find_answer_span(trace, answer),
    key=text_of(row, "unique_id") or None,
  )


def amc(row: Row, options: Options) -> Fields:
  """AMC 2023: problem and a numeric answer (27.0 is read as 27)."""
  return Fields(
    question=text_of(row, options.question or "problem", "question"),
    trace="",
    answer=text_of(row, options.answer or "answer"),
    key=text_of(row, "id") or None,
  )


def minerva(row: Row, options: Options) -> Fields:
  """The 272 physics and chemistry problems of Minerva: the answer is the last \\boxed{}."""
  trace = text_of(row, options.trace or "solution")
  boxes = spans.boxes(trace)
  if not boxes:
    raise Drop("no boxed answer")
  answer = boxes[-1][2].strip()
  return Fields(
    question=text_of(row, options.question or "problem"),
    trace=trace,
    answer=answer,
    answer_span=spans.find_answer_span(trace, answer),
    key=text_of(row, "idx") or None,
  )


@dataclasses.dataclass(frozen=True)
class Format:
  """How one dataset is read.

  Attributes:
    read: a row to its fields.
    unique_questions: use only the first row of each question.
    origin: which file people download from where; told when it is missing.
  """

  read: Callable[[Row, Options], Fields]
  unique_questions: bool = False
  origin: str = ""


FORMATS: dict[str, Format] = {
  "plain": Format(plain),
  "gsm8k": Format(
    gsm8k,
    origin="train.jsonl and test.jsonl of the GitHub repository"
    " openai/grade-school-math, folder grade_school_math/data",
  ),
  "metamath": Format(
    metamath,
    unique_questions=True,
    origin="MetaMathQA-395K.json of the Hugging Face dataset meta-math/MetaMathQA",
  ),
  "openr1": Format(
    openr1, origin="data/train-*.parquet of the Hugging Face dataset open-r1/OpenR1-Math-220k"
  ),
  "math": Format(math, origin="test.jsonl of the Hugging Face dataset HuggingFaceH4/MATH-500"),
  "amc": Format(
    amc, origin="evaluation/data/amc23/test.jsonl of the GitHub repository QwenLM/Qwen2.5-Math"
  ),
  "minerva": Format(
    minerva,
    origin="evaluation/data/minerva_math/test.jsonl of the GitHub repository QwenLM/Qwen2.5-Math",
  ),
}


def unread_columns(options: Mapping[str, Any]) -> tuple[str, ...]:
  """Columns that a format does not read, of those that are gigabytes."""
  if options.get("format") != "openr1":
    return ()
  return ("messages",) if options.get("solution") == "generation" else ("messages", "generations")


def with_final(fields: Fields, final: str) -> Fields:
  """`fields` with the trace's end, from the answer on, replaced by `final`."""
  if not final or not fields.trace or fields.answer_span is None:
    return fields
  start = fields.answer_span[0]
  trace = fields.trace[:start] + final.replace("{answer}", fields.answer)
  return dataclasses.replace(fields, trace=trace, answer_span=(start, len(trace)))
