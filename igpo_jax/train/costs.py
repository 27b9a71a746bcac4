"""The FLOPs of a run, counted from its shapes, and the time they take.

Only matrix products are counted, and upper bounds: every row is denoised to its end, and prompts
have the given length. Seconds are FLOPs divided by a share of the chips' peak that the caller
chooses; nothing is measured.
"""

from __future__ import annotations

import dataclasses

from igpo_jax.config import Config
from igpo_jax.eval.protocols import Task
from igpo_jax.models.flops import forward_flops
from igpo_jax.train.ahead_of_time import programs

# Problems of the published test sets, for where the files are not at hand (docs/evaluation.md).
PUBLISHED = {"gsm8k": 1319, "math500": 500, "amc": 40, "minerva": 272}


def step_flops(config: Config, mesh, prompt: int, hinted: float = 0.0) -> dict[str, dict[str, int]]:
  """Stage -> part of a step -> FLOPs of all devices together.

  Args:
    config: with all sizes resolved and with `model.vocab_size`.
    mesh: the device mesh.
    prompt: length that every prompt is padded to, in tokens.
    hinted: share of the groups that are sampled a second time, with hints.
  """
  data = dataclasses.replace(config.data, prompt_buckets=(prompt,))
  made = programs(dataclasses.replace(config, data=data), mesh)
  out: dict[str, dict[str, int]] = {}
  if "sft" in made:
    out["sft"] = {"update": made["sft"].flops}
  if "rollout" in made:
    rollout = made["rollout"].flops * config.rl.sample_slices
    again = 0.0 if config.rl.exploration == "none" else hinted
    out["rl"] = {
      "rollout": rollout,
      "groups tried again": int(again * rollout),
      "likelihood": made["likelihood"].flops,
      "updates": made["update"].flops * config.rl.inner_updates,
    }
  return out


def evaluation_flops(config: Config, task: Task, problems: int, prompt: int) -> int:
  """FLOPs of one evaluation of a benchmark, of all devices together.

  Rows that fill up the last batch are counted, too.

  Args:
    config: with all sizes resolved and with `model.vocab_size`.
    task: the benchmark and its settings.
    problems: number of problems.
    prompt: length that every prompt is padded to, in tokens.
  """
  sampler = task.setting.sampler
  rows = problems * task.setting.samples
  batch = min(config.eval.batch_size, rows)
  rows = -(-rows // batch) * batch if rows else 0
  total, block = prompt + sampler.gen_length, sampler.block_length
  calls = sampler.steps * (2 if sampler.cfg_scale else 1)
  return calls * forward_flops(config.model, rows, total, total, block, read=block)


def evaluations(steps: int, eval_every: int, initial: bool) -> int:
  """The number of evaluations of a stage of `steps` steps: before, during and at its end.

  Example: `evaluations(200, 50, True) == 5`.
  """
  between = (steps - 1) // eval_every if eval_every and steps else 0
  return int(initial) + between + (steps > 0)
