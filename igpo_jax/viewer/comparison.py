"""The report of a run with arms: one table, one picture and one inpainted example in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from igpo_jax.config import Config
from igpo_jax.io.jsonl import Row
from igpo_jax.viewer.files import each_row
from igpo_jax.viewer.summary import (
  ACCURACY_HEAD,
  accuracy_lines,
  evaluations,
  rl_lines,
  summary_of,
  write_summary,
)

METHODS = {"inpaint": "IGPO", "resample": "GRPO, resampled", "none": "GRPO"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # for all eyes
SMOOTH = 5  # RL steps that shares of groups are averaged over

Rows = Sequence[Row]


def method_of(config: Config) -> str:
  """The name of the run itself in a comparison with its arms, by its `rl.exploration`."""
  return METHODS[config.rl.exploration]


def write_comparison(
  rows: list[Row], arms: Mapping[str, list[Row]], own: str, workdir: epath.Path
) -> tuple[dict[str, Any], str]:
  """Writes summary.json, table.md and curves.png of a run with arms.

  Args:
    rows: the rows of the run's metrics.jsonl.
    arms: arm's name -> the rows of its metrics.jsonl.
    own: name of the run itself, see `method_of`.
    workdir: the run's workdir.

  Returns:
    (summary, text of table.md). The summary is that of the run (`summary_of`), with one more entry
    "arms": {name: {"eval", "rl", "steps"}}.
  """
  if own in arms:
    own = f"{own}, the run itself"
  only_rl = lambda rows: [row for row in rows if row["stage"] == "rl"]
  summary = summary_of(rows) | {"arms": {n: summary_of(only_rl(r)) for n, r in arms.items()}}
  example = example_in_words(each_row(workdir / "samples.jsonl"))
  text = "\n\n".join(filter(None, [comparison_table(summary, own), example]))
  write_summary(summary, text, workdir)
  draw_comparison(rows, arms, own, workdir / "curves.png")
  return summary, text


def comparison_table(summary: Mapping[str, Any], own: str) -> str:
  """A summary with arms as Markdown: accuracies, then means over the RL steps, a column each."""
  lines = [*ACCURACY_HEAD]
  for name, result in summary["eval"].items():
    if name.startswith("rl/"):
      for arm, of in summary["arms"].items():
        if name in of["eval"]:
          lines += accuracy_lines(name, of["eval"][name], f" with {arm}")
    lines += accuracy_lines(name, result, f" with {own}" if name.startswith("rl/") else "")
  columns = {arm: of["rl"] for arm, of in summary["arms"].items()} | {own: summary["rl"]}
  columns = {name: means for name, means in columns.items() if means}  # {} of no steps
  return "\n".join([*lines, "", *rl_lines(columns)] if columns else lines)


def draw_comparison(rows: Rows, arms: Mapping[str, Rows], own: str, path: epath.Path) -> None:
  """Draws held-out accuracy and the share of all-wrong groups over the RL steps.

  The run and each arm have a color. Accuracies have error bars of one standard error, and begin
  with the one before RL.

  Args:
    rows: the rows of the run's metrics.jsonl.
    arms: arm's name -> the rows of its metrics.jsonl.
    own: name of the run itself.
    path: the PNG file to write.
  """
  # Not pyplot: it would change the backend of a notebook that calls this.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 3.8), layout="constrained")
  left, right = figure.subplots(1, 2)
  benches = sorted({bench for row in rows for bench in evaluations(row)})
  for color, (name, of) in zip(COLORS * 9, {**arms, own: rows}.items(), strict=False):
    for bench, marker in zip(benches, "osD^vPX" * 9, strict=False):
      label = name if len(benches) == 1 else f"{name}, {bench}"
      points = _accuracies(rows, of, bench)
      if points:
        steps, values, errors = zip(*points, strict=True)
        left.errorbar(
          steps, values, yerr=errors, capsize=3, color=color, marker=marker, label=label
        )
    rl = [row for row in of if row.get("rl/all_wrong_before") is not None]
    steps = [row["step"] for row in rl]
    extra = any(row["rl/all_wrong_after"] != row["rl/all_wrong_before"] for row in rl)
    right.plot(
      steps, _smooth(rl, "rl/all_wrong_before"), color=color,
      label=f"{name}, as sampled" if extra else name,
    )  # fmt: skip
    if extra:
      after = _smooth(rl, "rl/all_wrong_after")
      right.plot(steps, after, "--", color=color, label=f"{name}, in the update")
  left.set(title="Held-out accuracy (± standard error)", xlabel="RL step", ylim=(0, 1))
  right.set(title="Groups whose answers are all wrong (share)", xlabel="RL step", ylim=(0, 1))
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=9)
  with path.open("wb") as file:
    figure.savefig(file, format="png", dpi=110)


def _accuracies(start: Rows, rows: Rows, bench: str) -> list[tuple[int, float, float]]:
  """(RL step, accuracy, standard error): the last evaluation before RL, then those of RL."""
  before = [row for row in start if row["stage"] in ("init", "sft") and bench in evaluations(row)]
  after = [row for row in rows if row["stage"] == "rl" and bench in evaluations(row)]
  points = []
  for row in [*before[-1:], *after]:
    result = evaluations(row)[bench]
    step = row["step"] if row["stage"] == "rl" else 0
    points.append((step, result["accuracy"], result["stderr"]))
  return points


def _smooth(rows: Rows, name: str) -> list[float]:
  """A running mean of a metric over the last `SMOOTH` steps."""
  values = [row[name] for row in rows]
  windows = [values[max(0, k - SMOOTH + 1) : k + 1] for k in range(len(values))]
  return [sum(window) / len(window) for window in windows]


def example_in_words(samples: Iterable[Row]) -> str:
  """Tells in words how hints made the first such completion of samples.jsonl right.

  Args:
    samples: rows of samples.jsonl (docs/samples.md), which are read up to that completion. Rows of
      version 1 have no `pieces`, and give no example.

  Returns:
    Lines of Markdown; "" if no completion was made right by hints.
  """
  for (step, _), group in itertools.groupby(samples, lambda row: (row["step"], row["group"])):
    rows = list(group)
    own = {row["number"]: row for row in rows if row["phase"] == "own"}
    for made in rows:
      if made["used"] == "inserted" and made["hints"] and "pieces" in made:
        replaced = own.get(made["partner"])
        if replaced is None:
          continue
        hints = " ... ".join("".join(made["pieces"][begin:end]) for begin, end in made["hints"])
        return "\n".join([
          f"An inpainted example, RL step {step}. The problem: {made['prompt']}",
          f"- Every answer of the policy alone was wrong, such as: {replaced['completion']}",
          f"- Pieces of the correct trace were put in their places: ... {hints} ...",
          f"- The policy filled in the rest, and the answer is right: {made['completion']}",
          "- The update learns from this one in the place of the wrong one.",
        ])  # fmt: skip
  return ""
