"""Safetensors files as streams: headers first, then any rows of any tensor, in and out.

The format is eight bytes of header length, a JSON header, and the tensors' bytes.
It is read here with plain positioned reads, so that nothing is mapped into memory
and a remote path works like a local one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from igpo_jax.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER = 100_000_000  # the format's own limit
MOST_PROBLEMS = 20  # of one message
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies: `nbytes` bytes at `start` of `file`."""

  file: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What one file says it holds.

  Attributes:
    tensors: by key.
    aliases: key -> the key of the tensor that stands for it. Of tensors that share their
      memory (a tied head) the torch writer keeps one, and names the others in `__metadata__`.
    problems: what is wrong with the file.
  """

  tensors: Mapping[str, TensorInfo]
  aliases: Mapping[str, str]
  problems: tuple[str, ...]


def raise_problems(where: Any, problems: Sequence[str], most: int = MOST_PROBLEMS) -> None:
  """Raises one UserError that lists the problems, the first `most` of them in words.

  Does nothing if there is none.
  """
  if problems:
    more = len(problems) - most
    listed = [*problems[:most], *([f"and {more} more"] if more > 0 else [])]
    raise UserError(f"{where}: {'; '.join(listed)}")


def read_header(file: epath.Path) -> Header:
  """The header of one file, checked: every tensor lies within it, and no two overlap."""
  try:
    size = file.stat().length
    with file.open("rb") as f:
      length = int.from_bytes(f.read(8), "little")
      if size < 8 or length > min(size - 8, MAX_HEADER):
        return Header({}, {}, (f"{file.name} is truncated or no safetensors file ({size} bytes)",))
      text = f.read(length)
  except OSError as error:
    return Header({}, {}, (f"{file.name} cannot be read ({error.strerror or error})",))
  try:
    header = json.loads(text, object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", None) or {}
    aliases = {k: v for k, v in metadata.items() if isinstance(v, str)}
    fields = {key: _field(value) for key, value in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return Header({}, {}, (f"{file.name} has a damaged header",))
  tensors, problems, data, end_of_last = {}, [], 8 + length, 0
  for key, (dtype, shape, begin, end) in sorted(fields.items(), key=lambda item: item[1][2:]):
    if begin != end_of_last:
      problems.append(f"{key} in {file.name} overlaps another tensor or leaves a gap before it")
    end_of_last = max(end, end_of_last)
    if dtype not in DTYPES:
      problems.append(f"{key} is stored as {dtype} (supported: {', '.join(DTYPES)})")
      continue
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
      problems.append(f"{key} in {file.name} has {end - begin} bytes for shape {list(shape)}")
      continue
    tensors[key] = TensorInfo(file, DTYPES[dtype], shape, data + begin, expected)
  if size < data + end_of_last:
    problems.append(f"{file.name} is truncated: {size} of {data + end_of_last} bytes")
  return Header(tensors, aliases, tuple(problems))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object, none of whose keys is there twice: the second would win in silence."""
  out = dict(pairs)
  if len(out) != len(pairs):
    raise ValueError("a key is there twice")
  return out


