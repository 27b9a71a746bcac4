"""Named arrays on disk, any part of which can be read without the rest.

Safetensors (one tensor per layer, kernels transposed) and Orbax (our stacked tree) have one
interface here: a name such as "blocks/q_proj/kernel", a shape in our layout, a dtype, and
`read(name, index)`. Nothing is read before it is asked for, and bytes that several parts share are
read once (`read_into`).
"""

from __future__ import annotations

import abc
import concurrent.futures
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from igpo_jax.convert.entries import Entry
from igpo_jax.convert.safetensors_io import Reader, raise_problems
from igpo_jax.errors import UserError

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
  def read_into(self, name: str, indices: Sequence[Index], outs: Sequence[np.ndarray]) -> None:
    """Fills outs[k] with the part indices[k] of an array, converted to the dtype of outs[k].

    Bytes that several parts share are read once. The shards of a host are filled in this way.

    Raises:
      UserError: the dtype cannot hold a value, or a file cannot be read.
    """

  def read(self, name: str, index: Index) -> np.ndarray:
    """The part `index` of an array, as stored."""
    out = np.empty(part_shape(index, self.shapes[name]), self.dtypes[name])
    self.read_into(name, [index], [out])
    return out

  def check(self) -> None:
    """Compares arrays that the files have twice. Unlike opening the files, it reads data.

    Raises:
      UserError: two copies of one parameter differ.
    """
    return  # most files hold nothing twice


def part_shape(index: Index, shape: Sequence[int]) -> tuple[int, ...]:
  """The shape of array[index] for an array of this shape."""
  return tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))


