"""Makes a masked diffusion model, to be fine-tuned, from an autoregressive Llama or Qwen model.

The weights do not change, attention is not causal any more, and a mask token is chosen or added. By
default the model still predicts one position ahead (`shift`), as its weights have learned to. It is
of no use before it is fine-tuned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from igpo_jax.convert.arrays import Arrays, Index, cast
from igpo_jax.convert.open import CONFIG_FILE, Source, open_hf, read_json
from igpo_jax.data import tokenizer as tokenizer_lib
from igpo_jax.errors import UserError
from igpo_jax.io.text import read_object
from igpo_jax.models.families import FAMILIES

MASK_TOKEN = "<|mask|>"
ROWS = 128  # an embedding that has to grow gets a multiple of this number of rows
READ_ROWS = 4096
SETTINGS_FILE = "tokenizer_config.json"


def open_as_diffusion(path: epath.PathLike, mask_token: str = "", shift: bool = True) -> Source:
  """Opens an autoregressive model as a diffusion model.

  Args:
    path: a Hugging Face directory with model_type llama, qwen2 or qwen3 and a tokenizer.json.
    mask_token: the mask token: one of the vocabulary that no text uses, or a new one. "":
      `<|mask|>`.
    shift: whether the state of position k - 1 predicts the token of position k, as in the
      checkpoint.

  Raises:
    UserError: it is another model, or has no tokenizer.json; else as `open_source`.
  """
  path, name = epath.Path(path), mask_token or MASK_TOKEN
  if not path.is_dir():
    raise UserError(f"no such directory: {path}")
  theirs = read_json(path / CONFIG_FILE)
  known = {f.autoregressive: f for f in FAMILIES.values() if f.autoregressive}
  kind = theirs.get("model_type")
  if kind not in known:
    raise UserError(
      f"--as-diffusion: {path / CONFIG_FILE} has model_type {kind!r}; it is for {', '.join(known)}"
    )
  if not (path / tokenizer_lib.HF_FILE).exists():
    raise UserError(f"--as-diffusion: {path} has no {tokenizer_lib.HF_FILE}")
  family = known[kind]
  tokens = read_object(path / tokenizer_lib.HF_FILE)
  mask_id, is_new = _find_mask(tokens, name)
  rows = theirs.get("vocab_size")
  if type(rows) is not int or rows < 1:
    raise UserError(f"{path / CONFIG_FILE}: vocab_size={rows!r} should be a whole number from 1")
  hf_config = {k: v for k, v in theirs.items() if k not in ("auto_map", "architectures")} | {
    "model_type": family.model_types[0],
    "architectures": list(family.written["architectures"]),
    "mask_token_id": mask_id,
    family.fields["shift_logits"]: shift,
  }
  source = open_hf(path, hf_config | {"vocab_size": max(rows, mask_id + 1)}, rows)
  rewritten = {}
  if is_new:
    rewritten[tokenizer_lib.HF_FILE] = _json_bytes(tokens)
  settings = read_object(path / SETTINGS_FILE, missing={})
  if settings:
    rewritten[SETTINGS_FILE] = _json_bytes(settings | {"mask_token": name})
  if mask_id >= rows:
    grown = -(-(mask_id + 1) // ROWS) * ROWS
    config = dataclasses.replace(source.config, vocab_size=grown)
    hf_config["vocab_size"] = grown
    source = source.with_config(config, GrownArrays(source.arrays, grown))
  return dataclasses.replace(source, hf_config=hf_config, rewritten=rewritten)


def _find_mask(tokens: dict[str, Any], name: str) -> tuple[int, bool]:
  """Finds the mask token in the contents of a tokenizer.json, or adds it to them.

  Returns:
    (id of the mask token, whether it was added).

  Raises:
    UserError: the tokenizer.json is damaged.
  """
  try:
    added = {token["content"]: token["id"] for token in tokens.setdefault("added_tokens", [])}
    vocabulary = tokens["model"]["vocab"]
    if isinstance(vocabulary, list):  # of a unigram model: pairs
      vocabulary = {piece: number for number, (piece, *_) in enumerate(vocabulary)}
    known = {**vocabulary, **added}
    if name in known:
      return known[name], False
    number = max(known.values()) + 1
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UserError(f"{tokenizer_lib.HF_FILE} is damaged: {error!r}") from error
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  tokens["added_tokens"].append({"id": number, "content": name, **flags, "special": True})
  return number, True


def _json_bytes(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class GrownArrays(Arrays):
  """Arrays with more rows in the embedding and the head. A new row is the mean of the old ones.

  Args:
    arrays: the stored arrays.
    rows: number of rows that the embedding gets.
  """

  AXES: Mapping[str, int] = {"wte/embedding": 0, "head/kernel": 1}

  def __init__(self, arrays: Arrays, rows: int):
    self._arrays = arrays
    self._axes = {name: axis for name, axis in self.AXES.items() if name in arrays.shapes}
    self._means: dict[str, np.ndarray] = {}
    self.dtypes = arrays.dtypes
    self.shapes = dict(arrays.shapes)
    for name, axis in self._axes.items():
      shape = list(arrays.shapes[name])
      shape[axis] = rows
      self.shapes[name] = tuple(shape)

  def check(self) -> None:
    self._arrays.check()

  def read_into(self, name: str, indices: Sequence[Index], outs: Sequence[np.ndarray]) -> None:
    if name not in self._axes:
      self._arrays.read_into(name, indices, outs)
      return
    axis, old = self._axes[name], self._arrays.shapes[name][self._axes[name]]
    inner_indices, inner_outs = [], []
    for index, out in zip(indices, outs, strict=True):
      start, stop, _ = index[axis].indices(self.shapes[name][axis])
      kept = max(min(stop, old) - start, 0)
      if kept:
        part = list(index)
        part[axis] = slice(start, start + kept)
        inner_indices.append(tuple(part))
        inner_outs.append(out[_along(axis, slice(0, kept))])
      if kept < stop - start:
        mean = cast(self._mean(name)[index[1 - axis]], out.dtype, name)
        out[_along(axis, slice(kept, None))] = np.expand_dims(mean, axis)
    if inner_indices:
      self._arrays.read_into(name, inner_indices, inner_outs)

  def _mean(self, name: str) -> np.ndarray:
    if name not in self._means:
      axis, shape = self._axes[name], self._arrays.shapes[name]
      total = np.zeros(shape[1 - axis], np.float32)
      for start in range(0, shape[axis], READ_ROWS):
        rows = slice(start, min(start + READ_ROWS, shape[axis]))
        whole = slice(0, shape[1 - axis])
        part = self._arrays.read(name, (rows, whole) if axis == 0 else (whole, rows))
        total += part.astype(np.float32).sum(axis=axis)
      self._means[name] = total / np.float32(shape[axis])
    return self._means[name]


def _along(axis: int, part: slice) -> tuple[slice, ...]:
  return (part,) if axis == 0 else (slice(None), part)
