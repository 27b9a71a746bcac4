"""Tables of facts: accelerator chips, and the TPU slices that configs are sized for.

Peak rates and bandwidths are the published ones. TPUs: Cloud TPU documentation, "TPU v5e", "TPU
v5p", "TPU v6e", system architecture; usable memory is what XLA's compiler allows a program.
GPUs: NVIDIA's data sheets of the H100, H200 and A100 (SXM boards; peaks without sparsity; NVLink
counted in one direction), L4 and T4 (PCI Express in one direction); usable memory is the share that
this program asks for of what CUDA reports.
"""

from __future__ import annotations

import dataclasses

from igpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip: a TPU chip or a GPU.

  Attributes:
    platform: "tpu" or "gpu".
    hbm_bytes: bytes of memory that a program may use.
    flops: peak floating-point operations per second in bfloat16; a multiply-add counts as two.
    hbm_bandwidth: bytes per second between the chip and its memory.
    ici_bandwidth: bytes per second that the chip receives over all of its links to other chips of
      the slice or machine.
  """

  platform: str
  hbm_bytes: int
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float


GIB = 2**30
# Of a GPU's memory, for the programs' arrays. jax's own default is 0.75; the rest is for CUDA's
# context, cuDNN and NCCL, which allocate their own.
GPU_SHARE = 0.92
# By jax's `device_kind`.
CHIPS = {
  "TPU v5 lite": Chip("tpu", int(15.75 * GIB), 197e12, 819e9, 200e9),
  "TPU v5": Chip("tpu", int(95.74 * GIB), 459e12, 2765e9, 600e9),
  "TPU v6 lite": Chip("tpu", int(31.25 * GIB), 918e12, 1640e9, 400e9),
  "NVIDIA H100 80GB HBM3": Chip("gpu", int(GPU_SHARE * 79.1 * GIB), 989e12, 3350e9, 450e9),
  "NVIDIA H200": Chip("gpu", int(GPU_SHARE * 139.7 * GIB), 989e12, 4800e9, 450e9),
  "NVIDIA A100-SXM4-40GB": Chip("gpu", int(GPU_SHARE * 39.4 * GIB), 312e12, 1555e9, 300e9),
  "NVIDIA L4": Chip("gpu", int(GPU_SHARE * 22.0 * GIB), 121e12, 300e9, 32e9),
  # Its peak is that of float32: it has no units for bfloat16.
  "Tesla T4": Chip("gpu", int(GPU_SHARE * 14.6 * GIB), 8.1e12, 320e9, 16e9),
  "NVIDIA A100-SXM4-80GB": Chip("gpu", int(GPU_SHARE * 79.1 * GIB), 312e12, 2039e9, 300e9),
}
# By the name that `config.mesh.hardware` gives it.
KINDS = {
  "v5e": "TPU v5 lite",
  "v5p": "TPU v5",
  "v6e": "TPU v6 lite",
  "h100": "NVIDIA H100 80GB HBM3",
  "h200": "NVIDIA H200",
  "a100": "NVIDIA A100-SXM4-80GB",
  "a100-40": "NVIDIA A100-SXM4-40GB",
  "l4": "NVIDIA L4",
  "t4": "Tesla T4",
}
PLATFORMS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice.

  Attributes:
    topology: its name for the compiler, as `igpo_jax.aot --topology` takes it.
    mesh: sizes of the axes data, fsdp and tensor.
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
  """The slice of a name under which it is rented, such as "v5e-64".

  Raises:
    UserError: an unknown name; the message lists the known ones.
  """
  if name not in SLICES:
    raise UserError(f"config: mesh.slice={name!r} is not one of {', '.join(SLICES)}")
  return SLICES[name]


def find_chip(device_kind: str) -> Chip:
  """The chip of a jax `device_kind`, such as "TPU v5 lite".

  Raises:
    UserError: an unknown kind; the message lists the known ones.
  """
  if device_kind not in CHIPS:
    raise UserError(f"no facts about the chip {device_kind!r}: known are {', '.join(CHIPS)}")
  return CHIPS[device_kind]


def find_hardware(name: str) -> tuple[str, str]:
  """(platform, jax's device kind or "") of a name that `config.mesh.hardware` may have.

  Example: `find_hardware("h200") == ("gpu", "NVIDIA H200")`.

  Raises:
    UserError: an unknown name.
  """
  if name in PLATFORMS:
    return name, ""
  if name not in KINDS:
    known = ", ".join((*PLATFORMS, *KINDS))
    raise UserError(f"config: mesh.hardware={name!r} is not one of {known}")
  return CHIPS[KINDS[name]].platform, KINDS[name]
