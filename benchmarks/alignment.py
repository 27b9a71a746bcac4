"""Fine-tuning on aligned traces against verbose ones, at equal steps, over seeds.

    python -m benchmarks.alignment --workdir=runs/alignment [--seeds=0,1,2] [--steps=300]
        [--arms=aligned,verbose,grouped,fitting] [--detours=1] [--long=80]

The generated task with verbose traces (`--detours` at each step on average): most are longer
than the window that RL samples, nearly all fit `--long`. Arms: `aligned`, after
`python -m igpo_jax.rewrite --mode=trim --rules=chains`; `verbose`, as they are, responses
padded to the long length; `grouped`, the same in batches of like length, so that canvases of
the window's length are among them; `fitting`, those of the verbose ones that fit the window.
Same model, problems, steps and rows per step; held-out accuracy is taken within the window
and with the long canvas. Interrupted, it goes on where it was. Writes results.json and
table.md to the workdir and prints the table.
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
  """What the arms share: steps, detours at each step, and the long canvas."""

  steps: int
  detours: float
  long: int

  def lengths(self, arm: str) -> tuple[int, ...]:
    """Lengths that responses are padded to."""
    if arm == "grouped":
      return tuple(sorted({WINDOW, *range(WINDOW, self.long, 2 * BLOCK), self.long}))
    return (self.long,) if arm == "verbose" else (WINDOW,)


def verbose_source(seed: int, setting: Setting) -> str:
  return f"{TASK}&split=train&n=20000&seed={100 + seed}&detours={setting.detours:g}"


def align(seed: int, setting: Setting, output: epath.Path) -> None:
  """The command that a user would give."""
  options = {
    "mode": "trim", "rules": "chains", "verifier": "exact", "tokenizer": "char",
    "source": verbose_source(seed, setting), "output": output, "max-tokens": WINDOW,
  }  # fmt: skip
  flags = [f"--{name}={value}" for name, value in options.items()]
  flags += [f"--window={length}" for length in (WINDOW, setting.long)]
  subprocess.run([sys.executable, "-m", "igpo_jax.rewrite", *flags], check=True)


def make_config(arm: str, seed: int, setting: Setting, aligned: epath.Path) -> Config:
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
  """Fine-tunes and evaluates; the accuracies within the window and with the long canvas."""
  began = time.perf_counter()
  within = train(config, workdir)["eval"]["sft/test"]
  seconds = time.perf_counter() - began
  longer = SamplerConfig(gen_length=long, block_length=BLOCK, steps=long)
  whole = train(dataclasses.replace(config, stages=("eval",), sampler=longer), workdir)
  return {"window": within, "long": whole["eval"]["eval/test"], "seconds": seconds}


def mean_and_error(values: list[float]) -> str:
  """Mean over seeds with its standard error."""
  mean = sum(values) / len(values)
  if len(values) < 2:
    return f"{mean:.3f}"
  spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
  return f"{mean:.3f} ± {spread / math.sqrt(len(values)):.3f}"


def table(results: dict[str, dict[str, dict]], long: int) -> str:
  """One row per arm, seeds in the order they were asked for."""
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
