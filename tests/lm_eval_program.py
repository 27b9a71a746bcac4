"""Run by lm_eval_test on some devices: the harness' own runner on two tiny tasks, as JSON.

python -m tests.lm_eval_program MODEL TASKS BATCH_SIZE ...
"""

from __future__ import annotations

import json
import sys

import jax
import lm_eval
from lm_eval.tasks import TaskManager

from igpo_jax.lm_eval.model import DiffusionLM


def main():
  model, folder, *sizes = sys.argv[1:]
  out = {}
  for size in sizes:
    args = {"pretrained": model, "draws": 6, "gen_length": 16, "block_length": 8, "steps": 8}
    lm = DiffusionLM.create_from_arg_obj(args, {"batch_size": int(size)})
    results = lm_eval.simple_evaluate(
      lm, tasks=["tiny_choice", "tiny_answer", "tiny_text"], bootstrap_iters=0,
      task_manager=TaskManager(include_path=folder, include_defaults=False),
    )  # fmt: skip
    samples = {
      task: [[sample["resps"], sample["filtered_resps"]] for sample in rows]
      for task, rows in results["samples"].items()
    }
    out[size] = {"results": results["results"], "samples": samples, "config": results["config"]}
  print(json.dumps({"devices": jax.device_count(), "by_size": out}, default=str))


if __name__ == "__main__":
  main()
