"""The paper's claims, and some of our own, tested on a generated task.

    python -m benchmarks.claims --all --workdir=runs/claims [--jobs=2]
    python -m benchmarks.claims --claim=3,7 --workdir=runs/claims [--seeds=5]
    python -m benchmarks.claims --all --smoke --workdir=DIR

Every run is a whole training run of this package (SFT, then RL) on `synthetic:letter_maps`. The
configs are in benchmarks/claims/arms.py. Claims share runs. An interrupted command continues where
it was and ends with the same tables. It writes claimN.md, claimN.png and results.json to the
workdir and prints the tables: mean and 95% interval (Student's t) over seeds, and differences
paired by seed. `--smoke` runs everything with one seed and tiny settings, as a test; its numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import json

from etils import epath

from benchmarks.claims.claims import CLAIMS, compare, runs_of, theorem
from benchmarks.claims.plots import draw
from benchmarks.claims.runs import Task
from benchmarks.study import run_all
from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import write_whole


def seeds_of(number: int, asked: int, smoke: bool) -> range:
  """The seeds of a claim: `asked` of them, or if that is 0, the claim's own number of seeds."""
  return range(asked or (1 if smoke else CLAIMS[number].seeds))


def claim_numbers(text: str) -> list[int]:
  """The claims of "3,7". Raises `UserError` for anything else than numbers of claims."""
  known = {str(number) for number in CLAIMS}
  if not set(text.split(",")) <= known:
    raise UserError(
      f"{text} should be numbers from {', '.join(sorted(known, key=int))}, such as 3,7"
    )
  return sorted({int(number) for number in text.split(",")})


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--claim", type=claim_numbers, help="some of 1 to 11, such as 3,7")
  parser.add_argument("--all", action="store_true")
  parser.add_argument("--smoke", action="store_true", help="on next to nothing")
  parser.add_argument("--workdir", type=epath.Path, required=True)
  parser.add_argument(
    "--seeds", type=int, default=0, help="default: 10 for claims 1 to 3, 3 for 9 and 10, else 5"
  )
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its own cores")
  args = parser.parse_args()
  if (args.claim is None) != args.all:
    raise UserError("give --claim=N or --all")
  if args.seeds < 0 or args.jobs < 1:
    raise UserError("--seeds and --jobs must be positive")
  numbers = sorted(CLAIMS) if args.all else args.claim

  # Each run once, in the order of the claims.
  wanted = [
    (run, seed)
    for number in numbers
    for seed in seeds_of(number, args.seeds, args.smoke)
    for run in runs_of(number)
  ]
  tasks = [Task(run, seed, args.workdir, args.smoke) for run, seed in dict.fromkeys(wanted)]
  results = run_all(tasks, args.jobs)

  report = {}
  for number in numbers:
    seeds = seeds_of(number, args.seeds, args.smoke)
    claim = CLAIMS[number]
    table, rows = compare(results, number, seeds) if claim.arms else theorem(results, seeds)
    minutes = sum(results[run, seed]["seconds"] for run in runs_of(number) for seed in seeds) / 60
    report[number] = {"title": claim.title, "seeds": list(seeds), "rows": rows,
                      "process_minutes": minutes}  # fmt: skip
    text = f"## Claim {number}: {claim.title}\n\n{table}\n"
    (args.workdir / f"claim{number}.md").write_text(text)
    draw(results, number, seeds, rows, args.workdir / f"claim{number}.png")
    print(f"\n{text}\nIts runs took {minutes:.1f} process minutes in all.")
  write_whole(args.workdir / "results.json", json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
