"""Tokens into what a client reads: the text of an answer, whole or as it grows, and the objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.hints.leak import segments


class Text(NamedTuple):
  """The text of an answer.

  Attributes:
    text: up to the first stop token, the first text of `stop`, or `max_tokens` tokens.
    count: number of its tokens.
    ended: whether a stop token or a text of `stop` ended it; else it is as long as it may be.
  """

  text: str
  count: int
  ended: bool


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads the answers to one request.

  Attributes:
    tokenizer: the model's.
    max_tokens: the length of the longest answer.
    stop: texts that end an answer.
    block_length: with edits, the size of the pieces that are final together; 1 without.
  """

  tokenizer: Tokenizer
  max_tokens: int
  stop: tuple[str, ...] = ()
  block_length: int = 1

  def read(self, tokens: np.ndarray) -> Text:
    """The text of a completion, i32[L], or of its beginning."""
    ids = tokens.tolist()
    end = next((k for k, i in enumerate(ids) if i in self.tokenizer.stop_ids), len(ids))
    ended = end < len(ids) and end <= self.max_tokens
    ids = ids[: min(end, self.max_tokens)]
    text = self.tokenizer.decode(ids)
    cut = min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=-1)
    if cut < 0:
      return Text(text, len(ids), ended)
    needed = (k for k in range(len(ids)) if len(self.tokenizer.decode(ids[:k])) >= cut)
    return Text(text[:cut], next(needed, len(ids)), True)

  def final(self, tokens: np.ndarray) -> np.ndarray:
    """The beginning of a completion that is at work, i32[L], up to its first mask."""
    masks = np.flatnonzero(tokens == self.tokenizer.mask_id)
    end = int(masks[0]) if len(masks) else len(tokens)
    return tokens[: end if end == len(tokens) else end - end % self.block_length]

  def safe(self, text: Text) -> str:
    """What of the text of a beginning stays, whatever follows it.

    Held back are half a character, and what may be the beginning of a text of `stop`.
    """
    if text.ended:
      return text.text
    kept = text.text.rstrip("\ufffd")
    for size in range(max(map(len, self.stop), default=1) - 1, 0, -1):
      if any(len(stop) > size and kept.endswith(stop[:size]) for stop in self.stop):
        return kept[:-size]
    return kept

  def is_settled(self, beginning: np.ndarray) -> bool:
    """Whether nothing that follows this beginning of a completion changes the answer."""
    return len(beginning) > self.max_tokens or self.read(beginning).ended


def canvas(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str | None]:
  """A piece of text for each token of a completion; None where it is still masked."""
  pieces = tokenizer.pieces(tokens)
  return [
    None if token == tokenizer.mask_id else piece
    for token, piece in zip(tokens.tolist(), pieces, strict=True)
  ]


def order(
  tokens: np.ndarray, commit_step: np.ndarray, hinted: np.ndarray, tokenizer: Tokenizer
) -> dict[str, Any]:
  """The whole completion: ids, pieces, the steps that filled them in, and runs that were given."""
  return {
    "tokens": tokens.tolist(),
    "pieces": tokenizer.pieces(tokens),
    "commit_step": commit_step.tolist(),
    "hints": segments(hinted),
  }


def usage(prompts: Sequence[int], answers: Sequence[int]) -> dict[str, int]:
  """Numbers of tokens; a prompt counts once however many answers it has."""
  return {
    "prompt_tokens": sum(prompts),
    "completion_tokens": sum(answers),
    "total_tokens": sum(prompts) + sum(answers),
  }


def choice(index: int, text: str, finish: str | None, chat: bool, streamed: bool) -> dict[str, Any]:
  """An answer, or a piece of one, as an element of "choices"."""
  out: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
  if not chat:
    return out | {"text": text}
  if streamed:
    return out | {"delta": {"content": text} if text else {}}
  return out | {"message": {"role": "assistant", "content": text, "refusal": None}}
