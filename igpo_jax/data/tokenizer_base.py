"""What every tokenizer offers, and what the tokenizers share. No jax in here."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from igpo_jax.data.records import ROLES, Message
from igpo_jax.errors import UserError

# Our own description file: all there is of a character tokenizer, and beside the
# others the special ids, which their own files do not always tell.
DESCRIPTION_FILE = "igpo_tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"

Offsets = list[tuple[int, int]]


class Tokenizer(abc.ABC):
  """What the program knows of a tokenizer.

  Attributes:
    vocab_size: ids are in [0, vocab_size); the model's table may be larger.
    mask_id: the absorbing token of masked diffusion.
    pad_id: fills prompts on the left; often the same as `eos_id`.
    eos_id: end of text; fills responses on the right.
    stop_ids: tokens that end an answer, `eos_id` first.
    turn_id: the token a chat model writes after its answer; `eos_id` if it has none.
    special_ids: ids that stand for no text; `decode` drops them.
  """

  vocab_size: int
  mask_id: int
  pad_id: int
  eos_id: int
  stop_ids: tuple[int, ...]
  turn_id: int
  special_ids: frozenset[int]

  @abc.abstractmethod
  def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
    """Token ids of `text` and the characters [start, end) that each one covers.

    Text that looks like a special token is encoded as the characters it is made of.
    Tokens that share a character (the bytes of one letter) all cover it.
    """

  @abc.abstractmethod
  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    """Chat messages in the model's format, up to where the assistant's turn begins.

    A last message with the role "assistant" is the beginning of that turn: it is
    written after the header as it stands, and left open.
    """

  @abc.abstractmethod
  def save(self, directory: epath.PathLike) -> None:
    """Writes what `load_tokenizer(directory)` needs."""

  @abc.abstractmethod
  def _decode_text(self, ids: list[int]) -> str:
    """Text of ids that hold no special token."""

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; see `encode_with_offsets`."""
    return self.encode_with_offsets(text)[0]

  def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
    """`encode_with_offsets` of many texts; faster where the library has threads."""
    return [self.encode_with_offsets(text) for text in texts]

  def decode(self, ids: Iterable[int], *, stop: bool = True) -> str:
    """Text of `ids`, without special tokens.

    Args:
      ids: any integers; those outside the vocabulary stand for nothing.
      stop: cut at the first of `stop_ids`.
    """
    ids = [int(i) for i in ids]
    if stop:
      end = next((k for k, i in enumerate(ids) if i in self.stop_ids), len(ids))
      ids = ids[:end]
    return self._decode_text(
      [i for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids]
    )


class Prefill(NamedTuple):
  """Messages that are complete, and the text that the assistant's turn begins with."""

  messages: Sequence[Message]
  text: str


def split_prefill(messages: Sequence[Message]) -> Prefill:
  """Takes a last message of the assistant off; checks the roles.

  Raises:
    UserError: no message, or a role that no chat format knows.
  """
  if not messages:
    raise UserError("a prompt needs at least one message")
  for message in messages:
    if message["role"] not in ROLES:
      raise UserError(
        f"unknown role {message['role']!r} in a prompt: expected one of {', '.join(ROLES)}"
      )
  if messages[-1]["role"] == "assistant":
    return Prefill(messages[:-1], messages[-1]["content"])
  return Prefill(messages, "")


def write_file(directory: epath.PathLike, name: str, data: bytes) -> None:
  """Writes a file under a temporary name and renames it: there whole or not at all."""
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / f".{name}.partial"
  partial.write_bytes(data)
  partial.replace(directory / name)


def write_description(directory: epath.PathLike, description: dict[str, Any]) -> None:
  """Writes `DESCRIPTION_FILE` into `directory`, which is made if need be."""
  text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
  write_file(directory, DESCRIPTION_FILE, text.encode())
