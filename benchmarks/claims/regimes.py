"""Claim 4 on long traces, in other regimes: where are partial hints better than full ones?

    python -m benchmarks.claims.regimes --all --workdir=runs/regimes [--seeds=1]
    python -m benchmarks.claims.regimes --regimes=noise_0.5,mu_8 --workdir=runs/regimes
    python -m benchmarks.claims.regimes --all --smoke --workdir=DIR

A regime changes something in all three arms of claim 4 (benchmarks/claims/long_traces.py): partial
hints, full hints and none. Its seeds, 100 and further, are not those of the study. One seed is for
finding a regime. It does not answer anything, and what it suggests has to be seen again with
more seeds.

A finished run is kept in seedS/RUN.json and is not made again; table.md and results.json are
written after every regime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from benchmarks import study
from benchmarks.claims import long_traces
from benchmarks.claims.claims import AFTER, BEFORE, EXTRA, FALL, LEFT, Results
from benchmarks.claims.long_traces import HIGH_RATE, RIDES, SENTENCE
from benchmarks.shared_runs import perform
from benchmarks.study import finished, in_words, markdown, read_command, write_results
from igpo_jax import cli
from igpo_jax.config import Config
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.train.workdir import hold

FIRST_SEED = 100
STEPS = 32  # of the study; a longer run is read here, too
PARTIAL, FULL, NONE = ARMS = ("igpo", "full_hints", "grpo")


@dataclasses.dataclass(frozen=True)
class Regime:
  """What differs from the study in all three arms.

  Attributes:
    label: its name in the table.
    changes: options, by dotted name.
    rl: options of the RL stage's source, which are appended to its URI.
    of_hints: whether it changes only how hints are used. Then GRPO is the study's.
  """

  label: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  rl: str = ""
  of_hints: bool = False


LONGER = "longer"
REGIMES = {
  LONGER: Regime("as in the study, 80 steps", {"rl.steps": 80}),
  "noise_0.3": Regime("three tenths of the stops wrong", rl="&noise=0.3", of_hints=True),
  "noise_0.5": Regime("half of the stops wrong", rl="&noise=0.5", of_hints=True),
  "tau_0.5": Regime("tau 0.5", {"objective.entropy_keep": 0.5}, of_hints=True),
  "tau_1": Regime("tau 1, no filter", {"objective.entropy_keep": 1.0}, of_hints=True),
  "exact": Regime("exact rollouts, a token a step",
                  {"sampler.cache": "none", "sampler.steps": RIDES * SENTENCE}),
  "mu_4": Regime("mu 4", {"rl.inner_updates": 4}),
  "mu_8": Regime("mu 8", {"rl.inner_updates": 8}),
  "fast": Regime("learning rate 3e-3", {"rl_optimizer.learning_rate": HIGH_RATE}),
  "free": Regime("no pull to the reference (beta 0)", {"objective.beta": 0.0}),
}  # fmt: skip


def run_of(regime: str, arm: str) -> str:
  """The name of the run of an arm in a regime."""
  return f"{LONGER if arm == NONE and REGIMES[regime].of_hints else regime}.{arm}"


@dataclasses.dataclass(frozen=True)
class Task(study.Task):
  """One run, named "REGIME.ARM"."""

  @property
  def config(self) -> Config:
    name, _, arm = self.name.rpartition(".")
    regime = REGIMES[name]
    changes = dict(regime.changes)
    if self.smoke:
      changes = {k: v for k, v in changes.items() if k not in ("rl.steps", "sampler.steps")}
    if regime.rl:
      plain = long_traces.make_config(arm, self.seed, self.smoke)
      changes["data.rl"] = plain.data.rl + regime.rl
    return long_traces.make_config(arm, self.seed, self.smoke, changes)


def until(result: dict, end: int) -> dict:
  """The result as it would be if the run had had `end` steps."""
  curves = {name: values[:end] for name, values in result["curves"].items()}
  accuracy = [[step, value] for step, value in result["accuracy"] if step <= end]
  return {"accuracy": accuracy, "curves": curves}


def compare(results: Results, regimes: Sequence[str], seeds: Sequence[int]) -> tuple[str, list]:
  """(Markdown table, its rows as JSON values) of the regimes whose runs are all there."""
  lines, rows = [], []
  for regime in regimes:
    runs = {arm: [results.get((run_of(regime, arm), seed)) for seed in seeds] for arm in ARMS}
    if not all(result for of in runs.values() for result in of):
      continue
    end = runs[PARTIAL][0]["accuracy"][-1][0]  # GRPO's run may be of a longer regime
    runs = {arm: [until(result, end) for result in of] for arm, of in runs.items()}
    early = {arm: [AFTER.of(until(result, STEPS)) for result in of] for arm, of in runs.items()}
    late = {arm: [AFTER.of(result) for result in of] for arm, of in runs.items()}
    ahead = [a - b for a, b in zip(late[PARTIAL], late[FULL], strict=True)]
    rows.append({"regime": regime, "partial - full": ahead, f"step {STEPS}": early, "end": late})
    for arm, of in runs.items():
      measures = [in_words([m.of(r) for r in of]) for m in (FALL, LEFT, EXTRA)]
      lines.append([
        REGIMES[regime].label, long_traces.ARMS[arm].label, in_words([BEFORE.of(r) for r in of]),
        in_words(early[arm]), in_words(late[arm]) if end > STEPS else "-",
        *(measures if arm != NONE else [*measures[:2], "-"]),
        in_words(ahead, signed=True) if arm == PARTIAL else "",
      ])  # fmt: skip
  head = ["regime", "arm", BEFORE.label, f"after {STEPS} steps", "at the end",
          *(m.label for m in (FALL, LEFT, EXTRA)), "partial - full"]  # fmt: skip
  return markdown(head, lines), rows


def main() -> None:
  args = read_command(__doc__, "regimes", REGIMES, seeds=1)
  use_cache()
  workdir: epath.Path = args.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  seeds = [FIRST_SEED + k for k in args.seeds]
  results: Results = {}
  printed = ""
  with hold(workdir):
    shared = long_traces.share(workdir, args.smoke)
    for regime in args.names:
      for seed in seeds:
        for arm in ARMS:
          task = Task(run_of(regime, arm), seed, workdir, args.smoke)
          results[task.name, seed] = finished(task) or perform(task, shared)
      printed = write_results(workdir, *compare(results, args.names, seeds), results,
                              {"seeds": seeds})  # fmt: skip
  print(printed)


if __name__ == "__main__":
  cli.run(main)
