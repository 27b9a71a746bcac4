"""python -m igpo_jax.rehearse --config=configs/X.py[:ARGUMENT] [--config.a.b=value]

Makes the checks of a start of igpo_jax.main for devices that are not here, and without weights: the
config, its sizes, how batches divide over devices and processes, and memory. The programs are
traced and lowered for the platform at full width; nothing is compiled or run. Prints one page:
sizes, memory of a device, FLOPs, hours, checkpoints, and which files are here. The exit code is 0
if the run could start; if not, it is 2 after a line with the reason.

  --devices     number of devices; default: what the config is sized for, or 1
  --processes   number of processes; default: one for up to 8 GPUs, one per GPU beyond that (as
                slurm.sbatch starts them), one per machine of a TPU slice. None is started; what
                each would hold is counted.
  --chip        h100, h200, a100, a100-40, l4, t4, v5e, v5p or v6e; default: the config's; for any
                GPU an h100
  --share       share of the chips' peak that the hours assume; default 0.4. It is not measured.
  --hinted      share of the groups that are all wrong and sampled again; default 0.3
  --nolower     do not lower the programs, which takes most of the time

Time and memory of programs are estimates (igpo_jax/train/costs.py, memory.py). The sizes of
parameters and optimizer state are exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from typing import Any

from absl import flags

from igpo_jax import cli
from igpo_jax.config import STAGES, Config, arms_of
from igpo_jax.errors import UserError
from igpo_jax.flags import config_flag, parse
from igpo_jax.io.amounts import in_time

FLAGS = config_flag()
flags.DEFINE_integer("devices", 0, "How many; 0: the config's own.", 0, flag_values=FLAGS)
flags.DEFINE_integer("processes", 0, "Of the run; 0: the usual number.", 0, flag_values=FLAGS)
flags.DEFINE_string("chip", "", "The kind of device.", flag_values=FLAGS)
flags.DEFINE_float("share", 0.4, "Of the peak that is reached.", 0.01, 1.0, flag_values=FLAGS)
flags.DEFINE_float("hinted", 0.3, "Groups sampled again.", 0.0, 1.0, flag_values=FLAGS)
flags.DEFINE_bool("lower", True, "Lower the programs.", flag_values=FLAGS)

FAKE_DEVICES = "--xla_force_host_platform_device_count"
LOWERED_FOR = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}
KERNELS = ("__cudnn$fmha", "tpu_custom_call")  # of fused attention, in a lowered program
MACHINE_GPUS, MACHINE_CHIPS = 8, 4  # of a machine with GPUs; of a machine of a TPU slice


def machine_for(config: Config, devices: int = 0, processes: int = 0, chip: str = ""):
  """The machine that a config would run on.

  Args:
    config: the run's config.
    devices, processes: how many; 0 takes the number that the config is sized for.
    chip: kind of device; "" takes the config's.

  Raises:
    UserError: an unknown chip, or devices that do not divide over the processes.
  """
  from igpo_jax.parallel import machine
  from igpo_jax.parallel.tpu import SLICES, find_hardware

  hardware = machine.hardware_of(config.mesh)
  chip = chip or {"gpu": "h100", "tpu": "v5e"}.get(hardware, hardware) or "cpu"
  platform, _ = find_hardware(chip)
  if not devices:
    slice_ = SLICES.get(config.mesh.slice)
    devices = math.prod(slice_.mesh) if slice_ else config.mesh.devices or 1
  if not processes:
    processes = 1
    if platform == "gpu" and devices > MACHINE_GPUS:
      processes = devices
    if platform == "tpu" and devices > 8 and devices % MACHINE_CHIPS == 0:
      processes = devices // MACHINE_CHIPS
  return machine.modelled(chip, devices, processes)


def rehearse(
  config: Config, machine, share: float = 0.4, hinted: float = 0.3, lower: bool = True
) -> dict[str, Any]:
  """Makes the checks of a start; returns the facts that `page` prints.

  Args:
    config: the run's config.
    machine: see `machine_for`. jax must have at least as many devices here, real or fake.
    share: share of the chips' peak, for the seconds.
    hinted: share of the groups that are sampled again.
    lower: also lower the programs for the machine's platform.

  Raises:
    UserError: the run could not start.
  """
  import jax

  from igpo_jax.eval.protocols import plan
  from igpo_jax.parallel.mesh import configured_mesh
  from igpo_jax.parallel.tpu import CHIPS
  from igpo_jax.train import costs, memory
  from igpo_jax.train.ahead_of_time import policy_options
  from igpo_jax.train.arms import resolve_all
  from igpo_jax.train.sizes import asked, model_of

  sized, arms = resolve_all(config, machine, strict=True)
  sized = dataclasses.replace(sized, model=model_of(config))
  others = {
    arm.name: dataclasses.replace(arm.config, stages=("rl",), model=sized.model) for arm in arms
  }
  if len(jax.devices()) < machine.devices:
    raise UserError(
      f"{machine.devices} devices cannot be rehearsed in a process that has {len(jax.devices())}: "
      f"set XLA_FLAGS={FAKE_DEVICES}={machine.devices} before jax is used"
    )
  mesh = configured_mesh(sized.mesh, devices=jax.devices()[: machine.devices])
  kernels = _lowered(_only_programs(sized), mesh, LOWERED_FOR[machine.platform]) if lower else {}
  needed = memory.memory(dataclasses.replace(sized, arms=config.arms), mesh)
  for name, other in others.items():
    if policy_options(other) != policy_options(sized):
      of_arm = lambda facts, name=name: {
        f"{name}/{k}": v for k, v in facts.items() if k in ("rollout", "likelihood", "update")
      }
      needed |= of_arm(memory.memory(other, mesh))
      if lower:
        kernels |= of_arm(_lowered(_only_programs(other), mesh, LOWERED_FOR[machine.platform]))

  chip = CHIPS.get(machine.kind)
  rate = chip.flops * machine.devices * share if chip else 0.0
  seconds = lambda flops: flops / rate if rate else None
  buckets = config.data.prompt_buckets
  steps = {}
  for bucket in dict.fromkeys((buckets[0], buckets[-1])):
    flops_of = costs.step_flops(sized, mesh, bucket, hinted)
    for name, other in others.items():
      flops_of[f"arm {name}"] = costs.step_flops(other, mesh, bucket, hinted)["rl"]
    steps[bucket] = {
      stage: {part: (flops, seconds(flops)) for part, flops in parts.items()}
      for stage, parts in flops_of.items()
    }
  files = missing_files(config)
  evaluations = {}
  for task in plan(config):
    problems = _problems(config, task, files)
    flops = problems and costs.evaluation_flops(sized, task, problems, buckets[-1])
    evaluations[task.name] = {
      "problems": problems, "samples": task.setting.samples, "seconds": problems and seconds(flops)
    }  # fmt: skip
  stages = _stages(sized, files)
  for name, other in others.items():
    stages[f"arm {name}"] = (
      other.rl.steps,
      costs.evaluations(other.rl.steps, other.rl.eval_every, False),
    )
  return {
    "config": sized, "machine": machine, "sizes": asked(sized), "share": share, "hinted": hinted,
    "peak": chip.flops if chip else 0.0, "parameters": _count(sized, mesh), "kernels": kernels,
    "memory": needed, "steps": steps, "evaluations": evaluations,
    "stages": stages, "files": files,
    "checkpoint": memory.checkpoint_bytes(sized, mesh),
  }  # fmt: skip


def _only_programs(config: Config) -> Config:
  """The config with the options that the programs do not depend on set to their defaults."""
  default, buckets = Config(), config.data.prompt_buckets
  data = dataclasses.replace(default.data, prompt_buckets=buckets)
  kept = ("stages", "model", "mesh", "sampler", "objective", "sft", "rl")
  return dataclasses.replace(default, data=data, **{name: getattr(config, name) for name in kept})


@functools.lru_cache(maxsize=64)
def _lowered(config: Config, mesh, platform: str) -> dict[str, int]:
  """Lowers every program of a config; program -> its number of fused attention kernels."""
  from igpo_jax.train.ahead_of_time import programs

  kernels = {}
  for name, program in programs(config, mesh).items():
    text = program.lower(platform).as_text()
    kernels[name] = sum(text.count(kernel) for kernel in KERNELS)
  return kernels


def _count(config: Config, mesh) -> tuple[int, int]:
  """(number of all parameters, number of trained parameters)."""
  import jax

  from igpo_jax.models import lora
  from igpo_jax.train.ahead_of_time import abstract_params

  params = abstract_params(config, mesh)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  return size(params), size(lora.split(params)[0])


def missing_files(config: Config) -> dict[str, str]:
  """Input files of the run that are not here: option or benchmark -> what is missing.

  Raises:
    UserError: a source is of an unknown kind.
  """
  from igpo_jax.data.sources import check_files, reads_files
  from igpo_jax.eval.protocols import plan

  uris = {f"data.{s}": getattr(config.data, s) for s in config.stages if s != "eval"}
  uris |= {f"data.rl of arm {name}": arm.data.rl for name, arm in arms_of(config).items()
           if arm.data.rl != config.data.rl}  # fmt: skip
  uris |= {f"data.eval {task.name}": task.uri for task in plan(config)}
  missing = {}
  for name, uri in uris.items():
    if not reads_files(uri):
      check_files(uri)
      continue
    try:
      check_files(uri)
    except UserError as error:
      missing[name] = str(error)
  if config.init_from and not os.path.exists(config.init_from) and "://" not in config.init_from:
    missing["init_from"] = f"{config.init_from}: no such directory; sizes are the config's"
  return missing


def _problems(config: Config, task, missing: dict[str, str]) -> int:
  """The number of problems of a benchmark; 0 if it is not known."""
  from igpo_jax.data.names import one_name
  from igpo_jax.data.sources import load_records
  from igpo_jax.train.costs import PUBLISHED

  if f"data.eval {task.name}" in missing:
    count = PUBLISHED.get(one_name(task.name.partition("@")[0]), 0)
  else:
    count = len(load_records(task.uri).records)
  return min(count, config.eval.limit) if config.eval.limit else count


def _stages(config: Config, missing: dict[str, str]) -> dict[str, tuple[int, int]]:
  """Training stage -> (steps, evaluations). 0 steps if they depend on a file that is not here."""
  from igpo_jax.data.sources import load_records
  from igpo_jax.train.costs import evaluations

  out = {}
  training = [stage for stage in config.stages if stage != "eval"]
  for stage in training:
    section = getattr(config, stage)
    steps = section.steps
    if stage == "sft" and section.epochs:
      records = 0 if "data.sft" in missing else len(load_records(config.data.sft).records)
      steps = math.ceil(section.epochs * records / section.batch_size)
    initial = config.eval.initial and stage == training[0]
    out[stage] = steps, evaluations(steps, section.eval_every, initial)
  return out


# --- the page ------------------------------------------------------------------------------


def page(facts: dict[str, Any], name: str) -> str:
  """The facts as text of at most 100 columns."""
  config, machine, sizes = facts["config"], facts["machine"], facts["sizes"]
  everything, trained = facts["parameters"], facts["parameters"][1]
  rank = config.model.lora.rank
  kind = f"LoRA, rank {rank}" if rank else "all of them"
  lines = [
    f"{name} on {machine}",
    "A rehearsal: nothing was run or measured.",
    "",
    f"model        {everything[0]:,} parameters; trained: {trained:,} ({kind})",
    *_wrapped("sizes", [f"{k}={v}" for k, v in sizes.items()]),
    *_work_lines(config, machine),
  ]
  if facts["kernels"]:
    fused = [f"{k} ({n} fused kernels)" if n else k for k, n in facts["kernels"].items()]
    lines += _wrapped(f"lowered for {LOWERED_FOR[machine.platform]}", fused)
  lines += ["", *_memory_lines(facts), "", *_time_lines(facts), "", *_checkpoint_lines(facts)]
  if facts["files"]:
    lines += ["", "not here, and needed for a real start:"]
    lines += [f"  {what}: {said}" for what, said in facts["files"].items()]
  return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(head: str, items: list[str], width: int = 100) -> list[str]:
  """Lines of at most `width` columns: "head         item, item, ..."."""
  lines = [f"{head:<12}"]
  for k, item in enumerate(items):
    item = f" {item}," if k + 1 < len(items) else f" {item}"
    if len(lines[-1]) + len(item) > width:
      lines.append(" " * 12)
    lines[-1] += item
  return lines


def _work_lines(config: Config, machine) -> list[str]:
  """Lines on how the batches of a step are split."""
  lines, ways = [], config.mesh.data * config.mesh.fsdp * config.mesh.expert
  lengths = ", ".join(map(str, config.data.prompt_buckets))
  if "rl" in config.stages:
    rl, sampler = config.rl, config.sampler
    slice_ = rl.prompts_per_step // rl.sample_slices
    micro = rl.prompts_per_step // rl.micro_batches
    lines += [
      f"rl step      {rl.prompts_per_step} prompts x {rl.group_size} completions; sampled"
      f" {slice_} prompts at a time",
      f"             ({slice_ * rl.group_size // ways} rows a device), updated {micro} at a time"
      f" ({micro // ways or 1} a device)",
      f"             prompts padded to {lengths}; {sampler.gen_length} positions in"
      f" {sampler.steps} steps, blocks of {sampler.block_length}",
    ]
  if "sft" in config.stages:
    sft = config.sft
    responses = ", ".join(map(str, sft.response_lengths or (config.sampler.gen_length,)))
    lines += [
      f"sft step     {sft.batch_size} rows, {sft.batch_size // sft.micro_batches} at a time,"
      f" {sft.batch_size // sft.micro_batches // ways} a device",
      f"             prompts padded to {lengths}; responses to {responses}",
    ]
  if machine.processes > 1:
    each = machine.devices // machine.processes
    lines.append(
      f"processes    {machine.processes}, each with {each} device(s), its share of every batch, "
      "and graders of its own"
    )
  return lines


def _memory_lines(facts: dict[str, Any]) -> list[str]:
  from igpo_jax.parallel.tpu import GIB

  size = lambda value: f"{value / GIB:.1f}" if value >= 0.05 * GIB else f"{value / GIB:.3f}"
  usable = facts["machine"].memory
  width = max([12, *(len(name) + 1 for name in facts["memory"])])  # names of arms may be long
  lines = [f"memory, GiB on each device{f', of {size(usable)} usable' if usable else ''}",
           f"  {'':<{width}}{'in all':>8}{'held':>8}{'work':>8}{'to spare':>10}"]  # fmt: skip
  for name, one in facts["memory"].items():
    spare = f"{1 - one.total / usable:.0%}" if usable else "-"
    held, work = sum(one.held.values()), sum(one.work.values())
    lines.append(f"  {name:<{width}}{size(one.total):>8}{size(held):>8}{size(work):>8}{spare:>10}")
  largest = max(facts["memory"].values(), key=lambda one: one.total, default=None)
  if largest:
    parts = lambda these: [f"{what} {size(value)}" for what, value in these.items()]
    lines += _wrapped("  held", parts(largest.held)) + _wrapped("  work", parts(largest.work))
  return lines


def _time(seconds: float | None) -> str:
  """A length of time in words; "-" where it is not known."""
  return "-" if seconds is None else in_time(seconds)


def step_seconds(facts: dict[str, Any], stage: str, bucket: int) -> float | None:
  """Seconds of a step with all prompts padded to `bucket`; None if the chips' peak is not known."""
  seconds = [s for _, s in facts["steps"][bucket][stage].values()]
  return None if None in seconds else sum(seconds)


