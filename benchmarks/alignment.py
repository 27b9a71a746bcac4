"""Fine-tuning on aligned traces compared with verbose ones, at equal steps, over seeds.

    python -m benchmarks.alignment --workdir=runs/alignment [--seeds=0,1,2] [--steps=300]
        [--arms=aligned,verbose,grouped,fitting] [--detours=1] [--long=80]

The task is generated, with verbose traces (`--detours` per step on average). Most traces are longer
than the window that RL samples; nearly all fit `--long` tokens. The arms are

    aligned   traces shortened by `python -m igpo_jax.rewrite --mode=trim --rules=chains`
    verbose   the verbose traces, padded to the long length
    grouped   the verbose traces in batches of similar length, so that some have the window's length
    fitting   only those verbose traces that fit the window

All arms have the same model, problems, steps and rows per step. Held-out accuracy is measured with
a canvas of the window's length and with the long one. An interrupted command continues where it
was. It writes results.json and table.md to the workdir and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time

from etils import epath

from igpo_jax import cli
from igpo_jax.config import Config, SamplerConfig, default_config, freeze
from igpo_jax.errors import UserError
from igpo_jax.main import train

TASK = "synthetic:chains?min_steps=4&max_steps=4&rare=add&rare_share=0.25"
WINDOW, BLOCK = 24, 8
LABELS = {
  "aligned": "aligned",
  "verbose": "verbose",
  "grouped": "verbose, in batches of like length",
  "fitting": "verbose, those that fit the window",
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all arms share: SFT steps, detours per step of a trace, and the long length in tokens."""

  steps: int
  detours: float
  long: int

  def lengths(self, arm: str) -> tuple[int, ...]:
    """The lengths to which an arm's responses are padded."""
    if arm == "grouped":
      return tuple(sorted({WINDOW, *range(WINDOW, self.long, 2 * BLOCK), self.long}))
    return (self.long,) if arm == "verbose" else (WINDOW,)


def verbose_source(seed: int, setting: Setting) -> str:
  """URI of the verbose training data of a seed."""
  return f"{TASK}&split=train&n=20000&seed={100 + seed}&detours={setting.detours:g}"


def align(seed: int, setting: Setting, output: epath.Path) -> None:
  """Writes the aligned traces to `output`, by the command that a user would run."""
  options = {
    "mode": "trim", "rules": "chains", "verifier": "exact", "tokenizer": "char",
    "source": verbose_source(seed, setting), "output": output, "max-tokens": WINDOW,
  }  # fmt: skip
  flags = [f"--{name}={value}" for name, value in options.items()]
  flags += [f"--window={length}" for length in (WINDOW, setting.long)]
  subprocess.run([sys.executable, "-m", "igpo_jax.rewrite", *flags], check=True)


def make_config(arm: str, seed: int, setting: Setting, aligned: epath.Path) -> Config:
  """The config of an arm; `aligned` is the file of aligned traces."""
  config = default_config()
  config.seed = seed
  config.stages = ("sft",)
  config.data.sft = f"jsonl:{aligned}" if arm == "aligned" else verbose_source(seed, setting)
  config.data.eval = (f"test={TASK}&split=test&n=512&seed=3",)
  config.data.prompt_buckets = (20,)
  config.reward.verifier = "exact"
  config.model.rope_theta = 100.0
  config.sampler.gen_length = WINDOW
  config.sampler.block_length = BLOCK
  config.sampler.steps = WINDOW
  config.sft.response_lengths = setting.lengths(arm)
  config.sft.steps = setting.steps
  config.sft_optimizer.learning_rate = 3e-3
  config.sft_optimizer.warmup_steps = 30
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01
  config.eval.initial = False
  config.eval.batch_size = 128
  config.log.tensorboard = False
  return freeze(config)


def run_arm(config: Config, long: int, workdir: epath.Path) -> dict:
  """Fine-tunes and evaluates.

  Returns:
    "window" and "long", the metrics with a canvas of each length, and "seconds" of the first.
  """
  began = time.perf_counter()
  within = train(config, workdir)["eval"]["sft/test"]
  seconds = time.perf_counter() - began
  longer = SamplerConfig(gen_length=long, block_length=BLOCK, steps=long)
  whole = train(dataclasses.replace(config, stages=("eval",), sampler=longer), workdir)
  return {"window": within, "long": whole["eval"]["eval/test"], "seconds": seconds}


def mean_and_error(values: list[float]) -> str:
  """The mean over seeds with its standard error, as text; only the mean for one seed."""
  mean = sum(values) / len(values)
  if len(values) < 2:
    return f"{mean:.3f}"
  spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
  return f"{mean:.3f} ± {spread / math.sqrt(len(values)):.3f}"


def table(results: dict[str, dict[str, dict]], long: int) -> str:
  """The Markdown table, one row per arm; seeds are in the order of --seeds."""
  lines = [
    f"| SFT on | seeds, within {WINDOW} tokens | mean | with {long} tokens, mean |",
    "|---|---|---|---|",
  ]
  for arm, by_seed in results.items():
    window = [result["window"]["accuracy"] for result in by_seed.values()]
    whole = [result["long"]["accuracy"] for result in by_seed.values()]
    lines.append(
      f"| {LABELS[arm]} | {', '.join(f'{v:.3f}' for v in window)} "
      f"| {mean_and_error(window)} | {mean_and_error(whole)} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", type=epath.Path, required=True)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--arms", default=",".join(LABELS))
  parser.add_argument("--detours", type=float, default=1.0)
  parser.add_argument("--long", type=int, default=80)
  args = parser.parse_args()
  arms = args.arms.split(",")
  for arm in arms:
    if arm not in LABELS:
      raise UserError(f"--arms: {arm!r} is not one of {', '.join(LABELS)}")
  if args.long <= WINDOW or args.long % BLOCK:
    raise UserError(f"--long={args.long}: give a multiple of {BLOCK} above {WINDOW}")
  setting = Setting(args.steps, args.detours, args.long)
  results: dict[str, dict[str, dict]] = {arm: {} for arm in arms}
  for seed in map(int, args.seeds.split(",")):
    root = args.workdir / f"seed{seed}"
    aligned = root / "aligned.jsonl"
    align(seed, setting, aligned)
    for arm in arms:
      config = make_config(arm, seed, setting, aligned)
      results[arm][str(seed)] = run_arm(config, args.long, root / arm)
    (args.workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.workdir / "table.md").write_text(table(results, args.long) + "\n")
  print(table(results, args.long))


if __name__ == "__main__":
  cli.run(main)
