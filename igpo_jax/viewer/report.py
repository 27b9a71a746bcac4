"""What a run writes for people: summary.json, table.md, curves.png, report.html."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import Row, write_whole
from igpo_jax.viewer.curves import draw_curves
from igpo_jax.viewer.page import make_page
from igpo_jax.viewer.summary import summary_of, summary_table

PAGE = "report.html"


def write_report(rows: list[Row], workdir: epath.Path) -> dict[str, Any]:
  """Writes summary.json, table.md and curves.png; returns the summary."""
  summary = summary_of(rows)
  write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
  workdir.joinpath("table.md").write_text(summary_table(summary) + "\n")
  draw_curves(rows, workdir / "curves.png")
  return summary


def write_page(workdir: epath.Path, *others: epath.Path) -> str:
  """Writes report.html, the page of a run (viewer/page.py).

  Args:
    workdir: of the run.
    others: workdirs of runs that the page compares it with, such as its arms.

  Returns:
    "", or why it could not be written: a page is no reason to end a run.
  """
  try:
    write_whole(workdir / PAGE, make_page([workdir, *others]))
  except (OSError, UserError) as error:
    return f"{workdir / PAGE} was not written: {error}"
  return ""
