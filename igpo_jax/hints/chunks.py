"""Chunks of a trace: splitting, choosing and placing them, in numpy
(docs/method.md#exploration)."""

from __future__ import annotations

import math

import numpy as np

from igpo_jax.errors import UserError

Chunk = tuple[int, int]  # [start, end) in trace tokens
Placed = tuple[int, int, int]  # canvas position, and the [start, end) of the trace it shows

# What the official placement does: it leaves this many positions at the end of the
# canvas free, stretches the gaps between chunks by at most this factor, and lets no
# gap grow beyond this many positions.
STRETCH_FREE_TAIL = 30
STRETCH_LIMIT = 1.5
STRETCH_MAX_GAP = 100


def split_chunks(
  length: int, chunk_range: tuple[int, int], rng: np.random.Generator
) -> list[Chunk]:
  """Cuts `length` tokens into contiguous chunks of random lengths; the last may be shorter.

  Args:
    length: number of tokens.
    chunk_range: (min, max); each length is drawn from U{min..max}.
    rng: the source of randomness.

  Example: length 12 with chunk_range (5, 5) gives [(0, 5), (5, 10), (10, 12)].
  """
  low, high = chunk_range
  if not 1 <= low <= high:
    raise UserError(f"chunk_range={chunk_range}: need 1 <= min <= max")
  chunks = []
  start = 0
  while start < length:
    end = min(start + int(rng.integers(low, high + 1)), length)
    chunks.append((start, end))
    start = end
  return chunks


def choose_chunks(chunks: list[Chunk], ratio: float, rng: np.random.Generator) -> list[Chunk]:
  """A uniformly random choice of floor(ratio * N) of the N chunks, in the order of the trace.

  The floor is that of the decimal number `ratio` as it is written: 0.29 of 100 chunks is 29.
  """
  count = math.floor(ratio * len(chunks) + 1e-9)
  picked = rng.permutation(len(chunks))[:count]
  return [chunks[i] for i in sorted(picked)]


def place_index(chunks: list[Chunk]) -> list[Placed]:
  """Places every token at its index in the trace, as in the paper."""
  return [(start, start, end) for start, end in chunks]


def place_stretched(
  chunks: list[Chunk], trace_length: int, gen_length: int, max_gap: int = STRETCH_MAX_GAP
) -> list[Placed]:
  """Spreads the chunks over the canvas, as the official code does.

  `usable` is the canvas without its last 30 positions. The gap before each chunk is multiplied by
  `usable / trace_length`, clipped to [1, 1.5], and is at most `max_gap` positions. A chunk that
  reaches beyond `usable` is cut there, and no chunk after it is placed.
  """
  usable = gen_length - STRETCH_FREE_TAIL
  scale = min(max(usable / max(trace_length, 1), 1.0), STRETCH_LIMIT)
  placed = []
  at = shown_to = 0  # the end of the previous chunk: on the canvas, and in the trace
  for start, end in chunks:
    gap = int((start - shown_to) * scale)
    at += min(gap, max_gap) if placed else gap
    if at >= usable:
      break
    end = min(end, start + usable - at)
    placed.append((at, start, end))
    at, shown_to = at + end - start, end
  return placed
