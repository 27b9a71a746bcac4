"""Writes arrays block by block: as safetensors shards, or as an Orbax PyTree checkpoint.

Both writers go through the same blocks. A block is some rows of one Hugging Face tensor, which are
some columns of one layer of our kernel. It is the unit of reading, transposing and writing, and the
chunk of Orbax. So memory is a few blocks per thread, whatever the model's size.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from igpo_jax.convert import THREADS, safetensors_io
from igpo_jax.convert.arrays import (
  TREE_METADATA,
  Arrays,
  Index,
  copy_bits,
  file_store,
  part_shape,
)
from igpo_jax.convert.entries import Entry

BLOCK_BYTES = 16 * 2**20
INNER_PARTS = 16  # a reader can read 1/16 of a chunk's rows without the rest

Progress = Callable[[int], Any]  # called with the bytes of each block that has been written


@dataclasses.dataclass(frozen=True)
class Block:
  """Rows start .. stop - 1 of the tensor of key number `number` of an entry."""

  entry: Entry
  number: int
  start: int
  stop: int

  @property
  def index(self) -> Index:
    """The block's part of our array."""
    rows = slice(self.start, self.stop)
    if self.entry.transposed:
      inner = (slice(0, self.entry.slice_shape[0]), rows)
    else:
      inner = (rows, *(slice(0, n) for n in self.entry.slice_shape[1:]))
    return (*self.entry.part(self.number), *inner)


