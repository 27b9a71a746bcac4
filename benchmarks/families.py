"""SFT and IGPO of a small model of every family, on the quickstart's generated task.

    python -m benchmarks.families --workdir=runs/families [--families=dream,llada_moe] [--smoke]
        [--short] [--seed=0] [--grpo] [--sft_steps=800] [--rl_steps=16] [--prompts=16]
        [--group_size=8]

The quickstart's IGPO with another network, 64 wide, 2 layers, and fewer steps: what shows that a
family learns. With experts there are 4, of which 2 work on a token. Block-causal models have the
quickstart's blocks of 7, and are sampled in these. Prints one line for each family and one JSON
object: accuracy of the held-out problems, greedy, after SFT and after RL, with standard errors, and
whether it rose by more than two of them. `--grpo` adds GRPO from the same SFT checkpoint. An
interrupted command continues where it was.

`--short` takes half a minute of one core for a family, more with experts: maps over 8 letters and a
model 32 wide. One layer is enough for one that predicts one position ahead: the letter before is
then its input where it chooses the next.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from typing import Any

from igpo_jax.config import Config, freeze, load_config_file
from igpo_jax.main import train
from igpo_jax.models import FAMILIES

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
MOE = {"experts": 4, "experts_per_token": 2, "expert_hidden": 64}
BLOCK = 7
SHORT_STEPS, SHORT_BLOCK = 6, 5  # a trace of 8 tokens and its end in two blocks


def config_of(name: str, args: argparse.Namespace) -> Config:
  """The quickstart with a network of the family `name`; `args` as the command line has them."""
  config = load_config_file(CONFIGS / "quickstart.py", "smoke" if args.smoke else "")
  config.seed = args.seed
  config.arms = config.arms if args.grpo else ()
  if args.short:
    _make_short(config)
  elif not args.smoke:
    config.data.eval = tuple(uri.replace("n=512", "n=256") for uri in config.data.eval)
    config.rl.steps = 16
  if not args.smoke:
    config.sft.steps = args.sft_steps
  if args.rl_steps is not None:
    config.rl.steps = args.rl_steps
  config.rl.prompts_per_step = args.prompts or config.rl.prompts_per_step
  config.rl.group_size = args.group_size or config.rl.group_size
  config.rl.eval_every, config.eval.initial = 0, False
  model, family = config.model, FAMILIES[name]
  model.family = name
  model.n_kv_heads = 2
  tiny = family.tiny
  if "moe" in family.reads:
    for option, value in MOE.items():
      model.moe[option] = value
    for option in ("dense_layers", "groups", "groups_kept"):
      model.moe[option] = tiny.get(f"moe.{option}", 0)
    model.moe.shared_hidden = MOE["expert_hidden"] if "moe.shared_hidden" in tiny else 0
    model.moe.scale = tiny.get("moe.scale", 1.0)
    model.router_loss = 0.01
  for option in ("rotary_share", "shift_logits", "tie_embeddings"):
    if option in tiny:
      model[option] = tiny[option]
  if "attention_block" in family.reads:
    config.sampler.block_length = SHORT_BLOCK if args.short else BLOCK
    model.attention_block = config.sampler.block_length
    config.sampler.schedule = "full_block"
  config.log.tensorboard = False
  if args.short and family.design(freeze(config).model).shift:
    model.n_layers = 1
  return freeze(config)


def _make_short(config) -> None:
  """A task with 24 transitions, a quarter of them doubtful, and rates for few steps."""
  task = f"synthetic:letter_maps?steps={SHORT_STEPS}&maps=3&letters=8"
  config.data.sft = f"{task}&split=train&n=2000&seed=1&doubtful=0.25&slips=0.7"
  config.data.rl = f"{task}&split=train&n=1000&seed=2"
  config.data.eval = (f"test={task}&split=test&n=256&seed=3",)
  config.data.prompt_buckets = (SHORT_STEPS + 2,)
  config.sampler.gen_length = config.sampler.steps = 2 * SHORT_BLOCK
  config.sampler.block_length = SHORT_BLOCK
  config.model.d_model, config.model.mlp_hidden = 32, 128
  config.sft_optimizer.learning_rate = 1e-2
  config.rl.steps, config.rl_optimizer.learning_rate, config.rl_optimizer.warmup_steps = 20, 3e-3, 1


def accuracy_of(summary: dict[str, Any], stage: str) -> dict[str, Any]:
  """Of the held-out problems after a stage, with its standard error."""
  result = summary["eval"][f"{stage}/test"]
  accuracy, n = result["accuracy"], result["n"]
  error = math.sqrt(accuracy * (1 - accuracy) / n)
  return {"accuracy": accuracy, "standard_error": round(error, 4), "n": n}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
  """Trains one; its row of the table."""
  began, workdir = time.process_time(), args.workdir / name
  summary = train(config_of(name, args), workdir)
  out: dict[str, Any] = {"cpu_seconds": round(time.process_time() - began)}
  out |= {stage: accuracy_of(summary, stage) for stage in ("sft", "rl")}
  for arm in workdir.glob("arms/*/summary.json"):
    told = json.loads(arm.read_text())
    out[arm.parent.name] = accuracy_of(told, "rl") | {
      key: told["rl"][key] for key in ("all_wrong_before", "all_wrong_after")
    }
  rise = out["rl"]["accuracy"] - out["sft"]["accuracy"]
  error = math.hypot(*(out[stage]["standard_error"] for stage in ("sft", "rl")))
  out |= {key: summary["rl"][key] for key in ("all_wrong_before", "all_wrong_after")}
  return out | {"rise": rise, "rose": rise > 2 * error}


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--families", default=",".join(FAMILIES))
  size = parser.add_mutually_exclusive_group()
  size.add_argument("--smoke", action="store_true", help="the quickstart's smoke preset")
  size.add_argument("--short", action="store_true", help="a task that takes fewer steps")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--grpo", action="store_true", help="GRPO from the same SFT checkpoint, too")
  parser.add_argument("--sft_steps", type=int, default=800)
  parser.add_argument("--rl_steps", type=int, help="16, or 20 if --short")
  parser.add_argument("--prompts", type=int, help="of a step of RL; fewer compile fewer programs")
  parser.add_argument("--group_size", type=int, help="completions of a prompt")
  return parser


def main() -> None:
  parser = make_parser()
  args = parser.parse_args()
  names = args.families.split(",")
  if unknown := set(names) - set(FAMILIES):
    parser.error(f"--families: {', '.join(sorted(unknown))} not in {', '.join(FAMILIES)}")
  results = {}
  for name in names:
    row = results[name] = measure(name, args)
    cell = lambda stage, row=row: f"{row[stage]['accuracy']:.3f} ± {row[stage]['standard_error']}"
    verdict = "rose" if row["rose"] else "did not rise"
    print(f"{name}: {cell('sft')} after SFT, {cell('rl')} after RL: {verdict}", flush=True)
  print(json.dumps(results, indent=2))


if __name__ == "__main__":
  main()
