"""One plot per claim: curves over the RL steps with 95% bands, or the curve of the theorem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

from benchmarks.claims.claims import Results, Study
from benchmarks.study import interval

LABELS = {
  "accuracy": "held-out accuracy, greedy",
  "all_wrong_after": "groups all wrong in the update (share)",
}
# Color-blind readers can tell them apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#999999")
DASHES = ("-", "--", "-.", ":")
SMOOTH = 5  # number of RL steps over which a metric is averaged


def _curve(result: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of one run."""
  if name == "accuracy":
    steps, values = zip(*result["accuracy"], strict=True)
    return np.array(steps), np.array(values)
  values = np.array(result["curves"][name], float)
  width = min(SMOOTH, len(values))
  smooth = np.convolve(values, np.ones(width) / width, "valid")
  return np.arange(width, len(values) + 1), smooth


def _band(axes, steps, rows, label: str, style: int) -> None:
  means, widths = np.array([interval(column) for column in np.transpose(rows)]).T
  dash, color = DASHES[style % len(DASHES)], COLORS[style]
  axes.plot(steps, means, dash, color=color, label=label, linewidth=2)
  axes.fill_between(steps, means - widths, means + widths, color=color, alpha=0.18, linewidth=0)


def draw(study: Study, results: Results, number: int, seeds: Sequence[int], tables: list[dict],
         path: epath.Path) -> None:  # fmt: skip
  """Writes the plot of a claim as PNG. Its title is the claim's question.

  Args:
    study: the claims and their arms.
    results: of all runs.
    number: of the claim.
    seeds: of the claim.
    tables: the rows from `claims.theorem`; used for claim 11 only.
    path: the file to write.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  claim = study.claims[number]
  figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
  if claim.arms:
    for style, arm in enumerate(claim.arms):
      curves = [_curve(results[arm, seed], claim.curve) for seed in seeds]
      _band(axes, curves[0][0], [values for _, values in curves],
            study.arms[arm].label, style)  # fmt: skip
    axes.set_xlabel("RL steps")
    axes.set_ylabel(LABELS[claim.curve])
    axes.set_ylim(0, 1)
  else:
    rho = np.array([row["rho"] for row in tables])
    means = np.array([row["mean"] for row in tables])
    errors = [(row["high"] or row["mean"]) - row["mean"] for row in tables]
    fine = np.linspace(0, 1, 101)
    largest = max(r * (1 - r) for r in rho)
    axes.plot(fine, fine * (1 - fine) / largest, "-", color=COLORS[1], label="rho (1 - rho)")
    axes.errorbar(rho, means, errors, fmt="o", color=COLORS[0], capsize=3, label="measured")
    axes.set_xlabel("rho, share of the group that is correct")
    axes.set_ylabel("norm of the expected gradient\n(share of the largest predicted)")
    axes.set_ylim(0, None)
  axes.set_title(f"{claim.question}\nmean and 95% interval, n = {len(seeds)} seeds", fontsize=10)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=9)
  figure.savefig(path, dpi=110, metadata={"Title": claim.question})
  plt.close(figure)
