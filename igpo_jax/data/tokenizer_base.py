"""The interface of all tokenizers, and what they share. Does not import jax."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from igpo_jax.data.records import ROLES, Message
from igpo_jax.errors import UserError

# A file that this program writes into every tokenizer's directory. A character or word tokenizer
# has no other file. For Hugging Face tokenizers it has the special ids, which their own files do
# not always give.
DESCRIPTION_FILE = "igpo_tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"

Offsets = list[tuple[int, int]]
LONGEST_CHARACTER = 4  # bytes in UTF-8, each of which may be a token


class Tokenizer(abc.ABC):
  """The interface of all tokenizers.

  Attributes:
    vocab_size: ids are in [0, vocab_size). The model's embedding may have more rows.
    mask_id: id of the mask, the absorbing token of masked diffusion.
    pad_id: id that fills prompts on the left; often equal to `eos_id`.
    eos_id: id of the end of text, which also fills responses on the right.
    stop_ids: ids that end an answer, `eos_id` first.
    turn_id: id that a chat model writes after its answer; `eos_id` if it has none.
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
    """(token ids of `text`, the characters [start, end) that each token covers).

    Text that looks like a special token is encoded as ordinary characters. If several tokens are
    the bytes of one character, all of them cover it.
    """

  @abc.abstractmethod
  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    """Token ids of chat messages in the model's format, up to the assistant's header.

    If the last message has the role "assistant", it is the beginning of the answer: its text
    follows the header as it is, and the message is not closed.
    """

  @abc.abstractmethod
  def save(self, directory: epath.PathLike) -> None:
    """Writes the files from which `load_tokenizer(directory)` makes this tokenizer again."""

  @abc.abstractmethod
  def _decode_text(self, ids: list[int]) -> str:
    """The text of ids of the vocabulary, none of which is special."""

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; see `encode_with_offsets`."""
    return self.encode_with_offsets(text)[0]

  def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
    """`encode_with_offsets` of many texts; faster if the library uses threads."""
    return [self.encode_with_offsets(text) for text in texts]

  def decode(self, ids: Iterable[int], *, stop: bool = True) -> str:
    """The text of `ids`, without special tokens.

    Args:
      ids: any integers; numbers outside the vocabulary are dropped.
      stop: end the text at the first of `stop_ids`.
    """
    ids = [int(i) for i in ids]
    if stop:
      end = next((k for k, i in enumerate(ids) if i in self.stop_ids), len(ids))
      ids = ids[:end]
    return self._decode_text(
      [i for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids]
    )

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """The text that each token adds to those before it, to show a completion token by token.

    Joined without the names of special tokens they are `decode(ids, stop=False)`.

    Args:
      ids: any integers.

    Returns:
      A text per id. A special token, or a number outside the vocabulary, gets a name such as
      "<eos>", "<mask>" or "<17>". Where several tokens are the bytes of one character, the last
      of them has it and the others are "".
    """
    out: list[str] = []
    before: list[int] = []  # the tokens of the last text: spaces may depend on them
    waiting: list[int] = []  # tokens whose character is not complete
    last = -1  # where the last of them is in `out`

    def added() -> str:
      shown = self._decode_text(before)
      text = self._decode_text([*before, *waiting])
      return text[len(shown) :] if text.startswith(shown) else self._decode_text(waiting)

    for i in map(int, ids):
      if i in self.special_ids or not 0 <= i < self.vocab_size:
        out.append(self._special_name(i))
        continue
      waiting.append(i)
      last = len(out)
      text = added()
      if text.endswith("\ufffd") and len(waiting) < LONGEST_CHARACTER:
        out.append("")
        continue
      out.append(text)
      before, waiting = waiting, []
    if waiting:
      out[last] = added()
    return out

  def _special_name(self, token: int) -> str:
    # One id may have several of the roles: the last name in this list wins.
    names = {self.pad_id: "pad", self.turn_id: "turn", self.mask_id: "mask", self.eos_id: "eos"}
    return f"<{names.get(token, token)}>"


class Prefill(NamedTuple):
  """A prompt's complete messages, and the text with which the assistant's answer begins."""

  messages: Sequence[Message]
  text: str


def split_prefill(messages: Sequence[Message]) -> Prefill:
  """Splits off a last message of the assistant, and checks the roles.

  Raises:
    UserError: there is no message, or a role is not one of `ROLES`.
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
  """Writes a file under a temporary name and renames it, so that it is never there in part."""
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / f".{name}.partial"
  partial.write_bytes(data)
  partial.replace(directory / name)


def write_description(directory: epath.PathLike, description: dict[str, Any]) -> None:
  """Writes `DESCRIPTION_FILE` into `directory`, which is made if there is none."""
  text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
  write_file(directory, DESCRIPTION_FILE, text.encode())
