"""The formats of known datasets: for each, a small function that reads a row.

It takes a row (a dict of plain values) and returns `Fields`. For a row that cannot be used it
raises `Drop` with the reason, under which the row is counted.
"""

from __future__ import annotations

import dataclasses
import decimal
import itertools
import json
import math as maths
import re
from collections.abc import Callable, Mapping
from typing import Any

from igpo_jax.data import spans
from igpo_jax.data.names import one_name
from igpo_jax.data.records import Message, read_messages
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers

Row = Mapping[str, Any]


class Drop(Exception):
  """Raised for a row that cannot be used. Its text is the reason, under which rows are counted."""


@dataclasses.dataclass(frozen=True)
class Fields:
  """What a format reads from a row.

  Attributes:
    question: the problem, before `template` is applied.
    trace: reasoning that ends with the answer; "" if there is none.
    answer: the gold answer.
    answer_span: characters [start, end) of the answer in `trace`; None if it is not known.
    key: the row's id within its source; None uses its number.
    before: the messages of a chat before the question.
  """

  question: str
  trace: str
  answer: str
  answer_span: tuple[int, int] | None = None
  key: str | None = None
  before: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of a data source that say how rows are read.

  Attributes:
    question, answer, trace, id: names of these fields in the rows; "": the format's own names. A
      name with dots looks into objects and lists: "reward_model.ground_truth", "solutions.0".
    strip_calculator: for gsm8k: remove the marks <<48/2=24>> from traces.
    final: text that replaces the end of each trace, from the answer on; "{answer}" in it stands for
      the answer. "": traces stay as they are.
    solution: for openr1: which trace is used, "solution" (the short reference) or "generation" (a
      long chain of thought that was verified).
    task: name of the task of every record; "": none.
    task_field: name of a field with the task of each row, used instead of `task`; "": none.
    gold: name of a field with a JSON value for the verifier (`Record.gold`). Format plain looks for
      a field "gold". If there is no such field, an answer that is an object is also the gold.
  """

  question: str = ""
  answer: str = ""
  trace: str = ""
  id: str = ""
  strip_calculator: bool = False
  final: str = ""
  solution: str = "solution"
  task: str = ""
  task_field: str = ""
  gold: str = ""


def value_of(row: Row, name: str) -> Any:
  """The value of a field; None if the row has none.

  If the row has no field of that name, a name with dots looks into objects and lists. NaN counts as
  no value, since tables write a missing value so.
  """
  value: Any = row.get(name)
  if value is None and "." in name:
    value = row
    for part in name.split("."):
      if isinstance(value, Mapping):
        value = value.get(part)
      elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        value = value[int(part)]
      else:
        return None
  return _present(value)


def _present(value: Any) -> Any:
  """The value, or None for NaN and infinity."""
  missing = isinstance(value, float | decimal.Decimal) and not maths.isfinite(value)
  return None if missing else value


def text_of(row: Row, *names: str) -> str:
  """The first of the named fields that the row has, as stripped text; "" if it has none.

  A whole number is written without ".0".

  Raises:
    Drop: the field is a list or an object.
  """
  for name in names:
    value = value_of(row, name)
    if isinstance(value, Mapping | list):
      kind = "a list" if isinstance(value, list) else "an object"
      raise Drop(f"{name} is {kind}, not text")
    if value is not None:
      return _plain_text(value)
  return ""


def _plain_text(value: Any) -> str:
  if isinstance(value, float | decimal.Decimal) and value == int(value):
    value = int(value)
  return str(value).strip()


def answer_of(row: Row, *names: str) -> str:
  """The gold answer as text; "" if the row has none of the named fields.

  Unlike `text_of` it takes lists and objects: a list of one item counts as this item, and other
  lists and objects become JSON text, which the verifiers of structured tasks read.
  """
  for name in names:
    value = value_of(row, name)
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], Mapping | list):
      value = _present(value[0])
    if isinstance(value, Mapping | list):
      return json.dumps(value)
    if value is not None:
      return _plain_text(value)
  return ""


def gold_of(row: Row, options: Options) -> Any:
  """`Record.gold` of a row: a JSON value, or None if the text of the answer is enough."""
  gold = value_of(row, options.gold) if options.gold else None
  if gold is None:
    answer = value_of(row, options.answer) if options.answer else None
    gold = answer if isinstance(answer, Mapping) else None
  return gold


def task_of(row: Row, options: Options) -> str:
  """The name of the row's task, from its `task_field` or else `task`; "" if there is neither."""
  return text_of(row, options.task_field) if options.task_field else options.task


def _asked(row: Row, *names: str) -> dict[str, Any]:
  """`Fields.question`, and `Fields.before` if the field holds the messages of a chat."""
  for name in names:
    value = value_of(row, name)
    if isinstance(value, list):
      try:
        messages = read_messages(value)
      except ValueError as reason:
        raise Drop(f"{name}: {reason}") from None
      return _split_question(messages)
  return {"question": text_of(row, *names)}