def _time_lines(facts: dict[str, Any]) -> list[str]:
  config, buckets = facts["config"], sorted(facts["steps"])
  peak = facts["peak"]
  at = f"at {facts['share']:.0%} of {peak / 1e12:.0f} TFLOP/s a device" if peak else "no peak known"
  lines = [f"time, {at}: products only, every row denoised to its end"]
  heads = [f"prompts of {bucket}" for bucket in buckets]
  # Room for the longest label, "arm NAME groups tried again 30%".
  width = max([26, *(len(stage) + 24 for stage in facts["stages"] if stage not in STAGES)])
  lines.append(f"  {'':<{width - 4}}{'PFLOP':>10}" + "".join(f"{head:>16}" for head in heads))
  for stage in facts["steps"][buckets[-1]]:
    for part in facts["steps"][buckets[-1]][stage]:
      label = f"{stage} {part}"
      if part == "groups tried again":
        label += f" {facts['hinted']:.0%}"
      cells = [_time(facts["steps"][b][stage][part][1]) for b in buckets]
      flops = facts["steps"][buckets[-1]][stage][part][0]
      row = "".join(f"{cell:>16}" for cell in cells)
      lines.append(f"  {label:<{width}}{flops / 1e15:>6.3g}{row}")
    totals = [step_seconds(facts, stage, bucket) for bucket in buckets]
    lines.append(
      f"  {f'{stage}: a step':<{width + 6}}" + "".join(f"{_time(t):>16}" for t in totals)
    )
    steps, _ = facts["stages"][stage]
    if steps:
      whole = "".join(f"{_time(t and t * steps):>16}" for t in totals)
      lines.append(f"  {f'{stage}: {steps} steps':<{width + 6}}{whole}")
    else:
      lines.append(f"  {stage}: how many steps depends on the records, which are not here")
  evaluation = 0.0
  for name, one in facts["evaluations"].items():
    rows = f"{one['problems']} problems" if one["problems"] else "problems not here"
    rows += f" x {one['samples']}" if one["samples"] > 1 else ""
    lines.append(f"  evaluation {name:<12} {rows}: {_time(one['seconds'] or None)}")
    evaluation += one["seconds"] or 0.0
  times = sum(count for _, count in facts["stages"].values()) + ("eval" in config.stages)
  if evaluation and all(steps for steps, _ in facts["stages"].values()):
    lines.append(f"  all evaluations, {times} times: {_time(times * evaluation)}")
  return lines


