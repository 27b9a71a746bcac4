"""Chooses the sizes that a config leaves to the devices (0).

Config files are read before jax looks for its devices. So `rl.sample_slices`, `rl.micro_batches`,
`sft.micro_batches`, `eval.batch_size`, `mesh.data` and `mesh.fsdp` may be 0, and `resolve` replaces
the zeros. These sizes do not change what is learned: batches are the same, only cut differently.

It also checks what would otherwise fail only in the middle of a run: that prompts, groups and rows
divide over devices and processes, and that the arrays fit into memory. No weights are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from igpo_jax.config import RUN_CHOOSES, Config, ModelConfig
from igpo_jax.convert.open import open_source
from igpo_jax.diffusion.sampler import check_sampler
from igpo_jax.errors import UserError
from igpo_jax.eval.protocols import plan
from igpo_jax.models.families import check
from igpo_jax.parallel.machine import Machine, check_machine
from igpo_jax.parallel.mesh import (
  abstract_mesh,
  check_micro_batches,
  check_rows_per_process,
  check_sample_slices,
)
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rl.methods import rows_per_prompt
from igpo_jax.train import memory
from igpo_jax.train.ahead_of_time import abstract_params

# How many positions a device puts through the network at a time. At 8B this is 240 TFLOP, a quarter
# of a second at an H100's peak: more would take memory and save no time.
TOKENS_AT_ONCE = 2**14
# With several slices one is graded while the next is sampled, and a long prompt does not make all
# rows long. This many are wanted, as long as each device has this many rows in a slice.
SLICES_WANTED, FEWEST_ROWS = 4, 4
# GPUs that share the fast links of one machine: full fine-tuning splits its state over them first.
MACHINE_DEVICES = 8

SIZES = ("rl.sample_slices", "rl.micro_batches", "sft.micro_batches", "eval.batch_size",
         "mesh.data", "mesh.fsdp", "mesh.tensor")  # fmt: skip


def resolve(config: Config, machine: Machine, strict: bool = False) -> Config:
  """The config with a number for every size, checked against the devices.

  Args:
    config: the run's config.
    machine: the devices, which need not exist.
    strict: also refuse what is only estimated not to fit; else only what cannot fit.

  Raises:
    UserError: the config is for other devices, its sizes do not share out over them, their memory
      is too small, or the model cannot be sampled from as it says. The message says what to change.
  """
  check_machine(config.mesh, machine)
  counted = dataclasses.replace(config, model=model_of(config))
  if config.mesh.expert > 1 and not counted.model.moe.experts:
    raise UserError(
      f"config: mesh.expert={config.mesh.expert}, and the model has no experts: use mesh.fsdp or "
      "mesh.data for these devices"
    )
  _check_samplers(counted)
  failures, uneven = [], None
  for mesh in _meshes(config, machine):
    whole = dataclasses.replace(counted, mesh=dataclasses.replace(config.mesh, **mesh))
    abstract = abstract_mesh(whole.mesh, machine.devices)
    _check_batches(whole, abstract, machine)
    try:
      _check_parameters(whole, abstract)
    except UserError as error:
      uneven = error  # another mesh may do
      continue
    for sized in _sized(whole, abstract, machine):
      needed = memory.memory(sized, abstract) if machine.memory else {}
      if not needed or memory.largest(needed)[1].total <= machine.memory:
        return dataclasses.replace(sized, model=config.model)
    failures.append((needed, sized))
  if not failures:
    raise uneven
  # Nothing fits by the estimate. What was chosen by hand may be tried all the same.
  needed, sized = min(failures, key=lambda f: memory.largest(f[0])[1].total)
  name, most = memory.largest(needed)
  held = max(sum(m.held.values()) for m in needed.values())
  if strict or held > machine.memory or not _is_by_hand(config):
    raise UserError(
      f"config: {name} needs about {memory.gib(most.total)} on each device, of which parameters, "
      f"optimizer and copies are {memory.gib(sum(most.held.values()))}; there are {machine}: "
      f"{_advice(sized, machine)}"
    )
  return dataclasses.replace(sized, model=config.model)


def _check_samplers(config: Config) -> None:
  """Refuses at the start what the first rollout or evaluation would refuse."""
  block_length = check(config.model).design(config.model).block_length
  samplers = [task.setting.sampler for task in plan(config)]
  for sampler in [config.sampler] * ("rl" in config.stages) + samplers:
    try:
      check_sampler(block_length, sampler)
    except UserError as error:
      raise UserError(f"config: {error}") from None


def _advice(config: Config, machine: Machine) -> str:
  advice = ["use more devices"]
  if not config.model.lora.rank:
    advice.append("train adapters (model.lora.rank)")
  if config.mesh.fsdp == 1 < machine.devices:
    advice.append("split the parameters (mesh.fsdp)")
  return ", or ".join([*advice, "do less at a time (rl.sample_slices, micro_batches)"])


def model_of(config: Config) -> ModelConfig:
  """The model that the run will have: with the sizes of `init_from` if its directory exists.

  A vocabulary size that only a tokenizer would tell is assumed to be small.
  """
  model = config.model
  if config.init_from and epath.Path(config.init_from).exists():
    found = open_source(config.init_from).config
    model = dataclasses.replace(found, **{name: getattr(model, name) for name in RUN_CHOOSES})
  if not model.vocab_size:
    pieces = config.data.tokenizer.partition("sentencepiece:")[2]
    size = int(pieces) + 64 if pieces.isdigit() else 256
    model = dataclasses.replace(model, vocab_size=size, mask_id=size - 1)
  return model


def _is_by_hand(config: Config) -> bool:
  """Whether no size that memory depends on is left to the devices."""
  return all(value != 0 for value in asked(config).values())


def asked(config: Config) -> dict[str, int]:
  """The sizes as the config has them, 0 where they are left to the devices."""
  section = lambda name: getattr(config, name.partition(".")[0])
  sizes = {name: getattr(section(name), name.partition(".")[2]) for name in SIZES}
  if config.mesh.expert > 1:
    sizes["mesh.expert"] = config.mesh.expert
  unused = {stage for stage in ("sft", "rl") if stage not in config.stages}
  return {name: size for name, size in sizes.items() if name.partition(".")[0] not in unused}


def said(config: Config, machine: Machine) -> str:
  """One line: the machine, and every size that a resolved config has for it."""
  sizes = ", ".join(f"{name}={size}" for name, size in asked(config).items())
  return f"devices: {machine}; {sizes}"


# --- the mesh ------------------------------------------------------------------------------


def _meshes(config: Config, machine: Machine) -> Iterator[dict[str, Any]]:
  """Axis sizes to try, best first; one where the config says."""
  cfg = config.mesh
  if cfg.slice or (cfg.data and cfg.fsdp):
    mesh = dict(abstract_mesh(cfg, machine.devices).shape)
    yield {"slice": "", **mesh}
    return
  if cfg.data or cfg.fsdp:  # one of them: the other takes the rest
    rest = {"data": cfg.data or (1 if cfg.fsdp == -1 else -1),
            "fsdp": cfg.fsdp or (1 if cfg.data == -1 else -1)}  # fmt: skip
    mesh = dict(abstract_mesh(dataclasses.replace(cfg, **rest), machine.devices).shape)
    yield {"slice": "", **mesh}
    return
  free = abstract_mesh(dataclasses.replace(cfg, data=-1, fsdp=1), machine.devices).shape["data"]
  parts = [n for n in range(1, free + 1) if free % n == 0]
  if not config.model.lora.rank and config.stages != ("eval",):
    # Everything is trained: spread over the devices of a machine, or of more.
    least = max(n for n in parts if n <= MACHINE_DEVICES)
    parts = sorted(parts, key=lambda n: (n < least, abs(n - least)))
  for fsdp in parts:
    yield {"data": free // fsdp, "fsdp": fsdp, "expert": cfg.expert, "tensor": cfg.tensor}


def _check_batches(config: Config, mesh, machine: Machine) -> None:
  """Raises `UserError` for batches that devices or processes cannot share."""
  ways, processes = num_shards("act_batch", mesh=mesh), machine.processes
  # As `make_mesh` lays them out: the devices of a process follow one another.
  process_of = np.arange(mesh.size) * processes // mesh.size
  check_rows_per_process(process_of.reshape(tuple(mesh.shape.values())))
  batches = {"rl": ("rl.prompts_per_step", config.rl.prompts_per_step),
             "sft": ("sft.batch_size", config.sft.batch_size)}  # fmt: skip
  unit = math.lcm(ways, processes)
  for stage, (name, size) in batches.items():
    if stage in config.stages and size % unit:
      near = sorted({max(size // unit, 1) * unit, (size // unit + 1) * unit})
      raise UserError(
        f"config: {name}={size} does not share out over {ways} devices (mesh data x fsdp x "
        f"expert) in {processes} process(es): make it {' or '.join(map(str, near))}, use a number "
        "of devices that divides it, or raise mesh.tensor"
      )


def _check_parameters(config: Config, mesh) -> None:
  """Raises `UserError` for a parameter that the mesh does not divide."""
  for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(config, mesh)):
    try:
      x.sharding.shard_shape(x.shape)
    except ValueError:
      name = "/".join(str(key.key) for key in path)
      sizes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
      raise UserError(
        f"config: mesh ({sizes}) does not divide the parameter {name} of shape {x.shape}"
      ) from None


# --- how much at a time --------------------------------------------------------------------


def _sized(config: Config, mesh, machine: Machine) -> Iterator[Config]:
  """The config with its sizes filled in: the preferred ones first, then less and less at a time."""
  ways = num_shards("act_batch", mesh=mesh)
  bucket = config.data.prompt_buckets[-1]
  tokens = TOKENS_AT_ONCE
  seen = set()
  while True:
    rl, sft, evaluation = config.rl, config.sft, config.eval
    if "rl" in config.stages:
      total = bucket + config.sampler.gen_length
      rl = dataclasses.replace(
        rl,
        sample_slices=rl.sample_slices or _slices(config, ways, machine.processes, total, tokens),
        micro_batches=rl.micro_batches or _micro(
          rl.prompts_per_step, ways,
          total * rows_per_prompt(config), tokens,
        ),
      )  # fmt: skip
      check_sample_slices(
        mesh, rl.prompts_per_step, rl.group_size, rl.sample_slices, machine.processes
      )
      check_micro_batches(mesh, rl.prompts_per_step, rl.micro_batches, "rl.micro_batches")
    if "sft" in config.stages:
      total = bucket + (sft.response_lengths or (config.sampler.gen_length,))[-1]
      micro = sft.micro_batches or _micro(sft.batch_size, ways, total, tokens)
      sft = dataclasses.replace(sft, micro_batches=micro)
      check_micro_batches(mesh, sft.batch_size, sft.micro_batches, "sft.micro_batches")
    if not evaluation.batch_size:
      longest = max((t.setting.sampler.gen_length for t in plan(config)), default=1)
      rows = 2 ** int(math.log2(max(1, tokens // (bucket + longest)))) * ways
      evaluation = dataclasses.replace(evaluation, batch_size=rows)
    sized = dataclasses.replace(config, rl=rl, sft=sft, eval=evaluation)
    if sized not in seen:
      yield sized
    seen.add(sized)
    if tokens <= 1:
      return
    tokens //= 2


def _slices(config: Config, ways: int, processes: int, total: int, tokens: int) -> int:
  """Slices of the prompts: up to `SLICES_WANTED` of enough rows, or as many more as bring each
  device's positions down to `tokens`."""
  rl = config.rl
  rows = lambda slices: rl.prompts_per_step // slices * rl.group_size // ways
  able = _divisors(
    rl.prompts_per_step,
    lambda n: n % processes == 0 and (n * rl.group_size) % ways == 0,
  )
  if not able:
    return 1  # told by check_sample_slices
  wanted = [n for n in able if rows(n) * total <= tokens]
  slices = wanted[0] if wanted else able[-1]
  return max([slices, *(n for n in able if n <= SLICES_WANTED and rows(n) >= FEWEST_ROWS)])


def _micro(rows: int, ways: int, positions: int, tokens: int) -> int:
  """The fewest micro-batches of `rows` rows that bring each device's positions down to `tokens`."""
  able = _divisors(rows, lambda n: n % ways == 0)
  wanted = [n for n in able if rows // n // ways * positions <= tokens]
  return (wanted or able[-1:] or [1])[0]


def _divisors(total: int, can: Callable[[int], bool]) -> list[int]:
  """Into how many equal parts a total can be cut so that `can(part)`; ascending."""
  return [n for n in range(1, total + 1) if total % n == 0 and can(total // n)]
