"""From what a request asks to the rows that answer it: prompts in tokens, canvases, the sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from igpo_jax.config import SamplerConfig
from igpo_jax.data.records import Message
from igpo_jax.data.sources import Prompting
from igpo_jax.errors import UserError
from igpo_jax.inference.requests import Request, batch_arrays, make_request
from igpo_jax.inference.session import Session
from igpo_jax.inference.settings import Settings
from igpo_jax.serve.answers import Reader
from igpo_jax.serve.engine import Row
from igpo_jax.serve.fields import Asked
from igpo_jax.serve.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Job:
  """The rows of one request: `n` for each prompt.

  Attributes:
    rows: in the order of the choices.
    prompt_tokens: number of tokens of each prompt.
    reader: reads the answers.
    seed: of the noise.
  """

  rows: tuple[Row, ...]
  prompt_tokens: tuple[int, ...]
  reader: Reader
  seed: int


def make_job(
  asked: Asked,
  chat: bool,
  session: Session,
  settings: Settings,
  max_prompt: int,
  deliver: Callable[[int, Any], None],
) -> Job:
  """Makes the rows.

  Args:
    asked: the request, with a seed.
    chat: whether its prompts are chats, which are put into the model's format.
    session, settings: the model, and how it is asked.
    max_prompt: most tokens of a prompt.
    deliver: called with the number of a choice and what `Row.deliver` gets.

  Raises:
    Refusal: the model cannot be asked this.
  """
  sampler = _sampler(asked, settings.sampler)
  requests = [
    _request(asked, prompt, chat, session, settings.prompting) for prompt in asked.prompts
  ]
  for request in requests:
    if len(request.prompt) > max_prompt:
      raise Refusal(
        400, f"the prompt has {len(request.prompt)} tokens; this server takes {max_prompt}",
        "messages" if chat else "prompt", "context_length_exceeded",
      )  # fmt: skip
  seed = asked.seed or 0
  early = bool(asked.stop) and not asked.order
  rows: list[Row] = []
  for request in requests:
    try:
      session.check(request)
      arrays = [x[0] for x in batch_arrays([request], sampler.gen_length, session.tokenizer)]
    except UserError as error:
      raise Refusal(400, str(error)) from None
    for number in range(asked.n):
      index = len(rows)
      to = lambda update, index=index: deliver(index, update)
      rows.append(Row(*arrays, sampler, seed, number, to, watched=asked.stream or early))
  length = sampler.gen_length if asked.max_tokens is None else asked.max_tokens
  block = 1 if sampler.edit_threshold is None else sampler.block_length
  reader = Reader(session.tokenizer, length, asked.stop, block)
  return Job(tuple(rows), tuple(len(request.prompt) for request in requests), reader, seed)


def _sampler(asked: Asked, sampler: SamplerConfig) -> SamplerConfig:
  """The server's options with the request's. The canvas is a whole number of blocks."""
  given: dict[str, Any] = {}
  if asked.max_tokens is not None:
    if asked.max_tokens > sampler.gen_length:
      raise Refusal(
        400, f"max_tokens is {asked.max_tokens}; this server answers with at most "
        f"{sampler.gen_length} (its --gen_length)", "max_tokens",
      )  # fmt: skip
    blocks = -(-asked.max_tokens // sampler.block_length)
    given["gen_length"] = blocks * sampler.block_length
    given["steps"] = blocks * sampler.steps_per_block
  if asked.temperature is not None:
    given["temperature"] = float(asked.temperature)
  try:
    return dataclasses.replace(sampler, **given)
  except UserError as error:
    raise Refusal(400, str(error)) from None


def _request(
  asked: Asked, prompt: Any, chat: bool, session: Session, prompting: Prompting
) -> Request:
  row = {"messages": with_prompting(prompt, prompting)} if chat else {"prompt": prompt}
  if asked.template is not None:
    row["template"] = asked.template
  row["hints"] = [f"{text}@{start}" for text, start in asked.hints if isinstance(text, str)]
  try:
    request = make_request(row, session.tokenizer, raw=not chat)
  except UserError as error:
    raise Refusal(400, str(error)) from None
  ids = tuple((ids, start) for ids, start in asked.hints if not isinstance(ids, str))
  return dataclasses.replace(request, hints=(*request.hints, *ids))


def with_prompting(messages: Sequence[Message], prompting: Prompting) -> list[Message]:
  """A chat with the run's template around every question and its system message, if it has none."""
  out: tuple[Message, ...] = ()
  for message in messages:
    if message["role"] == "user":
      (*_, question) = prompting.messages(message["content"])
      out = (*out, question)
    else:
      out = (*out, message)
  if prompting.system and not any(message["role"] == "system" for message in out):
    out = ({"role": "system", "content": prompting.system}, *out)
  return list(out)
