r"""Finding the final answer in a trace, since hints end before it (docs/method.md#exploration).

A hint that states the answer would be graded as if the model had written it. So everything that the
grader's extraction (`rewards.answers`) reads as a statement of the answer counts: \boxed{}, \fbox{}
or a bare \boxed 7, "#### 7", <answer>, "The answer is 7".
"""

from __future__ import annotations

import itertools
import re

from igpo_jax.data.values import may_equal, value_spans
from igpo_jax.rewards import answers

# A box opens, an escaped character, or a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# What may open a statement. Too many matches do no harm: the grader is asked about each of them.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_MARKS = (re.compile(r"####"), re.compile(r"(?i)<answer>"))
_SAID = re.compile(r"(?i)(?:\b(?:the|final|correct|my|our)[ \t]+)*(?<![</])\banswers?\b")
_SAID_SO = re.compile(r"(?i)\b(?:the )?(?:final )?answer is\b")


def boxes(text: str) -> list[tuple[int, int, str]]:
  r"""All outermost \boxed{...} whose braces close, as (start, end, content).

  Worked example: r"so \boxed{\frac{1}{2}}." gives [(3, 22, r"\frac{1}{2}")].
  """
  closed, stack = [], []
  for match in _BRACES.finditer(text):
    piece = match.group()
    if piece.endswith("{") and piece != r"\{":
      stack.append(match if len(piece) > 1 else None)
    elif piece == "}" and stack:
      opened = stack.pop()
      if opened is not None:
        closed.append((opened.start(), match.end(), opened.end()))
  found, last = [], 0
  for start, end, inner in sorted(closed):
    if start >= last:
      found.append((start, end, text[inner : end - 1]))
      last = end
  return found


def find_answer_span(trace: str, answer: str = "") -> tuple[int, int] | None:
  r"""Characters [start, end) of a trace from its first statement of the final answer to its end.

  The start is the earliest of two kinds of places: the beginning of the final statement
  (`final_statement`), and every other statement that the grader would read, unless its value
  plainly differs from `answer` and from the last box (`values.may_equal`). None if there is no
  statement.

  Args:
    trace: the trace.
    answer: the gold answer; "" if it is not known.
  """
  final = _marked(trace)
  closed = boxes(trace)
  answered = [text for text in (answer, closed[-1][2] if closed else "") if text]
  stated = _stated(trace, answered, len(trace) if final is None else final)
  start = final if stated is None else stated
  start = final_statement(trace, answer) if start is None else _line_opened(trace, start)
  return None if start is None else (start, len(trace))


def final_statement(trace: str, answer: str = "") -> int | None:
  r"""The character at which the last statement of a trace's final answer begins.

  It is the earliest of the last box that closes, the last "####" and the last "<answer>"; or the
  "the answer is" before it on the same line. Without any of these it is the last "the answer is".
  Without that it is the last place where the value of `answer` stands. None if there is none.
  """
  start = _marked(trace)
  if start is not None:
    return _line_opened(trace, start)
  said = [match.start() for match in _SAID_SO.finditer(trace)]
  if not said and answer:
    said = [start for start, _ in value_spans(trace, answer)]
  return said[-1] if said else None


def _marked(trace: str) -> int | None:
  """The earliest of the last box that closes, the last "####" and the last "<answer>"."""
  found = [[match.start() for match in mark.finditer(trace)] for mark in _MARKS]
  found.append([start for start, _, _ in boxes(trace)])
  return min((places[-1] for places in found if places), default=None)


def _line_opened(trace: str, start: int) -> int:
  """`start`, or where "the answer is" begins before it on its line."""
  said = [match.start() for match in _SAID_SO.finditer(trace)]
  opened = bool(said) and said[-1] < start and "\n" not in trace[said[-1] : start]
  return said[-1] if opened else start


def last_boxed(trace: str) -> str:
  """The answer that the grader reads in the last box; "" if there is no box."""
  return (answers.find_answer(trace, ("boxed",)) or "").strip()


def _stated(trace: str, answered: list[str], before: int) -> int | None:
  """Where the first statement begins that the grader reads and that may say one of `answered`.

  Only statements that begin before the character `before` count. None if there is none.
  """
  starts = sorted(m.start() for pattern in (_BOX, *_MARKS, _SAID) for m in pattern.finditer(trace))
  for start, end in itertools.pairwise([*starts, len(trace)]):
    if start >= before:
      break
    text = answers.find_answer(trace[start:end])
    if text is not None and any(may_equal(text, target) for target in answered):
      return start
  return None
