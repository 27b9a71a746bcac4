"""The report of a finished run: summary.json, a table, and the curves as a PNG."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from igpo_jax.train.runlog import Row, offsets

RL_MEANS = (
  "all_wrong_before",
  "all_wrong_after",
  "reward",
  "reward_after",
  "accuracy",
  "extra_correct",
  "answer_shown",
  "replaced",
  "kl",
  "hints_kept",
)


def summary_of(rows: list[Row]) -> dict[str, Any]:
  """The summary of a run, from its metric rows.

  Returns:
    "eval": {"STAGE/BENCHMARK": {"accuracy", "stderr", "n", ...}}, from the last evaluation of each
    stage; "rl": {name: mean over all steps}; "steps": {stage: last step}. If an evaluation had
    other settings than most of the run's evaluations, "unlike" names them.
  """
  evals: dict[str, dict[str, Any]] = {}
  steps: dict[str, int] = {}
  usual = _usual(rows)
  for row in rows:
    steps[row["stage"]] = max(steps.get(row["stage"], 0), row["step"])
    for bench, result in _evaluations(row).items():
      unlike = _unlike(result, usual[bench])
      evals[f"{row['stage']}/{bench}"] = result | ({"unlike": unlike} if unlike else {})
  rl_rows = [row for row in rows if row["stage"] == "rl"]
  means = {}
  for name in RL_MEANS:
    values = [row[f"rl/{name}"] for row in rl_rows if row.get(f"rl/{name}") is not None]
    if values:
      means[name] = sum(values) / len(values)
  return {"eval": evals, "rl": means, "steps": steps}


def _evaluations(row: Row) -> dict[str, dict[str, Any]]:
  """Benchmark -> its metrics, of one row."""
  out: dict[str, dict[str, Any]] = {}
  for name, value in row.items():
    if name.startswith("eval/"):
      _, bench, field = name.split("/", 2)
      out.setdefault(bench, {})[field] = value
  return out


def _settings(result: dict[str, Any]) -> dict[str, str]:
  """The settings of an evaluation. Accuracies under different settings cannot be compared.

  Rows of earlier versions have fewer settings.
  """
  words = [word.split("=", 1) for word in result.get("settings", "").split(", ") if word]
  out = {"protocol": str(result.get("protocol", "none"))} | dict(words)
  return out | {name: str(result[name]) for name in ("cache", "samples", "n") if name in result}


def _usual(rows: list[Row]) -> dict[str, dict[str, str]]:
  """Benchmark -> the most frequent settings of its evaluations, or the first of several."""
  counts: dict[str, Counter[tuple[tuple[str, str], ...]]] = {}
  for row in rows:
    for bench, result in _evaluations(row).items():
      counts.setdefault(bench, Counter())[tuple(sorted(_settings(result).items()))] += 1
  return {bench: dict(count.most_common(1)[0][0]) for bench, count in counts.items()}


def _unlike(result: dict[str, Any], usual: dict[str, str]) -> str:
  """The settings of an evaluation that differ from the usual, such as "cache=dual, steps=8"."""
  own = _settings(result)
  if not ("settings" in result and "steps" in usual):  # one of them is of an earlier version
    own = {name: value for name, value in own.items() if name in usual}
    usual = {name: value for name, value in usual.items() if name in own}
  names = [*own, *(name for name in usual if name not in own)]
  return ", ".join(
    f"{name}={own.get(name, 'none')}" for name in names if own.get(name) != usual.get(name)
  )


STAGE_LABELS = {
  "init": "before training",
  "sft": "after SFT",
  "rl": "after RL",
  "eval": "evaluated",
}


def summary_table(summary: dict[str, Any]) -> str:
  """The summary as a small Markdown table."""
  lines = [
    "| held-out accuracy | value | 95% interval | standard error | problems |",
    "|---|---|---|---|---|",
  ]
  for name, result in summary["eval"].items():
    lines += _accuracy_lines(name, result)
  rl = summary["rl"]
  if rl:
    lines += [
      "",
      "| RL, mean over all steps | value |",
      "|---|---|",
      f"| groups all wrong, before inpainting | {rl['all_wrong_before']:.3f} |",
      f"| groups all wrong, after inpainting | {rl['all_wrong_after']:.3f} |",
      f"| extra samples that were correct | {rl['extra_correct']:.3f} |",
      f"| hinted canvases that showed the answer's value | {rl['answer_shown']:.3f} |",
      f"| reward of the policy's own samples | {rl['reward']:.3f} |",
    ]
  return "\n".join(lines)


def _accuracy_lines(name: str, result: dict[str, Any]) -> list[str]:
  """The table's rows for one benchmark: accuracy, metrics of several samples, published number."""
  stage, bench = name.split("/", 1)
  where = f"{bench}, {STAGE_LABELS.get(stage, stage)}"
  if "protocol" in result:
    where += f", protocol {result['protocol']}"
  if "unlike" in result:
    where += f", unlike the others: {result['unlike']}"
  samples = result["samples"]
  lines = [
    f"| {where}{f', avg@{samples}' if samples > 1 else ''} | {result['accuracy']:.3f} "
    f"| {result['low']:.3f} to {result['high']:.3f} | {result['stderr']:.3f} | {result['n']} |"
  ]
  for field, value in result.items():
    if field.startswith(("pass@", "majority@")):
      lines.append(f"| {bench}, {field} | {value:.3f} | | | {result['n']} |")
  if "published" in result:
    lines.append(
      f"| {bench}, published for LLaDA-8B-Instruct ({result['published_source']}) "
      f"| {result['published']:.3f} | | | |"
    )
  return lines


