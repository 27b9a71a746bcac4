"""Grades gold answers of different problems against each other, to find wrong "correct" verdicts.

    python -m benchmarks.gold_pairs DATA

DATA holds gsm8k/train.jsonl, gsm8k/test.jsonl, math500/test.jsonl, amc23/test.jsonl and
minerva_math/test.jsonl. Every ordered pair of two answers of the last three files is graded, then
random pairs of all files, up to `--pairs` in total. Prints the pairs that are graded equal, for a
person to check (72 and 72.0 are equal), then one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import random
import time

from igpo_jax import cli
from igpo_jax.rewards import answers
from igpo_jax.rewards.math import equivalence

HARD = ("math500/test", "amc23/test", "minerva_math/test")
EASY = ("gsm8k/test", "gsm8k/train")


def golds(data: pathlib.Path, names: tuple[str, ...]) -> list[str]:
  """The distinct gold answers of some files, in the order of the files."""
  found = {}
  for name in names:
    for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines():
      row = json.loads(line)
      found[answers.gold_answer(row.get("answer", row.get("solution")))] = None
  return list(found)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("data", type=pathlib.Path)
  parser.add_argument("--pairs", type=int, default=310_000)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  hard = golds(args.data, HARD)
  everything = list(dict.fromkeys([*hard, *golds(args.data, EASY)]))
  pairs = dict.fromkeys(itertools.islice(itertools.permutations(hard, 2), args.pairs))
  draw = random.Random(args.seed)
  while len(pairs) < args.pairs:
    pairs[tuple(draw.sample(everything, 2))] = None
  start, slowest, equal, statuses = time.perf_counter(), 0.0, 0, {}
  for gold, answer in pairs:
    began = time.perf_counter()
    status, same = equivalence.quick(gold, answer) or equivalence.compare(gold, answer)
    slowest = max(slowest, time.perf_counter() - began)
    statuses[status] = statuses.get(status, 0) + 1
    if same:
      equal += 1
      print(f"{gold}\t{answer}")
  seconds = round(time.perf_counter() - start, 1)
  print(
    json.dumps(
      {
        "benchmark": "gold_pairs",
        "pairs": len(pairs),
        "equal": equal,
        "status": statuses,
        "seconds": seconds,
        "slowest_pair_s": round(slowest, 3),
      }
    )
  )


if __name__ == "__main__":
  cli.run(main)
