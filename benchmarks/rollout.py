"""Whole RL steps: IGPO with k of P groups all wrong, compared with plain GRPO.

    python -m benchmarks.rollout [--model=bench] [--prompts=8] [--group=4] [--prompt=32]
        [--gen_length=32] [--block_length=16] [--steps=4] [--inner_updates=1] [--beta=0.01]
        [--wrong=0,1,2,4,8] [--repeats=3]

The steps are the trainer's own: sample, grade, inpaint the groups that are all wrong, score,
update. The grader is told how many groups to call all wrong. In all other groups and in inpainted
groups it calls every second completion correct. The case `grpo` is a step with exploration "none";
its cost does not depend on the answers. Every round makes one step of each case, on the same
prompts.

Prints one JSON object. `extra_share` is the extra time of a case compared with no wrong groups, as
a share of the extra time when all P groups are wrong (null if --wrong does not have P).
`bucket_share` is the share of the prompts that the case samples again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics

import jax
import numpy as np

from benchmarks import common
from igpo_jax import cli
from igpo_jax.config import (
  Config,
  DataConfig,
  HintConfig,
  ModelConfig,
  ObjectiveConfig,
  RLConfig,
  SamplerConfig,
)
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.models.flops import forward_flops
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import PendingScores, Scores
from igpo_jax.rl.sampling import group_buckets
from igpo_jax.tasks.chains import ALPHABET
from igpo_jax.train.preflight import rl_stream
from igpo_jax.train.rl import make_stage
from igpo_jax.train.setup import make_model

SOURCE = "synthetic:chains?min_steps=6&max_steps=6&split=train&n=512&seed=2"


class ToldGrader:
  """A grader that calls the first groups of a step all wrong, and half of the others correct.

  Args:
    group_size: completions of a group.

  Attributes:
    wrong: how many groups are called all wrong; `begin` sets it.
  """

  def __init__(self, group_size: int):
    self.group_size, self.wrong, self.calls = group_size, 0, 0

  def begin(self, wrong: int) -> None:
    """Begins a step. It grades the policy's own samples first, then the inpainted ones."""
    self.wrong, self.calls = wrong, 0

  def submit(self, texts, records) -> PendingScores:
    """Grades texts without reading them; see the class."""
    del records
    rows = np.arange(len(texts))
    correct = rows % 2 == 0
    if self.calls == 0:
      correct &= rows >= self.wrong * self.group_size
    self.calls += 1
    reward = correct.astype(np.float32)
    scores = Scores(reward, correct, ["ok"] * len(texts), list(texts), {})
    return PendingScores(lambda: scores)


def step_flops(config: Config, model: ModelConfig, sampled_again: int) -> int:
  """FLOPs of the matrix products that a step needs; `sampled_again` prompts are sampled twice."""
  rl, sampler = config.rl, config.sampler
  total = config.data.prompt_buckets[0] + sampler.gen_length
  rows = (rl.prompts_per_step + sampled_again) * rl.group_size
  call = forward_flops(model, rows, total, total, sampler.block_length, read=sampler.block_length)
  read = forward_flops(model, rl.prompts_per_step, total, total, sampler.gen_length, read=total)
  references = 1 if config.objective.beta else 0
  return call * sampler.steps + read * (1 + references + 3 * rl.inner_updates)


