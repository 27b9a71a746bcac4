"""A byte-level BPE tokenizer of vocab.json and merges.txt, for directories without tokenizer.json.

Directories of Dream, of older Qwen models and of GPT-2 have these two files, and code of their own
that reads them. How that code cuts a text into words, before it merges bytes, is in neither file.
It depends on the class that tokenizer_config.json names, so only known classes are read.
"""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from igpo_jax.errors import UserError
from igpo_jax.io.text import read_object

VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"

# Words of Qwen2: a contraction's end; letters, with one character that is no letter before them;
# a single digit; other characters, with one blank before and line ends after; blanks.
QWEN2_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


def has_bpe_files(directory: epath.Path) -> bool:
  """Whether a directory has both vocab.json and merges.txt."""
  return all((directory / name).exists() for name in (VOCABULARY_FILE, MERGES_FILE))


def tokenizer_json(directory: epath.Path) -> str:
  """Makes the text of a tokenizer.json that encodes as the directory's own code does.

  Added tokens are not in it: they are read from tokenizer_config.json and added_tokens.json.

  Raises:
    UserError: an unknown tokenizer class, or files that do not go together.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  name = read_object(directory / "tokenizer_config.json", missing={}).get("tokenizer_class")
  if name not in (*QWEN2_CLASSES, *GPT2_CLASSES):
    raise UserError(
      f"{directory}: {VOCABULARY_FILE} and {MERGES_FILE} of tokenizer_class={name!r} in "
      f"tokenizer_config.json; known: {', '.join((*QWEN2_CLASSES, *GPT2_CLASSES))}. Put a "
      "tokenizer.json there"
    )
  vocabulary = read_object(directory / VOCABULARY_FILE)
  merges = _read_merges(directory / MERGES_FILE, vocabulary)
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  if name in QWEN2_CLASSES:
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer.to_str()


def _read_merges(path: epath.Path, vocabulary: dict[str, Any]) -> list[tuple[str, str]]:
  """Pairs in the order in which they are merged.

  Raises:
    UserError: a line that is no pair, or whose parts or result the vocabulary lacks; a token
      whose id is no number.
  """
  odd = next((token for token, id in vocabulary.items() if type(id) is not int or id < 0), None)
  if odd is not None:
    raise UserError(
      f"{path.parent / VOCABULARY_FILE}: {odd!r} has the id {json.dumps(vocabulary[odd])}, which "
      "is no number"
    )
  try:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not text: {error}") from None
  merges = []
  for number, line in enumerate(lines, 1):
    line = line.rstrip("\r")
    if not line or (number == 1 and line.startswith("#version")):
      continue
    first, _, second = line.partition(" ")
    missing = [part for part in (first, second, first + second) if part not in vocabulary]
    if not second or missing:
      raise UserError(
        f"{path}: line {number}, {line!r}, is no pair of tokens of {VOCABULARY_FILE} that make "
        "another one"
      )
    merges.append((first, second))
  return merges