def block_rows(entry: Entry, dtype: np.dtype) -> int:
  """How many rows a block has: all of a tensor, or an equal part that fits into BLOCK_BYTES."""
  rows = entry.hf_shape[0]
  row_bytes = math.prod(entry.hf_shape[1:]) * dtype.itemsize
  parts = math.ceil(rows / max(BLOCK_BYTES // row_bytes, 1))
  return math.ceil(rows / parts)


def blocks(entry: Entry, dtype: np.dtype, numbers: Iterable[int]) -> Iterator[Block]:
  """Yields the blocks of the keys `numbers` of an entry, in the order of a safetensors file."""
  step = block_rows(entry, dtype)
  for number in numbers:
    for start in range(0, entry.hf_shape[0], step):
      yield Block(entry, number, start, min(start + step, entry.hf_shape[0]))


def read_block(arrays: Arrays, block: Block, dtype: np.dtype) -> np.ndarray:
  """Reads a block, in our layout, converted to `dtype`.

  Raises:
    UserError: `dtype` cannot hold one of its values.
  """
  out = np.empty(part_shape(block.index, block.entry.shape), dtype)
  arrays.read_into(block.entry.name, [block.index], [out])
  return out


def run_all(tasks: Iterable[Callable[[], None]], threads: int) -> None:
  """Runs tasks in parallel. After the first failure, which is raised, no further task begins."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    futures = [pool.submit(task) for task in tasks]
    done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    pool.shutdown(wait=True, cancel_futures=True)
    for future in done:
      future.result()


# Safetensors


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file to be written."""

  key: str
  entry: Entry
  number: int
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor in its file."""
    return math.prod(self.entry.hf_shape) * self.dtype.itemsize


def plan_shards(
  entries: Sequence[Entry], dtypes: Mapping[str, np.dtype], max_bytes: int, stem: str = "model"
) -> dict[str, list[Tensor]]:
  """Distributes tensors over safetensors files, layer after layer.

  Args:
    entries: the parameters to write.
    dtypes: name of an entry -> its dtype.
    max_bytes: the largest size of a file. A larger tensor gets a file of its own.
    stem: begins the files' names. A single file is called STEM.safetensors.

  Returns:
    File name -> its tensors.
  """
  tensors = [
    Tensor(key, entry, number, dtypes[entry.name])
    for entry in entries
    for number, key in enumerate(entry.keys)
  ]
  # A stable sort: tensors that belong to no layer come first, then layer by layer.
  tensors.sort(key=lambda t: t.entry.part(t.number)[0].start if t.entry.stacked else -1)
  shards: list[list[Tensor]] = [[]]
  for tensor in tensors:
    if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_bytes:
      shards.append([])
    shards[-1].append(tensor)
  if len(shards) == 1:
    return {f"{stem}.safetensors": shards[0]}
  name = f"{stem}-{{:05d}}-of-{len(shards):05d}.safetensors"
  return {name.format(n): shard for n, shard in enumerate(shards, start=1)}


def write_safetensors(
  directory: epath.Path,
  shards: Mapping[str, list[Tensor]],
  arrays: Arrays,
  progress: Progress,
  threads: int = THREADS,
) -> None:
  """Writes safetensors files, each by one thread from its first byte to its last.

  With several files it also writes their index.

  Args:
    directory: where to write.
    shards: file name -> its tensors, of `plan_shards`.
    arrays: reads the arrays.
    progress: called with the bytes of each block that has been written.
    threads: number of threads.

  Raises:
    UserError: a dtype cannot hold a value, or a file of the source cannot be read.
  """

  def write(name: str) -> None:
    with (directory / name).open("wb") as f:
      f.write(safetensors_io.header(
        {t.key: (t.dtype, t.entry.hf_shape) for t in shards[name]}
      ))  # fmt: skip
      for tensor in shards[name]:
        for block in blocks(tensor.entry, tensor.dtype, [tensor.number]):
          part = read_block(arrays, block, tensor.dtype)
          part = part.reshape(part.shape[tensor.entry.stacked :])
          part = part.T if tensor.entry.transposed else part
          data = np.empty(part.shape, part.dtype)
          copy_bits(data, part)
          f.write(data.reshape(-1).view(np.uint8).data)
          progress(data.nbytes)

  run_all([lambda name=name: write(name) for name in shards], threads)
  if len(shards) > 1:
    weight_map = {t.key: name for name, tensors in shards.items() for t in tensors}
    total = sum(t.nbytes for tensors in shards.values() for t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (directory / safetensors_io.INDEX_FILE).write_text(text)


# Orbax


def chunk_shapes(entry: Entry, dtype: np.dtype) -> tuple[list[int], list[int]]:
  """(chunk, inner chunk), shapes for zarr3: a chunk is a block, inner chunks can be read alone."""
  rows = block_rows(entry, dtype)
  chunk = [entry.slice_shape[0], rows] if entry.transposed else [rows, *entry.slice_shape[1:]]
  inner = list(chunk)
  if entry.transposed and chunk[0] % INNER_PARTS == 0:
    inner[0] = chunk[0] // INNER_PARTS
  one = [1] * entry.stacked
  return [*one, *chunk], [*one, *inner]


def array_spec(directory: epath.Path, entry: Entry, dtype: np.dtype) -> dict[str, Any]:
  """TensorStore's description of one array: zarr3 in the checkpoint's OCDBT database."""
  chunk, inner = chunk_shapes(entry, dtype)
  inner_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
  index_codecs = [*inner_codecs, {"name": "crc32c"}]
  return {
    "driver": "zarr3",
    "kvstore": {
      "driver": "ocdbt",
      "base": file_store(directory),
      "path": ".".join(entry.path) + "/",
    },
    "metadata": {
      "shape": list(entry.shape),
      "data_type": dtype.name,
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
      "chunk_key_encoding": {"name": "default"},
      "fill_value": 0.0,
      "codecs": [
        {
          "name": "sharding_indexed",
          "configuration": {
            "chunk_shape": inner,
            "codecs": inner_codecs,
            "index_codecs": index_codecs,
          },
        }
      ],
    },
    # Zeros are written like other numbers: a missing chunk is a damaged checkpoint.
    "store_data_equal_to_fill_value": True,
  }


def tree_metadata(entries: Sequence[Entry], dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
  """The contents of Orbax's `_METADATA`: the tree, and how its leaves are stored."""
  leaves = {}
  for entry in entries:
    leaves[str(entry.path)] = {
      "key_metadata": [{"key": name, "key_type": 2} for name in entry.path],
      "value_metadata": {
        # As numpy, so that a restore without arguments works on every machine.
        "value_type": "np.ndarray",
        "skip_deserialize": False,
        "write_shape": chunk_shapes(entry, dtypes[entry.name])[0],
      },
    }
  return {
    "tree_metadata": leaves,
    "use_ocdbt": True,
    "use_zarr3": True,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }


def write_orbax(
  directory: epath.Path,
  entries: Sequence[Entry],
  dtypes: Mapping[str, np.dtype],
  arrays: Arrays,
  progress: Progress,
  threads: int = THREADS,
) -> None:
  """Writes an Orbax PyTree checkpoint that any Orbax restores, chunk by chunk.

  Orbax's own `save` needs every array whole in memory, and writes the same files.

  Args:
    directory: the checkpoint to make.
    entries: the arrays to write.
    dtypes: name of an entry -> its dtype.
    arrays: reads the arrays.
    progress: called with the bytes of each block that has been written.
    threads: number of threads.

  Raises:
    UserError: a dtype cannot hold a value, or a file of the source cannot be read.
  """
  began = time.time_ns()
  directory.mkdir(parents=True, exist_ok=True)
  context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
  stores = {
    entry.name: ts.open(
      array_spec(directory, entry, dtypes[entry.name]), create=True, context=context
    ).result()
    for entry in entries
  }

  def write(block: Block) -> None:
    part = read_block(arrays, block, dtypes[block.entry.name])
    stores[block.entry.name][block.index].write(part).result()
    progress(part.nbytes)

  tasks = [
    lambda block=block: write(block)
    for entry in entries
    for block in blocks(entry, dtypes[entry.name], range(len(entry.keys)))
  ]
  run_all(tasks, threads)
  (directory / TREE_METADATA).write_text(json.dumps(tree_metadata(entries, dtypes)))
  handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
  step = {
    "item_handlers": handler,
    "metrics": {},
    "performance_metrics": {},
    "init_timestamp_nsecs": began,
    "commit_timestamp_nsecs": time.time_ns(),
    "custom_metadata": {},
  }
  (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(step))
  (directory / "commit_success.txt").write_text(f"Checkpoint commit was successful to {directory}")
