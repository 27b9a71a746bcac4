"""The plan of a run: inputs are read and checked, sizes, memory and time printed; nothing is
trained.

    python -m igpo_jax.main --config=configs/X.py --dry_run

Nothing is written, and no weights are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from etils import epath

from igpo_jax.config import Config
from igpo_jax.convert.open import open_source
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.eval.protocols import plan
from igpo_jax.io.amounts import in_time
from igpo_jax.models.flops import forward_flops
from igpo_jax.parallel.machine import Machine, check_machine, here
from igpo_jax.parallel.mesh import configured_mesh
from igpo_jax.parallel.tpu import CHIPS
from igpo_jax.rewards.score import make_scorer
from igpo_jax.train import memory
from igpo_jax.train.ahead_of_time import Program, abstract_params, policy_options, programs
from igpo_jax.train.arms import resolve_all
from igpo_jax.train.inputs import check_inputs
from igpo_jax.train.preflight import Inputs, sft_steps
from igpo_jax.train.runlog import print_once
from igpo_jax.train.setup import peek_tokenizer, with_lora
from igpo_jax.train.sizes import model_of, said
from igpo_jax.usage import options

# The share of the peak that a run of this program reaches: a guess within a factor of three
# (docs/benchmarks.md has measurements).
REACHED = {"cpu": 0.25}
REACHED_ELSEWHERE = 0.3
Arms = Mapping[str, Config]  # by name, with sizes resolved
ALL_WRONG = 0.5  # share of the groups that are sampled again; a guess, too


def dry_run(config: Config, workdir: epath.Path) -> None:
  """Prints the plan of a run.

  Raises:
    UserError: the run could not start; the message is the one that the run would give.
  """
  machine = here()
  check_machine(config.mesh, machine)
  check_inputs(config)
  if config.init_from:
    with_lora(open_source(config.init_from), config.model.lora)
  sized, arms = resolve_all(config, machine)
  mesh = configured_mesh(sized.mesh)
  with jax.set_mesh(mesh), make_scorer(config.reward) as scorer:
    tokenizer = peek_tokenizer(config, workdir)
    inputs = Inputs(sized, tokenizer, scorer, print_once, {arm.name: arm.config for arm in arms})
  if jax.process_index() != 0:
    return
  model = _model(sized, tokenizer)
  counted = dataclasses.replace(sized, model=model)
  others = {arm.name: dataclasses.replace(arm.config, model=model, stages=("rl",)) for arm in arms}
  steps = {}
  if inputs.sft is not None:
    steps["sft"] = sft_steps(config, inputs.sft)
  if inputs.rl is not None:
    steps["rl"] = config.rl.steps
  problems = {
    task.name: len(inputs.records(task.uri)[: config.eval.limit or None]) for task in plan(config)
  }
  print("\n".join([
    f"plan: {workdir} (dry run: nothing is trained or written)",
    "", "options that differ from the defaults:", *differences(config),
    "", "sizes:", f"  {said(sized, machine)}", *_sizes(counted, others, mesh, steps, problems),
    "", "memory of a device, by program (what a program works with is estimated):",
    *_memory(dataclasses.replace(counted, arms=config.arms), others, mesh, machine),
    "", "time, without compilation:", *_time(counted, others, mesh, machine, steps, problems),
  ]))  # fmt: skip


def differences(config: Config) -> list[str]:
  """A line for each option that differs from its default."""
  lines = []
  for option in options():
    value = config
    for part in option.name.split("."):
      value = getattr(value, part)
    if value != option.default:
      lines.append(f"  {option.name} = {_short(value)} (default {_short(option.default)})")
  return lines or ["  none"]


def _short(value: object, most: int = 200) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= most else text[: most - 3] + "..."


def _model(config: Config, tokenizer: Tokenizer):
  """The sizes of the model, with the tokenizer's vocabulary."""
  if config.init_from:
    return model_of(config)
  size = config.model.vocab_size or tokenizer.vocab_size
  return dataclasses.replace(config.model, vocab_size=size, mask_id=tokenizer.mask_id)


