"""LLaDA-8B on one accelerator: time and memory of each program of an RL step, in one table.

    python -m benchmarks.accelerator [--torch=DIR] [--seconds=480] [--output=FILE]
        [--rows=64] [--prompt=256] [--gen_length=256] [--block_length=32] [--steps=128]

Random bfloat16 weights of LLaDA-8B's shape are made on the device, with LoRA adapters. No file is
read. The parts are a rollout without a cache, a rollout with the dual cache, the likelihood, the
LoRA update and an evaluation batch. For each, the table has seconds, tokens/s, the share of the
matrix-product peak that the same run measures, and the memory that the compiler plans. Before
that, every implementation of attention is compared with float32, gradients included.

The whole command takes at most --seconds. The default, 8 minutes, is meant for an H100 or H200.
Denoising costs the same in every block, so a part measures as many blocks as its time allows and
extrapolates to all. The column "measured" says how many were measured. If a part fails or no time
is left for it, its line says so, and the exit code is 1.

--torch=DIR also times the PyTorch code for LLaDA in DIR. It runs first, in a process of its own
(benchmarks/torch_llada.py says which files it needs).

Prints the table, and as the last line one JSON object (--output=FILE also writes it).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.denoise import calls_by_block, needed_flops
from benchmarks.torch_llada import find_code
from igpo_jax import cli
from igpo_jax.config import Config, DataConfig, LoRAConfig, RLConfig, SamplerConfig
from igpo_jax.convert.families import hf_config
from igpo_jax.diffusion.completions import sample_rows
from igpo_jax.errors import UserError
from igpo_jax.models import attention, make_lm
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.train.ahead_of_time import programs
from igpo_jax.train.micro_batches import shardings_of
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.setup import Model, compute_copy, make_optimizer, start_state
from igpo_jax.types import Rollout

GIB = 2**30
COMPILE_SECONDS = 45  # reserved for each part that is still to come
TORCH_SHARE = 0.25  # share of --seconds that the PyTorch code may take
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-5}  # relative L2 error of attention


@dataclasses.dataclass
class Line:
  """One line of the table.

  Attributes:
    name: name of the part.
    seconds: time of the whole part, extrapolated if `measured` says so.
    tokens: number of completion tokens that the part samples or reads.
    measured: a text on what was timed.
    flops_per_second: FLOPs of the products that the part needs, divided by its seconds; None if
      they are not counted.
    bytes: memory that the compiler plans for the program, including its arguments.
    compile_seconds: time of the compilation, before the first run.
    problem: why the part has no numbers; "" if it has.
  """

  name: str
  seconds: float = 0.0
  tokens: int = 0
  measured: str = ""
  flops_per_second: float | None = None
  bytes: int | None = None
  compile_seconds: float | None = None
  problem: str = ""


class Budget:
  """A budget of wall time that is divided among the parts. It starts when it is made.

  Args:
    seconds: for all parts together.
    parts: number of parts.
  """

  def __init__(self, seconds: float, parts: int):
    self.end, self.parts = time.monotonic() + seconds, parts

  @property
  def left(self) -> float:
    """Seconds that are left."""
    return self.end - time.monotonic()

  def next_part(self) -> float | None:
    """Seconds for the measurements of the next part; None if no time is left."""
    self.parts -= 1
    free = self.left - (self.parts + 1) * COMPILE_SECONDS
    return free / (self.parts + 1) if free > 0 else None


def attention_errors(model, length: int, queries: int) -> dict[str, dict[str, float]]:
  """Implementation of attention -> relative L2 errors of its result and of its gradients.

  The errors are those against "einsum" in float32.

  Args:
    model: gives heads, head size and the dtype that is checked.
    length: number of keys in a row. In one row the first third is padding.
    queries: number of queries in a row.
  """
  heads, size = (model.n_heads, model.kv_heads), model.head_size
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, queries, heads[0], size))
  k, v = rng.normal(size=(2, 2, length, heads[1], size))
  weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
  valid = jnp.arange(length) >= jnp.array([[0], [length // 3]])
  # All start from the same rounded numbers, so that only the arithmetic is compared.
  given = [jnp.asarray(x, jnp.float32).astype(model.dtype) for x in (q, k, v)]

  def outcome(name, *qkv):
    def total(q, k, v):
      out = attention.attend(q, k, v, valid, name)
      return jnp.sum(out.astype(jnp.float32) * weight), out

    program = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, out), gradients = program(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]

  with jax.default_matmul_precision("highest"):
    exact = outcome("einsum", *(x.astype(jnp.float32) for x in given))
  names = ("einsum", "dot_product", *(["splash"] if attention.platform() == "tpu" else []))
  apart = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
  found = {}
  for name in names:
    errors = list(map(apart, outcome(name, *given), exact))
    found[name] = {"result": errors[0], "gradients": max(errors[1:])}
  return found


class Bench:
  """The model on the device, and the parts of the benchmark, which time its programs.

  Args:
    args: the options of the command.
    budget: the time of all parts.
  """

  def __init__(self, args: argparse.Namespace, budget: Budget):
    self.args, self.budget = args, budget
    lora = LoRAConfig(rank=args.lora_rank)
    model = dataclasses.replace(common.model_config(args), lora=lora, remat="full")
    if not args.attention:
      model = dataclasses.replace(model, attention="auto")
    self.sampler = SamplerConfig(
      args.gen_length, args.block_length, args.steps, temperature=1.2, early_stop="none"
    )
    self.config = Config(
      stages=("rl",),
      model=model,
      data=DataConfig(prompt_buckets=(args.prompt,)),
      sampler=self.sampler,
      rl=RLConfig(prompts_per_step=args.rows // args.group, group_size=args.group),
    )
    self.mesh, self.lm = make_mesh(1, 1, 1, jax.devices()[:1]), make_lm(model)
    with jax.set_mesh(self.mesh):
      shardings = tree_shardings(self.lm.logical_axes(), self.mesh)
      init = jax.jit(self.lm.init, out_shardings=shardings)
      params = jax.block_until_ready(init(jax.random.key(0)))
      self.model = Model(self.lm, params, shardings, None)
      self.policy = compute_copy(params, model.dtype)
      self.peak = common.matmul_peak(args, model)
    keys = jax.random.split(jax.random.key(1), 3)
    self.prompt = common.random_prompts(keys[0], args.rows, args.prompt, model.vocab_size)
    # Prompts of many lengths, from half of the bucket to all of it.
    pads = jnp.arange(args.rows)[:, None] * (args.prompt // 2) // args.rows
    self.valid = jnp.arange(args.prompt)[None] >= pads
    self.keys = jax.random.split(keys[1], args.rows)

  def denoising(self, name: str, sampler: SamplerConfig, seconds: float) -> Line:
    """Times the sampling of all rows: as many blocks as fit into `seconds`, at least one."""
    args, blocks = self.args, sampler.num_blocks
    position = jnp.arange(args.gen_length)

    def arguments(count: int):
      """A canvas that is masked in its first `count` blocks and fixed in the others."""
      fixed = position >= count * args.block_length
      canvas = jnp.where(fixed, self.lm.eos_id, self.lm.mask_id)
      tile = lambda x: jnp.broadcast_to(x, (args.rows, args.gen_length))
      canvas, fixed = tile(canvas.astype(jnp.int32)), tile(fixed)
      return self.policy, self.prompt, self.valid, canvas, fixed, self.keys

    lower = lambda *given: sample_rows.lower(self.lm, *given, sampler)
    compiled, facts = common.compile_facts(lower, *arguments(blocks))
    self.wait(compiled, arguments(0))  # nothing to do: loads the program
    count, (took, out) = 1, self.wait(compiled, arguments(1))
    affordable = min(blocks, int(seconds / took))
    if affordable > 1:
      count, (took, out) = affordable, self.wait(compiled, arguments(affordable))
    commit_step = np.asarray(out[1])
    # (refreshes, other calls) of each block, for a row each; every one makes all its steps.
    calls = calls_by_block(sampler, commit_step)
    assert sum(map(sum, calls)) == args.rows * count * sampler.steps_per_block
    committed = commit_step[commit_step >= 0]
    decided = int((committed % sampler.steps_per_block + 1).sum())
    total = args.prompt + args.gen_length
    flops = needed_flops(self.config.model, sampler, [1] * blocks, total, calls, decided)
    return self.line(
      name, facts, took * blocks / count, args.rows * args.gen_length, flops / took,
      f"{count} of {blocks} blocks" if count < blocks else "all blocks",
    )  # fmt: skip

  def rollout(self) -> Rollout:
    """Prompts with random completions and advantages; a fifth of the tokens are hints."""
    args, config = self.args, self.config
    p, g, length = config.rl.prompts_per_step, args.group, args.gen_length
    keys = jax.random.split(jax.random.key(3), 3)
    tokens = common.random_prompts(keys[0], p * g, length, config.model.vocab_size)
    hinted = jax.random.bernoulli(keys[1], 0.2, (p, g, length))
    return Rollout(
      prompt=self.prompt[:: args.group],
      prompt_valid=self.valid[:: args.group],
      completion=tokens.reshape(p, g, length),
      hinted=hinted,
      commit_step=jnp.where(hinted, -1, 0),
      advantages=jax.random.normal(keys[2], (p, g)),
    )

  def learning(self, seconds: float) -> list[Line]:
    """Times the old and reference log-probabilities, then the update of the adapters."""
    args, config = self.args, self.config
    optimizer = make_optimizer(config.rl_optimizer, 1)
    state, frozen = start_state(self.model, optimizer, self.mesh)
    policy = make_policy_programs(self.lm, optimizer, config, shardings_of(state))
    rollout, planned = self.rollout(), programs(config, self.mesh)
    keys, number = jax.random.split(jax.random.key(4), config.rl.prompts_per_step), jnp.int32(0)
    reference = self.policy
    read = args.rows * args.gen_length

    given = (self.policy, reference, rollout, keys)
    compiled, facts = common.compile_facts(policy.score.lower, *given)
    took, scores = self.repeat(lambda: compiled(*given), seconds / 2)
    lines = [
      self.line("likelihood, old and reference", facts, took, read,
                planned["likelihood"].flops / took, f"median of at most {args.repeats}")
    ]  # fmt: skip

    compiled, facts = common.compile_facts(
      policy.update.lower, state, frozen, rollout, scores, keys, number
    )

    def update():
      nonlocal state
      state, metrics = compiled(state, frozen, rollout, scores, keys, number)
      return metrics

    took, metrics = self.repeat(update, seconds / 2)
    if int(metrics["skipped"]):
      raise FloatingPointError("an update's loss or gradient is not finite")
    lines.append(
      self.line("LoRA update", facts, took, read, planned["update"].flops / took,
                f"median of at most {args.repeats}")
    )  # fmt: skip
    return lines

  def wait(self, compiled: Callable, given: tuple) -> tuple[float, Any]:
    """(seconds, result) of one run."""
    jax.block_until_ready(given)
    began = time.perf_counter()
    out = jax.block_until_ready(compiled(*given))
    return time.perf_counter() - began, out

  def repeat(self, run: Callable[[], Any], seconds: float) -> tuple[float, Any]:
    """(median seconds, last result) of --repeats runs, or of as many as `seconds` allow.

    One run before them is not timed.
    """
    jax.block_until_ready(run())
    times, began = [], time.monotonic()
    while len(times) < self.args.repeats and (not times or time.monotonic() - began < seconds):
      took, out = self.wait(run, ())
      times.append(took)
    return statistics.median(times), out

  def line(self, name, facts, seconds, tokens, flops_per_second, measured) -> Line:
    """A line of the table; the peak is measured once more beside it."""
    self.peak.sample()
    return Line(
      name, seconds, tokens, measured, flops_per_second, facts["planned_bytes"],
      facts["compile_seconds"],
    )  # fmt: skip


def run_parts(bench: Bench, report: Callable[[Line], None]) -> None:
  """Runs every part in turn. A part that fails or has no time left also gets a line."""
  sampler = bench.sampler
  denoising = {
    "rollout, no cache": sampler,
    "rollout, dual cache": dataclasses.replace(sampler, cache="dual"),
    "evaluation batch, no cache": dataclasses.replace(sampler, temperature=0.0),
  }
  parts: list[tuple[str, Callable[[float], list[Line]]]] = [
    (name, lambda seconds, name=name, cfg=cfg: [bench.denoising(name, cfg, seconds)])
    for name, cfg in denoising.items()
  ]
  parts.insert(2, ("likelihood and LoRA update", bench.learning))
  for name, part in parts:
    seconds = bench.budget.next_part()
    if seconds is None:
      report(Line(name, problem="left out: no time left (see --seconds)"))
      continue
    try:
      for line in part(seconds):
        report(line)
    except Exception as error:  # out of memory, a kernel that refuses: the other parts go on
      report(Line(name, problem=failure(error)))


def failure(error: BaseException) -> str:
  """An error as one short line."""
  text = " ".join(str(error).split())
  return f"failed: {type(error).__name__}: {text[:300]}"


def torch_lines(args: argparse.Namespace) -> list[Line]:
  """Times the rollouts of the PyTorch code in a process of its own, which frees its memory."""
  seconds = TORCH_SHARE * args.seconds
  setting = {
    "config": hf_config(common.model_config(args)),
    "dtype": common.model_config(args).dtype,
    "mask_id": common.model_config(args).mask_id,
    "seconds": seconds,
    **{k: getattr(args, k) for k in ("rows", "prompt", "gen_length", "block_length", "steps")},
  }
  command = [sys.executable, "-m", "benchmarks.torch_llada", args.torch, json.dumps(setting)]
  root = pathlib.Path(__file__).parent.parent
  try:
    done = subprocess.run(
      command, cwd=root, env=os.environ | {"PYTHONPATH": os.fspath(root)}, text=True,
      stdout=subprocess.PIPE, timeout=seconds, check=False,
    )  # fmt: skip
  except subprocess.TimeoutExpired:
    return [Line("PyTorch", problem=f"failed: not done within {seconds:.0f} s")]
  if done.returncode:
    return [Line("PyTorch", problem=f"failed: exit code {done.returncode}, see above")]
  return [Line(**line) for line in json.loads(done.stdout.splitlines()[-1])]


def table(lines: list[Line], peak: float) -> str:
  """The lines as a Markdown table; `peak` is in FLOPs per second."""
  rows = [
    "| part | seconds | measured | tokens/s | of the matrix peak | planned, GiB | compiled in, s |",
    "|---|---|---|---|---|---|---|",
  ]
  cell = lambda value, text: "" if value is None else text.format(value)
  for line in lines:
    if line.problem:
      rows.append(f"| {line.name} | {line.problem} | | | | | |")
      continue
    rate = line.flops_per_second
    share = None if rate is None else rate / peak
    rows.append(
      f"| {line.name} | {line.seconds:.3g} | {line.measured} |"
      f" {line.tokens / line.seconds:.4g} | {cell(share, '{:.0%}')} |"
      f" {cell(None if line.bytes is None else line.bytes / GIB, '{:.2f}')} |"
      f" {cell(line.compile_seconds, '{:.0f}')} |"
    )
  return "\n".join(rows)


def check_options(args: argparse.Namespace) -> None:
  """Checks the options before any work.

  Raises:
    UserError: sizes that do not fit together, or no PyTorch code in --torch.
  """
  for name in ("rows", "prompt", "group", "lora_rank", "repeats"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)}: at least 1")
  if args.group < 2 or args.rows % args.group:
    raise UserError(
      f"--rows={args.rows} is not a multiple of --group={args.group} completions, at least 2"
    )
  if args.torch:
    find_code(args.torch)


def main() -> int:
  parser = cli.ArgumentParser(description=__doc__)
  common.add_arguments(parser)
  parser.set_defaults(model="8b")
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
  parser.add_argument("--prompt", type=int, default=256, help="positions of the prompt")
  parser.add_argument("--gen_length", type=int, default=256)
  parser.add_argument("--block_length", type=int, default=32)
  parser.add_argument("--steps", type=int, default=128)
  parser.add_argument("--lora_rank", type=int, default=128)
  parser.add_argument("--seconds", type=float, default=480.0, help="for the whole command")
  parser.add_argument("--torch", help="directory with PyTorch code for LLaDA")
  args = parser.parse_args()
  check_options(args)

  budget, lines = Budget(args.seconds, 4), []

  def report(line: Line) -> None:
    lines.append(line)
    print(f"{line.name}: {line.problem or f'{line.seconds:.3g} s'}", file=sys.stderr, flush=True)

  for line in torch_lines(args) if args.torch else []:
    report(line)
  bench = Bench(args, budget)
  model, total = bench.config.model, args.prompt + args.gen_length
  tolerance, checks = TOLERANCE[model.dtype], {}
  with jax.set_mesh(bench.mesh):
    bench.peak.sample()
    for queries in (total, args.block_length):
      try:
        checks[f"{queries} of {total}"] = attention_errors(model, total, queries)
      except Exception as error:
        report(Line(f"attention, {queries} of {total}", problem=failure(error)))
    run_parts(bench, report)

  peak = bench.peak.flops_per_second
  wrong = []
  for where, found in checks.items():
    for name, errors in found.items():
      good = max(errors.values()) <= tolerance  # not a number is wrong, too
      wrong += [] if good else [name]
      print(
        f"attention {name}, {where} positions: result {errors['result']:.1e}, gradients"
        f" {errors['gradients']:.1e} from float32: {'ok' if good else f'WRONG (> {tolerance})'}"
      )
  device, memory = jax.devices()[0].device_kind, common.peak_memory()
  print(f"\n{device}, {args.rows} rows, peak {peak / 1e12:.3g} TFLOP/s in {model.dtype}")
  print(table(lines, peak))
  if "peak_device_bytes" in memory:
    print(f"most device memory in use: {memory['peak_device_bytes'] / GIB:.1f} GiB")
  text = json.dumps({
    "benchmark": "accelerator",
    "model": dataclasses.asdict(model),
    "parameters": common.count_parameters(bench.model.params),
    "sampler": dataclasses.asdict(bench.sampler),
    "rows": args.rows,
    "attention": checks,
    "peak_flops_per_second": peak,
    "lines": [dataclasses.asdict(line) for line in lines],
    "memory": memory,
    "machine": common.machine(),
  })  # fmt: skip
  print(text)
  if args.output:
    pathlib.Path(args.output).write_text(text + "\n")
  return int(bool(wrong or any(line.problem for line in lines)))


if __name__ == "__main__":
  cli.run(main)
