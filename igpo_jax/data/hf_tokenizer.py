"""The tokenizer of a Hugging Face directory: tokenizer.json and the files beside it.

A directory that has vocab.json and merges.txt instead is read as if it had one (bpe_files).

Special ids are looked for in this order: config.json (what the model was trained with),
tokenizer_config.json and special_tokens_map.json, well-known names in the vocabulary. The chat
format is that of the directory's own template; without one, that of the family whose special tokens
are in the vocabulary.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from igpo_jax.data import added_tokens, bpe_files, chat_template
from igpo_jax.data import tokenizer_base as base
from igpo_jax.data.records import Message
from igpo_jax.errors import UserError
from igpo_jax.io.text import mend, read_object

_FILES = (
  base.HF_FILE,
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)
_MASK_NAMES = ("<|mdm_mask|>", "[MDM_MASK]", "<|mask|>", "<|MASK|>", "<[MASK]>", "[MASK]",
               "<mask>")  # fmt: skip
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>")
_EOT_NAMES = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")


class HFTokenizer(base.Tokenizer):
  """A `tokenizer.json` with its special ids and chat format.

  Args:
    directory: has tokenizer.json, or vocab.json and merges.txt. These files are read if they are
      there: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
      chat_template.jinja, and the model's config.json and generation_config.json.

  Raises:
    UserError: a file cannot be read, or no mask token or end of text is found.
  """

  def __init__(self, directory: epath.PathLike):
    import tokenizers

    directory = epath.Path(directory)
    self._directory = directory
    try:
      self._files = {
        name: (directory / name).read_bytes().decode("utf-8-sig")
        for name in _FILES
        if (directory / name).exists()
      }
      if base.HF_FILE not in self._files:
        self._files[base.HF_FILE] = bpe_files.tokenizer_json(directory)
      self._text = tokenizers.Tokenizer.from_str(_untrimmed(self._files[base.HF_FILE]))
      self._special = tokenizers.Tokenizer.from_str(self._files[base.HF_FILE])
    except UserError:
      raise
    except Exception as error:  # the library raises nothing narrower
      raise UserError(f"cannot read {directory / base.HF_FILE}: {error}") from error
    for tokenizer in (self._text, self._special):
      tokenizer.no_padding()
      tokenizer.no_truncation()
    self._text.encode_special_tokens = True
    self._read_added_tokens()
    self._read_special_ids()
    self._ours = self._known_chat()
    self._template = self._read_template()
    self._chat = self._template.chat(self._ours) if self._template else self._ours

  def _read_added_tokens(self) -> None:
    directory = self._directory
    self._config = read_object(directory / "tokenizer_config.json", missing={})
    self._special_map = read_object(directory / "special_tokens_map.json", missing={})
    self._vocabulary = self._special.get_vocab(with_added_tokens=True)
    found = added_tokens.find_added(
      self._vocabulary,
      self._config,
      read_object(directory / "added_tokens.json", missing={}),
      self._special_map,
      directory,
    )
    self._added = {token.id: token for token in found}
    self._vocabulary |= {token.text: token.id for token in found}
    self._all_added = added_tokens.Splitter(found)
    self._plain_added = added_tokens.Splitter([token for token in found if not token.special])
    self.vocab_size = max(self._vocabulary.values()) + 1

  def _read_special_ids(self) -> None:
    directory = self._directory
    self._described = read_object(directory / base.DESCRIPTION_FILE, missing={})
    files = {base.DESCRIPTION_FILE: self._described}
    for name in ("config.json", "generation_config.json"):
      files[name] = read_object(directory / name, missing={})
    names = added_tokens.named_tokens(self._config, self._special_map)

    def find(what: str, well_known: Sequence[str]) -> list[int]:
      for file in (base.DESCRIPTION_FILE, "config.json"):
        ids = _ids(files[file], what, directory / file)
        if ids:
          return ids
      name = names.get(f"{what}_token") or added_tokens.token_text(
        self._config.get(f"{what}_token")
      )
      known = [self._vocabulary[n] for n in (name, *well_known) if n in self._vocabulary]
      return known[:1]

    mask, eos = find("mask", _MASK_NAMES), find("eos", _EOS_NAMES)
    for what, value in (("mask", mask), ("end-of-text", eos)):
      if not value:
        raise UserError(
          f"no {what} token in {directory}: config.json or tokenizer_config.json"
          f" should name one (mask_token_id, eos_token_id)"
        )
    eot, pad = find("eot", _EOT_NAMES), find("pad", ())
    self.mask_id, self.eos_id = mask[0], eos[0]
    self.pad_id = pad[0] if pad else self.eos_id
    self.turn_id = eot[0] if eot else self.eos_id
    # Every end of text ends an answer, and the first one pads.
    also = _ids(files["generation_config.json"], "eos", directory / "generation_config.json")
    self.stop_ids = tuple(dict.fromkeys((*eos, self.turn_id, *also)))
    inside = self._special.get_added_tokens_decoder().items()
    special = [i for i, token in inside if token.special]
    special += [i for i, token in self._added.items() if token.special]
    self.special_ids = frozenset((self.mask_id, self.pad_id, *self.stop_ids, *special))
    self.vocab_size = max(self.vocab_size, *(i + 1 for i in self.special_ids))

  def _known_chat(self) -> chat_template.Chat:
    """The built-in chat format that fits the special tokens of the vocabulary."""
    known = (
      (("<|start_header_id|>", "<|startoftext|>"), chat_template.llada_chat),
      (("<|im_start|>", "<|im_end|>"), chat_template.chatml_chat),
      (("<role>", "<|role_end|>"), chat_template.role_chat),
    )
    return next(
      (chat for tokens, chat in known if all(token in self._vocabulary for token in tokens)),
      chat_template.plain_chat,
    )

  def _read_template(self) -> chat_template.Template | None:
    template = self._files.get("chat_template.jinja") or self._config.get("chat_template")
    if isinstance(template, list):  # several by name
      named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
      if named and "default" not in named:
        raise UserError(
          f"{self._directory}: of the chat templates {', '.join(map(str, named))} none is named"
          " default: put the one to be used into chat_template.jinja"
        )
      template = named.get("default")
    if not template:
      return None
    if not isinstance(template, str):
      raise UserError(f"{self._directory}: the chat template should be text")
    return chat_template.Template(
      template,
      added_tokens.named_tokens(self._config, self._special_map),
      str(self._directory),
      self._now(),
    )

  def _now(self) -> datetime.datetime:
    """The time that a template may write into prompts.

    A run keeps it with its tokenizer, so that prompts are the same on every day and host.
    """
    kept = self._described.get("now")
    try:
      return datetime.datetime.fromisoformat(kept) if kept else datetime.datetime.now()
    except (TypeError, ValueError) as error:
      raise UserError(f"{self._directory / base.DESCRIPTION_FILE}: now={kept!r}: {error}") from None

  def encode_with_offsets(self, text: str) -> tuple[list[int], base.Offsets]:
    return self._plain_added.encode(mend(text), self._encode_text)

  def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], base.Offsets]]:
    if self._plain_added:
      return [self.encode_with_offsets(text) for text in texts]
    encodings = self._text.encode_batch([mend(text) for text in texts], add_special_tokens=False)
    return [(list(e.ids), list(e.offsets)) for e in encodings]

  def _encode_text(self, text: str) -> tuple[list[int], base.Offsets]:
    encoding = self._text.encode(text, add_special_tokens=False)
    return list(encoding.ids), list(encoding.offsets)

  def _encode_special(self, text: str) -> tuple[list[int], base.Offsets]:
    encoding = self._special.encode(text, add_special_tokens=False)
    return list(encoding.ids), list(encoding.offsets)

  def render_prompt(self, messages: Sequence[Message]) -> str:
    """The prompt as text, with special tokens written out."""
    prefill = base.split_prefill(messages)
    return chat_template.text_of(self._chat(prefill.messages)) + prefill.text

  def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
    prefill = base.split_prefill(messages)
    ids: list[int] = []
    segments = [*self._chat(prefill.messages), (prefill.text, False)]
    for text, special in chat_template.merged(segments):
      if special:
        ids += self._all_added.encode(mend(text), self._encode_special)[0]
      else:
        ids += self.encode(text)
    return ids

  def save(self, directory: epath.PathLike) -> None:
    description = {
      "type": "hf",
      "mask_token_id": self.mask_id,
      # All stop ids: some come from files that are not saved here.
      "eos_token_id": self.eos_id if len(self.stop_ids) == 1 else list(self.stop_ids),
      "pad_token_id": self.pad_id,
      "eot_token_id": self.turn_id,
    }
    if self._template and self._template.tells_time:
      description["now"] = self._template.now.isoformat(timespec="seconds")
    base.write_description(directory, description)
    for name in reversed(_FILES):  # tokenizer.json last: it makes the directory a tokenizer's
      if name in self._files:
        base.write_file(directory, name, self._files[name].encode())

  def _special_name(self, token: int) -> str:
    if token in self._added:
      return self._added[token].text
    return self._special.id_to_token(token) or super()._special_name(token)

  def _decode_text(self, ids: list[int]) -> str:
    if not self._plain_added:
      return self._special.decode(ids, skip_special_tokens=True)
    out, run = [], []
    for i in ids:
      if i in self._added:
        out += [self._special.decode(run, skip_special_tokens=True), self._added[i].text]
        run = []
      else:
        run.append(i)
    return "".join([*out, self._special.decode(run, skip_special_tokens=True)])


def _ids(file: dict[str, Any], what: str, where: epath.Path) -> list[int]:
  """The ids that a file gives for a special token: one, several, or none (null or negative).

  Raises:
    UserError: an id is not a whole number.
  """
  name = f"{what}_token_id" if f"{what}_token_id" in file else f"{what}_id"
  value = file.get(name)
  ids = []
  for item in value if isinstance(value, list) else [value]:
    if item is None:
      continue
    if not isinstance(item, int) or isinstance(item, bool):
      raise UserError(f"{where}: {name}={value!r} should be a whole number")
    if item >= 0:
      ids.append(item)
  return ids


def _untrimmed(text: str) -> str:
  """The text of tokenizer.json, changed so that a token's offsets include its blanks.

  Byte-level tokenizers may leave blanks out of the offsets. A token that begins before an answer
  would then seem to begin within it.
  """

  def walk(node: Any) -> None:
    if isinstance(node, dict):
      if "trim_offsets" in node:
        node["trim_offsets"] = False
      for value in node.values():
        walk(value)
    elif isinstance(node, list):
      for value in node:
        walk(value)

  tree = json.loads(text)
  for part in ("post_processor", "pre_tokenizer"):
    walk(tree.get(part))
  return json.dumps(tree, ensure_ascii=False)
