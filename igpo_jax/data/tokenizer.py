"""Character, word and SentencePiece tokenizers; loading a tokenizer of any kind from a directory.

All tokenizers have one interface (`tokenizer_base.Tokenizer`), so the rest of the program does not
depend on the kind. Hugging Face tokenizers are in `hf_tokenizer`. Does not import jax.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from etils import epath

from igpo_jax.data import bpe_files
from igpo_jax.data.records import ROLES, Message
from igpo_jax.data.task_registry import task_with
from igpo_jax.data.tokenizer_base import (
  DESCRIPTION_FILE,
  HF_FILE,
  SENTENCEPIECE_FILE,
  Offsets,
  Tokenizer,
  split_prefill,
  write_description,
  write_file,
)
from igpo_jax.errors import UserError
from igpo_jax.io.text import mend, read_object

CHAR, WORDS = "char", "words"  # "char:TASK", "words:TASK"; "char" stands for "char:chains"
OWN_KINDS = (CHAR, WORDS)  # tokenizers that consist of a description file only


class CharTokenizer(Tokenizer):
  """One token per character, for generated tasks.

  Ids: 0 is the end of text and the padding, 1 the mask, 2 the end of a message; then the alphabet.

  Worked example, alphabet "ab=": encode("ab=") is [3, 4, 5]; the prompt of the one
  message "a=" is [3, 5, 2].
  """

  EOS, MASK, TURN = 0, 1, 2

  def __init__(self, alphabet: str):
    if not alphabet or len(set(alphabet)) != len(alphabet):
      raise UserError(
        f"the alphabet {alphabet!r} of the character tokenizer is empty or has a character twice"
      )
    self.alphabet = alphabet
    self._ids = {character: 3 + k for k, character in enumerate(alphabet)}
    self.vocab_size = 3 + len(alphabet)
    self.mask_id, self.eos_id, self.pad_id = self.MASK, self.EOS, self.EOS
    self.stop_ids = (self.EOS,)
    self.turn_id = self.EOS
    self.special_ids = frozenset((self.EOS, self.MASK, self.TURN))

  def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
    try:
      ids = [self._ids[character] for character in text]
    except KeyError as error:
      raise UserError(
        f"the character {error.args[0]!r} of {text[:40]!r} is not in this"
        f" tokenizer's alphabet {self.alphabet!r}"
      ) from None
    return ids, [(k, k + 1) for k in range(len(text))]

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    ids, prefill = [], split_prefill(messages)
    for message in prefill.messages:
      ids += [*self.encode(message["content"]), self.TURN]
    return ids + self.encode(prefill.text)

  def save(self, directory: epath.PathLike) -> None:
    write_description(directory, {"type": CHAR, "alphabet": self.alphabet})

  def _decode_text(self, ids: list[int]) -> str:
    return "".join(self.alphabet[i - 3] for i in ids)


class WordTokenizer(Tokenizer):
  """One token per word, for generated tasks told in sentences. Words are separated by blanks.

  Ids: 0 is the end of text and the padding, 1 the mask, 2 the end of a message; then the words. For
  a text with single spaces between its words, `decode(encode(text)) == text`.

  Worked example, words ("a", "bus", "."): encode("a bus .") is [3, 4, 5].
  """

  EOS, MASK, TURN = 0, 1, 2

  def __init__(self, words: Sequence[str]):
    words = tuple(words)
    if not words or len(set(words)) != len(words):
      raise UserError(
        f"a word tokenizer needs at least one word and no word twice; it was given {len(words)}"
      )
    odd = [word for word in words if word.split() != [word]]
    if odd:
      raise UserError(f"the word {odd[0]!r} of a tokenizer is empty or has a blank in it")
    self.words = words
    self._ids = {word: 3 + k for k, word in enumerate(words)}
    self.vocab_size = 3 + len(words)
    self.mask_id, self.eos_id, self.pad_id = self.MASK, self.EOS, self.EOS
    self.stop_ids = (self.EOS,)
    self.turn_id = self.EOS
    self.special_ids = frozenset((self.EOS, self.MASK, self.TURN))

  def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
    found = list(re.finditer(r"\S+", text))
    try:
      ids = [self._ids[match.group()] for match in found]
    except KeyError as error:
      raise UserError(
        f"the word {error.args[0]!r} of {text[:40]!r} is not one of this tokenizer's"
        f" {len(self.words)} words"
      ) from None
    return ids, [match.span() for match in found]

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    ids, prefill = [], split_prefill(messages)
    for message in prefill.messages:
      ids += [*self.encode(message["content"]), self.TURN]
    return ids + self.encode(prefill.text)

  def save(self, directory: epath.PathLike) -> None:
    write_description(directory, {"type": WORDS, "words": list(self.words)})

  def _decode_text(self, ids: list[int]) -> str:
    return " ".join(self.words[i - 3] for i in ids)


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model, trained by `train_sentencepiece` or elsewhere.

  Special tokens are pieces of the model. If it has none for the mask or for the end of text, an id
  past its last piece is used, so `vocab_size` may be up to two more than the model's. In a prompt
  the piece of its role (`<|user|>`, ...) stands before each message, and `<|assistant|>` at the
  end. A model without such pieces gets the lines "User: ..." and "Assistant: ".

  Args:
    model: the bytes of a .model file.
  """

  MASK_PIECES = ("<mask>", "<|mask|>", "[MASK]", "<|mdm_mask|>")

  def __init__(self, model: bytes):
    import sentencepiece

    try:
      self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise UserError(f"not a SentencePiece model: {error}") from error
    self._model = model
    size = self._sp.vocab_size()
    mask = next((self._sp.piece_to_id(p) for p in self.MASK_PIECES if self._has(p)), None)
    if mask is None:
      mask, size = size, size + 1
    eos = self._sp.eos_id()
    if eos < 0:
      eos, size = size, size + 1
    pad = self._sp.pad_id()
    self.vocab_size, self.mask_id, self.eos_id = size, mask, eos
    self.pad_id = pad if pad >= 0 else eos
    self.stop_ids, self.turn_id = (eos,), eos
    self._roles = {
      role: self._sp.piece_to_id(f"<|{role}|>") for role in ROLES if self._has(f"<|{role}|>")
    }
    control = [i for i in range(self._sp.vocab_size()) if self._sp.is_control(i)]
    self.special_ids = frozenset(
      (mask, eos, self.pad_id, *control, *self._roles.values(), self._sp.unk_id())
    )

  def _has(self, piece: str) -> bool:
    return self._sp.id_to_piece(self._sp.piece_to_id(piece)) == piece

  def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
    encoded = self._sp.encode(mend(text), return_type="offset_mapping")
    offsets = [(int(start), int(end)) for start, end in encoded["offsets"]]
    # Of the bytes of one letter only the last is given its width; all belong to it.
    for k in range(len(offsets) - 2, -1, -1):
      if offsets[k][0] == offsets[k][1]:
        offsets[k] = (offsets[k][0], offsets[k + 1][1])
    return list(encoded["ids"]), offsets

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    ids, prefill = [], split_prefill(messages)
    if len(self._roles) < len(ROLES):
      lines = [f"{m['role'].capitalize()}: {m['content']}\n" for m in prefill.messages]
      return self.encode("".join(lines) + "Assistant: " + prefill.text)
    for message in prefill.messages:
      ids += [self._roles[message["role"]], *self.encode(message["content"])]
    return [*ids, self._roles["assistant"], *self.encode(prefill.text)]

  def save(self, directory: epath.PathLike) -> None:
    write_file(directory, SENTENCEPIECE_FILE, self._model)

  def _decode_text(self, ids: list[int]) -> str:
    return self._sp.decode(ids)


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, path: epath.PathLike | None = None, *, what: str = ""
) -> SentencePieceTokenizer:
  """Trains a unigram model. The result is the same on every run.

  Texts are not normalized, rare and unknown characters become bytes, and every digit is a token. So
  `decode(encode(text)) == text` for every text without NUL and U+2581, which SentencePiece uses
  itself.

  Args:
    texts: any strings; long ones are cut at line ends for training.
    vocab_size: number of ids, including the 256 bytes and the special tokens.
    path: if given, the model is also written there, as a .model file.
    what: beginning of an error's message, such as the option that asked for the training.

  Raises:
    UserError: there is no text, or it has fewer pieces than `vocab_size`, or needs more.
  """
  import sentencepiece

  lines = [line for text in texts for line in text.split("\n") if line]
  if not lines:
    raise UserError(f"{what}there is no text to make pieces of")
  symbols = ["<mask>", *(f"<|{role}|>" for role in ROLES)]
  least = 256 + len(symbols) + len(("unknown", "end", "newline"))  # and the characters
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=max(vocab_size, least),  # with fewer, its error would not count the characters
      model_type="unigram",
      character_coverage=0.9995,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      split_digits=True,
      max_sentence_length=1 << 20,
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      control_symbols=symbols,
      user_defined_symbols=["\n"],
      num_threads=1,
      shuffle_input_sentence=False,
      minloglevel=2,
    )
  except RuntimeError as error:
    # The library's message is about flags of its command line, so this one is written anew.
    few = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    many = re.search(r"to a value <= (\d+)", str(error))
    reason = str(error).rpartition("] ")[2]
    if few:
      reason = (
        f"bytes, special pieces and the characters of the text take {few[1]}: ask for at least "
        "that many"
      )
    elif many:
      reason = (
        f"there are no more than {many[1]} in it: ask for at most that many, or give more text"
      )
    raise UserError(
      f"{what}{vocab_size} pieces cannot be made of {len(lines)} line(s) of text: {reason}"
    ) from error
  if path is not None:
    write_file(epath.Path(path).parent, epath.Path(path).name, model.getvalue())
  return SentencePieceTokenizer(model.getvalue())


