"""Weights into memory: from a directory straight into arrays, sharded if there is a mesh."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.config import ModelConfig
from igpo_jax.convert import families, safetensors_io
from igpo_jax.data import tokenizer as tokenizer_lib
from igpo_jax.models.llada import make_lm
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.types import LM, Params

CONFIG_FILE = "config.json"
DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}
READ_THREADS = 8


class Pretrained(NamedTuple):
  """A model ready to use.

  Attributes:
    lm: its pure functions.
    params: its parameters, on the default device or sharded over the mesh.
    tokenizer: a `igpo_jax.data.tokenizer.Tokenizer`, None if the directory has none.
    config: its ModelConfig.
  """

  lm: LM
  params: Params
  tokenizer: Any
  config: ModelConfig


def load_pretrained(
  path: epath.PathLike, dtype: str = "bfloat16", mesh: jax.sharding.Mesh | None = None
) -> Pretrained:
  """Reads a model from a Hugging Face directory.

  Args:
    path: the directory, local or remote: config.json, safetensors, and usually a
      tokenizer.
    dtype: of the parameters and of the computation.
    mesh: shards the parameters by the rules of `parallel.sharding`; each process
      reads only what its devices hold.

  Raises:
    UserError: a missing or damaged file, an option of config.json that would change
      the mathematics, or tensors that are missing, extra or of the wrong shape.
  """
  path = epath.Path(path)
  if dtype not in DTYPES:
    raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
  hf_config = read_config(path)
  config = families.model_config(hf_config, path / CONFIG_FILE)
  tokenizer = None
  if tokenizer_lib.has_tokenizer(path):
    tokenizer = tokenizer_lib.load_tokenizer(path)
    stops = dict.fromkeys((*config.stop_ids, *tokenizer.stop_ids))
    config = dataclasses.replace(config, stop_ids=tuple(stops))
  config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  lm = make_lm(config)
  shardings = None if mesh is None else tree_shardings(lm.logical_axes(), mesh)
  with safetensors_io.Reader(path) as reader:
    params = read_params(reader, hf_config["model_type"], config, DTYPES[dtype], shardings)
  return Pretrained(lm, params, tokenizer, config)


def read_config(directory: epath.Path) -> dict[str, Any]:
  """The parsed config.json of a directory.

  Raises:
    UserError: there is none, or it is not a JSON object.
  """
  file = directory / CONFIG_FILE
  if not directory.is_dir():
    raise UserError(f"no such directory: {directory}")
  if not file.exists():
    raise UserError(f"{directory} has no {CONFIG_FILE}; is it a Hugging Face model directory?")
  try:
    value = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{file} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{file} should hold a JSON object, not a {type(value).__name__}")
  return value


def check_tensors(
  reader: safetensors_io.Reader, entries: tuple[families.Entry, ...], config: ModelConfig
) -> None:
  """Compares keys and shapes with what the config promises; needs headers only.

  Raises:
    UserError: every missing, extra or misshapen tensor in one message.
  """
  expected = {key: entry for entry in entries for key in entry.keys}
  problems = []
  for key, entry in expected.items():
    if key not in reader.tensors:
      problems.append(f"{key} is missing")
    elif reader.tensors[key].shape != entry.hf_shape:
      found = list(reader.tensors[key].shape)
      problems.append(f"{key} has shape {found}, config.json says {list(entry.hf_shape)}")
  problems += [f"{key} is not part of this model" for key in reader.tensors if key not in expected]
  safetensors_io.raise_problems(reader.directory, problems)


def read_slice(
  reader: safetensors_io.Reader, entry: families.Entry, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
  """The part `index` of one of our parameters, converted to `dtype`."""
  ranges = [range(*s.indices(n)) for s, n in zip(index, entry.shape, strict=True)]
  out = np.empty([len(r) for r in ranges], dtype)
  inner = ranges[1:] if entry.stacked else ranges
  # Theirs is [out, in]: our last axis is their rows, which are what can be read apart.
  rows, rest = (inner[-1], inner[:-1]) if entry.transposed else (inner[0], inner[1:])

  def fill(layer: int) -> None:
    block = reader.read(entry.keys[layer], rows.start, rows.stop)
    if rest:
      block = block[:, rest[0].start : rest[0].stop]
    target = out[layer - ranges[0].start] if entry.stacked else out
    copy_cast(target, block.T if entry.transposed else block)

  with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
    list(pool.map(fill, ranges[0] if entry.stacked else [0]))
  return out


def copy_cast(target: np.ndarray, source: np.ndarray) -> None:
  """target[...] = source; the bits as they are where the dtypes agree."""
  if target.dtype == source.dtype:
    word = np.dtype(f"u{target.dtype.itemsize}")
    target, source = target.view(word), source.view(word)
  np.copyto(target, source, casting="unsafe")


def place(
  shape: tuple[int, ...], sharding: jax.sharding.Sharding | None, read_part: Any
) -> jax.Array:
  """An array from `read_part(index)`, called once for each distinct local part."""
  if sharding is None:
    return jax.device_put(read_part(tuple(slice(0, n) for n in shape)))
  parts: dict[tuple, np.ndarray] = {}
  arrays = []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    if key not in parts:
      parts[key] = read_part(index)
    arrays.append(jax.device_put(parts[key], device))
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_params(
  reader: safetensors_io.Reader,
  family: str,
  config: ModelConfig,
  dtype: np.dtype,
  shardings: Mapping[str, Any] | None = None,
) -> Params:
  """All parameters, one stacked array after the other."""
  entries = families.entries(family, config)
  check_tensors(reader, entries, config)
  params: dict[str, Any] = {}
  for entry in entries:
    sharding, node = shardings, params
    for name in entry.path:
      sharding = sharding and sharding[name]
    for name in entry.path[:-1]:
      node = node.setdefault(name, {})
    read_part = lambda index, entry=entry: read_slice(reader, entry, index, dtype)
    node[entry.path[-1]] = place(entry.shape, sharding, read_part)
  return params
