"""The fields of a request's body: read and checked, one by one. Needs no jax and no server."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from igpo_jax.config.fields import meant
from igpo_jax.data.records import read_messages
from igpo_jax.inference.requests import parse_template
from igpo_jax.io.text import mend
from igpo_jax.serve.refusal import Refusal

MOST_CHOICES = 64  # answers to one request
MOST_STOPS = 4
# Fields of OpenAI's whose effect is not offered, and the value that means "without it".
WITHOUT = {
  "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0,
  "logit_bias": {}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "best_of": 1,
  "echo": False, "suffix": "", "response_format": {"type": "text"}, "modalities": ["text"],
  "store": False,
}  # fmt: skip
IGNORED = ("user", "metadata", "safety_identifier")  # they say who asks
COMMON = ("model", "max_tokens", "temperature", "seed", "stop", "n", "stream", "stream_options",
          "hints", "template", "order")  # fmt: skip
CHAT, TEXT = ("messages", "max_completion_tokens"), ("prompt",)


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request as its body states it. What is None was not given.

  Attributes:
    prompts: of a chat its messages alone; else texts.
    hints: (text or token ids, position in the answer) of each given piece.
    template: the answer with gaps, as `igpo_jax.generate` reads it.
    stop: texts that end an answer.
    n: answers to each prompt.
    usage: whether a stream ends with the number of tokens.
    denoising: whether a stream shows the canvas while it is filled in.
    order: whether an answer comes with its tokens, and with the step at which each was filled in.
  """

  prompts: tuple[Any, ...]
  model: str | None = None
  max_tokens: int | None = None
  temperature: float | None = None
  seed: int | None = None
  stop: tuple[str, ...] = ()
  n: int = 1
  stream: bool = False
  usage: bool = False
  denoising: bool = False
  order: bool = False
  hints: tuple[tuple[str | tuple[int, ...], int], ...] = ()
  template: str | None = None


def read_body(body: bytes) -> dict[str, Any]:
  """The JSON object of a body.

  Raises:
    Refusal: it is none.
  """
  try:
    value = json.loads(body)
  except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
    raise Refusal(400, f"the body is not JSON: {reason}") from None
  if not isinstance(value, dict):
    raise Refusal(400, f"the body should be a JSON object, not {_kind(value)}")
  return value


def parse(body: dict[str, Any], chat: bool) -> Asked:
  """Reads the fields of /v1/chat/completions (`chat`) or of /v1/completions.

  Raises:
    Refusal: a field is unknown, is missing, or cannot have its value.
  """
  given = {name: value for name, value in body.items() if value is not None}
  own = (*COMMON, *(CHAT if chat else TEXT))
  for name, value in given.items():
    if name in WITHOUT:
      if value != WITHOUT[name]:
        raise Refusal(400, f"{name} is not offered; leave it out", name, "unsupported_parameter")
    elif name not in own and name not in IGNORED:
      raise Refusal(
        400, f"unknown field {name[:60]!r}{meant(name, own)}", name[:60], "unknown_parameter"
      )
  options = _take(given, "stream_options", dict, {}, "an object")
  if unknown := set(options) - {"include_usage", "denoising", "include_obfuscation"}:
    name = f"stream_options.{sorted(unknown)[0][:60]}"
    raise Refusal(400, f"unknown field {name!r}", name, "unknown_parameter")
  if options and not given.get("stream"):
    raise Refusal(400, "stream_options goes with stream=true", "stream_options")
  asked = Asked(
    prompts=_messages(given) if chat else _prompts(given),
    model=_take(given, "model", str, None, "text"),
    max_tokens=_number(given, _length_name(given), 1, 10**6, whole=True),
    temperature=_number(given, "temperature", 0, 2),
    seed=_number(given, "seed", 0, 2**32 - 1, whole=True),
    stop=_stops(given),
    n=_number(given, "n", 1, MOST_CHOICES, whole=True) or 1,
    stream=_take(given, "stream", bool, False, "true or false"),
    usage=_take(options, "include_usage", bool, False, "true or false", "stream_options."),
    denoising=_take(options, "denoising", bool, False, "true or false", "stream_options."),
    order=_take(given, "order", bool, False, "true or false"),
    hints=tuple(_hint(item, f"hints[{k}]") for k, item in enumerate(
      _take(given, "hints", list, [], "a list"))),
    template=_template(given),
  )  # fmt: skip
  if len(asked.prompts) * asked.n > MOST_CHOICES:
    raise Refusal(400, f"n times the prompts is more than {MOST_CHOICES} answers", "n")
  return asked


