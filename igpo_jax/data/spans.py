"""Where the final answer of a trace is: hints end before it (docs/method.md#exploration)."""

from __future__ import annotations

import re

# A box opens, an escaped character, or a brace.
_BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
_EXPLICIT = (re.compile(r"####"), re.compile(r"(?i)<answer>"))
_SAID = re.compile(r"(?i)\b(?:the )?(?:final )?answer is\b")


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
  r"""Characters [start, end) from where a trace states its final answer to its end.

  The start is the earliest of: the last "####", the last "<answer>", the last \boxed{}
  and every other box with the same content or with `answer` in it (a hinted box would be
  graded as if the model had written it). The last "the answer is" is the start where
  there is none of these, or where it opens the line that has the start. Without any,
  the last place where `answer` stands as a word of its own. None if there is none.
  """

  def squeeze(text: str) -> str:
    return re.sub(r"[\s$]", "", text)

  starts = [
    matches[-1].start() for pattern in _EXPLICIT if (matches := list(pattern.finditer(trace)))
  ]
  found = boxes(trace)
  if found:
    same = {squeeze(found[-1][2]), squeeze(answer)}
    starts += [start for start, _, content in found if squeeze(content) in same]
  said = [match.start() for match in _SAID.finditer(trace)]
  first = min(starts, default=len(trace))
  if said and (not starts or (said[-1] < first and "\n" not in trace[said[-1] : first])):
    starts = said[-1:]
  if not starts and answer:
    pattern = rf"(?<![\w.]){re.escape(answer)}(?!\w)"
    starts = [match.start() for match in re.finditer(pattern, trace)][-1:]
  return (min(starts), len(trace)) if starts else None
