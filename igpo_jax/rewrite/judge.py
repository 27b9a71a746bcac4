"""Accepts a concise trace if it has the answer of the original, and few enough tokens."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.rewards import registry
from igpo_jax.rewards.score import Scorer

# Why a trace is not accepted; rejects are counted under these.
EMPTY = "empty"
CUT_OFF = "cut off by the endpoint"
NO_ANSWER = "no final answer"
WRONG = "wrong answer"
UNREADABLE = "answer cannot be read"
TOO_LONG = "too long"


class Verdict(NamedTuple):
  """A decision.

  Attributes:
    reason: why the text was refused; None if it was accepted.
    complaint: the reason in words for the model that wrote the text.
    tokens: number of tokens of the text, including the one that ends the turn.
  """

  reason: str | None
  complaint: str
  tokens: int


class Judge:
  """Decides by the grader and by the tokenizer of the model that is to be trained.

  Args:
    scorer: grades by the verifier of the task; its rules say where an answer may be.
    tokenizer: counts tokens.
    max_tokens: the largest number of tokens of an accepted trace, including the one that ends the
      turn: the positions that it takes on a canvas.
  """

  def __init__(self, scorer: Scorer, tokenizer: Tokenizer, max_tokens: int):
    self.scorer, self.tokenizer, self.max_tokens = scorer, tokenizer, max_tokens

  def count(self, text: str) -> int:
    """The number of positions that a trace takes on a canvas: its tokens and the end of turn."""
    return len(self.tokenizer.encode(text)) + 1

  async def gradable(self, record: Record) -> bool:
    """Whether the gold answer equals itself: if not, no rewriting can be accepted."""
    if registry.verifier_of(record, self.scorer.verifier) != registry.POOLED:
      return True
    status, correct, _ = await self._grade(rf"\boxed{{{record.answer}}}", record)
    return correct or status == "timeout"

  async def __call__(self, record: Record, text: str, cut_off: bool = False) -> Verdict:
    """Judges a trace written for `record`.

    Args:
      cut_off: the endpoint stopped the text at its own limit.
    """
    tokens = self.count(text)
    limit = f"at most {self.max_tokens} tokens are allowed"
    if not text:
      return Verdict(EMPTY, "You wrote nothing.", tokens)
    if cut_off:
      return Verdict(CUT_OFF, f"Your solution is far too long and was cut off; {limit}.", tokens)
    status, correct, extracted = await self._grade(text, record)
    if extracted is None:
      return Verdict(NO_ANSWER, r"Your solution has no final answer in \boxed{}.", tokens)
    if not correct:
      right = f"but the final answer is {record.answer}"
      if record.gold is not None:  # of several answers that are right, the record has one or none
        right = "which is not right"
      said = f"Your solution ends in {extracted}, {right}."
      return Verdict(WRONG if status == "ok" else UNREADABLE, said, tokens)
    if tokens > self.max_tokens:
      return Verdict(TOO_LONG, f"Your solution has {tokens} tokens; {limit}.", tokens)
    return Verdict(None, "", tokens)

  async def _grade(self, text: str, record: Record) -> tuple[str, bool, str | None]:
    pending = self.scorer.submit([text], [record])
    # The workers may take their time; other requests go on meanwhile.
    scores = await asyncio.to_thread(pending.result)
    return scores.status[0], bool(scores.correct[0]), scores.extracted[0]
