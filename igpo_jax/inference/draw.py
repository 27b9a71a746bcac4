"""Lines for a terminal: the tokens of a canvas, and the order in which they were filled in."""

from __future__ import annotations

import itertools

import numpy as np

from igpo_jax.data.tokenizer import Tokenizer


def show_token(token: int, tokenizer: Tokenizer) -> str:
  """A token as quoted text, or as <ID> if it stands for no text."""
  if token in tokenizer.special_ids:
    return f"<{token}>"
  return repr(tokenizer.decode([token], stop=False))


def preview(tokens: np.ndarray, hinted: np.ndarray, tokenizer: Tokenizer) -> str:
  """One line for a canvas: its given tokens and the gaps between them.

  Example: "[0] 'A'  [1..6] 6 masks  [7] ' B'  [8..31] 24 masks".

  Args:
    tokens: i32[L], token ids of the canvas.
    hinted: bool[L], True where a token is given.
  """
  parts = []
  kinds = ["end" if h and t == tokenizer.eos_id else "hint" if h else "mask"
           for t, h in zip(tokens.tolist(), hinted.tolist(), strict=True)]  # fmt: skip
  for kind, group in itertools.groupby(range(len(kinds)), kinds.__getitem__):
    places = list(group)
    first, last, count = places[0], places[-1], len(places)
    where = f"[{first}]" if count == 1 else f"[{first}..{last}]"
    if kind == "hint":
      parts += [f"[{k}] {show_token(int(tokens[k]), tokenizer)}" for k in places]
    else:
      word = "end of text" if kind == "end" else "mask" if count == 1 else f"{count} masks"
      parts.append(f"{where} {word}")
  return "  ".join(parts)


def order(
  tokens: np.ndarray, commit_step: np.ndarray, hinted: np.ndarray, tokenizer: Tokenizer
) -> str:
  """A line with the hints, then a line per denoising step with the tokens it committed.

  Args:
    tokens: i32[L], token ids of the answer.
    commit_step: i32[L], the step at which each was committed; -1 on hints.
    hinted: bool[L], True on hints.
  """
  lines = []
  for step in sorted(set(commit_step.tolist())):
    name = "hint" if step < 0 else f"step {step}"
    where = np.flatnonzero((commit_step == step) & (hinted | (step >= 0)))
    pieces = [f"[{k}] {show_token(int(tokens[k]), tokenizer)}" for k in where]
    if pieces:
      lines.append(f"{name:>8}  {'  '.join(pieces)}")
  return "\n".join(lines)
