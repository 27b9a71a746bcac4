"""Chunks of a trace: split, choose, place. Host side, numpy (docs/method.md#exploration)."""

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
  """Cuts `length` tokens into contiguous chunks of U{min..max} tokens; the tail may be shorter.

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
  """floor(ratio * N) of the N chunks, uniformly, in the order of the trace.

  A ratio given in decimals counts as written: 0.29 of 100 is 29.
  """
  count = math.floor(ratio * len(chunks) + 1e-9)
  picked = rng.permutation(len(chunks))[:count]
  return [chunks[i] for i in sorted(picked)]


def place_index(chunks: list[Chunk]) -> list[Placed]:
  """A token's place on the canvas is its index in the trace (the paper)."""
  return [(start, start, end) for start, end in chunks]


def place_stretched(
  chunks: list[Chunk], trace_length: int, gen_length: int, max_gap: int = STRETCH_MAX_GAP
) -> list[Placed]:
  """Spreads the chunks over the canvas, as the official code does.

  The gap before each chunk is multiplied by `usable / trace_length`, held between 1
  and 1.5, and capped at `max_gap`; `usable` is the canvas less its last 30 positions.
  A chunk that reaches beyond `usable` is cut there, and so are all after it.
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