OTHER_MARKERS: Sequence[str] = ("s", "^", "D", "v", "P", "X")


def draw_curves(rows: list[Row], path: epath.Path) -> None:
  """Draws loss, reward, all-wrong groups and held-out accuracy over steps into a PNG file."""
  # Not pyplot: it would change the backend of a notebook that calls this.
  from matplotlib.figure import Figure

  fig = Figure(figsize=(10, 7), layout="constrained")
  axes = fig.subplots(2, 2)
  _lines(axes[0, 0], rows, "sft", {"sft/loss": "NELBO"}, "SFT loss (nats per token)")
  _lines(axes[0, 1], rows, "rl", {"rl/reward": "reward"}, "Reward of the policy's own samples")
  _lines(
    axes[1, 0],
    rows,
    "rl",
    {"rl/all_wrong_before": "before inpainting", "rl/all_wrong_after": "after inpainting"},
    "All-wrong groups (share)",
  )
  _accuracies(axes[1, 1], rows)
  with path.open("wb") as file:
    fig.savefig(file, format="png", dpi=120)


def _lines(ax, rows, stage, names, title, window: int = 10) -> None:
  """Draws metrics over steps: raw values in faint color, and their running mean."""
  for name, label in names.items():
    points = [(r["step"], r[name]) for r in rows if r["stage"] == stage and r.get(name) is not None]
    if not points:
      continue
    steps, values = zip(*points, strict=True)
    means = [
      sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
      for i in range(len(values))
    ]
    (line,) = ax.plot(steps, means, label=label)
    ax.plot(steps, values, alpha=0.25, color=line.get_color(), linewidth=0.8)
  ax.set(title=title, xlabel=f"{stage} step")
  if len(names) > 1 and ax.lines:
    ax.legend()


def _accuracies(ax, rows) -> None:
  """Draws held-out accuracy with its standard error over the steps of the run.

  Evaluations with the usual settings are joined by a line. Others have markers of their own.
  """
  before, usual = offsets(rows), _usual(rows)
  series: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
  for row in rows:
    for bench, result in _evaluations(row).items():
      point = (before[row["stage"]] + row["step"], result["accuracy"], result["stderr"])
      series.setdefault((bench, _unlike(result, usual[bench])), []).append(point)
  others = iter(OTHER_MARKERS * len(series))
  for (bench, unlike), points in sorted(series.items()):
    steps, values, errors = zip(*points, strict=True)
    style = {"marker": next(others), "linestyle": "none"} if unlike else {"marker": "o"}
    label = f"{bench}: {unlike}" if unlike else bench
    ax.errorbar(steps, values, yerr=errors, capsize=3, label=label, **style)
  ax.axvline(before["rl"], color="grey", linestyle=":", linewidth=1)
  ax.set(title="Held-out accuracy (± standard error)", xlabel="step (SFT, then RL)", ylim=(0, 1))
  if series:
    ax.legend()


def write_report(rows: list[Row], workdir: epath.Path) -> dict[str, Any]:
  """Writes summary.json, table.md and curves.png; returns the summary."""
  summary = summary_of(rows)
  workdir.joinpath("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  workdir.joinpath("table.md").write_text(summary_table(summary) + "\n")
  draw_curves(rows, workdir / "curves.png")
  return summary
