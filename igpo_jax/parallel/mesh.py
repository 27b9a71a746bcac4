"""The device mesh: axes (data, fsdp, tensor), the same program from a laptop to a pod."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType

from igpo_jax.cli import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(data: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
  """Resolves the one size that may be -1 ("the rest").

  Example: `mesh_shape(-1, 2, 1, num_devices=8) == (4, 2, 1)`.

  Raises:
    UserError: more than one -1, a size below 1, or a product that is not `num_devices`.
  """
  sizes = [data, fsdp, tensor]
  text = f"config.mesh ({', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))})"
  if sizes.count(-1) > 1:
    raise UserError(f"{text}: only one axis may be -1")
  if any(s < 1 and s != -1 for s in sizes):
    raise UserError(f"{text}: sizes are positive, or -1 for the rest of the devices")
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    if num_devices % known:
      raise UserError(f"{text}: {num_devices} devices are not a multiple of {known}")
    sizes[sizes.index(-1)] = num_devices // known
  if math.prod(sizes) != num_devices:
    raise UserError(f"{text}: the product is {known}, but there are {num_devices} devices")
  return tuple(sizes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
  """A mesh over all devices (or the given ones) with axes data, fsdp and tensor."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(data, fsdp, tensor, len(devices))
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
