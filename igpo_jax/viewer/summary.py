"""The summary of a run from its metric rows: means, last evaluations, a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from igpo_jax.io.jsonl import Row, write_whole

# The order of stages in a run; "init" is the evaluation before the first one.
STAGE_ORDER = ("init", "sft", "rl", "eval")

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


def offsets(rows: Sequence[Row]) -> dict[str, int]:
  """Stage -> number of steps of the stages before it, for a count of steps over the whole run."""
  out, total = {}, 0
  for stage in STAGE_ORDER:
    out[stage] = total
    total += max((row["step"] for row in rows if row["stage"] == stage), default=0)
  return out


def summary_of(rows: list[Row]) -> dict[str, Any]:
  """The summary of a run, from its metric rows.

  Returns:
    "eval": {"STAGE/BENCHMARK": {"accuracy", "stderr", "n", ...}}, from the last evaluation of each
    stage; "rl": {name: mean over all steps}; "steps": {stage: last step}. If an evaluation had
    other settings than most of the run's evaluations, "unlike" names them.
  """
  evals: dict[str, dict[str, Any]] = {}
  steps: dict[str, int] = {}
  usual = usual_settings(rows)
  for row in rows:
    steps[row["stage"]] = max(steps.get(row["stage"], 0), row["step"])
    for bench, result in evaluations(row).items():
      unlike = unlike_usual(result, usual[bench])
      evals[f"{row['stage']}/{bench}"] = result | ({"unlike": unlike} if unlike else {})
  rl_rows = [row for row in rows if row["stage"] == "rl"]
  means = {}
  for name in RL_MEANS:
    values = [row[f"rl/{name}"] for row in rl_rows if row.get(f"rl/{name}") is not None]
    if values:
      means[name] = sum(values) / len(values)
  return {"eval": evals, "rl": means, "steps": steps}


def write_summary(summary: Mapping[str, Any], table: str, workdir: epath.Path) -> None:
  """Writes summary.json and table.md, the summary as JSON and as Markdown, into a workdir."""
  write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
  workdir.joinpath("table.md").write_text(table + "\n")


def evaluations(row: Row) -> dict[str, dict[str, Any]]:
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


def usual_settings(rows: list[Row]) -> dict[str, dict[str, str]]:
  """Benchmark -> the most frequent settings of its evaluations, or the first of several."""
  counts: dict[str, Counter[tuple[tuple[str, str], ...]]] = {}
  for row in rows:
    for bench, result in evaluations(row).items():
      counts.setdefault(bench, Counter())[tuple(sorted(_settings(result).items()))] += 1
  return {bench: dict(count.most_common(1)[0][0]) for bench, count in counts.items()}


def unlike_usual(result: dict[str, Any], usual: dict[str, str]) -> str:
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


ACCURACY_HEAD = (
  "| held-out accuracy | value | 95% interval | standard error | problems |",
  "|---|---|---|---|---|",
)


def summary_table(summary: dict[str, Any]) -> str:
  """The summary as a small Markdown table."""
  lines = [*ACCURACY_HEAD]
  for name, result in summary["eval"].items():
    lines += accuracy_lines(name, result)
  rl = summary["rl"]
  if rl:
    lines += ["", *rl_lines({"value": rl})]
  return "\n".join(lines)


RL_LABELS = {
  "all_wrong_before": "groups all wrong, before inpainting",
  "all_wrong_after": "groups all wrong, after inpainting",
  "extra_correct": "extra samples that were correct",
  "answer_shown": "hinted canvases that showed the answer's value",
  "reward": "reward of the policy's own samples",
}


def rl_lines(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
  """The means over all RL steps as a Markdown table: a row a metric, a column for each heading."""
  lines = [
    f"| RL, mean over all steps | {' | '.join(columns)} |",
    "|---" * (1 + len(columns)) + "|",
  ]
  for name, label in RL_LABELS.items():
    lines.append(f"| {label} | {' | '.join(f'{c[name]:.3f}' for c in columns.values())} |")
  return lines


def accuracy_lines(name: str, result: dict[str, Any], of: str = "") -> list[str]:
  """The table's rows for one benchmark: accuracy, metrics of several samples, published number.

  Args:
    of: what to say of the stage in addition, such as the name of an arm.
  """
  stage, bench = name.split("/", 1)
  where = f"{bench}, {STAGE_LABELS.get(stage, stage)}{of}"
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