def cast(x: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
  """`x` in another dtype, rounded to the nearest number; `x` itself if it has this dtype.

  Args:
    x: the array.
    dtype: the dtype.
    what: name of the tensor, for the message.

  Raises:
    UserError: a finite number would become infinite.
  """
  if x.dtype == dtype:
    return x
  with np.errstate(over="ignore", invalid="ignore"):
    out = x.astype(dtype)
  if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(x.dtype).max:
    infinite = np.isinf(out)
    if infinite.any() and (lost := x[infinite])[np.isfinite(lost)].size:
      worst = float(np.abs(lost[np.isfinite(lost)].astype(np.float32)).max())
      raise UserError(
        f"{what} has values up to {worst:.3g}, which {dtype.name} cannot hold (its largest is "
        f"{float(ml_dtypes.finfo(dtype).max):.3g}); use bfloat16 or float32"
      )
  return out


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
  """Safetensors files as our arrays.

  Args:
    reader: an open directory.
    entries: the arrays that it must have.
    copies: further keys that it may have, each with the name of the array that it must be equal to
      (the head of a model whose embeddings are tied).
    tied_by: the option of config.json that says so, for the message.

  Raises:
    UserError: every missing, extra or misshapen tensor, in one message.
  """

  def __init__(
    self,
    reader: Reader,
    entries: Iterable[Entry],
    copies: Mapping[str, str] | None = None,
    tied_by: str = "",
  ):
    self._reader, self._tied_by = reader, tied_by
    self._entries = {entry.name: entry for entry in entries}
    self._copies = {k: name for k, name in (copies or {}).items() if k in reader.tensors}
    self.shapes = {name: entry.shape for name, entry in self._entries.items()}
    self.dtypes = {}
    problems, expected = [], {key: self._entries[n].hf_shape for key, n in self._copies.items()}
    for name, entry in self._entries.items():
      expected |= dict.fromkeys(entry.keys, entry.hf_shape)
      found = [reader.tensors[key] for key in entry.keys if key in reader.tensors]
      dtypes = {info.dtype for info in found}
      if len(dtypes) > 1:
        problems.append(f"the layers of {name} have different dtypes: {sorted(map(str, dtypes))}")
      self.dtypes[name] = found[0].dtype if found else np.dtype(np.float32)
    for key, shape in expected.items():
      if key not in reader.tensors:
        problems.append(f"{key} is missing")
      elif reader.tensors[key].shape != shape:
        problems.append(
          f"{key} has shape {list(reader.tensors[key].shape)}, config.json says {list(shape)}"
        )
    extra = reader.tensors.keys() - expected.keys() - reader.aliases
    problems += [f"{key} is not part of this model" for key in extra]
    raise_problems(reader.directory, sorted(problems))

  def read_into(self, name: str, indices: Sequence[Index], outs: Sequence[np.ndarray]) -> None:
    entry = self._entries[name]
    step = max(READ_BYTES * entry.hf_shape[0] // self._nbytes(name), 1)

    def fill(layer: int, parts: list[tuple[Index, np.ndarray]]) -> None:
      key = entry.keys[layer]
      targets = []
      for index, out in parts:
        ranges = [range(*s.indices(n)) for s, n in zip(index, entry.slice_shape, strict=True)]
        # Theirs is [out, in]: our last axis is their rows, which are what can be read apart.
        rows, *rest = ranges[::-1] if entry.transposed else ranges
        targets.append((rows, rest, out.T if entry.transposed else out))
      for start, stop in _runs([rows for rows, *_ in targets], step):
        block = self._reader.read(key, start, stop)
        for rows, rest, target in targets:
          first, last = max(start, rows.start), min(stop, rows.stop)
          if first < last:
            piece = block[first - start : last - start]
            piece = piece[:, rest[0].start : rest[0].stop] if rest else piece
            copy_bits(target[first - rows.start : last - rows.start],
                      cast(piece, target.dtype, key))  # fmt: skip

    each_part(entry.shape[: entry.stacked], indices, outs, fill)

  def check(self) -> None:
    for key, name in self._copies.items():
      ours = self._entries[name].keys[0]
      infos = [self._reader.tensors[k] for k in (key, ours)]
      if (infos[0].file, infos[0].start) == (infos[1].file, infos[1].start):
        continue
      rows = infos[0].shape[0]
      step = max(READ_BYTES * rows // self._nbytes(name), 1)
      for start in range(0, rows, step):
        one, two = (self._reader.read(k, start, start + step) for k in (key, ours))
        if not np.array_equal(one.astype(np.float32), two.astype(np.float32), equal_nan=True):
          raise UserError(
            f"{self._reader.directory}: {key} and {ours} hold different numbers, but config.json "
            f"says that they are one ({self._tied_by}): set {self._tied_by} to false to use the "
            f"head that the file has, or remove {key} from it"
          )

  def _nbytes(self, name: str) -> int:
    """Bytes of what one key holds."""
    return math.prod(self._entries[name].hf_shape) * self.dtypes[name].itemsize


def _runs(wanted: Sequence[range], step: int) -> Iterator[tuple[int, int]]:
  """Runs (start, stop) of at most `step` rows that cover all wanted rows once, in order."""
  done = 0
  for rows in sorted(wanted, key=lambda rows: rows.start):
    for start in range(max(rows.start, done), rows.stop, step):
      yield start, min(start + step, rows.stop)
    done = max(done, rows.stop)


def each_part(
  stack: Sequence[int],
  indices: Sequence[Index],
  outs: Sequence[np.ndarray],
  fill: Callable[[int, list[tuple[Index, np.ndarray]]], None],
) -> None:
  """`fill(number, [(index within it, its part of an out)])` for each part, several at a time.

  Args:
    stack: the sizes of the first axes, along which the parts lie: layers, and experts. Parts are
      numbered along them; of no axis there is one part.
    indices: parts of the whole array.
    outs: arrays with the shapes of these parts.
  """
  parts: dict[int, list[tuple[Index, np.ndarray]]] = {}
  for index, out in zip(indices, outs, strict=True):
    ranges = [range(*s.indices(n)) for s, n in zip(index, stack, strict=False)]
    for place in itertools.product(*(range(len(r)) for r in ranges)):
      number = 0
      for n, size, r in zip(place, stack, ranges, strict=True):
        number = number * size + r[n]
      parts.setdefault(number, []).append((index[len(stack) :], out[place]))
  if len(parts) == 1:
    fill(*next(iter(parts.items())))
    return
  with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
    list(pool.map(fill, parts.keys(), parts.values()))


Box = tuple[tuple[int, int], ...]  # (start, stop) of every axis


def _boxes(wanted: Sequence[Box]) -> list[tuple[Box, list[int]]]:
  """(what to read, which of the wanted boxes it fills): one box around all of them, so that
  no chunk is read twice, or each alone where that one would hold much that nobody wants."""
  around = tuple(
    (min(start for start, _ in axis), max(stop for _, stop in axis))
    for axis in zip(*wanted, strict=True)
  )
  size = lambda box: math.prod(stop - start for start, stop in box)
  if size(around) <= sum(map(size, set(wanted))):
    return [(around, list(range(len(wanted))))]
  return [(box, [k]) for k, box in enumerate(wanted)]


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

  def read_into(self, name: str, indices: Sequence[Index], outs: Sequence[np.ndarray]) -> None:
    shape, what = self.shapes[name], f"{self.directory}: {name}"
    # Kernels layer by layer, and their experts one by one; the rest is read in one piece.
    stack = shape[:-2]

    def fill(number: int, parts: list[tuple[Index, np.ndarray]]) -> None:
      at = tuple(slice(int(n), int(n) + 1) for n in np.unravel_index(number, stack))
      inner = shape[len(stack) :]
      wanted = [
        tuple(s.indices(n)[:2] for s, n in zip(index, inner, strict=True)) for index, _ in parts
      ]
      for box, members in _boxes(wanted):
        data = self.read(name, (*at, *(slice(*bounds) for bounds in box)))
        data = data.reshape(data.shape[len(stack) :])
        for k in members:
          inside = tuple(
            slice(start - first, stop - first)
            for (start, stop), (first, _) in zip(wanted[k], box, strict=True)
          )
          out = parts[k][1]
          copy_bits(out, cast(data[inside], out.dtype, what))

    each_part(stack, indices, outs, fill)

  def read(self, name: str, index: Index) -> np.ndarray:
    try:
      return self._stores[name][index].read().result()
    except ValueError as error:
      raise UserError(f"{self.directory}: cannot read {name}: {error}") from error


class UnionArrays(Arrays):
  """Several sets of arrays as one. If two have an array of the same name, the later one counts."""

  def __init__(self, *parts: Arrays):
    self._parts = parts
    self._owner = {name: part for part in parts for name in part.shapes}
    self.shapes = {name: part.shapes[name] for name, part in self._owner.items()}
    self.dtypes = {name: part.dtypes[name] for name, part in self._owner.items()}

  def read_into(self, name: str, indices: Sequence[Index], outs: Sequence[np.ndarray]) -> None:
    self._owner[name].read_into(name, indices, outs)

  def check(self) -> None:
    for part in self._parts:
      part.check()


class MergedArrays(Arrays):
  """Arrays of a base with its adapters added, W + A B alpha / r, part by part as they are read.

  The sum is made in float32 and rounded once, to the dtype that is asked for.
  """

  def __init__(self, arrays: Arrays, alpha: float):
    self._arrays, self._alpha = arrays, alpha
    self.shapes = {k: v for k, v in arrays.shapes.items() if not k.endswith(("lora_a", "lora_b"))}
    self.dtypes = {name: arrays.dtypes[name] for name in self.shapes}

  def check(self) -> None:
    self._arrays.check()

  def read_into(self, name: str, indices: Sequence[Index], outs: Sequence[np.ndarray]) -> None:
    layer_name, _, leaf = name.rpartition("/")
    pair = [f"{layer_name}/lora_a", f"{layer_name}/lora_b"]
    if leaf != "kernel" or pair[0] not in self._arrays.shapes:
      self._arrays.read_into(name, indices, outs)
      return
    shape, rank = self.shapes[name], self._arrays.shapes[pair[0]][-1]
    scale, stack = np.float32(self._alpha / rank), shape[:-2]

    def fill(number: int, parts: list[tuple[Index, np.ndarray]]) -> None:
      at = tuple(slice(int(n), int(n) + 1) for n in np.unravel_index(number, stack))
      whole = lambda index: (*at, *index)
      ranks = slice(0, rank)
      wanted = [[i for i, _ in parts], [(i[0], ranks) for i, _ in parts],
                [(ranks, i[1]) for i, _ in parts]]  # fmt: skip
      read = []
      for array, inner in zip((name, *pair), wanted, strict=True):
        indices = [whole(index) for index in inner]
        arrays = [
          np.empty(part_shape(i, self._arrays.shapes[array]), self._arrays.dtypes[array])
          for i in indices
        ]
        self._arrays.read_into(array, indices, arrays)
        read.append([x.reshape(x.shape[len(stack) :]) for x in arrays])
      for (_, out), kernel, a, b in zip(parts, *read, strict=True):
        delta = np.matmul(a.astype(np.float32), b.astype(np.float32)) * scale
        merged = kernel.astype(np.float32) + delta
        copy_bits(out, cast(merged, out.dtype, f"{name} with its adapters"))

    each_part(stack, indices, outs, fill)


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
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise UserError(f"{file} is damaged: {error}") from error
  return metadata


def tree_paths(metadata: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The paths of all leaves, as names."""
  leaves = metadata["tree_metadata"].values()
  paths = [tuple(str(key["key"]) for key in leaf["key_metadata"]) for leaf in leaves]
  if any("/" in name for path in paths for name in path):
    raise ValueError("a name leads out of the checkpoint")
  return paths


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
