"""Prompts in a model's chat format: its own Jinja template, or an equivalent built-in format.

A template is rendered with the filters, tags and globals of Hugging Face's `transformers`, for
which templates are written; `tools` and `documents` are None. It runs in a sandbox, since it comes
with a download.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

from igpo_jax.data.records import Message
from igpo_jax.errors import UserError

# A piece of a rendered prompt: its text, and whether it may hold special tokens.
Segment = tuple[str, bool]
Chat = Callable[[Sequence[Message]], list[Segment]]


def llada_chat(messages: Sequence[Message]) -> list[Segment]:
  """The chat format of LLaDA-8B-Instruct, up to the assistant's header.

  One user message "Hi" is, in one piece,
  "<|startoftext|><|start_header_id|>user<|end_header_id|>\\n\\nHi<|eot_id|>"
  "<|start_header_id|>assistant<|end_header_id|>\\n\\n". Contents are stripped.
  """
  segments = [("<|startoftext|>", True)]
  for message in messages:
    segments += [
      (f"<|start_header_id|>{message['role']}<|end_header_id|>", True),
      ("\n\n" + message["content"].strip(), False),
      ("<|eot_id|>", True),
    ]
  return [*segments, ("<|start_header_id|>assistant<|end_header_id|>", True), ("\n\n", False)]


def chatml_chat(messages: Sequence[Message]) -> list[Segment]:
  """The ChatML format, up to the assistant's header."""
  segments = []
  for message in messages:
    segments += [
      ("<|im_start|>", True),
      (f"{message['role']}\n{message['content']}", False),
      ("<|im_end|>", True),
      ("\n", False),
    ]
  return [*segments, ("<|im_start|>", True), ("assistant\n", False)]


def role_chat(messages: Sequence[Message]) -> list[Segment]:
  """The format of LLaDA-MoE and LLaDA2, up to the assistant's header.

  One user message "Hi" is "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>".
  """
  names = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}
  segments = []
  for message in messages:
    segments += [
      (f"<role>{names[message['role']]}</role>", True),
      (message["content"], False),
      ("<|role_end|>", True),
    ]
  return [*segments, ("<role>ASSISTANT</role>", True)]


def plain_chat(messages: Sequence[Message]) -> list[Segment]:
  """Lines such as "User: ...", for a vocabulary without chat tokens (a base model)."""
  lines = [f"{m['role'].capitalize()}: {m['content']}\n" for m in messages]
  return [("".join(lines) + "Assistant: ", False)]


def text_of(segments: Sequence[Segment]) -> str:
  """The prompt as one text."""
  return "".join(text for text, _ in segments)


def merged(segments: Sequence[Segment]) -> list[Segment]:
  """Joins adjacent segments of one kind, since a tokenizer must see a text in one piece."""
  out: list[Segment] = []
  for text, special in segments:
    if out and out[-1][1] == special:
      out[-1] = (out[-1][0] + text, special)
    elif text:
      out.append((text, special))
  return out


class _Generation(jinja2.ext.Extension):
  """{% generation %}...{% endgeneration %}, which marks what a model wrote: only its content."""

  tags = frozenset({"generation"})

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    # A block with a scope: a variable that is set in it is unset after it.
    return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

  def _content(self, caller: Callable[[], str]) -> str:
    return caller()


class Template:
  """A chat template.

  Args:
    source: the template's text, in Jinja.
    tokens: texts of the tokenizer's special tokens by name, such as {"bos_token": "<s>"}.
    where: where the template comes from, for messages.
    now: the time that `strftime_now` writes, for templates with a date.

  Raises:
    UserError: the text is not valid Jinja.

  Attributes:
    now: as given.
    tells_time: whether the template asks for the time.
  """

  def __init__(self, source: str, tokens: Mapping[str, str], where: str, now: datetime.datetime):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # Jinja's own writes "<" as "\u003c", for web pages.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = self._refuse
    environment.globals["strftime_now"] = now.strftime
    self._tokens, self._where = dict(tokens), where
    self.now, self.tells_time = now, "strftime_now" in source
    try:
      self._template = environment.from_string(source)
    except Exception as error:  # a {% break %} outside a loop is Python's own error
      raise UserError(f"the chat template of {where} cannot be read: {error}") from error

  def _refuse(self, message: object) -> None:
    raise UserError(f"the chat template of {self._where} refuses these messages: {message}")

  def render(self, messages: Sequence[Message]) -> str:
    """The prompt up to where the assistant's turn begins.

    Raises:
      UserError: the template refuses the messages, or raises an error.
    """
    try:
      return self._template.render(
        messages=[dict(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **self._tokens,
      )
    except UserError:
      raise
    except Exception as error:  # whatever its expressions may raise
      raise UserError(f"the chat template of {self._where} fails: {error}") from error

  def chat(self, ours: Chat) -> Chat:
    """The chat format of this template.

    If the built-in format `ours` gives the same text for some messages, its segments are used: in
    them, a message that contains the text of a special token stays ordinary text. So are they if
    the template has something before it, such as a system message of its own.
    """

    def segments(messages: Sequence[Message]) -> list[Segment]:
      text, known = self.render(messages), ours(messages)
      said = text_of(known)
      # What comes before is cut off where a special token cuts, as a tokenizer does.
      if said == text or (text.endswith(said) and known[0][1]):
        return [(text.removesuffix(said), True), *known]
      return [(text, True)]

    return segments


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
