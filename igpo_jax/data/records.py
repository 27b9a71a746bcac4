"""The record: one problem as every source gives it and every loop takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = ("system", "user", "assistant")
# Other names in use: ShareGPT's, and OpenAI's newer one for a system message.
_ALSO_CALLED = {"human": "user", "gpt": "assistant", "developer": "system"}


@dataclasses.dataclass(frozen=True)
class Record:
  """One problem.

  Attributes:
    id: unique within its source and stable between runs.
    prompt: chat messages, the last one the user's question.
    trace: ground-truth reasoning ending in the answer; "" where there is none.
    answer: the gold answer as text; "" where there is none.
    answer_span: characters [start, end) of the final answer inside `trace`, or
      None where it is not known; what the span covers is never hinted (docs/method.md#exploration).
    task: the name of its task, for runs with several (`reward.verifier` = "task", metrics by
      task); "" where it was not said.
    gold: what its verifier needs where a text does not say it, as plain JSON values, such as
      {"numbers": [3, 7, 2], "target": 23}; None: the answer is all.
  """

  id: str
  prompt: tuple[Message, ...]
  trace: str
  answer: str
  answer_span: tuple[int, int] | None = None
  task: str = ""
  gold: Any = None

  @property
  def question(self) -> str:
    """The user's last message."""
    return self.prompt[-1]["content"]


def read_messages(value: Any) -> tuple[Message, ...]:
  """Chat messages from what a file says: [{"role": "user", "content": "Hi"}, ...].

  A content may be a list of parts {"type": "text", "text": ...}, which are joined. ShareGPT's
  {"from": "human", "value": "Hi"} is read, too.

  Raises:
    ValueError: it is something else; the text is a reason, such as "messages that are no list".
  """
  if not isinstance(value, list | tuple):
    raise ValueError("messages that are no list")
  if not value:
    raise ValueError("an empty list of messages")
  return tuple(_message(item) for item in value)


def _message(item: Any) -> Message:
  if not isinstance(item, dict):
    raise ValueError('a message that is no object with "role" and "content"')
  role = item.get("role", item.get("from"))
  role = _ALSO_CALLED.get(role, role) if isinstance(role, str) else role
  if role not in ROLES:
    raise ValueError(f"a message with the role {role!r}, not one of {', '.join(ROLES)}")
  content = item.get("content", item.get("value"))
  if isinstance(content, list | tuple):
    content = _joined(content)
  if not isinstance(content, str):
    raise ValueError("a message whose content is not text")
  return {"role": role, "content": content}


def _joined(parts: Any) -> str | None:
  """The text of a list of parts; None if one is something else, such as an image."""
  texts = []
  for part in parts:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
      return None
    texts.append(text)
  return "".join(texts)
