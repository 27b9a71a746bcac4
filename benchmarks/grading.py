"""Grading speed on real generations: one JSON object on stdout.

    python benchmarks/grading.py --generations=GSM8K.jsonl --generations=MATH.jsonl --workers=2

Each line of a file has "question", "completion" and "answer", as for `igpo_jax.grade`. Items per
second of wall time are measured for each file in three ways:

  cold      with a new scorer, including the start of its processes
  warm      with running workers, before any verdict is remembered
  workers   with every answer sent to a worker, even those that the caller could decide itself
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import time

from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.grade import read_generations
from igpo_jax.rewards import answers
from igpo_jax.rewards.pool import default_workers
from igpo_jax.rewards.score import Scorer


def measure(path: pathlib.Path, workers: int, repeats: int) -> dict:
  """Items per second for one file: the medians of `repeats` measurements."""
  rows = list(read_generations(path))
  if not rows:
    raise UserError(f"{path} has no rows")
  completions = [row["completion"] for row, _ in rows]
  records = [record for _, record in rows]
  cold, warm, pooled = [], [], []
  for _ in range(repeats):
    start = time.perf_counter()
    with Scorer("math", workers=workers) as scorer:
      scores = scorer(completions, records)
      cold.append(len(rows) / (time.perf_counter() - start))
      pairs = [
        (record.answer, found)
        for record, found in zip(records, scores.extracted, strict=True)
        if found
      ]
      start = time.perf_counter()
      for future in [scorer.pool.submit(*pair) for pair in pairs]:
        future.result()
      pooled.append(len(pairs) / (time.perf_counter() - start))
    with Scorer("math", workers=workers) as scorer:
      scorer.pool.submit("2x", "x+x").result()
      start = time.perf_counter()
      scorer(completions, records)
      warm.append(len(rows) / (time.perf_counter() - start))
  return {
    "items": len(rows),
    "extracted": sum(map(bool, map(answers.find_answer, completions))),
    "timeouts": scores.status.count("timeout"),
    "items_per_s": {
      name: round(statistics.median(values), 1)
      for name, values in (("cold", cold), ("warm", warm), ("workers", pooled))
    },
  }


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--generations", required=True, action="append", type=pathlib.Path)
  parser.add_argument("--workers", type=int, default=default_workers())
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  files = {path.name: measure(path, args.workers, args.repeats) for path in args.generations}
  print(
    json.dumps(
      {
        "benchmark": "grading",
        "workers": args.workers,
        "repeats": args.repeats,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "files": files,
      }
    )
  )


if __name__ == "__main__":
  cli.run(main)
