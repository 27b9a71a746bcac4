"""Named arrays on disk, any part of which can be read without the rest.

Safetensors (one tensor per layer, kernels transposed) and Orbax (our stacked tree)
look the same from here: a name such as "blocks/q_proj/kernel", a shape in our
layout, a dtype, and `read(name, index)`. Nothing is read before it is asked for.
"""

from __future__ import annotations

import abc
import concurrent.futures
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.convert.families import Entry
from igpo_jax.convert.safetensors_io import Reader, raise_problems

Index = tuple[slice, ...]

TREE_METADATA = "_METADATA"
READ_THREADS = 8
READ_BYTES = 4 * 2**20
STRIP = 128


class Arrays(abc.ABC):
  """A mapping from names to arrays in our layout. Safe to share between threads."""

  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]

  @abc.abstractmethod
  def read(self, name: str, index: Index) -> np.ndarray:
    """The part `index` of an array, as stored."""


def copy_bits(target: np.ndarray, source: np.ndarray) -> None:
  """target[...] = source for arrays of one dtype, NaN payloads included."""
  word = np.dtype(f"u{target.dtype.itemsize}")
  target, source = target.view(word), source.view(word)
  if source.ndim == 2 and source.flags.c_contiguous != target.flags.c_contiguous:
    # A transpose is six times as fast by strips: both sides stay in the cache.
    if target.flags.c_contiguous:
      target, source = target.T, source.T
    for start in range(0, len(source), STRIP):
      target[start : start + STRIP] = source[start : start + STRIP]
  else:
    np.copyto(target, source)


class SafetensorsArrays(Arrays):
  """Safetensors as the arrays they make up.

  Args:
    reader: an open directory.
    entries: what it must hold.
    ignored: keys that may be there besides (the copy of a tied head).

  Raises:
    UserError: every missing, extra or misshapen tensor, in one message.
  """

  def __init__(self, reader: Reader, entries: Iterable[Entry], ignored: Iterable[str] = ()):
    self._reader = reader
    self._entries = {entry.name: entry for entry in entries}
    self.shapes = {name: entry.shape for name, entry in self._entries.items()}
    self.dtypes = {}
    problems, expected = [], set(ignored)
    for name, entry in self._entries.items():
      expected.update(entry.keys)
      found = [reader.tensors[key] for key in entry.keys if key in reader.tensors]
      problems += [f"{key} is missing" for key in entry.keys if key not in reader.tensors]
      problems += [
        f"{key} has shape {list(reader.tensors[key].shape)}, "
        f"config.json says {list(entry.hf_shape)}"
        for key in entry.keys
        if key in reader.tensors and reader.tensors[key].shape != entry.hf_shape
      ]
      dtypes = {info.dtype for info in found}
      if len(dtypes) > 1:
        problems.append(f"the layers of {name} have different dtypes: {sorted(map(str, dtypes))}")
      self.dtypes[name] = found[0].dtype if found else np.dtype(np.float32)
    problems += [f"{key} is not part of this model" for key in reader.tensors.keys() - expected]
    raise_problems(reader.directory, sorted(problems))

  def read(self, name: str, index: Index) -> np.ndarray:
    entry = self._entries[name]
    ranges = [range(*s.indices(n)) for s, n in zip(index, entry.shape, strict=True)]
    out = np.empty([len(r) for r in ranges], self.dtypes[name])
    inner = ranges[1:] if entry.stacked else ranges
    # Theirs is [out, in]: our last axis is their rows, which are what can be read apart.
    rows, rest = (inner[-1], inner[:-1]) if entry.transposed else (inner[0], inner[1:])

    step = max(READ_BYTES * entry.hf_shape[0] // self._nbytes(name), 1)

    def fill(layer: int) -> None:
      target = out[layer - ranges[0].start] if entry.stacked else out
      target = target.T if entry.transposed else target
      for start in range(0, len(rows), step):
        part = rows[start : start + step]
        block = self._reader.read(entry.keys[layer], part.start, part.stop)
        if rest:
          block = block[:, rest[0].start : rest[0].stop]
        copy_bits(target[start : start + step], block)

    layers = ranges[0] if entry.stacked else [0]
    if len(layers) == 1:
      fill(layers[0])
    else:
      with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(fill, layers))
    return out

  def _nbytes(self, name: str) -> int:
    """Bytes of what one key holds."""
    return math.prod(self._entries[name].hf_shape) * self.dtypes[name].itemsize


