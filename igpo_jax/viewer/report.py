"""What a run writes for people: summary.json, table.md, curves.png, report.html."""

from __future__ import annotations

from typing import Any

from etils import epath

from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import Row, write_whole
from igpo_jax.viewer.curves import draw_curves
from igpo_jax.viewer.page import make_page
from igpo_jax.viewer.summary import summary_of, summary_table, write_summary

PAGE = "report.html"


def write_report(rows: list[Row], workdir: epath.Path) -> dict[str, Any]:
  """Writes summary.json, table.md and curves.png of a run.

  Args:
    rows: the rows of the run's metrics.jsonl.
    workdir: the run's workdir.

  Returns:
    The summary, see `summary_of`.
  """
  summary = summary_of(rows)
  write_summary(summary, summary_table(summary), workdir)
  draw_curves(rows, workdir / "curves.png")
  return summary


def write_page(workdir: epath.Path, *others: epath.Path) -> str:
  """Writes report.html, the page of a run (viewer/page.py).

  Args:
    workdir: the run's workdir.
    others: workdirs of runs that the page compares it with, such as its arms.

  Returns:
    "", or the reason why the page could not be written. It is no error, since a run should not end
    for want of its page.
  """
  try:
    write_whole(workdir / PAGE, make_page([workdir, *others]))
  except (OSError, UserError) as error:
    return f"{workdir / PAGE} was not written: {error}"
  return ""