def _find_sentencepiece(directory: epath.Path) -> epath.Path | None:
  models = [p for p in directory.glob("*.model") if p.exists()]  # a link may lead nowhere
  models = sorted(models, key=lambda p: (p.name != SENTENCEPIECE_FILE, p.name))
  return models[0] if models else None


def has_tokenizer(directory: epath.PathLike) -> bool:
  """True if `load_tokenizer(directory)` would find a tokenizer."""
  directory = epath.Path(directory)
  return directory.is_dir() and (
    read_object(directory / DESCRIPTION_FILE, missing={}).get("type") in OWN_KINDS
    or directory.joinpath(HF_FILE).exists()
    or bpe_files.has_bpe_files(directory)
    or _find_sentencepiece(directory) is not None
  )


def open_tokenizer(spec: str) -> Tokenizer:
  """The tokenizer of one or several generated tasks, or `load_tokenizer(spec)`.

  Args:
    spec: "char:NAME" for the characters of a task, "words:NAME" for its words, "char:A+B" for
      those of several tasks, "char" for "char:chains"; or a path.

  Raises:
    UserError: there is no such task, or it has no characters (or words) of its own; for a path, as
      `load_tokenizer`.
  """
  kind, _, names = spec.partition(":")
  if kind not in OWN_KINDS or (kind == WORDS and not names):
    return load_tokenizer(spec)
  attribute = "alphabet" if kind == CHAR else "words"
  tasks = [
    task_with(attribute, name, f"tokenizer {spec}") for name in (names or "chains").split("+")
  ]
  pieces = tuple(dict.fromkeys(piece for task in tasks for piece in getattr(task, attribute)))
  return CharTokenizer("".join(pieces)) if kind == CHAR else WordTokenizer(pieces)


