"""The record: one problem as every source gives it and every loop takes it."""

from __future__ import annotations

import dataclasses

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclasses.dataclass(frozen=True)
class Record:
  """One problem.

  Attributes:
    id: unique within its source and stable between runs.
    prompt: chat messages, the last one the user's question.
    trace: ground-truth reasoning ending in the answer; "" where there is none.
    answer: the gold answer, as a grader takes it.
    answer_span: characters [start, end) of the final answer inside `trace`, or
      None where it is not known; what the span covers is never hinted (docs/method.md#exploration).
  """

  id: str
  prompt: tuple[Message, ...]
  trace: str
  answer: str
  answer_span: tuple[int, int] | None = None

  @property
  def question(self) -> str:
    """The user's last message."""
    return self.prompt[-1]["content"]
