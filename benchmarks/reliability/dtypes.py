"""Runs of the same seed in float32 and in bfloat16: accuracies must agree within noise.

A case is a seed: a small model learns one step of a chain (SFT, then RL), once in each dtype.
Held-out accuracies after SFT and after RL are those of 512 problems. Lost is a difference of more
than `ERRORS` standard errors of the difference of two such shares. Over several seeds the mean of
the differences says more than each of them (docs/reliability.md).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

from etils import epath

from benchmarks.reliability.kills import CONFIG
from benchmarks.reliability.table import Campaign
from igpo_jax.io.jsonl import Row

DTYPES = ("float32", "bfloat16")
SEEDS, PROBLEMS, ERRORS = 5, 512, 4.0
TASK = "synthetic:chains?min_steps=1&max_steps=1"
OPTIONS = (
  f"data.sft={TASK}&split=train&n=2048&seed=1", f"data.rl={TASK}&split=train&n=512&seed=2",
  f"data.eval=('test={TASK}&split=test&n={PROBLEMS}&seed=3',)", "reward.verifier=task",
  "model.d_model=48", "model.n_layers=2", "model.mlp_hidden=128", "eval.batch_size=128",
  "sft.steps=800", "sft.batch_size=32", "sft_optimizer.learning_rate=3e-3",
  "rl.steps=40", "rl.prompts_per_step=8", "rl.group_size=4", "rl.eval_every=0",
  "rl_optimizer.learning_rate=1e-3", "checkpoint.every=1000", "log.samples_every=0",
  "log.report_every=0",
)  # fmt: skip


def accuracies(seed: int, dtype: str, folder: pathlib.Path) -> dict[str, float]:
  """Held-out accuracy of a whole run, after each stage."""
  workdir = folder / dtype
  options = (*OPTIONS, f"seed={seed}", f"model.dtype={dtype}")
  command = [sys.executable, "-m", "igpo_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  command += [f"--config.{option}" for option in options]
  command.append(f"--config.compilation_cache={folder.parent / 'cache'}")
  environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-600:]}")
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  name = "eval/test/accuracy"
  return {row["stage"]: row[name] for row in rows if row.get(name) is not None}


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  number = seed + int(case.partition("/")[2])
  try:
    found = {dtype: accuracies(number, dtype, pathlib.Path(folder)) for dtype in DTYPES}
  except RuntimeError as error:
    return {"lost": [str(error)]}
  lost = []
  for stage in ("sft", "rl"):
    one, other = (found[dtype][stage] for dtype in DTYPES)
    mean = (one + other) / 2
    if abs(one - other) > ERRORS * math.sqrt(2 * mean * (1 - mean) / PROBLEMS):
      lost.append(f"after {stage}: {one:.3f} and {other:.3f}")
  return {"tried": len(DTYPES), **found, "lost": lost}


CAMPAIGN = Campaign(
  "dtypes",
  "the same seeds in float32 and in bfloat16",
  lambda seed: [f"seed/{k}" for k in range(SEEDS)],
  attempt,
)
