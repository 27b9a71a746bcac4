"""The rollout viewer inside a notebook."""

from __future__ import annotations

import html
import os

from igpo_jax.viewer.collect import collect
from igpo_jax.viewer.files import open_run
from igpo_jax.viewer.page import render


class Viewer:
  """Shows the rollouts of a run, or its whole page, where it is the last value of a cell.

  The page is in a frame of its own, whose content security policy lets only its own scripts run.

  Args:
    workdirs: the runs' workdirs.
    whole: show the whole page, and not only the rollouts.
    height: height of the frame, in pixels.

  Raises:
    UserError: a workdir holds no run.
  """

  def __init__(self, *workdirs: os.PathLike | str, whole: bool = False, height: int = 720):
    data = collect([open_run(os.fspath(workdir)) for workdir in workdirs])
    self.page = render(data, "igpo_jax", "" if whole else "rollouts")
    self.height = height

  def _repr_html_(self) -> str:
    page = html.escape(self.page.encode("utf-8", "replace").decode())
    return (
      f'<iframe sandbox="allow-scripts" srcdoc="{page}" width="100%" height="{self.height}"'
      ' style="border:0"></iframe>'
    )
