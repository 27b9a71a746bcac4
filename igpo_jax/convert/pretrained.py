"""Weights into memory: from a directory straight into arrays, sharded if there is a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.config import ModelConfig
from igpo_jax.convert import families, sources
from igpo_jax.convert.arrays import Arrays, Index
from igpo_jax.data import tokenizer as tokenizer_lib
from igpo_jax.models.llada import make_lm
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.types import LM, Params

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}


class Pretrained(NamedTuple):
  """A model ready to use.

  Attributes:
    lm: its pure functions.
    params: its parameters, on the default device or sharded over the mesh.
    tokenizer: a `igpo_jax.data.tokenizer.Tokenizer`, None if the directory has none.
    config: its ModelConfig; `config.lora` describes the adapters, if there are any.
  """

  lm: LM
  params: Params
  tokenizer: Any
  config: ModelConfig


def load_pretrained(
  path: epath.PathLike,
  dtype: str = "bfloat16",
  mesh: jax.sharding.Mesh | None = None,
  adapter: epath.PathLike | None = None,
) -> Pretrained:
  """Reads a model from disk.

  Args:
    path: local or remote: a Hugging Face directory, one written by igpo_jax.convert,
      or a step of a training run.
    dtype: of the parameters and of the computation. Adapters keep the dtype they
      are stored in.
    mesh: shards the parameters by the rules of `parallel.sharding`; each process
      reads only what its devices hold.
    adapter: a PEFT directory; its adapters become leaves of `params`.

  Raises:
    UserError: a missing or damaged file, an option of config.json that would change
      the mathematics, or tensors that are missing, extra or of the wrong shape.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
  source = sources.open_source(path, adapter=adapter)
  config = dataclasses.replace(source.config, dtype=dtype, param_dtype=dtype)
  tokenizer = None
  if source.tokenizer is not None:
    tokenizer = tokenizer_lib.load_tokenizer(source.tokenizer)
    if tokenizer.mask_id != config.mask_id:
      raise UserError(
        f"{source.tokenizer}: the tokenizer's mask token is {tokenizer.mask_id}, "
        f"the model's {config.mask_id}"
      )
    stops = dict.fromkeys((*config.stop_ids, *tokenizer.stop_ids))
    config = dataclasses.replace(config, stop_ids=tuple(stops))
  lm = make_lm(config)
  shardings = None if mesh is None else tree_shardings(lm.logical_axes(), mesh)
  params = read_params(source, DTYPES[dtype], shardings)
  return Pretrained(lm, params, tokenizer, config)


def read_params(source: sources.Source, dtype: np.dtype, shardings: Any = None) -> Params:
  """All parameters of an open source, one stacked array after the other."""
  params: dict[str, Any] = {}
  for entry in source.entries:
    sharding, node = shardings, params
    for name in entry.path:
      sharding = sharding and sharding[name]
    for name in entry.path[:-1]:
      node = node.setdefault(name, {})
    adapter = entry.path[-1].startswith("lora_")
    target = source.arrays.dtypes[entry.name] if adapter else dtype
    read = lambda index, entry=entry, target=target: read_as(source.arrays, entry, index, target)
    # One at a time: the host's copy of an array is gone before the next one is read.
    node[entry.path[-1]] = jax.block_until_ready(place(entry.shape, sharding, read))
  return params


def read_as(arrays: Arrays, entry: families.Entry, index: Index, dtype: np.dtype) -> np.ndarray:
  """A part of an array, converted layer by layer: the unconverted whole is never held."""
  if arrays.dtypes[entry.name] == dtype or not entry.stacked:
    return arrays.read(entry.name, index).astype(dtype, copy=False)
  layers = range(*index[0].indices(entry.shape[0]))
  convert = lambda n: arrays.read(entry.name, (slice(n, n + 1), *index[1:])).astype(dtype)
  first = convert(layers[0])
  out = np.empty((len(layers), *first.shape[1:]), dtype)
  out[:1] = first
  for i, layer in enumerate(layers[1:], start=1):
    out[i : i + 1] = convert(layer)
  return out


def place(
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding | None,
  read: Callable[[Index], np.ndarray],
) -> jax.Array:
  """An array from `read(index)`, which is called once for each distinct local part."""
  if sharding is None:
    return jax.device_put(read(tuple(slice(0, n) for n in shape)))
  parts: dict[tuple, np.ndarray] = {}
  arrays = []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    if key not in parts:
      parts[key] = read(tuple(slice(*bounds) for bounds in key))
    arrays.append(jax.device_put(parts[key], device))
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
