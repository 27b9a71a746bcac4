"""The curves of a run as a PNG: loss, reward, all-wrong groups, held-out accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

from igpo_jax.io.jsonl import Row
from igpo_jax.viewer.summary import evaluations, offsets, unlike_usual, usual_settings

OTHER_MARKERS: Sequence[str] = ("s", "^", "D", "v", "P", "X")


def draw_curves(rows: list[Row], path: epath.Path) -> None:
  """Draws loss, reward, all-wrong groups and held-out accuracy over steps into a PNG file."""
  # Not pyplot: it would change the backend of a notebook that calls this.
  from matplotlib.figure import Figure

  fig = Figure(figsize=(11, 7.5), layout="constrained")
  axes = fig.subplots(2, 2)
  _lines(axes[0, 0], rows, "sft", {"sft/loss": "loss"}, "Fine-tuning: the loss should fall")
  axes[0, 0].set_ylabel("NELBO, nats per token")
  rewards = {"rl/reward": "the policy's own", "rl/reward_after": "with inserted ones"}
  _lines(axes[0, 1], rows, "rl", rewards, "RL: reward of sampled completions should rise")
  axes[0, 1].set_ylabel("mean reward")
  shares = [r.get(name) for r in rows for name in rewards]
  if all(0 <= value <= 1 for value in shares if value is not None):
    axes[0, 1].set_ylim(0, 1)
  _evaluated(axes[0, 1], rows)
  wrong = {"rl/all_wrong_before": "without hints", "rl/all_wrong_after": "after inpainting"}
  _lines(axes[1, 0], rows, "rl", wrong, "RL: prompts that teach nothing, as all tries are wrong")
  axes[1, 0].set(ylim=(0, 1), ylabel="share of the groups")
  _accuracies(axes[1, 1], rows)
  with path.open("wb") as file:
    fig.savefig(file, format="png", dpi=100)


def _lines(ax, rows, stage, names, title, window: int = 10) -> None:
  """Draws metrics over steps: raw values in faint color, their running mean, and its interval.

  The interval is the mean of the last `window` steps plus or minus 1.96 standard errors.
  """
  for name, label in names.items():
    points = [(r["step"], r[name]) for r in rows if r["stage"] == stage and r.get(name) is not None]
    if not points:
      continue
    steps, values = zip(*points, strict=True)
    means, errors = [], []
    for i in range(len(values)):
      last = np.array(values[max(0, i - window + 1) : i + 1], np.float64)
      means.append(last.mean())
      errors.append(1.96 * last.std(ddof=1) / np.sqrt(len(last)) if len(last) > 1 else 0.0)
    (line,) = ax.plot(steps, means, label=label)
    color, mean, error = line.get_color(), np.array(means), np.array(errors)
    ax.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    ax.plot(steps, values, alpha=0.25, color=color, linewidth=0.8)
  ax.set(title=title, xlabel=f"{stage.upper()} step (line: mean of the last {window})")
  if ax.lines:
    ax.legend()


def _evaluated(ax, rows) -> None:
  """Held-out accuracies as points on the RL curve; "sft" and "init" count as step 0."""
  usual = usual_settings(rows)
  start = {}
  points: dict[str, list[tuple[int, dict]]] = {}
  for row in rows:
    for bench, result in evaluations(row).items():
      if unlike_usual(result, usual[bench]):
        continue
      if row["stage"] == "rl":
        points.setdefault(bench, []).append((row["step"], result))
      elif row["stage"] != "eval":
        start[bench] = (0, result)
  for bench, found in points.items():
    some = [start[bench], *found] if bench in start else found
    values = [result["accuracy"] for _, result in some]
    low = [result["accuracy"] - result.get("low", result["accuracy"]) for _, result in some]
    high = [result.get("high", result["accuracy"]) - result["accuracy"] for _, result in some]
    ax.errorbar([step for step, _ in some], values, yerr=[low, high], fmt="o", capsize=3,
                color="black", label=f"held-out accuracy, {bench} (95%)")  # fmt: skip
  if points:
    ax.legend()


def _accuracies(ax, rows) -> None:
  """Draws held-out accuracy with its standard error over the steps of the run.

  Evaluations with the usual settings are joined by a line. Others have markers of their own.
  """
  before, usual = offsets(rows), usual_settings(rows)
  series: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
  for row in rows:
    for bench, result in evaluations(row).items():
      point = (before[row["stage"]] + row["step"], result["accuracy"], result["stderr"])
      series.setdefault((bench, unlike_usual(result, usual[bench])), []).append(point)
  others = iter(OTHER_MARKERS * len(series))
  for (bench, unlike), points in sorted(series.items()):
    steps, values, errors = zip(*points, strict=True)
    style = {"marker": next(others), "linestyle": "none"} if unlike else {"marker": "o"}
    label = f"{bench}: {unlike}" if unlike else bench
    ax.errorbar(steps, values, yerr=errors, capsize=3, label=label, **style)
  ax.axvline(before["rl"], color="grey", linestyle=":", linewidth=1)
  ax.set(
    title="Problems not trained on: share solved (± standard error)",
    xlabel="step (SFT, then RL)",
    ylim=(0, 1),
  )
  if series:
    ax.legend()
