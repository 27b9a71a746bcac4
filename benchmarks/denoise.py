"""Denoising: seconds, tokens per second and utilization, without and with caches.

    python -m benchmarks.denoise [--model=bench] [--rows=8] [--prompt=128] [--gen_length=128]
        [--block_length=32] [--steps=64] [--cases=none,prefix,dual] [--repeats=3]

Weights are random, and there is no early stop: every run makes all its steps. A case is a cache
("none", "prefix", "dual"), which may be followed by "+threshold=X", "+factor=X", "+refresh=N",
"+temperature=X" (default 0), "+steps=N" or "+batches=N" (see `SamplerConfig.batch_sizes`). With
--ragged the rows end after different blocks, evenly spread. The cases run in turns, and the
machine's peak for matrix products is measured between them. Utilization is the FLOPs that a case
needs, divided by its seconds and by that peak. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import common
from igpo_jax import cli
from igpo_jax.config import ModelConfig, SamplerConfig
from igpo_jax.diffusion.network import cached_widths, overhang
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.errors import UserError
from igpo_jax.models import make_lm
from igpo_jax.models.flops import forward_flops
from igpo_jax.types import Canvas

OPTIONS = {  # option of a case -> (option of the sampler, its type)
  "threshold": ("threshold", float),
  "factor": ("factor", float),
  "refresh": ("refresh_every", int),
  "temperature": ("temperature", float),
  "batches": ("batch_sizes", int),
  "steps": ("steps", int),
}


def parse_case(text: str, base: SamplerConfig) -> SamplerConfig:
  """The sampler that a case such as "dual+threshold=0.9+refresh=8" describes.

  Args:
    text: the case.
    base: gives all options that the case does not name.

  Raises:
    UserError: an unknown option, or a value that does not fit.
  """
  cache, *options = text.split("+")
  changes = {"cache": cache}
  for option in options:
    name, _, value = option.partition("=")
    if name not in OPTIONS:
      raise UserError(f"--cases: {option!r} is not one of {', '.join(OPTIONS)} with a value")
    try:
      field, kind = OPTIONS[name]
      changes[field] = kind(value)
    except ValueError:
      raise UserError(f"--cases: {option!r}: {value!r} is no number") from None
  return dataclasses.replace(base, **changes)


def needed_flops(
  model: ModelConfig,
  cfg: SamplerConfig,
  rows: list[int],
  length: int,
  calls: list[tuple[int, int]],
  decided: int,
) -> int:
  """FLOPs of the matrix products that a run needs.

  Args:
    model: sizes of the model.
    cfg: the sampler.
    rows: number of rows that are still denoised, for each block.
    length: positions of a row.
    calls: (refreshes, other calls) of each block.
    decided: number of positions to which the head is applied, over all calls: each position counts
      once in every call until it is committed.
  """
  total = forward_flops(model, 1, 1, 1, decided, 0) - forward_flops(model, 1, 1, 1, 0, 0)
  for active, (refreshes, others), width in zip(rows, calls, seen_widths(cfg), strict=True):
    whole = forward_flops(model, active, length, length, 0, cfg.block_length)
    part = forward_flops(model, active, width, length, 0, cfg.block_length)
    total += refreshes * whole + others * part
  return total


def seen_widths(cfg: SamplerConfig) -> list[int]:
  """For each block, how many positions a call reads that does not refresh the cache."""
  left = [cfg.gen_length - block * cfg.block_length for block in range(cfg.num_blocks)]
  return left if cfg.cache == "prefix" else [cfg.block_length] * cfg.num_blocks


def calls_by_block(cfg: SamplerConfig, commit_step) -> list[tuple[int, int]]:
  """(refreshes, other calls) of each block, derived from the steps of the commits.

  Args:
    cfg: the sampler.
    commit_step: i32[B,T], step at which each position was committed, -1 for fixed positions.
  """
  per_block, out = cfg.steps_per_block, []
  for block in range(cfg.num_blocks):
    steps = commit_step[(commit_step >= 0) & (commit_step // per_block == block)]
    made = int(steps.max()) % per_block + 1 if steps.size else 0
    every = cfg.refresh_every or per_block
    refreshes = made if cfg.cache == "none" else -(-made // every)
    out.append((refreshes, made - refreshes))
  return out


def main() -> None:
  parser = cli.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  common.add_arguments(parser)
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=128, help="positions of the prompt")
  parser.add_argument("--gen_length", type=int, default=128)
  parser.add_argument("--block_length", type=int, default=32)
  parser.add_argument("--steps", type=int, default=64)
  parser.add_argument("--cases", default="none,prefix,dual")
  parser.add_argument("--ragged", action="store_true", help="rows end after different blocks")
  args = parser.parse_args()

  model = common.model_config(args)
  base = SamplerConfig(args.gen_length, args.block_length, args.steps, early_stop="none")
  cases = {name: parse_case(name, base) for name in args.cases.split(",")}
  counter = common.CompileCounter()

  lm = make_lm(model)
  params = jax.jit(lm.init)(jax.random.key(0))
  length = args.prompt + args.gen_length
  prompt = common.random_prompts(jax.random.key(1), args.rows, args.prompt, model.vocab_size)
  masks = jnp.full((args.rows, args.gen_length), model.mask_id, jnp.int32)
  ends = jnp.full((args.rows,), length)
  if args.ragged:
    blocks = (jnp.arange(args.rows) * base.num_blocks) // args.rows + 1
    ends = args.prompt + blocks * args.block_length
  position = jnp.arange(length)
  given = (position < args.prompt) | (position >= ends[:, None])
  tokens = jnp.where(given, 1, jnp.concatenate([prompt, masks], axis=1))
  tokens = tokens.at[:, : args.prompt].set(prompt)
  canvas = Canvas(tokens, given, jnp.ones((args.rows, length), bool))
  begins = args.prompt + jnp.arange(base.num_blocks) * args.block_length
  active = [int(n) for n in jnp.sum(ends[:, None] > begins, axis=0)]  # rows in each block
  keys = jax.random.split(jax.random.key(2), args.rows)
  run = jax.jit(lambda params, canvas, keys, cfg: denoise(lm, params, canvas, keys, cfg),
                static_argnums=3)  # fmt: skip

  programs, results, outs = {}, {}, {}
  for name, cfg in cases.items():
    compiled, results[name] = common.compile_facts(run, params, canvas, keys, cfg)
    programs[name] = lambda compiled=compiled: compiled(params, canvas, keys)
    outs[name] = jax.device_get(programs[name]())
  peak = common.matmul_peak(args, model)
  seconds, facts = common.time_cases(programs, args.repeats, peak, counter)

  for name, cfg in cases.items():
    out = outs[name]
    calls = calls_by_block(cfg, out.commit_step)
    assert sum(map(sum, calls)) == out.forwards and sum(c[0] for c in calls) == out.refreshes
    committed = out.commit_step[out.commit_step >= 0]
    decided = int((committed % cfg.steps_per_block + 1).sum())
    flops = needed_flops(model, cfg, active, length, calls, decided)
    times = common.spread(seconds[name])
    results[name] |= {
      "seconds": times,
      "tokens_per_second": int((~given).sum()) / times["median"],
      "flops": flops,
      "flops_per_second": flops / times["median"],
      "utilisation": flops / times["median"] / peak.flops_per_second,
      "forwards": int(out.forwards),
      "refreshes": int(out.refreshes),
      "equal_to_first": float(
        (out.tokens == outs[next(iter(cases))].tokens)[:, args.prompt :].mean()
      ),
    }
    if cfg.cache == "prefix":
      results[name]["widths"] = cached_widths(cfg)
      results[name]["overhang"] = overhang(cfg)
  common.emit(
    {
      "benchmark": "denoise",
      "model": dataclasses.asdict(model),
      "parameters": common.count_parameters(params),
      "rows": args.rows,
      "prompt": args.prompt,
      "sampler": dataclasses.asdict(base),
      "cases": results,
      **facts,
    },
    args.output,
  )


if __name__ == "__main__":
  cli.run(main)