def _field(value: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
  """(dtype, shape, begin, end) of a tensor in a header.

  Raises:
    ValueError: sizes that are no whole numbers from 0.
  """
  shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
  if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
    raise ValueError("sizes should be whole numbers")
  return str(value["dtype"]), shape, begin, end


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
  """The first bytes of a file that holds these tensors one after the other."""
  names = {dtype: name for name, dtype in DTYPES.items()}
  fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for key, (dtype, shape) in tensors.items():
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    fields[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(fields, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
  return len(text).to_bytes(8, "little") + text


def _follow(key: str, aliases: Mapping[str, str], tensors: Mapping[str, Any]) -> str | None:
  """The tensor that a key's aliases end at; None if at none."""
  seen = set()
  while key not in tensors and key in aliases and key not in seen:
    seen.add(key)
    key = aliases[key]
  return key if key in tensors else None


class Reader:
  """The tensors of a directory, single file or sharded. Safe to share between threads.

  With an index, a tensor is the one of the shard that the index names; a copy of it that
  another shard still holds is not looked at.

  Args:
    directory: holds model.safetensors, or an index and its shards.

  Attributes:
    tensors: where each tensor lies, by key. Two keys of one tied tensor lie in one place.
    aliases: the keys that only the metadata names.

  Raises:
    UserError: no weights, pickled weights, a missing shard, a truncated file, or an
      index that disagrees with its shards; all problems in one message.
  """

  def __init__(self, directory: epath.PathLike, single_file: str = SINGLE_FILE):
    self.directory = epath.Path(directory)
    self._handles: dict[epath.Path, Any] = {}
    self._lock = threading.Lock()
    names, weight_map, problems = self._find_files(single_file)
    headers = {name: read_header(self.directory / name) for name in names}
    for header in headers.values():
      problems += header.problems
    if weight_map is None:
      tensors = dict(headers[single_file].tensors)
    else:
      tensors = {
        key: headers[name].tensors[key]
        for key, name in weight_map.items()
        if name in headers and key in headers[name].tensors
      }
    aliases = {
      key: tensors[kept]
      for header in headers.values()
      for key in header.aliases.keys() - tensors.keys()
      if (kept := _follow(key, header.aliases, tensors))
    }
    tensors |= aliases
    if weight_map is not None and not problems:
      problems += [
        f"{key} is in the index but not in {name}"
        for key, name in weight_map.items()
        if key not in tensors
      ]
      problems += [
        f"{key} is in {name} but not in the index"
        for name, header in headers.items()
        for key in header.tensors
        if key not in weight_map
      ]
    raise_problems(self.directory, problems)
    self.tensors: Mapping[str, TensorInfo] = tensors
    self.aliases = frozenset(aliases)

  def _find_files(self, single_file: str) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """(names of files, the index's tensor -> file or None, problems)."""
    index = self.directory / INDEX_FILE
    has_single = (self.directory / single_file).exists()
    if has_single and (single_file != SINGLE_FILE or not index.exists()):
      return [single_file], None, []
    if not index.exists():
      pickled = sorted(f.name for f in self.directory.glob("*.bin"))
      if pickled:
        raise UserError(
          f"{self.directory} has only pickled weights ({pickled[0]}), which can run code when "
          "read; save them with safe_serialization=True first"
        )
      raise UserError(f"{self.directory} has neither {single_file} nor {INDEX_FILE}")
    try:
      weight_map = dict(json.loads(index.read_bytes())["weight_map"])
      names = sorted(set(weight_map.values()))
      if any(n != os.path.basename(n) or n in ("", ".", "..") for n in names):
        raise ValueError("shards lie beside their index")
      missing = [n for n in names if not (self.directory / n).exists()]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
      raise UserError(
        f"{index} is damaged: it needs a JSON object with weight_map, tensor -> file"
      ) from error
    if has_single and single_file not in names:
      raise UserError(
        f"{self.directory} has weights twice: {single_file}, and the shards of {INDEX_FILE}; "
        "remove the ones that are out of date"
      )
    problems = [f"shard {n} is missing" for n in missing]
    return [n for n in names if n not in missing], weight_map, problems

  def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows start:stop of a tensor (the whole of it by default), as stored."""
    info = self.tensors[key]
    rows = range(*slice(start, stop).indices(info.shape[0]))
    row_bytes = info.nbytes // max(info.shape[0], 1)
    out = np.empty((len(rows), *info.shape[1:]), info.dtype)
    view = memoryview(out.reshape(-1).view(np.uint8))
    self._read_into(info.file, view, info.start + rows.start * row_bytes)
    return out

  def _read_into(self, file: epath.Path, view: memoryview, offset: int) -> None:
    with self._lock:
      if file not in self._handles:
        self._handles[file] = file.open("rb")
      handle = self._handles[file]
    done = 0
    while done < len(view):
      done += (count := self._read_some(handle, view[done:], offset + done))
      if count == 0:
        raise UserError(f"{file} ended early; was it changed while it was read?")

  def _read_some(self, handle: Any, view: memoryview, offset: int) -> int:
    try:
      descriptor = handle.fileno()
    except (AttributeError, OSError):  # a remote file: one position, one reader at a time
      with self._lock:
        handle.seek(offset)
        data = handle.read(len(view))
      view[: len(data)] = data
      return len(data)
    return os.preadv(descriptor, [view], offset)

  def close(self) -> None:
    """Closes all files."""
    for handle in self._handles.values():
      handle.close()
    self._handles.clear()

  def __enter__(self) -> Reader:
    return self

  def __exit__(self, *unused) -> None:
    self.close()
