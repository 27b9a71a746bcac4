"""Does a hint give the answer away? Where its value stands (docs/method.md#exploration).

Real traces state the answer's value before the answer itself (99.8% of GSM8K's do),
so never hinting the answer span is not enough to be sure. These functions find the
value in any spelling; `hints.hide_answer_value` drops the chunks that overlap it, and the share of
hinted canvases that show it is logged either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from igpo_jax.data.values import Span, value_spans


def value_tokens(text: str, answer: str, offsets: Sequence[Span]) -> list[Span]:
  """Token ranges [start, end) that overlap the answer's value.

  Args:
    text: the trace.
    answer: the gold answer.
    offsets: characters [start, end) of each token of the trace.
  """
  return overlapping_tokens(value_spans(text, answer), offsets)


def overlapping_tokens(spans: Sequence[Span], offsets: Sequence[Span]) -> list[Span]:
  """Token ranges [start, end) that overlap each of some ranges of characters.

  Args:
    spans: characters [start, end), such as those of `rewards.registry.shown_spans`.
    offsets: characters [start, end) of each token.
  """
  ranges = []
  for start, end in spans:
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and start < b]
    if inside:
      ranges.append((inside[0], inside[-1] + 1))
  return ranges


def segments(hinted: np.ndarray) -> list[Span]:
  """The maximal runs [start, end) of True in bool[L].

  Example: [F, T, T, F, T] has the runs (1, 3) and (4, 5).
  """
  edges = np.flatnonzero(np.diff(np.concatenate([[0], hinted.astype(np.int8), [0]])))
  return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
