"""Accuracy and number of calls with caches and parallel commits, on a trained model.

    python -m benchmarks.decoding --workdir=runs/quickstart [--config=configs/quickstart.py]
        [--cases=none,prefix,dual,none+threshold=0.9,...] [--rows=64] [--problems=0]

Completes the test problems of a finished run greedily, with its newest checkpoint, in each case
(benchmarks/denoise.py explains how a case is written). Every case has one step per position unless
it says otherwise, so that thresholds and factors can save steps. The problems of each prompt length
form one queue, and `--rows` of them are denoised at a time. "calls" is what a problem costs: the
calls of the network, each counted for all rows that it is made for, divided by the problems.
"alone" is the mean number of calls that a problem needs by itself. "full" is the share of the rows
of a call that it worked at, over the calls while problems were waiting. The cases run in turns,
`--repeats` times; seconds are medians, beside CPU seconds of the process for a machine that has
other work, too. Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

import jax
import numpy as np
from etils import epath

from benchmarks import common
from benchmarks.denoise import parse_case, slots_of
from igpo_jax import cli
from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import Config, SamplerConfig, freeze, load_config_file
from igpo_jax.diffusion.network import cached_widths, programs
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.errors import UserError
from igpo_jax.eval.evaluate import make_stream, parts_left, problems_of
from igpo_jax.eval.metrics import wilson
from igpo_jax.eval.protocols import plain_setting, plan
from igpo_jax.models.flops import forward_flops
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import Scorer
from igpo_jax.train.setup import load_source, make_model, make_tokenizer
from igpo_jax.types import Canvas, Denoised

CASES = (
  "none+steps=16,none,none+threshold=0.9,none+threshold=0.7,none+factor=0.5,none+factor=1.0,"
  "prefix,dual,dual+refresh=4,dual+refresh=2,prefix+threshold=0.9,dual+threshold=0.9,"
  "dual+refresh=2+threshold=0.9,dual+factor=1.0"
)


def trained_params(workdir: epath.Path, model, stage: str):
  """The newest parameters among a stage's checkpoints.

  Args:
    workdir: of a finished run.
    model: gives structure and sharding of the parameters.
    stage: "sft" or "rl".

  Raises:
    UserError: there is no checkpoint.
  """
  directory = workdir / "checkpoints" / stage
  step = Checkpoints(directory).latest() if directory.exists() else None
  if step is None:
    raise UserError(f"--workdir: {directory} holds no checkpoint of a finished run")
  return Checkpoints(directory).restore_part(step, {"params": model.params})["params"]


def canvas_of(batch, lm, length: int) -> Canvas:
  """Canvases of a batch of prompts: `length` masks follow each prompt."""
  masks = np.full((len(batch.tokens), length), lm.mask_id, np.int32)
  no, yes = np.zeros(masks.shape, bool), np.ones(batch.tokens.shape, bool)
  return Canvas(
    np.concatenate([batch.tokens, masks], axis=1),
    np.concatenate([yes, no], axis=1),
    np.concatenate([batch.valid, ~no], axis=1),
  )


def study(config: Config, workdir: epath.Path, args: argparse.Namespace) -> dict:
  """Runs every case on every problem: case -> its results."""
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  tokenizer = make_tokenizer(config, workdir)
  model = make_model(config, tokenizer, mesh)
  lm, params = model.lm, trained_params(workdir, model, args.stage)
  setting = plain_setting(config)
  length = setting.sampler.gen_length
  base = dataclasses.replace(setting.sampler, steps=length)
  cases = {name: parse_case(name, base) for name in args.cases.split(",")}
  if told := next((name for name in cases if slots_of(name)), ""):
    raise UserError(f"--cases: {told!r}: --rows says here how many rows are denoised at a time")
  records = load_source(plan(config)[0].uri)[: args.problems or None]
  problems = problems_of(setting, records)
  stream = make_stream(problems, tokenizer, args.rows, config.data.prompt_buckets, mesh)
  asked, queues = [], []
  for part in parts_left(stream, [False] * len(stream), base):
    batch = stream.batch_of(part, len(part))
    asked += batch.records
    queues.append(canvas_of(batch, lm, length))

  def run(cfg):
    key = jax.random.key(0)
    return [
      jax.device_get(denoise(lm, params, canvas, key, cfg, slots=args.rows)) for canvas in queues
    ]

  outs = {name: run(cfg) for name, cfg in cases.items()}  # compiled outside the clock
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
  for turn in range(args.repeats):
    for name, cfg in cases.items():
      began, cpu = time.perf_counter(), time.process_time()
      run(cfg)
      times[name].append((time.perf_counter() - began, time.process_time() - cpu))
    print(f"round {turn + 1} of {args.repeats}", file=sys.stderr, flush=True)
  sums = {name: costs(lm, cases[name], outs[name], args.rows) for name in cases}
  for name, seconds in times.items():
    sums[name]["seconds"], sums[name]["cpu_seconds"] = np.median(seconds, axis=0).tolist()
  tokens = {n: np.concatenate([out.tokens[:, -length:] for out in outs[n]]) for n in cases}
  texts = {name: [tokenizer.decode(row) for row in tokens[name]] for name in cases}

  results = {}
  exact = tokens[next(iter(cases))]
  positions = queues[0].tokens.shape[1]
  with Scorer(config.reward.verifier, dict(config.reward.weights), config.reward.workers) as scorer:
    for name, cfg in cases.items():
      correct = scorer(texts[name], asked).correct
      low, high = wilson(float(np.mean(correct)), len(correct))
      # Mean number of positions that a call with a cache reads, over the blocks.
      seen = sum(cached_widths(cfg)) // cfg.num_blocks if cfg.cache != "none" else positions
      whole, part = (
        forward_flops(lm_config(model, config), 1, n, positions, cfg.block_length, cfg.block_length)
        for n in (positions, seen)
      )
      others = sums[name]["calls"] - sums[name]["refreshes"]
      results[name] = {
        "accuracy": float(np.mean(correct)),
        "low": low,
        "high": high,
        "same_tokens_as_first": float(np.mean(tokens[name] == exact)),
        **sums[name],
        "gflops_per_row": (sums[name]["refreshes"] * whole + others * part) / 1e9,
      }
  return results


def costs(lm, cfg: SamplerConfig, outs: list[Denoised], slots: int) -> dict[str, float]:
  """Calls for a row as they were made, those on the whole canvas among them, and those alone; and
  how full the calls were while rows were waiting."""
  rows = sum(len(out.calls) for out in outs)
  made = {"calls": 0.0, "refreshes": 0.0}
  for out in outs:
    kinds = programs(cfg, lm, min(slots, len(out.calls)), cfg.early_stop == "batch")
    refreshes = int(out.refreshes) * kinds[0].rows
    made["refreshes"] += refreshes / rows
    made["calls"] += (refreshes + int(out.forwards - out.refreshes) * kinds[-1].rows) / rows
  worked, room = (sum(int(getattr(out, name)) for out in outs) for name in ("worked", "room"))
  alone = sum(int(out.calls.sum()) for out in outs) / rows
  return made | {"alone": alone, "full": worked / room if room else 1.0}


def lm_config(model, config: Config):
  """The model config with the actual vocabulary size, for `forward_flops`."""
  return dataclasses.replace(config.model, vocab_size=model.lm.vocab_size)


def table(results: dict) -> str:
  """The results as a Markdown table."""
  lines = [
    "| case | accuracy | calls (refreshes) | alone | full | same tokens | GFLOP a row | seconds |"
    " CPU |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, r in results.items():
    error = (r["high"] - r["low"]) / 2 / 1.96
    refreshes = f" ({r['refreshes']:.0f})" if r["refreshes"] < r["calls"] else ""
    lines.append(
      f"| {name} | {r['accuracy']:.3f} ± {error:.3f} | {r['calls']:.1f}{refreshes} |"
      f" {r['alone']:.1f} | {r['full']:.3f} | {r['same_tokens_as_first']:.3f} |"
      f" {r['gflops_per_row']:.2f} | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="of a finished run of the config")
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--stage", choices=("sft", "rl"), default="rl")
  parser.add_argument("--cases", default=CASES)
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--problems", type=int, default=0, help="the first so many; 0: all")
  parser.add_argument("--repeats", type=int, default=1, help="timed runs of every case")
  args = parser.parse_args()
  for path in (args.config, args.workdir):
    if not epath.Path(path).exists():
      raise UserError(f"no such file or directory: {path}")
  config = freeze(load_config_file(args.config))
  results = study(config, epath.Path(args.workdir), args)
  print(table(results))
  print(json.dumps({"rows": args.rows, "cases": results, "machine": common.machine()}))


if __name__ == "__main__":
  cli.run(main)