class OrbaxArrays(Arrays):
  """The arrays of an Orbax PyTree checkpoint below one key of the tree.

  Args:
    directory: holds Orbax's `_METADATA`.
    prefix: names of the path to the parameters: () or ("params",).

  Raises:
    UserError: no such checkpoint, or a damaged one.
  """

  def __init__(self, directory: epath.PathLike, prefix: tuple[str, ...] = ()):
    self.directory = epath.Path(directory)
    metadata = read_tree_metadata(self.directory)
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    stores = {}
    for path in tree_paths(metadata):
      if path[: len(prefix)] == prefix:
        spec = {"driver": driver, "kvstore": kvstore(self.directory, ".".join(path))}
        name = "/".join(path[len(prefix) :])
        stores[name] = ts.open(spec, context=self._context, read=True, open=True)
    try:
      self._stores = {name: future.result() for name, future in stores.items()}
    except ValueError as error:
      raise UserError(f"{self.directory} is damaged: {error}") from error
    self.shapes = {name: tuple(store.shape) for name, store in self._stores.items()}
    self.dtypes = {name: store.dtype.numpy_dtype for name, store in self._stores.items()}

  def read(self, name: str, index: Index) -> np.ndarray:
    try:
      return self._stores[name][index].read().result()
    except ValueError as error:
      raise UserError(f"{self.directory}: cannot read {name}: {error}") from error


class UnionArrays(Arrays):
  """Several sets of arrays with different names, as one."""

  def __init__(self, *parts: Arrays):
    self._owner = {name: part for part in parts for name in part.shapes}
    self.shapes = {name: part.shapes[name] for name, part in self._owner.items()}
    self.dtypes = {name: part.dtypes[name] for name, part in self._owner.items()}

  def read(self, name: str, index: Index) -> np.ndarray:
    return self._owner[name].read(name, index)


class MergedArrays(Arrays):
  """The base with its adapters added in, computed part by part as it is read.

  W + A B alpha / r, summed in float32 and rounded once to the dtype of W.
  """

  def __init__(self, arrays: Arrays, alpha: float):
    self._arrays, self._alpha = arrays, alpha
    self.shapes = {k: v for k, v in arrays.shapes.items() if not k.endswith(("lora_a", "lora_b"))}
    self.dtypes = {name: arrays.dtypes[name] for name in self.shapes}

  def read(self, name: str, index: Index) -> np.ndarray:
    kernel = self._arrays.read(name, index)
    layer, _, leaf = name.rpartition("/")
    if leaf != "kernel" or f"{layer}/lora_a" not in self._arrays.shapes:
      return kernel
    rank = slice(0, self._arrays.shapes[f"{layer}/lora_a"][-1])
    a = self._arrays.read(f"{layer}/lora_a", (*index[:-1], rank)).astype(np.float32)
    b = self._arrays.read(f"{layer}/lora_b", (*index[:-2], rank, index[-1])).astype(np.float32)
    delta = np.matmul(a, b) * np.float32(self._alpha / rank.stop)
    return (kernel.astype(np.float32) + delta).astype(kernel.dtype)


def check_arrays(arrays: Arrays, entries: Iterable[Entry], where: Any) -> None:
  """Raises one UserError for every array that is missing, extra or of another shape."""
  expected = {entry.name: entry.shape for entry in entries}
  problems = [f"{name} is missing" for name in expected.keys() - arrays.shapes.keys()]
  problems += [
    f"{name} is not part of this model" for name in arrays.shapes.keys() - expected.keys()
  ]
  problems += [
    f"{name} has shape {list(arrays.shapes[name])}, the config says {list(shape)}"
    for name, shape in expected.items()
    if arrays.shapes.get(name, shape) != shape
  ]
  raise_problems(where, sorted(problems))


def read_tree_metadata(directory: epath.Path) -> dict[str, Any]:
  """Orbax's description of a checkpoint's tree."""
  file = directory / TREE_METADATA
  if not file.exists():
    raise UserError(f"{directory} is no complete Orbax checkpoint: it has no {TREE_METADATA}")
  try:
    metadata = json.loads(file.read_text())
    tree_paths(metadata)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{file} is damaged: {error}") from error
  return metadata


def tree_paths(metadata: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The paths of all leaves, as names."""
  leaves = metadata["tree_metadata"].values()
  return [tuple(str(key["key"]) for key in leaf["key_metadata"]) for leaf in leaves]


def kvstore(directory: epath.Path, name: str) -> dict[str, Any]:
  """TensorStore's address of one array of an Orbax checkpoint."""
  if (directory / "manifest.ocdbt").exists():
    return {"driver": "ocdbt", "base": file_store(directory), "path": f"{name}/"}
  return file_store(directory / name)


def file_store(directory: epath.Path) -> dict[str, Any]:
  """TensorStore's address of a directory, local or gs://."""
  text = str(directory)
  if text.startswith("gs://"):
    bucket, _, path = text.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}
  return {"driver": "file", "path": str(directory.expanduser().absolute()) + "/"}
