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
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from igpo_jax.cli import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER = 100_000_000  # the format's own limit
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


def raise_problems(where: Any, problems: list[str]) -> None:
  """Raises one UserError that lists every problem; does nothing if there is none."""
  if problems:
    raise UserError(f"{where}: {'; '.join(problems)}")


def read_header(file: epath.Path) -> tuple[dict[str, TensorInfo], list[str]]:
  """The tensors of one file, and what is wrong with it."""
  size = file.stat().length
  with file.open("rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
      return {}, [f"{file.name} is truncated or no safetensors file ({size} bytes)"]
    text = f.read(length)
  try:
    header = json.loads(text)
    header.pop("__metadata__", None)
    fields = {key: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for key, v in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    return {}, [f"{file.name} has a damaged header"]
  tensors, problems, data = {}, [], 8 + length
  for key, (dtype, shape, begin, end) in fields.items():
    if dtype not in DTYPES:
      problems.append(f"{key} is stored as {dtype} (supported: {', '.join(DTYPES)})")
      continue
    expected = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
    if end - begin != expected:
      problems.append(f"{key} in {file.name} has {end - begin} bytes for shape {list(shape)}")
      continue
    tensors[key] = TensorInfo(file, DTYPES[dtype], shape, data + begin, expected)
  promised = data + max((end for *_, end in fields.values()), default=0)
  if size < promised:
    problems.append(f"{file.name} is truncated: {size} of {promised} bytes")
  return tensors, problems


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


class Reader:
  """The tensors of a directory, single file or sharded. Safe to share between threads.

  Args:
    directory: holds model.safetensors, or an index and its shards.

  Raises:
    UserError: no weights, pickled weights, a missing shard, a truncated file, or an
      index that disagrees with its shards; all problems in one message.
  """

  def __init__(self, directory: epath.PathLike, single_file: str = SINGLE_FILE):
    self.directory = epath.Path(directory)
    self.tensors: dict[str, TensorInfo] = {}
    self._handles: dict[epath.Path, Any] = {}
    self._lock = threading.Lock()
    files, weight_map, problems = self._find_files(single_file)
    for file in files:
      tensors, found = read_header(file)
      problems += found
      self.tensors.update(tensors)
    if not problems:
      for key, name in weight_map.items():
        if key not in self.tensors:
          problems.append(f"{key} is in the index but not in {name}")
    raise_problems(self.directory, problems)

  def _find_files(self, single_file: str):
    index = self.directory / INDEX_FILE
    if (self.directory / single_file).exists():
      return [self.directory / single_file], {}, []
    if not index.exists():
      pickled = sorted(f.name for f in self.directory.glob("*.bin"))
      if pickled:
        raise UserError(
          f"{self.directory} has only pickled weights ({pickled[0]}), which can run code when "
          "read; save them with safe_serialization=True first"
        )
      raise UserError(f"{self.directory} has neither {single_file} nor {INDEX_FILE}")
    try:
      weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{index} is damaged: it needs a JSON object with weight_map") from error
    names = sorted(set(weight_map.values()))
    missing = [n for n in names if not (self.directory / n).exists()]
    files = [self.directory / n for n in names if n not in missing]
    return files, weight_map, [f"shard {n} is missing" for n in missing]

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
    for handle in self._handles.values():
      handle.close()
    self._handles.clear()

  def __enter__(self) -> Reader:
    return self

  def __exit__(self, *unused) -> None:
    self.close()
