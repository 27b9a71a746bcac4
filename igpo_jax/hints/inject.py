"""From a trace to a hinted canvas: which tokens stand where (docs/method.md#exploration)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

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
  trace_ids: Sequence[int] | Integer[np.ndarray, " N"],
  answer_span: tuple[int, int] | None,
  gen_length: int,
  ratio: float,
  chunk_range: tuple[int, int],
  rng: np.random.Generator,
  mask_id: int,
  placement: str = "index",
  forbidden: Sequence[Chunk] = (),
  leak_answer: bool = False,
) -> tuple[Int32[np.ndarray, " L"], Bool[np.ndarray, " L"]]:
  """A completion canvas of mask tokens with some chunks of the trace in place.

  Only the part of the trace before its final answer, and only as much as fits the canvas, is cut
  into chunks. So no hint shows a token of the answer or of what follows it, unless `leak_answer`.

  Args:
    trace_ids: token ids of the ground-truth trace, of any length. An empty one gives a canvas
      without hints.
    answer_span: token range [start, end) of the final answer in `trace_ids`; None if the trace
      states no answer.
    gen_length: L, positions of the canvas.
    ratio: eta in [0, 1]: floor(eta * N) of the N chunks are shown.
    chunk_range: shortest and longest chunk, in tokens.
    rng: the only source of randomness.
    mask_id: the token at every position without a hint.
    placement: "index" puts a token at its index in the trace, "stretch" spreads the chunks
      (`chunks.place_stretched`).
    forbidden: token ranges of the trace, such as those that `hints.hide_answer_value` finds. A
      chunk that overlaps one of them is not shown, but counts in N.
    leak_answer: also show the trace from its answer on, each token at its index, as far as the
      canvas reaches.

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


def visible_hints(
  tokens: Int32[np.ndarray, "G L"],
  hinted: Bool[np.ndarray, "G L"],
  prompt_length: int,
  block_length: int,
  mask_id: int,
) -> tuple[Int32[np.ndarray, "G L"], Bool[np.ndarray, "G L"]]:
  """The hints that a block-causal model sees while it still has something to write.

  It writes block after block and sees a hint from that hint's block on, not before. A hint in a
  block after the last one with a mask is seen by nothing that the model writes: it would only be
  pasted to the answer. Such hints become masks.

  Example, blocks of 2 and no prompt, hints "a" to "c" and masks ".": ". a b c" -> ". a . .".

  Args:
    tokens, hinted: canvases with hints, as `hinted_group` gives them.
    prompt_length: tokens of the prompt; blocks are counted from its first one.
    block_length: positions of a block of the model.

  Returns:
    (tokens i32[G,L], hinted bool[G,L]).
  """
  block = (prompt_length + np.arange(tokens.shape[1])) // block_length
  last = np.max(np.where(hinted, -1, block), axis=1, keepdims=True)
  seen = hinted & (block <= last)
  return np.where(hinted & ~seen, np.int32(mask_id), tokens), seen


def hinted_group(
  trace_ids: Sequence[int] | Integer[np.ndarray, " N"],
  answer_span: tuple[int, int] | None,
  group_size: int,
  gen_length: int,
  hints: HintConfig,
  rng: np.random.Generator,
  mask_id: int,
  forbidden: Sequence[Chunk] = (),
) -> tuple[Int32[np.ndarray, "G L"], Bool[np.ndarray, "G L"]]:
  """G hinted canvases, each with a ratio eta ~ U[ratio_low, ratio_high] and chunks of its own.

  Arguments as `hint_canvas`; `hints` has the ratios, the chunk lengths and the placement.

  Returns:
    (tokens i32[G,L], hinted bool[G,L]).
  """
  rows = [
    hint_canvas(
      trace_ids,
      answer_span,
      gen_length,
      float(rng.uniform(hints.ratio_low, hints.ratio_high)),
      (hints.chunk_min, hints.chunk_max),
      rng,
      mask_id,
      hints.placement,
      forbidden if hints.hide_answer_value else (),
      hints.leak_answer,
    )
    for _ in range(group_size)
  ]
  return np.stack([tokens for tokens, _ in rows]), np.stack([hinted for _, hinted in rows])
