"""A Hugging Face tokenizer directory in miniature, with the special tokens of LLaDA."""

from __future__ import annotations

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

LLADA_TEMPLATE = (
  "{% set loop_messages = messages %}{% for message in loop_messages %}"
  "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
  "+ message['content'] | trim + '<|eot_id|>' %}"
  "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
  "{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# In the order of their ids, as in LLaDA: <|startoftext|> < <|endoftext|> < mask < headers < eot.
SPECIAL = (
  "<|startoftext|>",
  "<|endoftext|>",
  "<|mdm_mask|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
)
_TEXTS = (
  "She sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18 every day.\n#### 18",
  "The answer is \\boxed{\\frac{1}{2}}. How many eggs does she sell each day in all?",
)


def make_directory(
  path: pathlib.Path,
  *,
  template: str | None = LLADA_TEMPLATE,
  special: tuple[str, ...] = SPECIAL,
  config: dict | None = None,
  trim_offsets: bool = True,
) -> pathlib.Path:
  """Writes tokenizer.json, tokenizer_config.json and, if given, config.json into `path`."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
  )
  tokenizer.train_from_iterator(_TEXTS * 4, trainer)
  tokenizer.add_special_tokens(list(special))
  path.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(path / "tokenizer.json"))
  described = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": {"content": "<|endoftext|>", "special": True},
  }
  if template is not None:
    described["chat_template"] = template
  (path / "tokenizer_config.json").write_text(json.dumps(described))
  if config is not None:
    (path / "config.json").write_text(json.dumps(config))
  return path
