"""What the page of a run shows, as one JSON object of bounded size.

A page must open at once, however long the run is. So curves have at most POINTS points, each the
mean of a few steps. Of samples and evaluations only as much is taken as fits a budget: samples of
whole steps, evenly spaced; and first those items of evaluations whose verdict changed. The page
says what was left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from igpo_jax.config import Config
from igpo_jax.io.jsonl import Row, row_parts
from igpo_jax.viewer import files
from igpo_jax.viewer.summary import STAGE_LABELS, evaluations, offsets, summary_of
from igpo_jax.viewer.text import LONGEST_PIECE, shortened

POINTS = 1000  # the most points of a curve
CURVE_BYTES = 4 << 20  # the budget for all curves of all runs
SAMPLE_BYTES = 6 << 20  # the budget for the samples of all runs
ITEM_BYTES = 3 << 20  # the budget for the items of all evaluations
LONGEST_TEXT = 4000  # the most characters of a question or a completion
BYTES_PER_POINT = 16
_HEAD = re.compile(rb'\{"stage": "rl", "step": (\d+),')

Data = dict[str, Any]


def collect(workdirs: Sequence[epath.Path]) -> Data:
  """The data of a page about one or several runs, as a JSON object for `page.render`.

  Args:
    workdirs: the runs' workdirs, the main one first.

  Raises:
    UserError: a file of a run is not what this program writes.
  """
  names = _names(workdirs)
  share = 1 / max(1, len(workdirs))
  runs = [_run(path, name, share) for path, name in zip(workdirs, names, strict=True)]
  return {"runs": runs, "bands": _bands(runs)}


def _names(workdirs: Sequence[epath.Path]) -> list[str]:
  """The last part of each path, with more of it where that is not enough to tell them apart."""
  for count in range(1, 20):
    names = ["/".join(path.parts[-count:]) for path in workdirs]
    if len(set(names)) == len(names):
      break
  return names


def _run(workdir: epath.Path, name: str, share: float) -> Data:
  rows = files.metric_rows(workdir)
  config = files.config_of(workdir)
  resolved = config.pop("resolved", {})
  sampler = config.get("sampler", {})
  samples, told = _samples(workdir, int(SAMPLE_BYTES * share))
  items, told_items = _items(workdir, int(ITEM_BYTES * share))
  return {
    "name": name,
    "workdir": str(workdir),
    "config": _differences(config),
    "identity": _identity(config),
    "seed": config.get("seed"),
    "resolved": resolved,
    "block_length": sampler.get("block_length", 0),
    "stages": config.get("stages", []),
    "steps": {stage: config.get(stage, {}).get("steps") for stage in ("sft", "rl")},
    "offsets": offsets(rows),
    "curves": _curves(rows, config, CURVE_BYTES * share),
    "evals": _evals(rows),
    "summary": _summary(rows),
    "samples": samples,
    "items": items,
    "notes": [note for note in (told, told_items) if note],
  }


# --- what the run is ---------------------------------------------------------------------------


def _flat(options: Any, prefix: str = "") -> dict[str, Any]:
  out = {}
  for name, value in options.items():
    inside = isinstance(value, dict) and value
    out |= _flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
  return out


def _differences(config: Data) -> list[tuple[str, Any, Any]]:
  """(option, value, default) of every option that has another value than its default."""
  defaults = _flat(json.loads(json.dumps(dataclasses.asdict(Config()))))
  return [
    (name, value, defaults.get(name))
    for name, value in _flat(config).items()
    if value != defaults.get(name)
  ]


def _identity(config: Data) -> str:
  """A text that is the same for runs that differ by their seed alone."""
  what = {k: v for k, v in config.items() if k not in ("seed", "log", "compilation_cache")}
  return json.dumps(what, sort_keys=True) if what else ""


def _bands(runs: Sequence[Data]) -> list[Data]:
  """Groups of at least two runs that differ by their seed alone."""
  groups: dict[str, list[int]] = {}
  for number, run in enumerate(runs):
    if run["identity"]:
      groups.setdefault(run["identity"], []).append(number)
  for run in runs:
    del run["identity"]
  return [
    {"name": f"{len(some)} seeds of {runs[some[0]]['name']}", "runs": some}
    for some in groups.values()
    if len(some) > 1 and len({runs[k]["seed"] for k in some}) > 1
  ]


# --- numbers -------------------------------------------------------------------------------------


def _short(value: float) -> float:
  return float(f"{value:.5g}")


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _curves(rows: Sequence[Row], config: Data, budget: float) -> Data:
  """Stage -> metric -> [steps, values, largest number of steps in a point]."""
  found: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for row in rows:
    if row["stage"] not in ("sft", "rl"):
      continue
    stage = found.setdefault(row["stage"], {})
    for name, value in (row | _derived(row, config)).items():
      if _is_number(value) and name != "step" and not name.startswith("eval/"):
        stage.setdefault(name, []).append((row["step"], value))
  count = sum(len(stage) for stage in found.values())
  most = max(50, min(POINTS, int(budget / BYTES_PER_POINT / max(1, count))))
  return {
    stage: {name: _thinned(points, most) for name, points in sorted(metrics.items())}
    for stage, metrics in found.items()
  }


def _thinned(points: Sequence[tuple[int, float]], most: int) -> Data:
  """At most `most` points, each the mean of some that follow each other, at the last one's step."""
  size = -(-len(points) // most)
  groups = [points[k : k + size] for k in range(0, len(points), size)]
  values = [_short(sum(value for _, value in group) / len(group)) for group in groups]
  return {"x": [group[-1][0] for group in groups], "y": values, "mean_of": size}


def _derived(row: Row, config: Data) -> dict[str, float]:
  """Tokens per second of a step of RL: those sampled, up to the end of each completion."""
  seconds, length = row.get("time/step_seconds"), row.get("rl/length")
  rl = config.get("rl", {})
  if not (_is_number(seconds) and _is_number(length) and seconds > 0 and rl):
    return {}
  tries = 1 + (row.get("rl/all_wrong_before") or 0) * (rl.get("exploration") != "none")
  completions = rl.get("prompts_per_step", 0) * rl.get("group_size", 0) * tries
  return {"time/tokens_per_second": completions * length / seconds}


def _evals(rows: Sequence[Row]) -> Data:
  """Benchmark -> the evaluations in order: stage, step, step over the whole run, and numbers."""
  before, out = offsets(rows), {}
  for row in rows:
    for bench, result in evaluations(row).items():
      kept = {name: result.get(name) for name in ("accuracy", "low", "high", "stderr", "n")}
      at = {"stage": row["stage"], "step": row["step"], "x": before[row["stage"]] + row["step"]}
      out.setdefault(bench, []).append(at | kept)
  return out


def _summary(rows: Sequence[Row]) -> Data:
  """The headline: last evaluations of each stage with their intervals, and means of RL."""
  if not rows:
    return {"eval": [], "rl": {}}
  summary = summary_of(list(rows))
  table = []
  for name, result in summary["eval"].items():
    stage, bench = name.split("/", 1)
    kept = {key: result.get(key) for key in ("accuracy", "low", "high", "n", "unlike")}
    table.append({"benchmark": bench, "when": STAGE_LABELS.get(stage, stage)} | kept)
  return {"eval": table, "rl": {name: _short(value) for name, value in summary["rl"].items()}}


# --- samples -------------------------------------------------------------------------------------


def _samples(workdir: epath.Path, budget: int) -> tuple[list[Row], str]:
  """Rows of samples.jsonl, all those of evenly spaced steps; and what was left out, in words."""
  path = workdir / "samples.jsonl"
  sizes: dict[int, int] = {}  # step -> bytes
  count = 0
  for line in _lines(path):
    step = _step(line)
    if step is not None:
      sizes[step] = sizes.get(step, 0) + len(line)
      count += 1
  chosen = _spaced(sizes, budget)
  rows, used, left = [], 0, 0
  for line in _lines(path):
    if _step(line) not in chosen:
      continue
    row = _clipped(files.upgraded(json.loads(line), path))
    size = len(json.dumps(row))
    if used + size > budget:
      left += 1
      continue
    used += size
    rows.append(row)
  if len(rows) == count:
    return rows, ""
  return rows, (
    f"{len(rows):,} of {count:,} rows of samples.jsonl are here: those of {len(chosen)} of"
    f" {len(sizes)} steps, evenly spaced" + (f", but for {left} that do not fit" if left else "")
  )


def _lines(path: epath.Path) -> Iterable[bytes]:
  """Whole lines; one that is being written is left out."""
  for part in row_parts(path):
    with part.open("rb") as file:
      yield from (line for line in file if line.endswith(b"\n"))


def _step(line: bytes) -> int | None:
  head = _HEAD.match(line)  # as a run writes it; only other lines are parsed
  if head:
    return int(head[1])
  try:
    row = json.loads(line)
  except ValueError:
    return None
  fits = isinstance(row, dict) and row.get("stage") == "rl" and isinstance(row.get("step"), int)
  return row["step"] if fits else None


def _spaced(sizes: dict[int, int], budget: int) -> set[int]:
  """Evenly spaced steps, the first and the last among them, as many as fit."""
  steps = sorted(sizes)
  if not steps:
    return set()
  count = len(steps)
  while count > 1:
    chosen = {steps[round(k * (len(steps) - 1) / (count - 1))] for k in range(count)}
    if sum(sizes[step] for step in chosen) <= budget:
      return chosen
    count = min(count - 1, int(count * 0.9))
  return {steps[-1]}


def _cut(text: Any, most: int = LONGEST_TEXT) -> Any:
  return shortened(text, most) if isinstance(text, str) else text


def _clipped(row: Row) -> Row:
  """A row whose texts have a bounded length, without what the page does not show."""
  row = {name: value for name, value in row.items() if name not in ("stage", "version")}
  for name in ("prompt", "answer", "completion", "extracted", "reason", "id"):
    row[name] = _cut(row.get(name))
  if row["pieces"] is not None:
    row["pieces"] = [_cut(piece, LONGEST_PIECE) for piece in row["pieces"]]
  return row


# --- evaluations ---------------------------------------------------------------------------------


def _items(workdir: epath.Path, budget: int) -> tuple[Data, str]:
  """Benchmark -> {"labels": [...], "items": [{id, question, answer, tries: [...]}]}; and a note.

  A label is an evaluation, such as "rl-60"; `tries` has one entry per label, None where it lacks
  the item: correct, extracted, completion.
  """
  folder = workdir / "evals"
  found: dict[str, dict[str, dict[tuple[Any, Any], Row]]] = {}
  labels = sorted((p.name for p in folder.iterdir()), key=_label_order) if folder.is_dir() else []
  for label in labels:
    for path in _files_below(folder / label):
      bench = re.sub(r"-[0-9a-f]{8}$", "", path.stem)
      rows = found.setdefault(bench, {}).setdefault(label, {})
      for row in files.each_row(path):
        if "id" in row:
          rows[row["id"], row.get("sample", 0)] = row
  out, shown, total = {}, 0, 0
  for bench, by_label in found.items():
    items = _compared(by_label)
    total += len(items)
    kept = _fitting(items, budget // len(found))
    shown += len(kept)
    out[bench] = {"labels": list(by_label), "items": kept}
  note = f"{shown:,} of {total:,} items of evaluations are here, those that changed first"
  return out, note if shown < total else ""


def _files_below(folder: epath.Path) -> list[epath.Path]:
  """FOLDER/PROTOCOL/X.jsonl, sorted; parts of a file (gs://) by the file's own name."""
  protocols = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
  names = {
    protocol / re.sub(r"-\d{5}\.jsonl$", ".jsonl", path.name)
    for protocol in protocols
    for path in protocol.iterdir()
    if path.name.endswith(".jsonl")
  }
  return sorted(names)


def _label_order(label: str) -> tuple[int, int, str]:
  stage, _, step = label.partition("-")
  order = ("init", "sft", "rl")
  place = order.index(stage) if stage in order else len(order)
  return place, int(step) if step.isdigit() else 0, label


def _compared(by_label: dict[str, dict[tuple[Any, Any], Row]]) -> list[Data]:
  keys = dict.fromkeys(key for rows in by_label.values() for key in rows)
  items = []
  for key in keys:
    rows = [by_label[label].get(key) for label in by_label]
    first = next(row for row in rows if row)
    tries = [
      row and {
        "correct": bool(row.get("correct")),
        "extracted": _cut(row.get("extracted"), 200),
        "completion": _cut(row.get("completion")),
      }
      for row in rows
    ]  # fmt: skip
    verdicts = {bool(row.get("correct")) for row in rows if row}
    items.append({
      "id": _cut(str(key[0]), 500), "sample": key[1], "question": _cut(first.get("question")),
      "answer": _cut(first.get("answer")), "changed": len(verdicts) > 1, "tries": tries,
    })  # fmt: skip
  return sorted(items, key=lambda item: not item["changed"])


def _fitting(items: Sequence[Data], budget: int) -> list[Data]:
  kept, used = [], 0
  for item in items:
    used += len(json.dumps(item))
    if used > budget:
      break
    kept.append(item)
  return kept