def load_tokenizer(spec: epath.PathLike) -> Tokenizer:
  """Reads a tokenizer from a directory, or from the directory of a file.

  It looks for, in this order: a character or word tokenizer that this program wrote,
  `tokenizer.json`, or `vocab.json` and `merges.txt` (Hugging Face), and a SentencePiece `.model`.

  Raises:
    UserError: there is no such path, it has none of these files, or one cannot be read.
  """
  path = epath.Path(spec)
  if not path.exists():
    raise UserError(f"no tokenizer at {path}: no such file or directory")
  if not path.is_dir():
    if path.name.endswith(".model"):
      return SentencePieceTokenizer(path.read_bytes())
    path = path.parent
  description = read_object(path / DESCRIPTION_FILE, missing={})
  if description.get("type") == CHAR:
    return CharTokenizer(description.get("alphabet", ""))
  if description.get("type") == WORDS:
    words = description.get("words")
    return WordTokenizer([str(word) for word in words] if isinstance(words, list) else ())
  if (path / HF_FILE).exists() or bpe_files.has_bpe_files(path):
    from igpo_jax.data import hf_tokenizer

    return hf_tokenizer.HFTokenizer(path)
  model = _find_sentencepiece(path)
  if model is None:
    raise UserError(
      f"no tokenizer in {path}: expected {HF_FILE}, {bpe_files.VOCABULARY_FILE} with "
      f"{bpe_files.MERGES_FILE}, a SentencePiece *.model or {DESCRIPTION_FILE}"
    )
  return SentencePieceTokenizer(model.read_bytes())
