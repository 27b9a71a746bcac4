"""Weights into memory: from a directory straight into arrays, sharded if there is a mesh."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from etils import epath

from igpo_jax.config import ModelConfig, check_dtype
from igpo_jax.convert import open
from igpo_jax.convert.arrays import Arrays
from igpo_jax.data import tokenizer as tokenizer_lib
from igpo_jax.errors import UserError
from igpo_jax.models import make_lm
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.parallel.sharding import check_divides, tree_shardings
from igpo_jax.types import LM, Params


class Pretrained(NamedTuple):
  """A model ready to use.

  Attributes:
    lm: its pure functions.
    params: its parameters, on the default device or sharded over the mesh.
    tokenizer: its `igpo_jax.data.tokenizer.Tokenizer`; None if the directory has none.
    config: its ModelConfig; `config.lora` describes its adapters.
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
  source = open.open_source(path, adapter=adapter)
  return load_source(source, check_dtype(dtype, "dtype"), mesh)


def load_source(
  source: open.Source, dtype: str, mesh: jax.sharding.Mesh | None = None
) -> Pretrained:
  """`load_pretrained` for a source that is already open.

  Raises:
    UserError: as `load_pretrained`.
  """
  config = dataclasses.replace(source.config, dtype=dtype, param_dtype=dtype)
  tokenizer = None
  if source.tokenizer is not None:
    tokenizer = tokenizer_lib.load_tokenizer(source.tokenizer)
    check_tokenizer(tokenizer, config, source.tokenizer)
    stops = dict.fromkeys((*config.stop_ids, *tokenizer.stop_ids))
    config = dataclasses.replace(config, stop_ids=tuple(stops))
  lm, shardings = laid_out(config, mesh)
  source.arrays.check()
  params = read_params(source, np.dtype(dtype), shardings)
  return Pretrained(lm, params, tokenizer, config)


def laid_out(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> tuple[LM, Any]:
  """Makes a model, and the shardings of its parameters on a mesh.

  Returns:
    (the model, a tree of NamedShardings; None without a mesh).

  Raises:
    UserError: a parameter does not divide over the mesh, or the family is unknown.
  """
  lm = make_lm(config)
  if mesh is None:
    return lm, None
  shardings = tree_shardings(lm.logical_axes(), mesh)
  check_divides(jax.eval_shape(lm.init, jax.random.key(0)), shardings)
  return lm, shardings


def fitting_mesh(source: open.Source) -> jax.sharding.Mesh | None:
  """The mesh for sampling: parameters are split over as many devices as they can be divided by.

  It says on stderr if some devices stay idle. None if one device is used.
  """
  count = jax.device_count()
  for used in range(count, 0, -1):
    mesh = make_mesh(data=1, fsdp=used, devices=jax.devices()[:used])
    try:
      laid_out(source.config, mesh)
    except UserError:
      continue
    if used < count:
      print(f"the model divides over {used} of {count} devices: the others stay idle",
            file=sys.stderr)  # fmt: skip
    return mesh if used > 1 else None


def check_tokenizer(tokenizer: Any, config: ModelConfig, where: Any) -> None:
  """Checks that a tokenizer's special tokens are the model's.

  A tokenizer may have fewer tokens than the embedding has rows, and even more, as long as
  those are not used: `token_ids.check_ids` looks at the ids of each text.

  Args:
    tokenizer: a `igpo_jax.data.tokenizer.Tokenizer`.
    config: the model's.
    where: the tokenizer's directory or name, for messages.

  Raises:
    UserError: the mask or end-of-text tokens differ, or the embedding has no row for a token.
  """
  for what, ours, theirs in (
    ("mask", tokenizer.mask_id, config.mask_id),
    ("end-of-text", tokenizer.eos_id, config.eos_id),
  ):
    if ours != theirs:
      raise UserError(
        f"{where}: the tokenizer's {what} token is {ours}, the model's {theirs}; "
        "is it the tokenizer of another model?"
      )
  used = {"padding": tokenizer.pad_id, "end-of-turn": tokenizer.turn_id}
  used |= dict.fromkeys(["stop"], max(tokenizer.stop_ids))
  for what, token in used.items():
    if not 0 <= token < config.vocab_size:
      raise UserError(
        f"{where}: the tokenizer's {what} token is {token}, but the model's embedding has "
        f"{config.vocab_size} rows; were tokens added without resizing the model?"
      )


def read_params(source: open.Source, dtype: np.dtype, shardings: Any = None) -> Params:
  """Reads all parameters of an open source, one array after the other.

  Args:
    source: the source.
    dtype: dtype of the base's parameters; adapters keep theirs.
    shardings: NamedShardings with the structure of the parameters; None: the default device.
  """
  params: dict[str, Any] = {}
  for entry in source.entries:
    sharding, node = shardings, params
    for name in entry.path:
      sharding = sharding and sharding[name]
    for name in entry.path[:-1]:
      node = node.setdefault(name, {})
    adapter = entry.path[-1].startswith("lora_")
    target = source.arrays.dtypes[entry.name] if adapter else dtype
    # One at a time, so that the host's copy of an array is freed before the next one is read.
    node[entry.path[-1]] = jax.block_until_ready(place(source.arrays, entry.name, target, sharding))
  return params


def place(
  arrays: Arrays, name: str, dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.Array:
  """Reads one array onto its devices. Every byte of the file is read at most once.

  Args:
    arrays: reads the array.
    name: its name.
    dtype: the dtype that it is converted to while it is read.
    sharding: where its parts go; None: the default device.
  """
  shape = arrays.shapes[name]
  if sharding is None:
    whole = np.empty(shape, dtype)
    arrays.read_into(name, [tuple(slice(0, n) for n in shape)], [whole])
    return jax.device_put(whole)
  where = sharding.addressable_devices_indices_map(shape)
  bounds = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    for device, index in where.items()
  }
  # Devices that hold the same part share the host's copy of it.
  parts = {
    part: np.empty([stop - start for start, stop in part], dtype)
    for part in dict.fromkeys(bounds.values())
  }
  indices = [tuple(slice(*bound) for bound in part) for part in parts]
  arrays.read_into(name, indices, list(parts.values()))
  placed = [jax.device_put(parts[bounds[device]], device) for device in where]
  return jax.make_array_from_single_device_arrays(shape, sharding, placed)
