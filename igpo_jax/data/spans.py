"""Where the final answer of a trace is: what lies from there on is never hinted (METHOD 3)."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\f?boxed\s*\{")
_MARKERS = (re.compile(r"####"), re.compile(r"(?i)\bthe (?:final )?answer is\b"),
            re.compile(r"(?i)<answer>"))


def last_boxed(text: str) -> tuple[int, int, str] | None:
  """The last \\boxed{...} whose braces close: (start, end, what is in the box).

  Worked example: "so \\boxed{\\frac{1}{2}}." gives (3, 23, "\\frac{1}{2}").
  """
  for match in reversed(list(_BOXED.finditer(text))):
    depth = 1
    for k in range(match.end(), len(text)):
      if text[k] in "{}" and text[k - 1] != "\\":
        depth += 1 if text[k] == "{" else -1
        if depth == 0:
          return match.start(), k + 1, text[match.end():k]
  return None


def find_answer_span(trace: str, answer: str = "") -> tuple[int, int] | None:
  """Characters [start, end) from where a trace states its final answer to its end.

  The first of these that the trace has: "####", "the answer is", "<answer>" or a
  closed \\boxed{}, the earliest of their *last* occurrences; else the last place where
  `answer` stands as a word of its own. None if there is none.
  """
  starts = [matches[-1].start() for marker in _MARKERS
            if (matches := list(marker.finditer(trace)))]
  boxed = last_boxed(trace)
  if boxed is not None:
    starts.append(boxed[0])
  if not starts and answer:
    pattern = rf"(?<![\w.]){re.escape(answer)}(?!\w)"
    starts = [m.start() for m in re.finditer(pattern, trace)][-1:]
  return (min(starts), len(trace)) if starts else None