def _kind(value: Any) -> str:
  names = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    type(None): "null",
  }
  return names.get(type(value), "a number")


def _take(given: dict, name: str, kind: type, default: Any, what: str, under: str = "") -> Any:
  value = given.get(name)
  if value is None:
    return default
  if not isinstance(value, kind):
    raise Refusal(400, f"{under}{name} should be {what}, not {_kind(value)}", under + name)
  return value


def _number(given: dict, name: str, low: float, high: float, whole: bool = False) -> Any:
  value = given.get(name)
  if value is None:
    return None
  kinds = (int,) if whole else (int, float)
  if isinstance(value, bool) or not isinstance(value, kinds):
    what = "a whole number" if whole else "a number"
    kind = _kind(value) if not isinstance(value, float) else "a fraction"
    raise Refusal(400, f"{name} should be {what}, not {kind}", name)
  if not low <= value <= high or not math.isfinite(value):
    raise Refusal(400, f"{name} should be between {low} and {high}", name)
  return value


def _length_name(given: dict) -> str:
  names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
  if len(names) == 2 and given[names[0]] != given[names[1]]:
    raise Refusal(400, "max_tokens and max_completion_tokens differ: give one of them", names[0])
  return names[0] if names else "max_tokens"


def _messages(given: dict) -> tuple[Any, ...]:
  if "messages" not in given:
    raise Refusal(400, "messages is missing", "messages", "missing_required_parameter")
  try:
    messages = read_messages(given["messages"])
  except ValueError as reason:
    raise Refusal(400, f"messages: {reason}", "messages") from None
  return (tuple({**message, "content": mend(message["content"])} for message in messages),)


def _prompts(given: dict) -> tuple[str, ...]:
  if "prompt" not in given:
    raise Refusal(400, "prompt is missing", "prompt", "missing_required_parameter")
  prompts = given["prompt"]
  prompts = [prompts] if isinstance(prompts, str) else prompts
  if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
    raise Refusal(400, "prompt should be text or a list of texts", "prompt")
  if not prompts:
    raise Refusal(400, "prompt is an empty list", "prompt")
  return tuple(map(mend, prompts))


def _stops(given: dict) -> tuple[str, ...]:
  stops = given.get("stop")
  stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
  if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
    raise Refusal(400, "stop should be text or a list of texts", "stop")
  if not all(stops) or len(stops) > MOST_STOPS:
    raise Refusal(400, f"stop: up to {MOST_STOPS} texts, none of them empty", "stop")
  return tuple(map(mend, stops))


def _hint(item: Any, where: str) -> tuple[str | tuple[int, ...], int]:
  form = '{"text": TEXT, "start": POSITION} or {"tokens": [ID, ...], "start": POSITION}'
  if not isinstance(item, dict) or set(item) not in ({"text", "start"}, {"tokens", "start"}):
    raise Refusal(400, f"{where} should be {form}", where)
  start = _number(item, "start", 0, 10**6, whole=True)
  if start is None:
    raise Refusal(400, f"{where} should be {form}", where)
  if "text" in item:
    if not isinstance(item["text"], str) or not item["text"]:
      raise Refusal(400, f"{where}.text should be text that is not empty", where)
    return mend(item["text"]), start
  ids = item["tokens"]
  if not isinstance(ids, list) or not ids:
    raise Refusal(400, f"{where}.tokens should be a list of ids", where)
  return tuple(_number({where: k}, where, 0, 2**31 - 1, whole=True) or 0 for k in ids), start


def _template(given: dict) -> str | None:
  template = _take(given, "template", str, None, "text")
  if template is not None:
    try:
      parse_template(template := mend(template))
    except ValueError as reason:  # UserError is one
      raise Refusal(400, str(reason), "template") from None
  return template
