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
was. It writes results.json and table.md to the workdir and prints the table: means over seeds with
their 95% intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

from etils import epath

from benchmarks.study import Task, in_words, markdown, run_all
from igpo_jax import cli
from igpo_jax.config import Config, SamplerConfig, default_config, freeze
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import write_whole
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


@dataclasses.dataclass(frozen=True)
class Run(Task):
  """Fine-tuning on the traces of an arm, or "trim": the aligned traces that the first arm needs."""

  setting: Setting

  @property
  def comes_first(self) -> bool:
    return self.name == "trim"

  @property
  def config(self) -> Config:
    arm = "aligned" if self.name == "trim" else self.name
    return make_config(arm, self.seed, self.setting, self.root / "aligned.jsonl")

  def run(self) -> dict:
    """The accuracies within the window and with the long canvas."""
    if self.name == "trim":
      align(self.seed, self.setting, self.root / "aligned.jsonl")
      return {}
    workdir, long = self.root / self.name, self.setting.long
    within = train(self.config, workdir)["eval"]["sft/test"]
    longer = SamplerConfig(gen_length=long, block_length=BLOCK, steps=long)
    whole = train(dataclasses.replace(self.config, stages=("eval",), sampler=longer), workdir)
    return {"window": within, "long": whole["eval"]["eval/test"]}


def table(results: dict, arms: list[str], seeds: list[int], long: int) -> str:
  """The Markdown table, one row per arm; seeds are in the order of --seeds."""
  rows = []
  for arm in arms:
    of = lambda canvas, arm=arm: [results[arm, seed][canvas]["accuracy"] for seed in seeds]
    window = of("window")
    by_seed = ", ".join(f"{value:.3f}" for value in window)
    rows.append([LABELS[arm], by_seed, in_words(window), in_words(of("long"))])
  head = ("SFT on", f"seeds, within {WINDOW} tokens", "mean", f"with {long} tokens, mean")
  return markdown(head, rows)


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", type=epath.Path, required=True)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--arms", default=",".join(LABELS))
  parser.add_argument("--detours", type=float, default=1.0)
  parser.add_argument("--long", type=int, default=80)
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its own cores")
  args = parser.parse_args()
  arms = args.arms.split(",")
  for arm in arms:
    if arm not in LABELS:
      raise UserError(f"--arms: {arm!r} is not one of {', '.join(LABELS)}")
  if args.long <= WINDOW or args.long % BLOCK:
    raise UserError(f"--long={args.long}: give a multiple of {BLOCK} above {WINDOW}")
  setting = Setting(args.steps, args.detours, args.long)
  seeds = [int(seed) for seed in args.seeds.split(",")]
  names = ["trim", *arms] if "aligned" in arms else arms
  runs = [Run(n, s, args.workdir, False, setting) for s in seeds for n in names]
  results = run_all(runs, args.jobs)
  text = table(results, arms, seeds, args.long)
  report = {f"{arm}, seed {seed}": results[arm, seed] for arm in arms for seed in seeds}
  write_whole(args.workdir / "results.json", json.dumps(report, indent=2) + "\n")
  (args.workdir / "table.md").write_text(text + "\n")
  print(text)


if __name__ == "__main__":
  cli.run(main)
