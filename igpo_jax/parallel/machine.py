"""The devices that a run has: how many, of which kind, with how much memory.

A config says which devices it is for (`mesh.hardware`, `mesh.devices`, `mesh.slice`). They are
compared with the devices that are there once jax has looked for them, which it does only after the
processes of a run have joined.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from igpo_jax.config import MeshConfig
from igpo_jax.errors import UserError
from igpo_jax.parallel.mesh import over_processes
from igpo_jax.parallel.tpu import CHIPS, GIB, GPU_SHARE, SLICES, find_hardware, find_slice

# Of either, jax takes the share of a GPU's memory that it allocates at its start.
MEMORY_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Machine:
  """The devices of a run, over all of its processes.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: jax's `device_kind`.
    devices: number of devices of all processes together.
    processes: number of processes; each has the same number of devices.
    memory: bytes for arrays on the device that has least; 0 if it is not known.
  """

  platform: str
  kind: str
  devices: int
  processes: int = 1
  memory: int = 0

  def __str__(self) -> str:
    memory = f" with {self.memory / GIB:.1f} GiB each" if self.memory else ""
    processes = f" in {self.processes} processes" if self.processes > 1 else ""
    return f"{self.devices} x {self.kind}{memory}{processes}"


def here() -> Machine:
  """The machine that this process is part of. A collective."""
  device = jax.local_devices()[0]
  limit = min((x.memory_stats() or {}).get("bytes_limit", 0) for x in jax.local_devices())
  # Cards of one kind differ by some MiB; what is decided from it has to be the same on all.
  limit = int(over_processes(np.array(limit // 2**20), np.min)) * 2**20
  platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
  return Machine(platform, device.device_kind, jax.device_count(), jax.process_count(), limit)


def modelled(hardware: str, devices: int, processes: int = 1) -> Machine:
  """The machine that some devices would make, from the table of chips (parallel/tpu.py).

  Args:
    hardware: the kind of device, by a name that `mesh.hardware` may have.
    devices, processes: how many.

  Raises:
    UserError: an unknown name, or devices that do not divide over the processes.
  """
  if devices < 1 or processes < 1 or devices % processes:
    raise UserError(f"{devices} device(s) cannot be shared by {processes} process(es)")
  platform, kind = find_hardware(hardware)
  return Machine(
    platform, kind or platform, devices, processes, CHIPS[kind].hbm_bytes if kind else 0
  )


def hardware_of(config: MeshConfig) -> str:
  """The hardware that a config is for: the chip of `mesh.slice`, or `mesh.hardware`; "" for any.

  Raises:
    UserError: an unknown name.
  """
  if config.slice:
    return find_slice(config.slice).topology.partition(":")[0]
  if config.hardware:
    find_hardware(config.hardware)
  return config.hardware


def check_machine(config: MeshConfig, machine: Machine) -> None:
  """Checks that a run has the devices that its config is for: their platform and their number.

  Raises:
    UserError: it has others; the message says which are there and what to do.
  """
  hardware = hardware_of(config)
  platform = find_hardware(hardware)[0] if hardware else ""
  named = f"mesh.slice={config.slice}" if config.slice else f"mesh.hardware={config.hardware}"
  if platform and platform != machine.platform:
    install = {"gpu": "the [cuda] extra", "tpu": "the [tpu] extra"}.get(platform)
    missing = f"install {install} where there is one (docs/launch.md), " if install else ""
    raise UserError(
      f"config: {named} is for a {platform}, and jax finds only {machine.devices} "
      f"{machine.platform} device(s) here: {missing}choose a preset for this machine, or give "
      "--config.mesh.slice= --config.mesh.hardware= to run on what there is"
    )
  fewest = int(np.prod(SLICES[config.slice].mesh)) if config.slice else config.devices
  if machine.devices < fewest or (config.slice and machine.devices != fewest):
    raise UserError(
      f"config: {named} is sized for {fewest} devices, and there are {machine.devices}: choose a "
      "preset for fewer or more, such as gpu, or give --config.mesh.devices=0 "
      "(a slice: --config.mesh.slice= --config.mesh.fsdp=-1)"
    )


def claim_memory(config: MeshConfig, environment: dict[str, str] | None = None) -> None:
  """Raises the share of a GPU's memory that jax allocates from its default of 75%.

  Does nothing if the config is not for GPUs, or if the user has set the share. Call it before jax
  looks for its devices.

  Args:
    config: the config's mesh.
    environment: where the share is set; None is the environment of this process.
  """
  environment = os.environ if environment is None else environment
  hardware = hardware_of(config)
  if hardware and find_hardware(hardware)[0] == "gpu" and not set(MEMORY_SHARE) & set(environment):
    environment[MEMORY_SHARE[0]] = str(GPU_SHARE)
