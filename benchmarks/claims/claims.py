"""The claims: which arms and measures each compares, and the statistics over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.claims.arms import ARMS, Arm
from benchmarks.claims.runs import THEOREM
from benchmarks.study import bounds, in_words, largest_fall, markdown

Results = dict[tuple[str, int], dict]  # (name of the run, seed) -> its result


@dataclasses.dataclass(frozen=True)
class Measure:
  """A number that is computed from the result of one run.

  Attributes:
    label: heading of its column in the table.
    of: result -> number.
  """

  label: str
  of: Callable[[dict], float]


def _mean(curve: str) -> Callable[[dict], float]:
  return lambda result: float(np.mean(result["curves"][curve]))


AFTER = Measure("held-out accuracy after RL", lambda r: r["accuracy"][-1][1])
BEFORE = Measure("after SFT", lambda r: r["accuracy"][0][1])
REWARD = Measure("reward, last quarter", lambda r: float(np.mean(
  r["curves"]["reward"][-max(len(r["curves"]["reward"]) // 4, 1):])))  # fmt: skip
LEFT = Measure("groups all wrong in the update", _mean("all_wrong_after"))
WRONG = Measure("groups all wrong as sampled", _mean("all_wrong_before"))
EXTRA = Measure("extra samples correct", _mean("extra_correct"))
NORM = Measure("gradient norm", _mean("grad_norm"))
KL = Measure("KL, last step", lambda r: float(r["curves"]["kl"][-1]))
FALL = Measure("largest fall of accuracy", largest_fall)


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim.

  Attributes:
    title: the claim as a statement, which the runs may refute.
    question: the claim as a question, the title of its plot.
    arms: the arms that it compares, in the order of the table's rows.
    measures: the columns of the table.
    pairs: (arm, other, measure): differences arm - other, paired over seeds. An `other` of "" is
      the same arm before RL.
    seeds: number of seeds.
    curve: what the plot shows over the RL steps: "accuracy" or the name of a metric.
  """

  title: str
  question: str
  arms: Sequence[str]
  measures: Sequence[Measure]
  pairs: Sequence[tuple[str, str, Measure]]
  seeds: int = 5
  curve: str = "accuracy"