def _checkpoint_lines(facts: dict[str, Any]) -> list[str]:
  from igpo_jax.train.memory import gib

  config, lines = facts["config"], []
  checkpoint, bucket = config.checkpoint, max(facts["steps"])
  minutes = getattr(checkpoint, "minutes", 0)
  for stage in facts["steps"][bucket]:
    step = step_seconds(facts, stage, bucket)
    lost = step and step * checkpoint.every
    if minutes and (step or not checkpoint.every):
      lost = min(lost or float("inf"), 60 * minutes + (step or 0))
    often = " or ".join(
      f"every {number:g} {unit}"
      for number, unit in ((checkpoint.every, "steps"), (minutes, "minutes"))
      if number
    )
    lines.append(
      f"checkpoints  {stage}: {gib(facts['checkpoint'])} each, {often or 'at the end only'}, the "
      f"last {checkpoint.keep} kept"
    )
    if lost:
      lines.append(f"             a kill without notice loses at most {_time(lost)} of work")
  return lines


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  argv = sys.argv if argv is None else ["rehearse", *argv]
  config, name = parse(FLAGS, argv, __doc__)
  named = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), name)
  machine = machine_for(config, FLAGS.devices, FLAGS.processes, FLAGS.chip)
  # jax reads both when it first looks for devices, which nothing has made it do.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}={machine.devices}"
  import jax

  jax.config.update("jax_platforms", "cpu")
  facts = rehearse(config, machine, FLAGS.share, FLAGS.hinted, FLAGS.lower)
  print(page(facts, named), end="")


if __name__ == "__main__":
  cli.run(main)
