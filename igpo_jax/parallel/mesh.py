"""The device mesh: one program runs on a laptop and on a pod.

Its axes are data, fsdp, expert and tensor; `config.MeshConfig` says what each of them splits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igpo_jax.config import MeshConfig
from igpo_jax.errors import UserError
from igpo_jax.parallel.sharding import num_shards, partition_spec
from igpo_jax.parallel.tpu import find_slice

AXES = ("data", "fsdp", "expert", "tensor")


def check_devices() -> None:
  """Makes jax look for its devices. Call it before any computation and after `distributed.start`.

  Raises:
    UserError: the platform that JAX_PLATFORMS asks for has no device here.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter for cuda without its plugin
    asked = jax.config.jax_platforms
    reason = str(error).partition("(set JAX_PLATFORMS")[0].strip().splitlines()
    raise UserError(
      f"JAX_PLATFORMS={asked or ''}: jax finds no such device here"
      f"{f' ({reason[0].strip()})' if reason else ''}; install igpo_jax with the extra tpu or cuda "
      "on a machine that has one, or set JAX_PLATFORMS=cpu"
    ) from error


def mesh_shape(
  data: int, fsdp: int, tensor: int, num_devices: int, expert: int = 1
) -> tuple[int, int, int, int]:
  """The sizes of `AXES`, with the one that may be -1 replaced by the rest of the devices.

  Example: `mesh_shape(-1, 2, 1, num_devices=8) == (4, 2, 1, 1)`.

  Raises:
    UserError: more than one -1, a size below 1, or a product that is not `num_devices`.
  """
  sizes = [data, fsdp, expert, tensor]
  text = f"config.mesh ({', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))})"
  if sizes.count(-1) > 1:
    raise UserError(f"{text}: only one axis may be -1 (the rest of the devices)")
  if any(s < 1 and s != -1 for s in sizes):
    raise UserError(
      f"{text}: a size is positive, or -1 for the rest of the devices; where data or fsdp is 0, "
      "call train.sizes.resolve first"
    )
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    if num_devices % known:
      raise UserError(
        f"{text}: the {num_devices} devices are not a multiple of {known}, the product of the "
        "other axes"
      )
    sizes[sizes.index(-1)] = num_devices // known
  if math.prod(sizes) != num_devices:
    raise UserError(
      f"{text}: the sizes multiply to {known}, but there are {num_devices} devices; make one -1"
    )
  return tuple(sizes)


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None, expert: int = 1
) -> jax.sharding.Mesh:
  """A mesh with the axes `AXES` over all devices, or over the given ones.

  Args:
    data, fsdp, tensor, expert: sizes of the axes; one may be -1, the rest of the devices.
    devices: None takes all devices of all processes.

  Raises:
    UserError: sizes that do not fit the devices, or a tensor axis over several processes.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(data, fsdp, tensor, len(devices), expert)
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
  check_rows_per_process(
    np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
  )
  return mesh


def check_rows_per_process(process_of: np.ndarray) -> None:
  """Checks that every process can have rows of its own. Reading and grading rely on it.

  Args:
    process_of: int[...,tensor], for each device the index of its process.

  Raises:
    UserError: the tensor axis would make several processes hold the same rows.
  """
  for block in process_of.reshape(-1, process_of.shape[-1]):
    processes = sorted(set(block.tolist()))
    if len(processes) > 1:
      raise UserError(
        f"config.mesh: tensor={len(block)} spreads the same rows over processes "
        f"{', '.join(map(str, processes))}; a process has rows of its own: make tensor a divisor "
        "of the devices of one process"
      )


def check_micro_batches(mesh: jax.sharding.Mesh, rows: int, count: int, name: str) -> None:
  """Checks that every device has a row in each of `count` micro-batches of `rows` rows.

  With fewer rows than devices the program would still run, but devices would exchange pieces of
  rows.

  Raises:
    UserError: the rows do not divide. `name` is the option it names, such as "rl.micro_batches".
  """
  ways = num_shards("act_batch", mesh=mesh)
  _check_resolved(count, name)
  if count > 1 and (rows // count) % ways:
    raise UserError(
      f"config: {name}={count} leaves {rows // count} of {rows} rows, which do not divide over "
      f"{ways} devices (mesh data x fsdp x expert): lower it, leave it to the "
      "devices with 0, or raise mesh.tensor"
    )


def check_sample_slices(mesh, prompts: int, group_size: int, slices: int, processes: int) -> None:
  """Checks that a step's prompts share out over slices, processes and devices.

  Args:
    prompts: number of prompts of a step, over all processes.
    group_size: completions of each prompt.
    slices: `rl.sample_slices`.

  Raises:
    UserError: they do not; it names rl.sample_slices and says what to change.
  """
  ways = num_shards("act_batch", mesh=mesh)
  _check_resolved(slices, "rl.sample_slices")
  advice = "lower rl.sample_slices, or leave it to the devices with 0"
  if prompts % (slices * processes):
    raise UserError(
      f"config: rl.prompts_per_step={prompts} is not a multiple of rl.sample_slices={slices} x "
      f"{processes} process(es): {advice}"
    )
  if (prompts // slices * group_size) % ways:
    raise UserError(
      f"config: rl.sample_slices={slices} leaves {prompts // slices} prompts x {group_size} "
      f"completions, which do not share out over {ways} devices (mesh data x fsdp x expert): "
      f"{advice}"
    )


def _check_resolved(count: int, name: str) -> None:
  if count < 1:
    raise UserError(
      f"config: {name}={count} is left to the devices: call train.sizes.resolve first"
    )


def _sizes(config: MeshConfig) -> dict[str, int]:
  """Sizes of the axes: those of the TPU slice that the config names, or its own.

  A slice's fsdp axis gives up the devices that `config.expert` asks for.
  """
  if not config.slice:
    return {axis: getattr(config, axis) for axis in AXES}
  data, fsdp, tensor = find_slice(config.slice).mesh
  if fsdp % config.expert:
    raise UserError(
      f"config: mesh.expert={config.expert} does not divide the {fsdp} devices along fsdp of "
      f"mesh.slice={config.slice!r}"
    )
  return {
    "data": data, "fsdp": fsdp // config.expert, "expert": config.expert, "tensor": tensor
  }  # fmt: skip


def configured_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """The mesh of a config, over all devices or the given ones.

  Raises:
    UserError: an unknown slice, or sizes that do not fit the devices.
  """
  return make_mesh(**_sizes(config), devices=devices)


def abstract_mesh(config: MeshConfig, num_devices: int) -> jax.sharding.AbstractMesh:
  """The mesh of a config for `num_devices` devices that need not exist.

  Shardings over it tell where arrays would live; no array can be placed on it.
  """
  shape = mesh_shape(**_sizes(config), num_devices=num_devices)
  return jax.sharding.AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shard_rows(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Puts numpy arrays onto the devices, their first axis sharded over data, fsdp and expert.

  Args:
    mesh: the device mesh.
    tree: numpy arrays, each with this process's rows only.

  Returns:
    A tree of jax arrays with the rows of all processes, in the order of the processes.

  Raises:
    UserError: the rows of all processes do not divide over these axes.
  """
  ways = num_shards("act_batch", mesh=mesh)
  sharding = NamedSharding(mesh, partition_spec(("act_batch",)))

  def place(x):
    rows = x.shape[0] * jax.process_count()
    if rows % ways:
      raise UserError(
        f"a batch of {rows} rows does not divide over {ways} devices (mesh data x fsdp x expert): "
        "make the batch a multiple of them, or lower config.mesh.data or config.mesh.fsdp"
      )
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree.map(place, tree)