def _split_question(messages: tuple[Message, ...]) -> dict[str, Any]:
  if messages[-1]["role"] != "user":
    raise Drop(f"messages that end with the role {messages[-1]['role']}, not with the user's turn")
  return {"question": messages[-1]["content"].strip(), "before": messages[:-1]}


def plain(row: Row, options: Options) -> Fields:
  """Rows with a question, an answer and optionally a trace, under any field names.

  The question may be the messages of a chat, the last one by the user. A field `answer_span` may
  give the characters [start, end) of the answer in the trace; otherwise the answer is looked for
  (`spans.find_answer_span`).
  """
  trace = text_of(row, options.trace)
  answer = answer_of(row, options.answer)
  span = value_of(row, "answer_span")
  if span is None:
    span = spans.find_answer_span(trace, answer)
  else:
    trace = str(value_of(row, options.trace))  # not stripped: the span counts from its start
    span = tuple(span) if isinstance(span, list) else ()
    whole = all(isinstance(at, int) for at in span)
    if len(span) != 2 or not whole or not 0 <= span[0] < span[1] <= len(trace):
      raise Drop("answer_span outside the trace")
  return Fields(
    **_asked(row, options.question),
    trace=trace,
    answer=answer,
    answer_span=span,
    key=text_of(row, options.id) or None,
  )


def chat(row: Row, options: Options) -> Fields:
  """Chats: the assistant's last message is the trace, the messages before it are the prompt.

  The answer is a field of its own, or what the grader finds in the trace, or "".
  """
  name = next((n for n in (options.question, "conversations") if value_of(row, n)), "")
  if not name:
    raise Drop("no messages")
  try:
    messages = read_messages(value_of(row, name))
  except ValueError as reason:
    raise Drop(str(reason)) from None
  trace = ""
  if messages[-1]["role"] == "assistant":
    messages, trace = messages[:-1], messages[-1]["content"].strip()
  if not messages:
    raise Drop("messages without a question")
  answer = answer_of(row, options.answer) or (answers.find_answer(trace) or "").strip()
  return Fields(
    **_split_question(messages),
    trace=trace,
    answer=answer,
    answer_span=spans.find_answer_span(trace, answer),
    key=text_of(row, options.id) or None,
  )


_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def gsm8k(row: Row, options: Options) -> Fields:
  """GSM8K: the answer field is a trace that ends with a line such as "#### 72"."""
  trace = text_of(row, options.answer)
  if options.strip_calculator:
    trace = _CALCULATOR.sub("", trace)
  start = trace.rfind("####")
  if start < 0:
    raise Drop("no #### answer")
  answer = trace[start + len("####") :].strip().replace(",", "")
  return Fields(
    **_asked(row, options.question),
    trace=trace,
    answer=answer,
    answer_span=_from(start, trace, answer),
    key=text_of(row, options.id) or None,
  )


def _from(start: int, trace: str, answer: str) -> tuple[int, int]:
  """The span from `start` to the trace's end, or from an earlier statement of the answer on."""
  span = spans.find_answer_span(trace, answer) or (start, len(trace))
  return min(start, span[0]), len(trace)


def metamath(row: Row, options: Options) -> Fields:
  """MetaMathQA: the AnsAug rows, answered after "The answer is:"."""
  kind = text_of(row, "type")
  if not kind.endswith("AnsAug"):
    raise Drop("not an AnsAug type")
  trace = text_of(row, options.trace)
  start = trace.rfind("The answer is:")
  if start < 0:
    raise Drop('no "The answer is:"')
  answer = trace[start + len("The answer is:") :].strip()
  # The text before that line often states the answer already, in a box: the span begins there.
  return Fields(
    **_asked(row, options.question),
    trace=trace,
    answer=answer,
    answer_span=_from(start, trace, answer),
    key=text_of(row, options.id) or None,
  )


def _list(row: Row, name: str) -> list:
  value = row.get(name)
  return [] if value is None else list(value)


