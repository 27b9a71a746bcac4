"""The policy gradient of one group: the usual implementation compared with the trainer's programs.

    python -m benchmarks.update [--model=bench] [--group=8] [--prompt=128] [--gen_length=128]
        [--repeats=3] [--cases=plain,plain_completion,ours] [--estimators=all] [--most_forwards=8]

Times mean-field likelihoods, forward and backward, without the optimizer. `plain` is the usual
implementation: G masked rows through the model, logits at every position, log-softmax, gather,
entropy. `plain_completion` applies the head to the completion only. `ours` is
`PolicyPrograms.gradient`: all masked rows of a group are equal, so one row goes through the model,
and its logits are never held all at once. Prints one JSON object: seconds, compiled temporaries,
utilization, and the distance of the gradients (relative L2).

`--estimators` also times `PolicyPrograms.gradient` with other estimators, by name or "all". It
reports seconds and memory as multiples of those of mean_field (`ours`), and the forward passes per
completion. Estimators with more than `--most_forwards` of these are left out and listed.

The random weights of the head are multiplied by `SHARPER`. With small weights every entropy is
close to ln V. Then the last hint token that the entropy filter keeps and the first that it drops
differ by a few float32 roundings, and two correct programs may keep different tokens.
`filter_margin` is the smallest such difference of the run, in nats.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from igpo_jax import cli
from igpo_jax.config import (
  Config,
  ModelConfig,
  ObjectiveConfig,
  RLConfig,
  SamplerConfig,
  registry,
)
from igpo_jax.errors import UserError
from igpo_jax.models import make_lm
from igpo_jax.models.flops import forward_flops
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.rl.hint_filter import hints_to_keep
from igpo_jax.rl.methods import forwards_of
from igpo_jax.rl.objectives.clipped import policy_loss
from igpo_jax.rl.region import loss_region
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.types import LM, Rollout

SHARPER = 4.0  # logits have standard deviation 4, and entropies differ by tenths of a nat
CASES = ("plain", "plain_completion", "ours")
STEPS = 16  # most denoising steps that the commit steps of the rollout stand for


def steps_of(length: int) -> int:
  """The largest number of denoising steps, at most `STEPS`, that divides the length."""
  return next(n for n in range(min(STEPS, length), 0, -1) if length % n == 0)


def chosen_estimators(
  args: argparse.Namespace, config: Config
) -> tuple[dict[str, float], list[str]]:
  """(estimator -> forward passes per completion, names of estimators that need too many)."""
  known = [name for name in registry.classes("estimator") if name != "mean_field"]
  names = known if args.estimators == "all" else list(filter(None, args.estimators.split(",")))
  for name in names:
    registry.find("estimator", name)
  count = {name: forwards_of(with_estimator(config, name)).per_completion(args.group)
           for name in names}  # fmt: skip
  kept = {name: n for name, n in count.items() if n <= args.most_forwards}
  return kept, [name for name in names if name not in kept]


def with_estimator(config: Config, name: str) -> Config:
  """The config with another estimator."""
  return dataclasses.replace(config, rl=dataclasses.replace(config.rl, estimator=name))


def make_rollout(model: ModelConfig, group: int, prompt: int, length: int) -> Rollout:
  """One group of random completions with advantages; a fifth of the tokens are hints."""
  keys = jax.random.split(jax.random.key(1), 4)
  shape = (1, group, length)
  hinted = jax.random.uniform(keys[3], shape) < 0.2
  steps = steps_of(length)
  committed = jax.random.permutation(keys[3], jnp.arange(length) * steps // length)
  return Rollout(
    prompt=common.random_prompts(keys[0], 1, prompt, model.vocab_size),
    prompt_valid=jnp.ones((1, prompt), bool),
    completion=jax.random.randint(keys[1], shape, 1, model.vocab_size - 1, jnp.int32),
    hinted=hinted,
    commit_step=jnp.where(hinted, -1, committed),
    advantages=jax.random.normal(keys[2], (1, group)),
  )


def plain_gradient(lm: LM, objective: ObjectiveConfig, completion_only: bool):
  """The usual implementation: (params, rollout, old, ref f32[G,L]) -> (loss, gradient)."""

  def loss(params, rollout: Rollout, old, ref):
    completion, hinted = rollout.completion[0], rollout.hinted[0]
    group, length = completion.shape
    start = rollout.prompt.shape[1]
    prompt = jnp.broadcast_to(rollout.prompt, (group, start))
    masks = jnp.full((group, length), lm.mask_id, jnp.int32)
    tokens = jnp.concatenate([prompt, masks], axis=1)
    if completion_only:
      h, _ = lm.hidden(params, tokens)
      logits = lm.head(params, h[:, start:])
    else:
      logits = lm.logits(params, tokens)[:, start:]
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, completion[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    region = loss_region(completion, lm.stop_ids, "through_eos")
    return policy_loss(
      picked, entropy, old, ref, rollout.advantages[0], region, hinted, objective
    )[0]  # fmt: skip

  return jax.jit(jax.value_and_grad(loss))


def filter_margin(lm: LM, params, rollout: Rollout, objective: ObjectiveConfig) -> float | None:
  """The smallest entropy difference between the last hint kept and the first dropped, in nats.

  It is the smallest over rows; None if no hint is dropped.
  """
  length = rollout.completion.shape[2]
  masks = jnp.full((1, length), lm.mask_id, jnp.int32)
  h, _ = lm.hidden(params, jnp.concatenate([rollout.prompt, masks], axis=1))
  head = functools.partial(lm.head, params)
  entropy = np.asarray(token_stats(head, h[:, -length:], rollout.completion)[1][0])
  region = loss_region(rollout.completion[0], lm.stop_ids, "through_eos")
  margins = []
  for hints in np.asarray(region & rollout.hinted[0]):
    ranked = np.sort(entropy[hints])[::-1]
    keep = int(hints_to_keep(jnp.int32(len(ranked)), objective.entropy_keep, length))
    if keep < len(ranked):
      margins.append(float(ranked[keep - 1] - ranked[keep]))
  return min(margins, default=None)


def distance(left, right) -> float:
  """The L2 norm of the difference of two gradients, relative to that of `right`."""
  apart = jax.tree.map(jnp.subtract, left, right)
  return float(optax.tree.norm(apart) / optax.tree.norm(right))


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  common.add_arguments(parser)
  parser.add_argument("--group", type=int, default=8, help="completions of the prompt")
  parser.add_argument("--prompt", type=int, default=128, help="positions of the prompt")
  parser.add_argument("--gen_length", type=int, default=128)
  parser.add_argument("--cases", default=",".join(CASES))
  parser.add_argument("--estimators", default="", help='names, or "all"; they need the case "ours"')
  parser.add_argument("--most_forwards", type=float, default=8.0, help="of a completion")
  args = parser.parse_args()
  names = args.cases.split(",")
  for name in names:
    if name not in CASES:
      raise UserError(f"--cases: {name!r} is not one of {', '.join(CASES)}")

  model = common.model_config(args)
  group, length, total = args.group, args.gen_length, args.prompt + args.gen_length
  if args.estimators and "ours" not in names:
    raise cli.UserError('--estimators: they are compared with the case "ours": add it to --cases')
  config = Config(
    stages=(),
    model=model,
    rl=RLConfig(prompts_per_step=1, group_size=group),
    sampler=SamplerConfig(length, length, steps_of(length)),
  )
  estimators, left_out = chosen_estimators(args, config)
  lm = make_lm(model)
  params = jax.jit(lm.init)(jax.random.key(0))
  params["head"] = jax.tree.map(lambda x: SHARPER * x, params["head"])
  rollout = make_rollout(model, group, args.prompt, length)
  programs = make_policy_programs(lm, optax.identity(), config)
  # A reference and an old policy that are not quite the policy: ratios off 1 at the second inner
  # update, a KL.
  other = jax.tree.map(lambda x: 0.995 * x, params)
  row_keys = jax.random.split(jax.random.key(2), 1)
  scores = programs.score(other, other, rollout, row_keys)

  jitted, arguments = {}, {}
  for name in names:
    if name == "ours":
      jitted[name] = programs.gradient
      arguments[name] = (params, {}, rollout, scores, row_keys, jnp.int32(1))
    else:
      jitted[name] = plain_gradient(lm, config.objective, name == "plain_completion")
      arguments[name] = (params, rollout, scores.old[0, 0, 0], scores.ref[0, 0, 0])
  for name in estimators:
    other_programs = make_policy_programs(lm, optax.identity(), with_estimator(config, name))
    other_scores = other_programs.score(other, other, rollout, row_keys)
    jitted[name] = other_programs.gradient
    arguments[name] = (params, {}, rollout, other_scores, row_keys, jnp.int32(1))
  counter = common.CompileCounter()
  cases, results, gradients, losses = {}, {}, {}, {}
  for name in [*names, *estimators]:
    compiled, results[name] = common.compile_facts(jitted[name], *arguments[name])
    cases[name] = lambda run=compiled, given=arguments[name]: run(*given)
    loss, *_, gradients[name] = cases[name]()
    losses[name] = float(loss)
  peak = common.matmul_peak(args, model)
  seconds, facts = common.time_cases(cases, args.repeats, peak, counter)

  for name in [*names, *estimators]:
    rows = 1 if name == "ours" else group
    if name in estimators:
      forwards = forwards_of(with_estimator(config, name))
      rows = forwards.shared + group * forwards.own
      results[name]["forwards_per_completion"] = estimators[name]
    head = total if name == "plain" else length
    # Backward: the gradient of each product's input and of its weights.
    flops = 3 * forward_flops(model, rows, total, total, head, read=total)
    times = common.spread(seconds[name])
    results[name] |= {
      "seconds": times,
      "flops": flops,
      "utilisation": flops / times["median"] / peak.flops_per_second,
      "loss": losses[name],
    }
    if name != names[0] and name in names:
      results[name]["gradient_distance_to_first"] = distance(gradients[name], gradients[names[0]])
  ours = results.get("ours", {})
  ratios = {
    f"{name}_to_ours": {
      "seconds": results[name]["seconds"]["median"] / ours["seconds"]["median"],
      "temp_bytes": results[name]["temp_bytes"] / ours["temp_bytes"],
    }
    for name in names
    if ours and name != "ours"
  }
  in_ours = lambda name, what: results[name][what] / ours[what]
  compared = {
    name: {
      "seconds": results[name]["seconds"]["median"] / ours["seconds"]["median"],
      "temp_bytes": in_ours(name, "temp_bytes"),
      "forwards": estimators[name] * group,
    }
    for name in estimators
  }
  common.emit(
    {
      "benchmark": "update",
      "model": dataclasses.asdict(model),
      "parameters": common.count_parameters(params),
      "group": group,
      "prompt": args.prompt,
      "gen_length": length,
      "objective": dataclasses.asdict(config.objective),
      "filter_margin": filter_margin(lm, params, rollout, config.objective),
      "cases": results,
      "ratios": ratios,
      "to_mean_field": compared,
      "too_many_forwards": left_out,
      **facts,
    },
    args.output,
  )


if __name__ == "__main__":
  cli.run(main)
