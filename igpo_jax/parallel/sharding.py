"""Logical axis names, the one table that maps them to the mesh, and constraints.

Dimensions of parameters and of activations have different names, since they are laid out
differently: parameters are split over the mesh axes `fsdp`, `tensor` and, of experts, `expert`;
activations over the batch (`data` x `fsdp` x `expert`) and `tensor`. An unknown name raises. If it
silently meant "replicated", the first sign of a misspelled name would be an out-of-memory error on
a pod.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from igpo_jax.errors import UserError
from igpo_jax.types import Array

LogicalAxes = tuple[str | None, ...]

RULES: dict[str, str | tuple[str, ...] | None] = {
  # parameters
  "layers": None,  # the scanned axis: one program for every layer
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "qkv": "tensor",  # queries, keys and values as one product
  "experts": "expert",
  "expert_embed": "fsdp",
  "norm": None,
  "lora_rank": None,
  "lora_fan": ("fsdp", "tensor"),  # an adapter's other dimension, whatever the kernel's is
  # activations
  "act_batch": ("data", "fsdp", "expert"),
  "act_length": None,
  "act_sequence": "tensor",  # the same dimension where ModelConfig.shard_sequence is on
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_mlp": "tensor",
  "act_vocab": "tensor",
}


def partition_spec(axes: LogicalAxes) -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions have these logical names.

  Raises:
    KeyError: a name is not in the table.
  """
  for name in axes:
    if name is not None and name not in RULES:
      raise KeyError(f"no sharding rule for the logical axis {name!r}")
  return PartitionSpec(*(None if name is None else RULES[name] for name in axes))


def constrain(x: Array, *axes: str | None) -> Array:
  """Fixes the sharding of an activation inside a jitted program.

  Args:
    x: an array.
    axes: a logical name, or None, for each dimension of `x`.

  Returns:
    `x` with the sharding constraint. Without a mesh in context (`jax.set_mesh`) it is `x` itself;
    the names are checked all the same, so that a misspelled one also fails on a laptop.
  """
  spec = partition_spec(axes)
  if x.ndim != len(axes):
    raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {x.shape}")
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def num_shards(*axes: str, mesh: Any = None) -> int:
  """The number of parts that a mesh cuts an array with these logical axes into.

  Example: rows of a batch are split over `num_shards("act_batch", mesh=mesh)` devices.

  Args:
    axes: logical names.
    mesh: a Mesh or AbstractMesh; None takes the one in context. Without any the answer is 1.
  """
  sizes = dict((jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape)
  names = [
    name
    for axis in partition_spec(axes)
    for name in ((axis,) if isinstance(axis, str) else axis or ())
  ]
  return math.prod(sizes.get(name, 1) for name in names)


def is_axes(leaf: Any) -> bool:
  """True for a leaf of a tree of logical axes: a tuple of names and Nones."""
  return isinstance(leaf, tuple) and all(n is None or isinstance(n, str) for n in leaf)


def tree_shardings(logical_axes: Any, mesh: jax.sharding.Mesh) -> Any:
  """A tree of NamedShardings from a tree of logical axes."""
  return jax.tree.map(
    lambda axes: NamedSharding(mesh, partition_spec(axes)), logical_axes, is_leaf=is_axes
  )


def check_divides(arrays: Any, shardings: Any) -> None:
  """Checks that every array can be cut into the equal parts that its sharding asks for.

  Args:
    arrays: a tree of arrays or ShapeDtypeStructs.
    shardings: NamedShardings, mirroring it.

  Raises:
    UserError: names the first array that cannot, the dimension and the mesh axis.
  """
  leaves = zip(jax.tree_util.tree_leaves_with_path(arrays), jax.tree.leaves(shardings), strict=True)
  for (path, x), sharding in leaves:
    sizes = dict(sharding.mesh.shape)
    for size, axes in zip(x.shape, sharding.spec, strict=False):  # the spec may be shorter
      names = (axes,) if isinstance(axes, str) else axes or ()
      if size % math.prod(sizes[name] for name in names):
        over = " x ".join(f"{name}={sizes[name]}" for name in names)
        name = "/".join(str(key.key) for key in path)
        raise UserError(
          f"config.mesh: {name} {list(x.shape)} does not divide over the devices: {size} over "
          f"{over}; choose mesh sizes that divide the model's, or fewer devices"
        )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of an array of which every device holds a full copy."""
  return NamedSharding(mesh, PartitionSpec())


def layout_table(arrays: Any) -> str:
  """A Markdown table of a tree's arrays: name, shape, PartitionSpec, and MiB on each device.

  Args:
    arrays: a tree of arrays or ShapeDtypeStructs with NamedShardings.
  """
  lines = ["| parameter | shape | dtype | over | MiB a chip |", "|---|---|---|---|---|"]
  total = 0
  for path, x in jax.tree_util.tree_leaves_with_path(arrays):
    name = "/".join(str(key.key) for key in path)
    size = math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    total += size
    spec = ", ".join("-" if axis is None else str(axis) for axis in x.sharding.spec)
    shape = " x ".join(map(str, x.shape))
    lines.append(f"| {name} | {shape} | {x.dtype} | {spec} | {size / 2**20:.3f} |")
  lines.append(f"| in all | | | | {total / 2**20:.3f} |")
  return "\n".join(lines)