CLAIMS = {
  1: Claim(
    "IGPO has fewer all-wrong groups than GRPO (paper: about 60% fewer)",
    "Has IGPO fewer all-wrong groups than GRPO?",
    ("igpo", "grpo"), (LEFT, WRONG, EXTRA),
    (("igpo", "grpo", LEFT), ("igpo", "grpo", WRONG)), seeds=10, curve="all_wrong_after",
  ),
  2: Claim(
    "Held-out accuracy: IGPO > GRPO > no RL",
    "Held-out accuracy: is IGPO better than GRPO, and both than no RL?",
    ("igpo", "grpo"), (BEFORE, AFTER, REWARD),
    (("igpo", "grpo", AFTER), ("grpo", "", AFTER)), seeds=10,
  ),
  3: Claim(
    "IGPO > GRPO with the same number of samples",
    "IGPO and GRPO with the same number of samples: which is better?",
    ("igpo", "resample", "grpo"), (AFTER, LEFT, EXTRA),
    (("igpo", "resample", AFTER), ("resample", "grpo", AFTER)), seeds=10,
  ),
  4: Claim(
    "Partial hints (eta in 0.2..0.6) > full hints > none",
    "Partial hints (eta in 0.2..0.6), full hints or none: which is best?",
    ("igpo", "full_hints", "grpo"), (AFTER, LEFT, EXTRA),
    (("igpo", "full_hints", AFTER), ("full_hints", "grpo", AFTER)),
  ),
  5: Claim(
    "The entropy filter: tau 0.2 is best, tau 1 unstable",
    "The entropy filter: which tau is best, and is tau 1 unstable?",
    ("tau_0.05", "igpo", "tau_0.5", "tau_1"), (AFTER, FALL, NORM),
    (("igpo", "tau_0.05", AFTER), ("igpo", "tau_0.5", AFTER), ("igpo", "tau_1", AFTER),
     ("tau_1", "igpo", FALL)),
  ),
  6: Claim(
    "SFT on length-aligned traces > on verbose ones, and so is the RL after it",
    "Is RL better after SFT on length-aligned traces than on verbose ones?",
    ("igpo", "verbose"), (BEFORE, AFTER, LEFT),
    (("igpo", "verbose", BEFORE), ("igpo", "verbose", AFTER)),
  ),
  7: Claim(
    "What a leaked answer does (official code)",
    "What does a leaked answer do (official code)?",
    ("igpo", "leak", "grpo"), (AFTER, REWARD, LEFT, EXTRA),
    (("leak", "igpo", AFTER), ("leak", "grpo", AFTER)),
  ),
  8: Claim(
    "What the void entropy filter does (official code)",
    "What does the void entropy filter do (official code)?",
    ("igpo", "official", "tau_1"), (AFTER, FALL, NORM),
    (("igpo", "official", AFTER), ("official", "tau_1", AFTER)),
  ),
  9: Claim(
    "Estimators: coupled masks (IGPO here), random-ratio, mean-field",
    "Which estimator: coupled masks (IGPO here), random-ratio or mean-field?",
    ("igpo", "random_ratio", "mean_field"), (AFTER, LEFT, NORM),
    (("random_ratio", "igpo", AFTER), ("mean_field", "igpo", AFTER)), seeds=3,
  ),
  10: Claim(
    "Noise in the traces",
    "What does noise in the traces do?",
    ("igpo", "noise_0.1", "noise_0.3"), (AFTER, LEFT, EXTRA),
    (("noise_0.1", "igpo", AFTER), ("noise_0.3", "igpo", AFTER)), seeds=3,
  ),
  11: Claim(
    "The gradient's size is rho (1 - rho), largest at 1/2",
    "Is the gradient's size rho (1 - rho), largest at 1/2?", (), (), (), curve="",
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Study:
  """Claims about the arms of one task.

  Attributes:
    claims: the claims by number.
    arms: the arms by name.
    one_process: whether all runs are made in one process (`benchmarks.shared_runs`), which makes
      the SFT stages besides; else SFT stages are runs of their own.
  """

  claims: dict[int, Claim]
  arms: dict[str, Arm]
  one_process: bool = False

  def runs_of(self, number: int) -> list[str]:
    """The names of the runs that a claim needs, SFT runs first."""
    arms = self.claims[number].arms
    if self.one_process:
      return list(arms)
    sfts = sorted({self.arms[arm].sft for arm in arms} or {"aligned"})
    return [*(f"sft:{sft}" for sft in sfts), *(arms or (THEOREM,))]


LETTER_MAPS = Study(CLAIMS, ARMS)


def values_of(results: Results, arm: str, measure: Measure, seeds: Sequence[int]) -> list[float]:
  """The measure of an arm for each seed."""
  return [measure.of(results[arm, seed]) for seed in seeds]


def compare(
  study: Study, results: Results, number: int, seeds: Sequence[int]
) -> tuple[str, list[dict]]:
  """(Markdown tables, list of differences) of a claim that compares arms."""
  claim = study.claims[number]
  label = lambda arm: study.arms[arm].label
  cells = lambda arm: [in_words(values_of(results, arm, m, seeds)) for m in claim.measures]
  arms = markdown(
    ["arm", *(m.label for m in claim.measures)],
    ([label(arm), *cells(arm)] for arm in claim.arms),
  )
  rows, differences = [], []
  for arm, other, measure in claim.pairs:
    first = values_of(results, arm, measure, seeds)
    second = values_of(results, other or arm, measure if other else BEFORE, seeds)
    by_seed = [a - b for a, b in zip(first, second, strict=True)]
    against = label(other) if other else "the same before RL"
    differences.append({
      "arm": arm, "other": other or "before RL", "measure": measure.label, **bounds(by_seed),
      "relative": float(np.mean(by_seed)) / max(float(np.mean(second)), 1e-9), "by_seed": by_seed,
    })  # fmt: skip
    rows.append([f"{label(arm)} - {against}", measure.label, in_words(by_seed, signed=True),
                 ", ".join(f"{value:+.3f}" for value in by_seed)])  # fmt: skip
  head = ("difference, paired by seed", "of", "mean, 95% interval", "by seed")
  return f"{arms}\n\n{markdown(head, rows)}", differences


def theorem(results: Results, seeds: Sequence[int]) -> tuple[str, list[dict]]:
  """(Markdown table, list of its rows) of claim 11."""
  runs = [results[THEOREM, seed] for seed in seeds]
  lines, rows = [], []
  for i, rho in enumerate(runs[0]["rho"]):
    # Each seed has its own scale, because policies differ in g_correct - g_wrong.
    values = [run["norm"][i] / max(max(run["predicted"]), 1e-12) for run in runs]
    predicted = runs[0]["rho"][i] * (1 - rho) / max(r * (1 - r) for r in runs[0]["rho"])
    rows.append({"rho": rho, **bounds(values), "predicted": predicted, "by_seed": values})
    lines.append([f"{rho:.3f}", in_words(values), f"{predicted:.3f}"])
  head = ("rho", "gradient norm / largest predicted", "rho (1 - rho) / its largest")
  return markdown(head, lines), rows
