"""The record: one problem, as data sources give it and as training and evaluation take it."""

from __future__ import annotations

import dataclasses
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = ("system", "user", "assistant")
# Other names of these roles: ShareGPT's, and OpenAI's newer one for a system message.
_ALSO_CALLED = {"human": "user", "gpt": "assistant", "developer": "system"}


@dataclasses.dataclass(frozen=True)
class Record:
  """One problem.

  Attributes:
    id: unique within its source, and the same in every run.
    prompt: chat messages; the last one is the user's question.
    trace: ground-truth reasoning that ends with the answer; "" if there is none.
    answer: the gold answer as text; "" if there is none.
    answer_span: characters [start, end) of the final answer in `trace`; None if they are not known.
      Hints never show them (docs/method.md#exploration).
    task: name of the task, for runs with several tasks (`reward.verifier` = "task", metrics by
      task); "" if it is not known.
    gold: what the verifier needs beside `answer`, as plain JSON values, such as
      {"numbers": [3, 7, 2], "target": 23}; None if `answer` is enough.
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
  """Reads chat messages from a JSON value such as [{"role": "user", "content": "Hi"}, ...].

  A content may be a list of parts {"type": "text", "text": ...}, which are joined. ShareGPT's form,
  {"from": "human", "value": "Hi"}, is read as well.

  Raises:
    ValueError: it is something else. The error's text says what, such as "messages that are no
      list".
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
  """The joined text of a list of parts; None if one of them is not text, such as an image."""
  texts = []
  for part in parts:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
      return None
    texts.append(text)
  return "".join(texts)
