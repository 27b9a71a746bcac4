"""The paper's claims, and some of our own, tested on a generated task.

    python -m benchmarks.claims --all --workdir=runs/claims [--jobs=2]
    python -m benchmarks.claims --claim=3,7 --workdir=runs/claims [--seeds=5]
    python -m benchmarks.claims --task=stories --claim=4,5 --workdir=runs/long [--seeds=8]
    python -m benchmarks.claims --all --smoke --workdir=DIR

Every run is a whole training run of this package (SFT, then RL): on `synthetic:letter_maps`, or for
the claims that need long traces, on `synthetic:stories`. The configs are in
benchmarks/claims/arms.py and benchmarks/claims/long_traces.py. Claims share runs. An interrupted
command continues where it was and ends with the same tables. It writes claimN.md, claimN.png and
results.json to the workdir and prints the tables: mean and 95% interval (Student's t) over seeds,
and differences paired by seed. `--smoke` runs everything with one seed and tiny settings, as a
test; its numbers mean nothing.

Runs on letter maps are processes of their own, `--jobs` at a time. Those on stories are made in one
process, a seed after another, so that programs are compiled once. If the machine has other work,
set NPROC=1 for this process, so that its threads do not wait for each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from etils import epath

from benchmarks.claims.claims import LETTER_MAPS, Results, Study, compare, theorem
from benchmarks.claims.long_traces import LONG_TRACES
from benchmarks.claims.plots import draw
from benchmarks.claims.runs import Task
from benchmarks.study import finished, run_all
from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import write_whole
from igpo_jax.train.workdir import hold

STUDIES = {"letter_maps": LETTER_MAPS, "stories": LONG_TRACES}


def claim_numbers(text: str, study: Study) -> list[int]:
  """The claims of "3,7". Raises `UserError` for anything else than numbers of claims of `study`."""
  known = sorted(study.claims)
  if not set(text.split(",")) <= set(map(str, known)):
    raise UserError(
      f"--claim={text}: should be numbers from {', '.join(map(str, known))}, such as"
      f" {known[0]},{known[1]}"
    )
  return sorted({int(number) for number in text.split(",")})


@dataclasses.dataclass(frozen=True)
class Question:
  """What a command asks for.

  Attributes:
    study: the claims of a task and their arms.
    numbers: the claims that are asked about.
    workdir: where everything is kept.
    seeds: how many; 0 takes each claim's own number.
    smoke: whether runs have tiny settings, for a test.
  """

  study: Study
  numbers: list[int]
  workdir: epath.Path
  seeds: int = 0
  smoke: bool = False

  def seeds_of(self, number: int) -> range:
    """The seeds of a claim."""
    return range(self.seeds or (1 if self.smoke else self.study.claims[number].seeds))

  def runs_of(self, number: int) -> list[tuple[str, int]]:
    """(name, seed) of the runs of a claim."""
    return [(run, seed) for run in self.study.runs_of(number) for seed in self.seeds_of(number)]

  def runs(self) -> list[tuple[str, int]]:
    """(name, seed) of all runs, each once, in the order of the claims."""
    return list(dict.fromkeys(run for number in self.numbers for run in self.runs_of(number)))

  def write(self, results: Results) -> str:
    """Writes the claims whose runs are all there. Returns their tables."""
    report, texts = {}, []
    for number in self.numbers:
      runs, seeds, claim = self.runs_of(number), self.seeds_of(number), self.study.claims[number]
      if not all(run in results for run in runs):
        continue
      if claim.arms:
        table, rows = compare(self.study, results, number, seeds)
      else:
        table, rows = theorem(results, seeds)
      kind = "cpu_seconds" if self.study.one_process else "seconds"
      minutes = sum(results[run][kind] for run in runs) / 60
      report[number] = {"title": claim.title, "seeds": list(seeds), "rows": rows,
                        "process_minutes": minutes}  # fmt: skip
      text = f"## Claim {number}: {claim.title}\n\n{table}\n"
      (self.workdir / f"claim{number}.md").write_text(text)
      draw(self.study, results, number, seeds, rows, self.workdir / f"claim{number}.png")
      texts.append(f"\n{text}\nIts runs took {minutes:.1f} process minutes in all.")
    write_whole(self.workdir / "results.json", json.dumps(report, indent=2) + "\n")
    return "\n".join(texts)


def run_in_one_process(question: Question) -> Results:
  """Makes the runs of a study on stories that are not there yet, a seed after another."""
  from benchmarks.claims.long_traces import Task as Run
  from benchmarks.claims.long_traces import share
  from benchmarks.shared_runs import perform
  from igpo_jax.parallel.compile_cache import use_cache

  use_cache()
  question.workdir.mkdir(parents=True, exist_ok=True)
  results: Results = {}
  with hold(question.workdir):
    tasks = {run: Run(*run, question.workdir, question.smoke) for run in question.runs()}
    kept = {run: finished(task) for run, task in tasks.items()}
    shared = share(question.workdir, question.smoke)
    for (name, seed), task in sorted(tasks.items(), key=lambda item: item[0][1]):
      results[name, seed] = kept[name, seed] or perform(task, shared)
  return results


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--claim", help="numbers of claims, such as 3,7")
  parser.add_argument("--all", action="store_true")
  parser.add_argument("--task", choices=STUDIES, default="letter_maps")
  parser.add_argument("--smoke", action="store_true", help="on next to nothing")
  parser.add_argument("--workdir", type=epath.Path, required=True)
  parser.add_argument(
    "--seeds",
    type=int,
    default=0,
    help="default: on letter maps 10 for claims 1 to 3, 3 for 9 and 10, else 5; on stories 8",
  )
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its own cores")
  args = parser.parse_args()
  if (args.claim is None) != args.all:
    raise UserError("give --claim=N or --all")
  if args.seeds < 0 or args.jobs < 1:
    raise UserError("--seeds and --jobs must be positive")
  study = STUDIES[args.task]
  numbers = sorted(study.claims) if args.all else claim_numbers(args.claim, study)
  question = Question(study, numbers, args.workdir, args.seeds, args.smoke)

  if study.one_process:
    results = run_in_one_process(question)
  else:
    tasks = [Task(*run, args.workdir, args.smoke) for run in question.runs()]
    results = run_all(tasks, args.jobs)
  print(question.write(results))


if __name__ == "__main__":
  cli.run(main)