def openr1(row: Row, options: Options) -> Fields:
  """OpenR1-Math: an answer, and as trace the reference solution or a verified generation.

  A generation is verified if math-verify found it correct, or a language model where math-verify
  could not read the answer. A generation that was cut off does not count.
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
    trace = text_of(row, options.trace)
  else:
    raise UserError(f"solution={options.solution!r}: expected solution or generation")
  return _solved(row, options, trace, answer_of(row, options.answer))


def _solved(row: Row, options: Options, trace: str, answer: str) -> Fields:
  return Fields(
    **_asked(row, options.question),
    trace=trace,
    answer=answer,
    answer_span=spans.find_answer_span(trace, answer),
    key=text_of(row, options.id) or None,
  )


def math500(row: Row, options: Options) -> Fields:
  """MATH-500: problem, answer, and in some copies a solution."""
  return _solved(row, options, text_of(row, options.trace), answer_of(row, options.answer))


def amc(row: Row, options: Options) -> Fields:
  """AMC 2023: problem and a numeric answer (27.0 is read as 27)."""
  return Fields(
    **_asked(row, options.question, "question"),
    trace="",
    answer=answer_of(row, options.answer),
    key=text_of(row, options.id) or None,
  )


def minerva(row: Row, options: Options) -> Fields:
  """The 272 physics and chemistry problems of Minerva: the answer is the last box."""
  trace = text_of(row, options.trace)
  answer = spans.last_boxed(trace)
  if not answer:
    raise Drop("no boxed answer")
  return _solved(row, options, trace, answer)


@dataclasses.dataclass(frozen=True)
class Format:
  """How the rows of one dataset are read.

  Attributes:
    read: `read(row, options) -> Fields`; raises `Drop` for a row that cannot be used.
    names: the dataset's own names for the fields "question", "answer", "trace", "id" and "gold".
    others: further columns that `read` uses.
    unique_questions: whether only the first row of each question is used.
    needs_answer: whether rows without an answer are left out.
    origin: the file to download and where it is, for the message if the file is missing.
  """

  read: Callable[[Row, Options], Fields]
  names: Mapping[str, str]
  others: tuple[str, ...] = ()
  unique_questions: bool = False
  needs_answer: bool = True
  origin: str = ""

  def with_names(self, options: Options) -> Options:
    """`options` with the dataset's own field names where the user gave none."""
    own = {what: name for what, name in self.names.items() if not getattr(options, what)}
    return dataclasses.replace(options, **own)


_NAMES = {name: name for name in ("question", "answer", "trace", "id")}

FORMATS: dict[str, Format] = {
  "plain": Format(plain, _NAMES | {"gold": "gold"}, ("answer_span",)),
  "chat": Format(chat, _NAMES | {"question": "messages"}, ("conversations",), needs_answer=False),
  "gsm8k": Format(
    gsm8k,
    _NAMES,
    origin="train.jsonl and test.jsonl of the GitHub repository"
    " openai/grade-school-math, folder grade_school_math/data",
  ),
  "metamath": Format(
    metamath,
    _NAMES | {"question": "query", "trace": "response"},
    ("type",),
    unique_questions=True,
    origin="MetaMathQA-395K.json of the Hugging Face dataset meta-math/MetaMathQA",
  ),
  "openr1": Format(
    openr1,
    _NAMES | {"question": "problem", "trace": "solution", "id": "uuid"},
    ("generations", "correctness_math_verify", "correctness_llama", "is_reasoning_complete"),
    origin="data/train-*.parquet of the Hugging Face dataset open-r1/OpenR1-Math-220k",
  ),
  "math500": Format(
    math500,
    _NAMES | {"question": "problem", "trace": "solution", "id": "unique_id"},
    origin="test.jsonl of the Hugging Face dataset HuggingFaceH4/MATH-500",
  ),
  "amc": Format(
    amc,
    _NAMES | {"question": "problem"},
    ("question",),
    origin="evaluation/data/amc23/test.jsonl of the GitHub repository QwenLM/Qwen2.5-Math",
  ),
  "minerva": Format(
    minerva,
    _NAMES | {"question": "problem", "trace": "solution", "id": "idx"},
    origin="evaluation/data/minerva_math/test.jsonl of the GitHub repository QwenLM/Qwen2.5-Math",
  ),
}


def find_format(name: str) -> Format | None:
  """The format with this name, which may be any name of its data set; None if there is none."""
  return FORMATS.get(one_name(name))


def format_named(name: str) -> Format:
  """The format with this name, which may be any name of its data set.

  Raises:
    UserError: there is none; the message lists the formats.
  """
  found = find_format(name)
  if found is None:
    raise UserError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
  return found


def columns(format: str, options: Options) -> tuple[str, ...]:
  """The columns that a format reads from a table. Others may be large and are left alone."""
  known = format_named(format)
  named = known.with_names(options)
  others = known.others
  if known.read is openr1 and options.solution != "generation":
    others = ()
  further = (name for name in (named.gold, named.task_field) if name)
  return (named.question, named.answer, named.trace, named.id, *further, *others)


def with_final(fields: Fields, final: str) -> Fields:
  """`fields` with the trace's end, from the answer on, replaced by `final` (see `Options.final`).

  They are unchanged if `final` is "", there is no trace, or its answer was not found.
  """
  if not final or not fields.trace or fields.answer_span is None:
    return fields
  start = fields.answer_span[0]
  trace = fields.trace[:start] + final.replace("{answer}", fields.answer)
  return dataclasses.replace(fields, trace=trace, answer_span=(start, len(trace)))
