"""Tokens of a model directory that are not in its tokenizer.json, but in files beside it.

They are in tokenizer_config.json (`added_tokens_decoder`) or in added_tokens.json. If a file only
names a token (`mask_token: "<|mask|>"`), its id follows the vocabulary, in the order of `NAMED`, as
in the library `transformers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from igpo_jax.errors import UserError

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Added(NamedTuple):
  """One added token.

  Attributes:
    text: how it is written in a text.
    id: its token id.
    special: whether only the chat format may write it. Ordinary text never encodes to it.
    lstrip, rstrip: whether blanks to its left or right belong to it.
  """

  text: str
  id: int
  special: bool
  lstrip: bool = False
  rstrip: bool = False


def token_text(value: Any) -> str | None:
  """The text of a token in a file: "<s>" or {"content": "<s>", ...}; None for anything else."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) and value else None


def named_tokens(*files: Mapping[str, Any]) -> dict[str, str]:
  """Texts of special tokens by name, such as {"bos_token": "<s>"}; earlier files win."""
  found = {}
  for name in NAMED:
    texts = (token_text(file.get(name)) for file in files)
    text = next((text for text in texts if text), None)
    if text:
      found[name] = text
  return found


def find_added(
  vocabulary: Mapping[str, int],
  config: Mapping[str, Any],
  added: Mapping[str, Any],
  special_map: Mapping[str, Any],
  where: Any,
) -> list[Added]:
  """The tokens that the vocabulary lacks.

  Args:
    vocabulary: text -> id in tokenizer.json, including its own added tokens.
    config, added, special_map: contents of tokenizer_config.json, added_tokens.json and
      special_tokens_map.json.
    where: the directory, for messages.

  Raises:
    UserError: an id is not a number, or another token has it.
  """
  names = list(named_tokens(config, special_map).values())
  for file in (config, special_map):
    extra = file.get("additional_special_tokens") or file.get("extra_special_tokens")
    texts = extra if isinstance(extra, list) else []
    names += [text for item in texts if (text := token_text(item))]
  found: dict[str, Added] = {}
  taken = {id: text for text, id in vocabulary.items()}

  def add(text: str | None, id: Any, **flags: Any) -> None:
    if text is None or text in vocabulary or text in found:
      return
    number = int(id) if isinstance(id, int) or str(id).isdecimal() else -1
    if number < 0 or isinstance(id, bool):
      raise UserError(f"{where}: the added token {text!r} has the id {id!r}, which is no number")
    if number in taken:
      raise UserError(
        f"{where}: the added token {text!r} has the id {number}, which is that of {taken[number]!r}"
      )
    taken[number] = text
    found[text] = Added(text, number, **flags)

  decoder = config.get("added_tokens_decoder")
  for id, token in (decoder if isinstance(decoder, dict) else {}).items():
    text = token_text(token)
    flag = lambda name: isinstance(token, dict) and token.get(name) is True  # noqa: B023
    special = flag("special") or text in names
    add(text, id, special=special, lstrip=flag("lstrip"), rstrip=flag("rstrip"))
  for text, id in added.items():
    add(text, id, special=text in names)
  for text in names:
    add(text, max(taken, default=-1) + 1, special=True)
  return list(found.values())


class Splitter:
  """Cuts texts at added tokens. Of several that match at one place, the longest wins."""

  def __init__(self, tokens: Sequence[Added]):
    ordered = sorted(tokens, key=lambda token: -len(token.text))
    parts = [
      ("(?:(?<!\\s)\\s+)?" if token.lstrip else "")
      + re.escape(token.text)
      + ("\\s*" if token.rstrip else "")
      for token in ordered
    ]
    self._ordered = ordered
    self._pattern = re.compile("|".join(f"({part})" for part in parts)) if parts else None

  def __bool__(self) -> bool:
    return bool(self._ordered)

  def encode(
    self, text: str, encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]]
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) of `text`. The text between added tokens is encoded by `encode`."""
    if self._pattern is None:
      return encode(text)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end, token in self._pieces(text):
      if token is not None:
        ids.append(token.id)
        offsets.append((start, end))
      elif start < end:
        more, places = encode(text[start:end])
        ids += more
        offsets += [(start + a, start + b) for a, b in places]
    return ids, offsets

  def _pieces(self, text: str) -> Iterator[tuple[int, int, Added | None]]:
    at = 0
    for match in self._pattern.finditer(text):
      yield at, match.start(), None
      yield match.start(), match.end(), self._ordered[match.lastindex - 1]
      at = match.end()
    yield at, len(text), None
