"""Claim 4 on long traces, in other regimes: where are partial hints better than full ones?

    python -m benchmarks.claims.regimes --all --workdir=runs/regimes [--seeds=1]
    python -m benchmarks.claims.regimes --regimes=exact --first=0 --seeds=5 --workdir=runs/exact
    python -m benchmarks.claims.regimes --all --smoke --workdir=DIR

A regime changes something in all three arms of claim 4 (benchmarks/claims/long_traces.py): partial
hints, full hints and none. By default there is one seed, 100, which the study does not use, and
that is for finding a regime. It answers nothing: what it suggests has to be seen again, on other
seeds (`--first`, `--seeds`).

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
    of_hints: whether it changes only how hints are used. Then GRPO is that of the longer study.
  """

  label: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  rl: str = ""
  of_hints: bool = False


EXACT = {"sampler.cache": "none", "sampler.steps": RIDES * SENTENCE}
LONGER = "longer"
REGIMES = {
  LONGER: Regime("as in the study, 80 steps", {"rl.steps": 80}),
  "noise_0.3": Regime("three tenths of the stops wrong", rl="&noise=0.3", of_hints=True),
  "noise_0.5": Regime("half of the stops wrong", rl="&noise=0.5", of_hints=True),
  "tau_0.5": Regime("tau 0.5", {"objective.entropy_keep": 0.5}, of_hints=True),
  "tau_1": Regime("tau 1, no filter", {"objective.entropy_keep": 1.0}, of_hints=True),
  "exact": Regime("exact rollouts, a token a step", EXACT),
  "exact_longer": Regime("exact rollouts, 64 steps", EXACT | {"rl.steps": 64}),
  "mu_4": Regime("mu 4", {"rl.inner_updates": 4}),
  "mu_8": Regime("mu 8", {"rl.inner_updates": 8}),
  "fast": Regime("learning rate 3e-3", {"rl_optimizer.learning_rate": HIGH_RATE}),
  "free": Regime("no pull to the reference (beta 0)", {"objective.beta": 0.0}),
}  # fmt: skip


def run_of(regime: str, arm: str) -> str:
  """The name of the run of an arm in a regime."""
  return f"{LONGER if arm == NONE and REGIMES[regime].of_hints else regime}-{arm}"


@dataclasses.dataclass(frozen=True)
class Task(study.Task):
  """One run, named "REGIME-ARM"."""

  @property
  def config(self) -> Config:
    name, _, arm = self.name.partition("-")
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
  """(Markdown table, its rows as JSON values) of the runs that are there for all seeds."""
  lines, rows = [], []
  for regime in regimes:
    runs = {
      arm: [results[run_of(regime, arm), seed] for seed in seeds]
      for arm in ARMS
      if all((run_of(regime, arm), seed) in results for seed in seeds)
    }
    if PARTIAL not in runs:
      continue
    end = runs[PARTIAL][0]["accuracy"][-1][0]  # GRPO's run may be of a longer regime
    last = {arm: [AFTER.of(until(r, end)) for r in of] for arm, of in runs.items()}
    for arm, of in runs.items():
      of = [until(result, end) for result in of]
      early = [AFTER.of(until(result, STEPS)) for result in of]
      ahead = [a - b for a, b in zip(last[PARTIAL], last[arm], strict=True)]
      measures = [in_words([m.of(r) for r in of]) for m in (FALL, LEFT, EXTRA)]
      lines.append([
        REGIMES[regime].label, long_traces.ARMS[arm].label, in_words([BEFORE.of(r) for r in of]),
        in_words(early), in_words(last[arm]) if end > STEPS else "-",
        *(measures if arm != NONE else [*measures[:2], "-"]),
        "-" if arm == PARTIAL else in_words(ahead, signed=True),
      ])  # fmt: skip
      rows.append({"regime": regime, "arm": arm, f"step {STEPS}": early, "end": last[arm],
                   "IGPO ahead": ahead})  # fmt: skip
  head = ["regime", "arm", BEFORE.label, f"after {STEPS} steps", "at the end",
          *(m.label for m in (FALL, LEFT, EXTRA)), "IGPO - this arm"]  # fmt: skip
  return markdown(head, lines), rows


def main() -> None:
  args = read_command(__doc__, "regimes", REGIMES, seeds=1, first=FIRST_SEED)
  use_cache()
  workdir: epath.Path = args.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  results: Results = {}
  printed = ""
  with hold(workdir):
    shared = long_traces.share(workdir, args.smoke)
    for regime in args.names:
      for seed in args.seeds:
        for arm in ARMS:
          task = Task(run_of(regime, arm), seed, workdir, args.smoke)
          results[task.name, seed] = finished(task) or perform(task, shared)
      printed = write_results(workdir, *compare(results, args.names, args.seeds), results,
                              {"seeds": list(args.seeds)})  # fmt: skip
  print(printed)


if __name__ == "__main__":
  cli.run(main)