def local_rows(tree: Any) -> Any:
  """This process's rows of sharded arrays, as numpy arrays: the inverse of `shard_rows`."""

  def fetch(x):
    if x.is_fully_addressable:
      return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

  return jax.tree.map(fetch, tree)


def over_processes(values: np.ndarray | float, reduce: Callable) -> np.ndarray:
  """Reduces one small numpy array per process; every process gets the result. A collective.

  Args:
    values: this process's array or number; all have one shape and dtype.
    reduce: called as `reduce(stacked, axis=0)`, where `stacked` has the arrays of all processes.
  """
  values = np.asarray(values)
  if jax.process_count() == 1:
    return reduce(values[None], axis=0)
  return reduce(np.asarray(multihost_utils.process_allgather(values)), axis=0)


def max_over_processes(value: int) -> jax.Array:
  """i32[] on the devices: the largest of one number per process.

  A collective that does not wait. The result is there once the devices have finished the work that
  was given to them before.
  """
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  shape = (jax.process_count(), len(devices) // jax.process_count())
  mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), ("process", "local"))
  sharding = NamedSharding(mesh, PartitionSpec("process"))
  values = jax.make_array_from_process_local_data(sharding, np.full(1, value, np.int32))
  return _max(NamedSharding(mesh, PartitionSpec()))(values)


@functools.cache
def _max(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.max, out_shardings=sharding)
