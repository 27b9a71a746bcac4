"""Denoising: seconds, tokens per second and utilization, without and with caches.

    python -m benchmarks.denoise [--model=bench] [--rows=8] [--prompt=128] [--gen_length=128]
        [--block_length=32] [--steps=64] [--cases=none,prefix,dual] [--repeats=3]
    python -m benchmarks.denoise --ragged --rows=32 --cases=none,none+slots=8
    python -m benchmarks.denoise --cases=none,dual --peers=DIR

Weights are random, and there is no early stop: every run makes all its steps. A case is a cache
("none", "prefix", "dual"), which may be followed by "+threshold=X", "+factor=X", "+refresh=N",
"+temperature=X" (default 0), "+steps=N" or "+slots=N" (number of rows that are denoised at a time;
default: all). With --ragged the rows end after different blocks, evenly spread. The cases run in
turns, and the machine's peak for matrix products is measured between them. Utilization is the FLOPs
that the rows of a case need, divided by its seconds and by that peak. Prints one JSON object.

With --peers the PyTorch code for LLaDA in DIR is timed as well, in a process of its own and in
turns with ours (benchmarks/torch_llada.py says which files it needs). It has random weights of the
same shape, which do not change the number of calls here. "times_peer" is the peer's seconds per
token divided by ours, of each turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.torch_llada import find_code
from igpo_jax import cli
from igpo_jax.config import ModelConfig, SamplerConfig
from igpo_jax.convert.families import hf_config
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
  "steps": ("steps", int),
  "slots": ("slots", int),  # of the call, not of the sampler
}


def parse_case(text: str, base: SamplerConfig) -> SamplerConfig:
  """The sampler that a case such as "dual+threshold=0.9+refresh=8" describes.

  Args:
    text: the case.
    base: gives all options that the case does not name.

  Raises:
    UserError: an unknown option, or a value that does not fit.
  """
  changes = _changes(text)
  changes.pop("slots", None)
  return dataclasses.replace(base, **changes)


def slots_of(text: str) -> int:
  """N of a case with "+slots=N"; 0 of others."""
  return _changes(text).get("slots", 0)


def _changes(text: str) -> dict:
  """The options that a case names, "cache" among them."""
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
  return changes


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
  """(refreshes, other calls) of each block, summed over the rows, from the steps of the commits.

  Args:
    cfg: the sampler.
    commit_step: i32[B,T], step at which each position was committed, -1 for fixed positions.
  """
  per_block, out = cfg.steps_per_block, []
  for block in range(cfg.num_blocks):
    steps = np.where(commit_step // per_block == block, commit_step, -1).max(axis=1)
    made = (steps % per_block + 1)[steps >= 0]
    refreshes = made if cfg.cache == "none" else -(-made // (cfg.refresh_every or per_block))
    out.append((int(refreshes.sum()), int((made - refreshes).sum())))
  return out


# Our case -> the peer's of the same kind.
PEERS = {"none": "PyTorch, no cache", "dual": "PyTorch, dual cache"}


def peer_lines(args: argparse.Namespace, model: ModelConfig) -> dict[str, dict]:
  """What a process with the PyTorch code measured: name of its case -> its line.

  Raises:
    UserError: the process failed; it says above why.
  """
  setting = {
    "config": hf_config(model), "dtype": model.dtype, "mask_id": model.mask_id, "seconds": 1e9,
    **{k: getattr(args, k) for k in ("rows", "prompt", "gen_length", "block_length", "steps")},
  }  # fmt: skip
  command = [sys.executable, "-m", "benchmarks.torch_llada", args.peers, json.dumps(setting)]
  root = os.fspath(pathlib.Path(__file__).parent.parent)
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  done = subprocess.run(
    command, cwd=root, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    check=False,
  )  # fmt: skip
  if done.returncode:
    raise UserError(f"--peers={args.peers}: its process failed, see above")
  return {line["name"]: line for line in json.loads(done.stdout.splitlines()[-1])}


def beside_peers(args: argparse.Namespace, model: ModelConfig, programs: dict) -> dict[str, dict]:
  """Our case -> seconds per token of ours and of the peer's, and their ratio, of each turn.

  Every other turn the peer comes first.
  """
  tokens = args.rows * args.gen_length

  def ours() -> dict[str, float]:
    out = {}
    for name in PEERS.keys() & programs.keys():
      began = time.perf_counter()
      jax.block_until_ready(programs[name]())
      out[name] = (time.perf_counter() - began) / tokens
    return out

  out: dict[str, dict] = {}
  for turn in range(args.repeats):
    if turn % 2:
      lines, own = peer_lines(args, model), ours()
    else:
      own, lines = ours(), peer_lines(args, model)
    for name, seconds in own.items():
      line = lines.get(PEERS[name], {"problem": "no such function in its generate.py"})
      facts = out.setdefault(name, {"ours": [], "peer": [], "times_peer": []})
      if "problem" in line:
        facts["problem"] = line["problem"]
        continue
      theirs = line["seconds"] / line["tokens"]
      facts["ours"].append(seconds)
      facts["peer"].append(theirs)
      facts["times_peer"].append(theirs / seconds)
      facts["measured"] = line["measured"]
  return out


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  common.add_arguments(parser)
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=128, help="positions of the prompt")
  parser.add_argument("--gen_length", type=int, default=128)
  parser.add_argument("--block_length", type=int, default=32)
  parser.add_argument("--steps", type=int, default=64)
  parser.add_argument("--cases", default="none,prefix,dual")
  parser.add_argument("--ragged", action="store_true", help="rows end after different blocks")
  parser.add_argument("--peers", metavar="DIR", help="directory with PyTorch code for LLaDA")
  args = parser.parse_args()
  if args.peers:
    find_code(args.peers)  # before any work

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
  keys = jax.random.split(jax.random.key(2), args.rows)
  run = jax.jit(
    lambda params, canvas, keys, cfg, slots: denoise(lm, params, canvas, keys, cfg, slots=slots),
    static_argnums=(3, 4),
  )

  programs, results, outs = {}, {}, {}
  for name, cfg in cases.items():
    compiled, results[name] = common.compile_facts(run, params, canvas, keys, cfg, slots_of(name))
    programs[name] = lambda compiled=compiled: compiled(params, canvas, keys)
    outs[name] = jax.device_get(programs[name]())
  peak = common.matmul_peak(args, model)
  seconds, facts = common.time_cases(programs, args.repeats, peak, counter)

  for name, cfg in cases.items():
    out = outs[name]
    calls = calls_by_block(cfg, out.commit_step)
    assert sum(map(sum, calls)) == out.calls.sum()
    committed = out.commit_step[out.commit_step >= 0]
    decided = int((committed % cfg.steps_per_block + 1).sum())
    flops = needed_flops(model, cfg, [1] * cfg.num_blocks, length, calls, decided)
    times = common.spread(seconds[name])
    results[name] |= {
      "seconds": times,
      "tokens_per_second": int((~given).sum()) / times["median"],
      "flops": flops,
      "flops_per_second": flops / times["median"],
      "utilisation": flops / times["median"] / peak.flops_per_second,
      "forwards": int(out.forwards),
      "refreshes": int(out.refreshes),
      "calls_needed": int(out.calls.sum()),
      "equal_to_first": float(
        (out.tokens == outs[next(iter(cases))].tokens)[:, args.prompt :].mean()
      ),
    }
    if cfg.cache == "prefix":
      results[name]["widths"] = cached_widths(cfg)
      results[name]["overhang"] = overhang(cfg)
  if args.peers:
    facts["peers"] = beside_peers(args, model, programs)
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
