"""The tokenizer of a Hugging Face directory: tokenizer.json and the files beside it.

Special ids come from the files, in the order config.json (what the model was trained
with), tokenizer_config.json and special_tokens_map.json, well-known names. The chat
format is that of the directory's own template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.data import tokenizer as base

_FILES = (base.HF_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MASK_NAMES = ("<|mdm_mask|>", "[MDM_MASK]", "<|mask|>", "<[MASK]>", "[MASK]", "<mask>")
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>")
_EOT_NAMES = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")

# A piece of a rendered prompt: its text, and whether special tokens in it count.
Segment = tuple[str, bool]


def llada_chat(messages: Sequence[dict[str, str]]) -> list[Segment]:
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


def chatml_chat(messages: Sequence[dict[str, str]]) -> list[Segment]:
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


def plain_chat(messages: Sequence[dict[str, str]]) -> list[Segment]:
  """Lines "User: ..." for a vocabulary without chat tokens (a base model)."""
  lines = [f"{m['role'].capitalize()}: {m['content']}\n" for m in messages]
  return [("".join(lines) + "Assistant: ", False)]


class HFTokenizer(base.Tokenizer):
  """A `tokenizer.json` with its special ids and chat format.

  Args:
    directory: holds tokenizer.json, and if it has them tokenizer_config.json,
      special_tokens_map.json, chat_template.jinja and the model's config.json.

  Raises:
    UserError: a file that cannot be read, or no mask token to be found.
  """

  def __init__(self, directory: epath.PathLike):
    import tokenizers

    directory = epath.Path(directory)
    self._directory = directory
    try:
      self._files = {
        name: (directory / name).read_bytes().decode()
        for name in _FILES
        if (directory / name).exists()
      }
      self._text = tokenizers.Tokenizer.from_str(_untrimmed(self._files[base.HF_FILE]))
      self._special = tokenizers.Tokenizer.from_str(self._files[base.HF_FILE])
    except Exception as error:  # the library raises nothing narrower
      raise UserError(f"cannot read {directory / base.HF_FILE}: {error}") from error
    for tokenizer in (self._text, self._special):
      tokenizer.no_padding()
      tokenizer.no_truncation()
    self._text.encode_special_tokens = True
    self.vocab_size = max(self._special.get_vocab(with_added_tokens=True).values()) + 1
    self._read_special_ids()
    self._chat = self._choose_chat()

  def _read_special_ids(self) -> None:
    directory = self._directory
    self._tokenizer_config = base.read_json(directory / "tokenizer_config.json")
    self._ours = base.read_json(directory / base.DESCRIPTION_FILE)
    sources = (self._ours, base.read_json(directory / "config.json"))
    names = (self._tokenizer_config, base.read_json(directory / "special_tokens_map.json"))

    def find(what: str, well_known: Sequence[str]) -> int | None:
      for source in sources:
        value = source.get(f"{what}_token_id", source.get(f"{what}_id"))
        if isinstance(value, list):  # several ends of text: the first one pads
          value = value[0] if value else None
        if value is not None:
          return int(value)
      for source in names:
        value = source.get(f"{what}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and self._special.token_to_id(value) is not None:
          return self._special.token_to_id(value)
      return next(
        (i for name in well_known if (i := self._special.token_to_id(name)) is not None), None
      )

    mask, eos = find("mask", _MASK_NAMES), find("eos", _EOS_NAMES)
    for what, value in (("mask", mask), ("end-of-text", eos)):
      if value is None:
        raise UserError(
          f"no {what} token in {directory}: config.json or tokenizer_config.json"
          f" should name one (mask_token_id, eos_token_id)"
        )
    eot, pad = find("eot", _EOT_NAMES), find("pad", ())
    self.mask_id, self.eos_id = mask, eos
    self.pad_id = eos if pad is None else pad
    self.turn_id = eos if eot is None else eot
    self.stop_ids = tuple(dict.fromkeys((eos, self.turn_id)))
    added = self._special.get_added_tokens_decoder()
    self.special_ids = frozenset(
      (mask, self.pad_id, *self.stop_ids, *(i for i, token in added.items() if token.special))
    )
    self.vocab_size = max(self.vocab_size, *(i + 1 for i in self.special_ids))

  def _choose_chat(self) -> Callable[[Sequence[dict[str, str]]], list[Segment]]:
    """The directory's own template; ours where it says the same or there is none."""
    known = (
      (("<|start_header_id|>", "<|startoftext|>"), llada_chat),
      (("<|im_start|>", "<|im_end|>"), chatml_chat),
    )
    ours = next(
      (
        chat
        for tokens, chat in known
        if all(self._special.token_to_id(t) is not None for t in tokens)
      ),
      plain_chat,
    )
    template = self._files.get("chat_template.jinja") or self._tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several by name
      template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if not template:
      return ours
    theirs = _template_chat(template, self._tokenizer_config, self._directory)
    # Ours keeps a content that spells a special token as text; use it when it can be.
    probe = [
      {"role": role, "content": f" {role} \n"} for role in ("system", "user", "assistant", "user")
    ]
    try:
      same = _join(theirs(probe)) == _join(ours(probe))
    except UserError:  # a template that refuses some role
      same = False
    return ours if same else theirs

  def encode_with_offsets(self, text: str) -> tuple[list[int], base.Offsets]:
    encoding = self._text.encode(text, add_special_tokens=False)
    return list(encoding.ids), list(encoding.offsets)

  def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], base.Offsets]]:
    encodings = self._text.encode_batch(list(texts), add_special_tokens=False)
    return [(list(e.ids), list(e.offsets)) for e in encodings]

  def render_prompt(self, messages: Sequence[dict[str, str]]) -> str:
    """The prompt as text, special tokens spelled out."""
    prefill = base.split_prefill(messages)
    return _join(self._chat(prefill.messages)) + prefill.text

  def encode_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
    prefill = base.split_prefill(messages)
    ids: list[int] = []
    for text, special in _merge([*self._chat(prefill.messages), (prefill.text, False)]):
      tokenizer = self._special if special else self._text
      ids += tokenizer.encode(text, add_special_tokens=False).ids
    return ids

  def save(self, directory: epath.PathLike) -> None:
    base.write_description(
      directory,
      {
        "type": "hf",
        "mask_token_id": self.mask_id,
        "eos_token_id": self.eos_id,
        "pad_token_id": self.pad_id,
        "eot_token_id": self.turn_id,
      },
    )
    for name in reversed(_FILES):  # tokenizer.json last: with it, the directory counts as whole
      if name in self._files:
        base.write_file(directory, name, self._files[name].encode())

  def _decode_text(self, ids: list[int]) -> str:
    return self._special.decode(ids, skip_special_tokens=True)


