"""Requests to a model: a prompt, and the parts of the answer that are given. Needs no jax.

Parts of the answer are given as hints, TEXT@POSITION, or as a template of the whole answer:

    "A[MASK*6] B"        "A", six tokens to fill in, " B", and what is left of the canvas
    "so it is [MASK][END]"    one token to fill in; the answer ends there
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from igpo_jax.data.records import read_messages
from igpo_jax.data.sources import Prompting
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.errors import UserError
from igpo_jax.io.text import find_files, mend, read_objects

LENGTH_STEP = 64  # prompts are padded to a multiple of it: one program for many lengths
_MARK = re.compile(r"\[(?:MASK(?:\*(\d+))?|(END))\]", re.IGNORECASE)
_ALMOST = re.compile(r"(?<!\\)\[(?:MASK|END)\b[^\]]*\]?", re.IGNORECASE)

Hint = tuple[tuple[int, ...], int]  # token ids, and their position in the answer


@dataclasses.dataclass(frozen=True)
class Request:
  """One request, in token ids.

  Attributes:
    prompt: ids of the prompt, up to where the answer begins.
    hints: (ids, position in the answer) of each given piece.
    end: position at which the answer ends, filled with end-of-text from there on. None: the model
      decides where it ends.
  """

  prompt: tuple[int, ...]
  hints: tuple[Hint, ...] = ()
  end: int | None = None


@dataclasses.dataclass(frozen=True)
class Template:
  """An answer with gaps.

  Attributes:
    pieces: in their order: texts, and for each gap the number of tokens to fill in.
    ends: whether the answer ends after the last piece.
  """

  pieces: tuple[str | int, ...]
  ends: bool = False


def parse_hint(text: str) -> tuple[str, int]:
  """("TEXT", POSITION) from "TEXT@POSITION"; the last @ counts.

  Raises:
    UserError: no @, no text, or a position that is no number.
  """
  hint, at, position = text.rpartition("@")
  if not at or not hint or not re.fullmatch(r"[0-9]{1,9}", position):
    raise UserError(f"hint {text!r}: write TEXT@POSITION, the position in tokens from 0")
  return hint, int(position)


def parse_template(text: str) -> Template:
  r"""Parses the text of a template; the module's docstring has examples. \[ is a plain bracket.

  Raises:
    UserError: a mark is not well formed, a gap has no tokens, or text follows [END].
  """
  pieces: list[str | int] = []
  at, ends = 0, False
  for match in [*_MARK.finditer(text), None]:
    if match and text[: match.start()].endswith("\\"):
      continue  # \[MASK] is text
    plain = text[at : match.start() if match else len(text)]
    if wrong := _ALMOST.search(plain):
      raise UserError(f"template {text!r}: write [MASK], [MASK*N] or [END], not {wrong[0]}")
    if plain and ends:
      raise UserError(f"template {text!r}: {plain!r} follows [END]")
    if plain:
      pieces.append(plain.replace("\\[", "["))
    if match is None:
      break
    if ends:
      raise UserError(f"template {text!r}: {match[0]} follows [END]")
    at, ends = match.end(), bool(match[2])
    if not ends:
      count = int(match[1] or 1)
      if not 1 <= count < 10**6:
        raise UserError(f"template {text!r}: {match[0]} is no number of tokens")
      pieces.append(count)
  if not pieces:
    raise UserError(f"template {text!r}: there is nothing in it")
  return Template(tuple(pieces), ends)


def place_template(template: Template, tokenizer: Tokenizer) -> tuple[list[Hint], int | None]:
  """(hints, end of the answer or None) of a template. Each text is tokenized on its own."""
  hints, at = [], 0
  for piece in template.pieces:
    if isinstance(piece, int):
      at += piece
      continue
    ids = tuple(tokenizer.encode(piece))
    hints.append((ids, at))
    at += len(ids)
  return hints, at if template.ends else None


def canvas_with_hints(
  request: Request, length: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens i32[length], hinted bool[length]): mask tokens, and the given tokens in their places.

  Raises:
    UserError: a hint ends past the canvas, or two hints overlap.
  """
  tokens, hinted = np.full(length, tokenizer.mask_id, np.int32), np.zeros(length, bool)
  for ids, position in request.hints:
    end = position + len(ids)
    if end > length:
      raise UserError(
        f"a hint of {len(ids)} tokens at position {position} ends at {end}, past "
        f"gen_length={length}"
      )
    if hinted[position:end].any():
      raise UserError(f"the hint of {len(ids)} tokens at position {position} overlaps another one")
    tokens[position:end], hinted[position:end] = ids, True
  if request.end is not None:
    if request.end > length:
      raise UserError(f"the template takes {request.end} tokens, but gen_length={length}")
    if hinted[request.end :].any():
      raise UserError(f"a hint lies past the template's [END] at position {request.end}")
    tokens[request.end :], hinted[request.end :] = tokenizer.eos_id, True
  return tokens, hinted


