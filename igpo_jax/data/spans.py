r"""Where the final answer of a trace is: hints end before it (docs/method.md#exploration).

A hint that states the answer would be graded as if the model had written it. So every place counts
that the grader's own extraction (`rewards.answers`) reads as a statement of the answer: a \boxed{},
\fbox{} or bare \boxed 7, "#### 7", <answer>, "The answer is 7".
"""

from __future__ import annotations

import itertools
import re

from igpo_jax.data.values import may_equal, value_spans
from igpo_jax.rewards import answers

# A box opens, an escaped character, or a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# What opens a statement. More than the grader reads does no harm: it is asked about each.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_MARKS = (re.compile(r"####"), re.compile(r"(?i)<answer>"))
_SAID = re.compile(r"(?i)(?:\b(?:the|final|correct|my|our)[ \t]+)*(?<![</])\banswers?\b")
_SAID_SO = re.compile(r"(?i)\b(?:the )?(?:final )?answer is\b")


def boxes(text: str) -> list[tuple[int, int, str]]:
  r"""Every \boxed{...} whose braces close, outermost only: (start, end, content).

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
  r"""Characters [start, end) from where a trace first states its final answer to its end.

  The start is the earliest of: the last box that closes, the last "####", the last "<answer>"; and
  every other statement that the grader would read, unless it plainly says something else than
  `answer` and that box (`values.may_equal`). The last "the answer is" is the start where there
  is none of these, or where it opens the line that has the start. Without any, the last place
  where the value `answer` stands. None if there is none.
  """
  found = [[match.start() for match in mark.finditer(trace)] for mark in _MARKS]
  closed = boxes(trace)
  found.append([start for start, _, _ in closed])
  starts = [places[-1] for places in found if places]
  said = [match.start() for match in _SAID_SO.finditer(trace)]
  answered = [text for text in (answer, closed[-1][2] if closed else "") if text]
  starts += _stated(trace, answered, min(starts, default=len(trace)))
  first = min(starts, default=len(trace))
  if said and (not starts or (said[-1] < first and "\n" not in trace[said[-1] : first])):
    starts.append(said[-1])
  if not starts and answer:
    starts = [start for start, _ in value_spans(trace, answer)][-1:]
  return (min(starts), len(trace)) if starts else None


def last_boxed(trace: str) -> str:
  """What the grader reads in the last box; "" where there is none."""
  return (answers.find_answer(trace, ("boxed",)) or "").strip()


def _stated(trace: str, answered: list[str], before: int) -> list[int]:
  """Where the grader would read a statement that may say one of `answered`: the first, or none.

  Only those that begin before the character `before` are asked for.
  """
  starts = sorted(m.start() for pattern in (_BOX, *_MARKS, _SAID) for m in pattern.finditer(trace))
  for start, end in itertools.pairwise([*starts, len(trace)]):
    if start >= before:
      break
    text = answers.find_answer(trace[start:end])
    if text is not None and any(may_equal(text, target) for target in answered):
      return [start]
  return []
