"""Lengths before and after alignment: percentiles, the share that fits, a histogram."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from igpo_jax.errors import UserError
from igpo_jax.rewrite.journal import Paths, read_rows, read_settings

PERCENTILES = (5, 25, 50, 75, 95, 99)


def describe(lengths: np.ndarray, windows: Sequence[int]) -> dict[str, Any]:
  """Statistics of a distribution of lengths; {"n": 0} if it is empty.

  Args:
    lengths: i32[n], tokens of each trace, including the one that ends the turn.
    windows: lengths of canvases; `within` has the share of traces that fit into each.
  """
  if not len(lengths):
    return {"n": 0}
  points = np.percentile(lengths, PERCENTILES)
  return {
    "n": len(lengths),
    "mean": round(float(lengths.mean()), 2),
    "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, points, strict=True)},
    "max": int(lengths.max()),
    "within": {str(w): round(float((lengths <= w).mean()), 4) for w in windows},
  }


def make_report(output: pathlib.Path, windows: Sequence[int]) -> dict[str, Any]:
  """Reads an output and writes OUT.report.json and OUT.report.png.

  "before" are the traces of all records, "before, accepted ones" those whose rewritten trace was
  accepted, "after" the rewritten traces.

  Raises:
    UserError: there is no such output, or nothing in it.
  """
  paths = Paths(output)
  settings = read_settings(paths.settings)
  before, kept, after = [], [], []
  reasons: collections.Counter[str] = collections.Counter()
  for row in read_rows(paths.accepted):
    before.append(row["source_tokens"])
    kept.append(row["source_tokens"])
    after.append(row["tokens"])
  for row in read_rows(paths.rejected):
    before.append(row["source_tokens"])
    reasons[row["reasons"][-1]] += 1
  if not before:
    raise UserError(f"{output}: no row to report on")
  lengths = {
    name: np.array(values, np.int32)
    for name, values in (("before", before), ("before, accepted ones", kept), ("after", after))
  }
  report = {
    "mode": settings.get("mode"),
    "tokenizer": settings.get("tokenizer"),
    "max_tokens": settings.get("max_tokens"),
    "accepted": len(after),
    "rejected": dict(reasons),
    "lengths": {name: describe(values, windows) for name, values in lengths.items()},
  }
  paths.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
  draw(lengths, windows, report["max_tokens"], report["mode"], paths.picture)
  return report


def table(report: dict[str, Any]) -> str:
  """The report's distributions as a Markdown table, with a trailing line on what was decided."""
  rows = {name: d for name, d in report["lengths"].items() if d["n"]}
  windows = next(iter(rows.values()))["within"]
  head = [
    "tokens",
    "n",
    "mean",
    *(f"{p}%" for p in PERCENTILES),
    "max",
    *(f"≤ {w}" for w in windows),
  ]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for name, d in rows.items():
    cells = [name, f"{d['n']:,}", f"{d['mean']:.1f}"]
    cells += [f"{d['percentiles'][str(p)]:.0f}" for p in PERCENTILES]
    cells += [str(d["max"]), *(f"{share:.1%}" for share in d["within"].values())]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def draw(
  lengths: dict[str, np.ndarray],
  windows: Sequence[int],
  max_tokens: int | None,
  mode: str | None,
  path: pathlib.Path,
) -> None:
  """Draws the histogram. Its axis is logarithmic if lengths span more than a factor of twenty."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7.5, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  shown = {name: values for name, values in lengths.items() if len(values) and "," not in name}
  low = min(int(values.min()) for values in shown.values())
  high = max(int(values.max()) for values in shown.values())
  wide = high > 20 * max(low, 1)
  space = np.geomspace if wide else np.linspace
  bins = np.unique(np.round(space(max(low, 1), high + 1, 61)))
  if len(bins) < 2:
    bins = np.array([low, low + 1])
  looks = {
    "before": {"color": "#c4c4c4"},
    "after": {"histtype": "step", "color": "#1f6fb4", "lw": 1.8},
  }
  for name, values in shown.items():
    label = f"{name}: {len(values):,} traces, median {np.median(values):.0f}"
    axes.hist(values, bins, label=label, **looks[name])
  marks = {w: f"window of {w}" for w in windows if low < w < 1.2 * high}
  for number, (at, label) in enumerate(marks.items()):
    axes.axvline(at, color="#b03030", lw=1.2, ls=("-", "--", ":")[number % 3], label=label)
  if max_tokens and max_tokens not in marks and low < max_tokens < 1.2 * high:
    axes.axvline(max_tokens, color="black", lw=1, ls="--", label=f"limit of {max_tokens}")
  if wide:
    axes.set_xscale("log")
  axes.set_xlabel("tokens of a trace" + (", logarithmic" if wide else ""))
  axes.set_ylabel("traces")
  axes.set_title(f"Lengths before and after alignment ({mode})")
  axes.legend(framealpha=1, edgecolor="none")
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=120)
