"""TPU chips, and the slices of them that the configs are sized for: facts, in one table each.

Peak rates and bandwidths are the published ones (Cloud TPU documentation, "TPU v5e", "TPU
v5p", "TPU v6e": system architecture); usable memory is what XLA's compiler allows a program.
"""

from __future__ import annotations

import dataclasses

from igpo_jax.cli import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    hbm_bytes: memory that a program may use.
    flops: peak, bfloat16 products per second x 2.
    hbm_bandwidth: bytes per second.
    ici_bandwidth: bytes per second that all links of a chip receive.
  """

  hbm_bytes: int
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float


GIB = 2**30
# By jax's `device_kind`.
CHIPS = {
  "TPU v5 lite": Chip(int(15.75 * GIB), 197e12, 819e9, 200e9),
  "TPU v5": Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9),
  "TPU v6 lite": Chip(int(31.25 * GIB), 918e12, 1640e9, 400e9),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice by the name it is rented under.

  Attributes:
    topology: its name for the compiler, as `--topology` takes it.
    mesh: sizes of the axes (data, fsdp, tensor).
  """

  topology: str
  mesh: tuple[int, int, int]


# docs/scaling.md says why these meshes.
SLICES = {
  "v5e-8": Slice("v5e:2x4", (1, 8, 1)),
  "v5e-64": Slice("v5e:8x8", (1, 64, 1)),
  "v5p-32": Slice("v5p:2x2x4", (1, 16, 1)),  # named after its cores: two on a chip
}


def find_slice(name: str) -> Slice:
  """The slice of a name.

  Raises:
    UserError: an unknown name.
  """
  if name not in SLICES:
    raise UserError(f"config: mesh.slice={name!r} is not one of {', '.join(SLICES)}")
  return SLICES[name]


def find_chip(device_kind: str) -> Chip:
  """The facts of a chip.

  Raises:
    UserError: an unknown kind.
  """
  if device_kind not in CHIPS:
    raise UserError(f"no facts about the chip {device_kind!r}: known are {', '.join(CHIPS)}")
  return CHIPS[device_kind]