def make_config(args: argparse.Namespace, exploration: str) -> Config:
  """The config of a step with this exploration."""
  return Config(
    stages=("rl",),
    model=dataclasses.replace(common.model_config(args), mask_id=0),
    data=DataConfig(rl=SOURCE, prompt_buckets=(args.prompt,)),
    sampler=SamplerConfig(
      args.gen_length, args.block_length, args.steps, temperature=1.0, early_stop="none"
    ),
    hints=HintConfig(chunk_min=2, chunk_max=4),
    objective=ObjectiveConfig(beta=args.beta),
    rl=RLConfig(
      prompts_per_step=args.prompts,
      group_size=args.group,
      inner_updates=args.inner_updates,
      exploration=exploration,
    ),
  )


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  common.add_arguments(parser)
  parser.add_argument("--prompts", type=int, default=8, help="groups of a step")
  parser.add_argument("--group", type=int, default=4, help="completions of a prompt")
  parser.add_argument("--prompt", type=int, default=32, help="positions of the prompt")
  parser.add_argument("--gen_length", type=int, default=32)
  parser.add_argument("--block_length", type=int, default=16)
  parser.add_argument("--steps", type=int, default=4)
  parser.add_argument("--inner_updates", type=int, default=1)
  parser.add_argument("--beta", type=float, default=0.01, help="0: no reference, no KL")
  parser.add_argument("--wrong", default="0,1,2,4,8", help="numbers of all-wrong groups")
  args = parser.parse_args()
  try:
    wrong = sorted({0, *map(int, args.wrong.split(","))})
  except ValueError:
    raise UserError(f"--wrong={args.wrong}: give numbers with commas between") from None
  if wrong[0] < 0 or wrong[-1] > args.prompts:
    raise UserError(f"--wrong={args.wrong}: between 0 and --prompts={args.prompts}")

  config, grader = make_config(args, "inpaint"), ToldGrader(args.group)
  mesh, counter = make_mesh(), common.CompileCounter()
  with jax.set_mesh(mesh):
    peak = common.matmul_peak(args, config.model)
    model = make_model(config, CharTokenizer(ALPHABET), mesh)
    stream = rl_stream(config, model.tokenizer, load_records(config.data.rl).records)
    igpo, state = make_stage(config, mesh, model, grader, stream)
    grpo, _ = make_stage(make_config(args, "none"), mesh, model, grader, stream)
    cases = {"grpo": (grpo, 0)} | {f"igpo {k}": (igpo, k) for k in wrong}

    def run(name: str, n: int):
      nonlocal state
      stage, k = cases[name]
      grader.begin(k)
      state, metrics, _ = stage.step(state, n)
      shares = metrics["all_wrong_before"], metrics["replaced"]
      assert shares[0] == k / args.prompts and (shares[1] > 0) == (name != "grpo" and k > 0)
      return state

    for name in cases:  # compiles everything
      jax.block_until_ready(run(name, 0))
    # Each case counts its own steps, so that in a round all take the same prompts.
    steps = {name: itertools.count(1) for name in cases}
    timed = {name: (lambda name=name: run(name, next(steps[name]))) for name in cases}
    seconds, facts = common.time_cases(timed, args.repeats, peak, counter)

  buckets = group_buckets(args.prompts, mesh.size)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  extra = {name: seconds - median["igpo 0"] for name, seconds in median.items()}
  everything = extra.get(f"igpo {args.prompts}")
  results = {}
  for name, (_, k) in cases.items():
    again = next(b for b in buckets if b >= k) if k and name != "grpo" else 0
    flops = step_flops(config, model_of(config, model), again)
    results[name] = {
      "seconds": common.spread(seconds[name]),
      "to_grpo": statistics.median(
        mine / plain for mine, plain in zip(seconds[name], seconds["grpo"], strict=True)
      ),
      "sampled_again": again,
      "bucket_share": again / args.prompts,
      "extra_share": extra[name] / everything if everything else None,
      "utilisation": flops / median[name] / peak.flops_per_second,
    }
  common.emit(
    {
      "benchmark": "rollout",
      "model": dataclasses.asdict(model_of(config, model)),
      "parameters": common.count_parameters(model.params),
      "rl": dataclasses.asdict(config.rl),
      "sampler": dataclasses.asdict(config.sampler),
      "prompt": args.prompt,
      "beta": args.beta,
      "cases": results,
      **facts,
    },
    args.output,
  )


def model_of(config: Config, model) -> ModelConfig:
  """The config of the model that was made: its special tokens are those of the tokenizer."""
  return dataclasses.replace(config.model, mask_id=model.lm.mask_id, eos_id=model.lm.eos_id)


if __name__ == "__main__":
  cli.run(main)