def _join(segments: Sequence[Segment]) -> str:
  return "".join(text for text, _ in segments)


def _merge(segments: Sequence[Segment]) -> list[Segment]:
  """Joins neighbours of one kind: a tokenizer must see a text whole."""
  merged: list[Segment] = []
  for text, special in segments:
    if merged and merged[-1][1] == special:
      merged[-1] = (merged[-1][0] + text, special)
    elif text:
      merged.append((text, special))
  return merged


def _template_chat(template: str, tokenizer_config: dict[str, Any], where: epath.Path):
  """A chat format from a Jinja template, which runs sandboxed."""
  import jinja2
  import jinja2.sandbox

  def refuse(message: str):
    raise UserError(f"the chat template of {where} refuses these messages: {message}")

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = refuse
  tokens = {}
  for name in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token"):
    value = tokenizer_config.get(name)
    tokens[name] = value.get("content") if isinstance(value, dict) else value or ""
  try:
    compiled = environment.from_string(template)
  except jinja2.TemplateError as error:
    raise UserError(f"the chat template of {where} cannot be read: {error}") from error

  def chat(messages: Sequence[dict[str, str]]) -> list[Segment]:
    try:
      text = compiled.render(messages=list(messages), add_generation_prompt=True, **tokens)
    except jinja2.TemplateError as error:
      raise UserError(f"the chat template of {where} fails: {error}") from error
    return [(text, True)]

  return chat


def _untrimmed(text: str) -> str:
  """tokenizer.json with offsets that cover all characters, blanks included.

  Byte-level tokenizers may leave a token's blanks out of its offsets, and then a
  token that begins before an answer would seem to begin in it.
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
