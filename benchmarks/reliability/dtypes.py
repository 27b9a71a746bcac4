"""Runs of the same seed in float32 and in bfloat16: accuracies must agree within noise.

A case "seed/K" is the quickstart's IGPO run (configs/quickstart.py) with seed SEED + K, once in
each dtype. The case "agreement/0" comes last and compares: over the seeds, the interval of the
paired differences of accuracies, bfloat16 less float32, has to hold 0. SFT's loss is told beside
them: both dtypes draw the same initial parameters, batches and masks, so only rounding makes it
differ. In RL one token that is sampled otherwise makes another run, and runs differ by as much as
seeds do: hence several seeds (docs/reliability.md).
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

from etils import epath

from benchmarks.reliability.table import Campaign
from benchmarks.study import interval
from igpo_jax.io.jsonl import Row, write_whole

DTYPES = ("float32", "bfloat16")
SEEDS, LEVEL = 5, 0.99
JUDGED = ("sft", "rl")  # the stages whose accuracies must agree
LAST = 100  # SFT steps whose mean loss is compared
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
OPTIONS = ("arms=()", "rl.eval_every=0", "checkpoint.every=10000", "log.samples_every=0",
           "log.report_every=0")  # fmt: skip
ACCURACY = "eval/test/accuracy"


def figures(seed: int, dtype: str, folder: pathlib.Path) -> dict[str, float]:
  """Runs it; SFT's loss, and held-out accuracy after each stage ("sft", "rl")."""
  workdir = folder / dtype
  options = (*OPTIONS, f"seed={seed}", f"model.dtype={dtype}")
  command = [sys.executable, "-m", "igpo_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  command += [f"--config.{option}" for option in options]
  command.append(f"--config.compilation_cache={folder.parent / 'cache'}")
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-600:]}")
  rows = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
  losses = [row["sft/loss"] for row in rows if row.get("sft/loss") is not None]
  found = {row["stage"]: row[ACCURACY] for row in rows if row.get(ACCURACY) is not None}
  return {"loss": statistics.fmean(losses[-LAST:])} | {stage: found[stage] for stage in JUDGED}


def pair(number: int, shared: pathlib.Path) -> dict[str, dict[str, float]]:
  """The figures of one seed in each dtype; they are kept in `shared`, and made once."""
  file = shared / f"{number}.json"
  if not file.exists():
    folder = shared / f"{number}"
    found = {dtype: figures(number, dtype, folder) for dtype in DTYPES}
    write_whole(epath.Path(file), json.dumps(found))
  return json.loads(file.read_text())


def compared(pairs: Sequence[dict[str, dict[str, float]]]) -> Row:
  """Of each figure all differences, their mean and half of its interval; and what is lost."""
  one, other = DTYPES
  found: Row = {"lost": []}
  for name in ("loss", *JUDGED):
    differences = [found_by[other][name] - found_by[one][name] for found_by in pairs]
    mean, width = interval(differences, LEVEL)
    found[name] = {"differences": differences, "mean": mean, "width": width}
    if name in JUDGED and abs(mean) > width:
      found["lost"].append(f"{name}: {other} - {one} is {mean:.4f} ± {width:.4f}")
  return found


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  kind, _, k = case.partition("/")
  shared = pathlib.Path(folder).parent / f"dtypes-{seed}"
  shared.mkdir(exist_ok=True)
  try:
    if kind == "agreement":
      return compared([pair(seed + number, shared) for number in range(SEEDS)])
    return {"tried": len(DTYPES), **pair(seed + int(k), shared), "lost": []}
  except RuntimeError as error:
    return {"lost": [str(error)]}


CAMPAIGN = Campaign(
  "dtypes",
  "the same seeds in float32 and in bfloat16",
  lambda seed: [*(f"seed/{k}" for k in range(SEEDS)), "agreement/0"],
  attempt,
)