def _sizes(
  config: Config, arms: Arms, mesh, steps: dict[str, int], problems: dict[str, int]
) -> list[str]:
  model = config.model
  leaves = jax.tree.leaves(abstract_params(config, mesh))
  count = sum(math.prod(x.shape) for x in leaves)
  lines = [
    f"  model: {count:,} parameters, {model.n_layers} layers of width {model.d_model}, vocabulary"
    f" {model.vocab_size:,}" + (f", adapters of rank {model.lora.rank}" if model.lora.rank else "")
  ]
  bucket = config.data.prompt_buckets[-1]
  if "sft" in steps:
    length = (config.sft.response_lengths or (config.sampler.gen_length,))[-1]
    lines.append(
      f"  sft: {steps['sft']:,} steps of {config.sft.batch_size} rows of up to {bucket}+{length}"
      " positions"
    )
  for name, own in {"": config, **arms}.items() if "rl" in steps else ():
    rl, sampler = own.rl, own.sampler
    lines.append(
      f"  {f'arm {name}' if name else 'rl'}: {rl.steps:,} steps of {rl.prompts_per_step} prompts x"
      f" {rl.group_size} completions, {rl.inner_updates} updates each;"
      f" {bucket}+{sampler.gen_length} positions, {sampler.steps} denoising steps"
    )
  for task in plan(config):
    s, times = task.setting.sampler, evaluations(config, arms, steps)
    lines.append(
      f"  eval {task.name}: {problems[task.name]:,} problems x {task.setting.samples} samples,"
      f" {s.gen_length} positions, {s.steps} denoising steps; {times} time(s)"
    )
  size, keep = memory.checkpoint_bytes(config, mesh), config.checkpoint.keep
  kept = keep + bool(config.checkpoint.best_metric)
  if steps:
    stages = len(steps) + len(arms)
    lines.append(
      f"  disk: checkpoints of about {memory.gib(size)}, up to {kept} kept for each of"
      f" {stages} stage(s), and one being written: {memory.gib(size * (kept * stages + 1))}"
    )
  return lines


def evaluations(config: Config, arms: Arms, steps: dict[str, int]) -> int:
  """The number of times that each benchmark is evaluated in the run and its arms."""
  times = int("eval" in config.stages) + int(bool(steps) and config.eval.initial)
  stages = [(total, getattr(config, stage).eval_every) for stage, total in steps.items()]
  for total, every in [*stages, *((arm.rl.steps, arm.rl.eval_every) for arm in arms.values())]:
    times += -(-total // every) if every and total else bool(total)
  return times


def _memory(config: Config, arms: Arms, mesh, machine: Machine) -> list[str]:
  needed = memory.memory(config, mesh)
  for arm, other in arms.items():
    if policy_options(other) != policy_options(config):
      found = memory.memory(other, mesh)
      needed |= {f"{arm}/{name}": found[name] for name in ("rollout", "likelihood", "update")}
  lines = []
  for name, one in needed.items():
    parts = ", ".join(f"{k} {memory.gib(v)}" for k, v in {**one.held, **one.work}.items())
    lines.append(f"  {name}: {memory.gib(one.total)} ({parts})")
  if machine.memory and needed:
    name, most = memory.largest(needed)
    share = most.total / machine.memory
    lines.append(f"  {name} needs most: {share:.0%} of {memory.gib(machine.memory)}")
  return lines or ["  no program to run"]


def _time(
  config: Config,
  arms: Arms,
  mesh,
  machine: Machine,
  steps: dict[str, int],
  problems: dict[str, int],
) -> Iterator[str]:
  """Lines with the FLOPs of each stage, and their time at a share of the devices' peak."""
  work = {}
  found = programs(config, mesh)
  if "sft" in steps:
    work["sft"] = steps["sft"] * found["sft"].flops
  if "rl" in steps:
    work["rl"] = _rl_flops(config, found)
    work |= {f"arm {name}": _rl_flops(arm, programs(arm, mesh)) for name, arm in arms.items()}
  bucket = config.data.prompt_buckets[-1]
  for task in plan(config):
    s = task.setting.sampler
    rows, total = problems[task.name] * task.setting.samples, bucket + s.gen_length
    width = s.block_length
    flops = forward_flops(config.model, rows, total, total, width, read=width) * s.steps
    flops *= (2 if s.cfg_scale else 1) * evaluations(config, arms, steps)
    work[f"eval {task.name}"] = flops
  chip = CHIPS.get(machine.kind)
  peak = chip.flops if chip else measured_peak(config.model.dtype)
  whose = "peak" if chip else "a matrix product measured here"
  reached = REACHED.get(machine.platform, REACHED_ELSEWHERE)
  rate = peak * machine.devices * reached
  for name, flops in work.items():
    yield f"  {name}: {flops / 1e12:,.2f} TFLOP, about {in_time(flops / rate)}"
  yield (
    f"  in all about {in_time(sum(work.values()) / rate)}, within a factor of three: at"
    f" {reached:.0%} of {peak * machine.devices / 1e12:,.2f} TFLOP/s ({whose}); padding to the"
    " longest bucket and half of the groups all wrong are assumed"
  )


def _rl_flops(config: Config, found: dict[str, Program]) -> int:
  again = 0 if config.rl.exploration == "none" else ALL_WRONG
  sampled = found["rollout"].flops * config.rl.sample_slices * (1 + again)
  updates = config.rl.inner_updates * found["update"].flops
  return int(config.rl.steps * (sampled + found["likelihood"].flops + updates))


def measured_peak(dtype: str, n: int = 1024, repeats: int = 8) -> float:
  """FLOP/s of products of n x n matrices on one device, the fastest of a few."""
  x = jnp.ones((n, n), dtype)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    began = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * n**3 / best
