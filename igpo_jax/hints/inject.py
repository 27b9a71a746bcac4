"""From a trace to a hinted canvas: which tokens stand where (docs/method.md#exploration)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from igpo_jax.config import HintConfig
from igpo_jax.errors import UserError
from igpo_jax.hints.chunks import (
  STRETCH_FREE_TAIL,
  Chunk,
  choose_chunks,
  place_index,
  place_stretched,
  split_chunks,
)


def hint_canvas(
  trace_ids: Sequence[int],
  answer_span: tuple[int, int] | None,
  gen_length: int,
  ratio: float,
  chunk_range: tuple[int, int],
  rng: np.random.Generator,
  mask_id: int,
  placement: str = "index",
  forbidden: Sequence[Chunk] = (),
  leak_answer: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """A completion canvas with a share of the trace's chunks in place.

  The trace is cut to the canvas and only what stands before the final answer is
  segmented, so no hint ever shows the answer span or what follows it (`leak_answer` aside).

  Args:
    trace_ids: the ground-truth trace, any length; empty gives an unhinted canvas.
    answer_span: token range [start, end) of the final answer in `trace_ids`; None
      where the trace states no answer.
    gen_length: L.
    ratio: eta in [0, 1]; floor(eta * N) of the N chunks are shown.
    chunk_range: (min, max) chunk length in tokens.
    rng: the only source of randomness.
    mask_id: what fills the rest.
    placement: "index" or "stretch" (see `chunks`).
    forbidden: further token ranges of the trace; chunks that overlap one are never
      shown (they still count in N, as what the switch `hide_answer_value` drops).
    leak_answer: also show the trace from the answer on, at its index, as far as the canvas goes.

  Returns:
    (tokens i32[L], hinted bool[L]).

  Raises:
    UserError: a ratio outside [0, 1], an answer span outside the trace, or an
      unknown placement.
  """
  trace = np.asarray(trace_ids, np.int32).reshape(-1)
  if not 0 <= ratio <= 1:
    raise UserError(f"hint ratio {ratio} is not in [0, 1]")
  answer_start = len(trace)
  if answer_span is not None:
    answer_start, answer_end = answer_span
    if not 0 <= answer_start <= answer_end <= len(trace):
      raise UserError(f"answer_span {answer_span} is not inside a trace of {len(trace)} tokens")

  if placement == "index":
    chunks = split_chunks(min(answer_start, gen_length), chunk_range, rng)
    placed = place_index(_allowed(choose_chunks(chunks, ratio, rng), forbidden))
  elif placement == "stretch":
    usable = max(gen_length - STRETCH_FREE_TAIL, 0)
    chunks = split_chunks(min(answer_start, usable), chunk_range, rng)
    chunks = [c for c in chunks if c[1] - c[0] >= chunk_range[0]]  # it drops a short tail
    chosen = _allowed(choose_chunks(chunks, ratio, rng), forbidden)
    placed = place_stretched(chosen, len(trace), gen_length)
  else:
    raise UserError(f"hint placement {placement!r} is not one of index, stretch")

  if leak_answer and answer_start < gen_length:
    placed += place_index([(answer_start, min(len(trace), gen_length))])
  tokens = np.full(gen_length, mask_id, np.int32)
  hinted = np.zeros(gen_length, bool)
  for at, start, end in placed:
    tokens[at : at + end - start] = trace[start:end]
    hinted[at : at + end - start] = True
  return tokens, hinted


def _allowed(chunks: list[Chunk], forbidden: Sequence[Chunk]) -> list[Chunk]:
  return [(s, e) for s, e in chunks if not any(s < fe and fs < e for fs, fe in forbidden)]


def hinted_group(
  trace_ids: Sequence[int],
  answer_span: tuple[int, int] | None,
  group_size: int,
  gen_length: int,
  cfg: HintConfig,
  rng: np.random.Generator,
  mask_id: int,
  forbidden: Sequence[Chunk] = (),
) -> tuple[np.ndarray, np.ndarray]:
  """G hinted canvases, each with its own eta ~ U[low, high] and its own chunks.

  Returns:
    (tokens i32[G,L], hinted bool[G,L]).
  """
  rows = [
    hint_canvas(
      trace_ids,
      answer_span,
      gen_length,
      float(rng.uniform(cfg.ratio_low, cfg.ratio_high)),
      (cfg.chunk_min, cfg.chunk_max),
      rng,
      mask_id,
      cfg.placement,
      forbidden if cfg.hide_answer_value else (),
      cfg.leak_answer,
    )
    for _ in range(group_size)
  ]
  return np.stack([tokens for tokens, _ in rows]), np.stack([hinted for _, hinted in rows])
