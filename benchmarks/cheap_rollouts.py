"""RL whose rollouts are made with caches, parallel commits or fewer steps, compared on one task.

    python -m benchmarks.cheap_rollouts --all --workdir=runs/cheap_rollouts [--seeds=5]
    python -m benchmarks.cheap_rollouts --rollouts=exact,dual --workdir=runs/cheap_rollouts
    python -m benchmarks.cheap_rollouts --all --smoke --workdir=DIR

Only the sampling of rollouts is made cheaper. Likelihoods are always exact, and every evaluation
has all steps, no cache and one commit a step. Task, runner and settings of RL are those of
`benchmarks.estimators` with the quickstart's estimator and the learning rate that was chosen for it
there. All runs of a seed start from the same SFT checkpoint.

The cost of a run is counted, not timed, so it does not depend on what else the machine does. Its
unit is a forward pass of one completion's whole canvas. For sampling, the run itself counts the
positions that the network computed, second tries included (`time/positions`). Likelihoods and
updates are counted as in `benchmarks.estimators`. Runs are compared after equal steps; after equal
cost of sampling, the cheapest run's of the same exploration; and after equal cost of everything.

IGPO's runs are made first, then GRPO's, all kinds of rollouts of a seed after one another. A
finished run is kept in seedS/RUN.json and is not made again; table.md and results.json are written
after every seed. Table: mean and 95% interval (Student's t) over seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from benchmarks import estimators
from benchmarks.claims.arms import WINDOW
from benchmarks.estimators import EXPLORATIONS, area
from benchmarks.study import finished, in_words, markdown, read_command, write_results
from igpo_jax import cli
from igpo_jax.config import Config
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.train.workdir import hold

ORDER = ("inpaint", "none")  # of explorations; should there be no time for both, the first
METHOD, RATE = "coupled", 1e-3  # the quickstart's estimator; the rate that `estimators` chose

# Name -> (name in tables, options of the rollouts' sampler). Two blocks of 7 positions have to
# share the steps, so half and quarter are 8 and 4 of 14.
ROLLOUTS: dict[str, tuple[str, dict[str, Any]]] = {
  "exact": ("exact", {}),
  "dual": ("dual", {"cache": "dual"}),
  "dual_threshold": ("dual, threshold 0.9", {"cache": "dual", "threshold": 0.9}),
  "prefix_factor": ("prefix, factor 1", {"cache": "prefix", "factor": 1.0}),
  "half": ("8 of 14 steps", {"steps": 8}),
  "quarter": ("4 of 14 steps", {"steps": 4}),
}


def config_of(exploration: str, rollouts: str, seed: int, smoke: bool = False) -> Config:
  """The config of one run: cheaper rollouts, exact evaluations."""
  plain = estimators.config_of(exploration, METHOD, RATE, seed, smoke)
  return dataclasses.replace(
    plain,
    sampler=dataclasses.replace(plain.sampler, **ROLLOUTS[rollouts][1]),
    eval=dataclasses.replace(plain.eval, steps=WINDOW, parallel=False),
  )


@dataclasses.dataclass(frozen=True)
class Run(estimators.Run):
  """A run of the study, named "EXPLORATION.ROLLOUTS", or its SFT stage, "sft:aligned"."""

  @property
  def config(self) -> Config:
    """The config of the run."""
    if self.name.startswith("sft:"):
      return super().config
    return config_of(*self.name.split("."), self.seed, self.smoke)


def sampling_cost(result: dict, config: Config) -> np.ndarray:
  """f64[steps + 1]: cost of sampling for each completion until the end of each RL step; first 0.

  In forward passes of a whole canvas. A run that failed is counted as if it had gone on as before.
  """
  canvas = config.data.prompt_buckets[-1] + config.sampler.gen_length
  steps = [float(positions) / canvas for positions in result["curves"]["positions"]] or [math.nan]
  steps += [float(np.mean(steps))] * (config.rl.steps - len(steps))
  return np.concatenate([[0], np.cumsum(steps)])


def whole_cost(result: dict, config: Config) -> np.ndarray:
  """As `sampling_cost`, with likelihoods and updates."""
  none = dataclasses.replace(config, rl=dataclasses.replace(config.rl, exploration="none"))
  learning = estimators.forwards_per_step(none) - config.sampler.steps
  return sampling_cost(result, config) + learning * np.arange(config.rl.steps + 1)


def accuracy_at(result: dict, cost: np.ndarray, budget: float) -> float:
  """The accuracy when a run has cost `budget`, interpolated between its evaluations."""
  steps, values = (np.array(x) for x in zip(*result["accuracy"], strict=True))
  return float(np.interp(budget, cost[steps.astype(int)], values))


COLUMNS = {  # name of a value -> (head of its column, digits)
  "steps": ("accuracy at equal steps", 3),
  "sampling": ("at equal sampling", 3),
  "whole": ("at equal cost", 3),
  "area": ("area under the curve", 3),
  "sampling a step": ("sampling a step", 1),
  "cost a step": ("cost a step", 1),
  "all wrong": ("groups all wrong", 3),
  "all wrong after": ("in the update", 3),
  "ratio": ("ratio", 3),
  "effective share": ("effective share", 3),
  "kl": ("KL", 4),
}


def measure(results: dict, names: Sequence[str], smoke: bool) -> list[dict]:
  """A row for each exploration and kind of rollouts: for each column its values by seed.

  Seeds are those of which an exploration has all kinds of rollouts. Budgets are those of the
  cheapest run of the same exploration. Shares and statistics of ratios are means over the RL steps.
  """
  rows = []
  for exploration in ORDER:
    made = {name: {s for n, s in results if n == f"{exploration}.{name}"} for name in names}
    seeds = sorted(set.intersection(*made.values()))
    if not seeds:
      continue
    runs = {
      name: [(results[f"{exploration}.{name}", s], config_of(exploration, name, s, smoke))
             for s in seeds]
      for name in names
    }  # fmt: skip
    every = [one for of in runs.values() for one in of]
    least = {f: min(f(*one)[-1] for one in every) for f in (sampling_cost, whole_cost)}
    at = lambda one, f, least=least: accuracy_at(one[0], f(*one), least[f])
    a_step = lambda one, f: float(f(*one)[-1] / one[1].rl.steps)
    mean = lambda one, name: float(np.mean(one[0]["curves"][name] or [math.nan]))
    for name, of in runs.items():
      values = {
        "steps": [result["accuracy"][-1][1] for result, _ in of],
        "sampling": [at(one, sampling_cost) for one in of],
        "whole": [at(one, whole_cost) for one in of],
        "area": [area(result) for result, _ in of],
        "sampling a step": [a_step(one, sampling_cost) for one in of],
        "cost a step": [a_step(one, whole_cost) for one in of],
        "all wrong": [mean(one, "all_wrong_before") for one in of],
        "all wrong after": [mean(one, "all_wrong_after") for one in of],
        "ratio": [mean(one, "own_ratio") for one in of],
        "effective share": [mean(one, "effective_share") for one in of],
        "kl": [mean(one, "kl") for one in of],
      }
      rows.append({"exploration": exploration, "rollouts": name, "seeds": seeds, "values": values,
                   "failed": [result["failed"] for result, _ in of]})  # fmt: skip
  return rows


def table(rows: Sequence[dict]) -> str:
  """The rows as a Markdown table, and the differences from exact rollouts, paired by seed."""
  lines = [
    [EXPLORATIONS[row["exploration"]], ROLLOUTS[row["rollouts"]][0]]
    + [in_words(row["values"][name], digits=digits) for name, (_, digits) in COLUMNS.items()]
    + [f"{sum(map(bool, row['failed']))} of {len(row['seeds'])}"]
    for row in rows
  ]
  text = markdown(
    ["exploration", "rollouts", *(head for head, _ in COLUMNS.values()), "failed"], lines
  )
  exact = {row["exploration"]: row["values"] for row in rows if row["rollouts"] == "exact"}
  pairs = []
  for row in rows:
    base = exact.get(row["exploration"])
    if base is None or row["rollouts"] == "exact":
      continue
    minus = lambda name, row=row, base=base: in_words(
      np.subtract(row["values"][name], base[name]).tolist(), signed=True
    )
    pairs.append([EXPLORATIONS[row["exploration"]], ROLLOUTS[row["rollouts"]][0],
                  *(minus(name) for name in ("steps", "sampling", "whole", "area"))])  # fmt: skip
  if pairs:
    head = ["exploration", "rollouts, minus exact", "at equal steps", "at equal sampling",
            "at equal cost", "area"]  # fmt: skip
    text += "\n\n" + markdown(head, pairs)
  return text


def write(workdir: epath.Path, results: dict, names: Sequence[str], smoke: bool) -> str:
  """Writes table and numbers of the seeds that are done; returns what to print."""
  rows = measure(results, names, smoke)
  return write_results(workdir, table(rows), rows, results, {"rate": RATE})


def main() -> None:
  args = read_command(__doc__, "rollouts", ROLLOUTS)
  use_cache()
  results: dict[tuple[str, int], dict] = {}
  args.workdir.mkdir(parents=True, exist_ok=True)
  with hold(args.workdir):
    shared = estimators.shared_runs(args.workdir, args.smoke)
    for exploration in ORDER:
      for seed in args.seeds:
        for name in args.names:
          task = Run(f"{exploration}.{name}", seed, args.workdir, args.smoke)
          result = finished(task) or estimators.perform(task, shared)
          results[task.name, seed] = result
        text = write(args.workdir, results, args.names, args.smoke)
  print(text)


if __name__ == "__main__":
  cli.run(main)