def padded_length(request: Request) -> int:
  """The number of positions that the prompt of a request is padded to."""
  return -(-len(request.prompt) // LENGTH_STEP) * LENGTH_STEP


def batch_arrays(
  requests: Sequence[Request], length: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Prompts, left-padded to the longest `padded_length`, and canvases of `length` positions.

  Returns:
    (prompt i32[B,Tp], prompt_valid bool[B,Tp], canvas i32[B,L], hinted bool[B,L]), the first fields
    of `diffusion.completions.Rows`.
  """
  shape = (len(requests), max(map(padded_length, requests)))
  prompt, valid = np.full(shape, tokenizer.pad_id, np.int32), np.zeros(shape, bool)
  for row, request in enumerate(requests):
    start = shape[1] - len(request.prompt)
    prompt[row, start:], valid[row, start:] = request.prompt, True
  canvases = [canvas_with_hints(request, length, tokenizer) for request in requests]
  canvas, hinted = (np.stack(arrays) for arrays in zip(*canvases, strict=True))
  return prompt, valid, canvas, hinted


def read_requests(file: epath.PathLike) -> list[tuple[str, dict[str, Any]]]:
  """(position for messages, row) of each row of a JSONL file or a JSON array.

  Raises:
    UserError: there is no such file, it has no rows, or `make_request` would refuse a row; the
      message says which.
  """
  rows = []
  for path in find_files(str(file)):
    for where, row in read_objects(path):
      check_row(row, where)
      rows.append((where, row))
  if not rows:
    raise UserError(f"--input: {file} has no rows")
  return rows


def check_row(row: dict[str, Any], where: str) -> None:
  """Raises `UserError` if `make_request` would refuse a row. `where` begins the message."""
  if ("prompt" in row) == ("messages" in row):
    raise UserError(f'{where}: give "prompt" or "messages", one of them')
  for name in ("prompt", "template"):
    if not isinstance(row.get(name, ""), str):
      raise UserError(f'{where}: "{name}" should be text, not {type(row[name]).__name__}')
  hints = row.get("hints", [])
  if not isinstance(hints, list) or not all(isinstance(hint, str) for hint in hints):
    raise UserError(f'{where}: "hints" should be a list of "TEXT@POSITION", not {hints!r}')
  try:
    for hint in hints:
      parse_hint(hint)
    if "template" in row:
      parse_template(row["template"])
    if "messages" in row:
      read_messages(row["messages"])
  except ValueError as reason:
    raise UserError(f"{where}: {reason}") from reason


def make_request(
  row: dict[str, Any],
  tokenizer: Tokenizer,
  prompting: Prompting | None = None,
  raw: bool = False,
) -> Request:
  """The request that a row of JSON describes.

  Args:
    row: has "prompt" (text) or "messages" (a chat), and optionally "hints" (a list of
      TEXT@POSITION) and "template" (text).
    tokenizer: the model's tokenizer.
    prompting: makes messages of a "prompt"; None makes it the user's message.
    raw: give the prompt to the model without a chat format and without `prompting`.

  Raises:
    UserError: the tokenizer cannot encode a text, or `raw` is given with "messages".
  """
  if raw and "messages" in row:
    raise UserError('--raw has no chat format: give "prompt", not "messages"')
  if raw:
    prompt = tokenizer.encode(mend(row["prompt"]))
  elif "messages" in row:
    prompt = tokenizer.encode_prompt(read_messages(row["messages"]))
  else:
    prompt = tokenizer.encode_prompt((prompting or Prompting()).messages(mend(row["prompt"])))
  hints, end = [], None
  if "template" in row:
    hints, end = place_template(parse_template(mend(row["template"])), tokenizer)
  for text, at in map(parse_hint, row.get("hints", ())):
    hints.append((tuple(tokenizer.encode(mend(text))), at))
  return Request(tuple(prompt), tuple(hints), end)
