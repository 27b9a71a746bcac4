"""The page of a run: one HTML file that needs nothing else (docs/samples.md#the-page).

jinja2 fills the template and escapes every text. uPlot (MIT), which draws the curves, is part of
the package and is written into the page. The data is in the page as JSON in ASCII, in which no
character can end a script. The scripts put it into the document only as text. A content security
policy forbids all other scripts, and all requests.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from igpo_jax.viewer.collect import Data, collect

SCRIPTS = ("uPlot.iife.min.js", "text.js", "curves.js", "rollouts.js", "evaluations.js", "page.js")
STYLES = ("uPlot.min.css", "page.css")


@functools.cache
def _asset(name: str) -> str:
  return importlib.resources.files("igpo_jax.viewer").joinpath("page", name).read_text("utf-8")


def as_script(data: Data) -> str:
  """JSON that is safe inside a <script>: in ASCII, with "<", ">" and "&" escaped as well.

  A lone surrogate (half a character) is kept as an escape. A number that is not finite, such as a
  user's own reward may be, becomes null, since JSON has no other way to write it.
  """
  try:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
  except ValueError:
    text = json.dumps(_finite(data), separators=(",", ":"))
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _hash(script: str) -> str:
  return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def render(data: Data, title: str = "igpo_jax", section: str = "") -> str:
  """The page as HTML.

  Args:
    data: what the page shows, see `collect`.
    title: the page's title.
    section: "rollouts" shows only that part, for notebooks; "" shows all.
  """
  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
  scripts = [_asset(name) for name in SCRIPTS]
  return environment.from_string(_asset("page.html")).render(
    title=title,
    section=section,
    styles=[Markup(_asset(name)) for name in STYLES],
    scripts=[Markup(script) for script in scripts],
    policy="; ".join([
      "default-src 'none'",
      "script-src " + " ".join(f"'sha256-{_hash(script)}'" for script in scripts),
      "style-src 'unsafe-inline'",
      "img-src data:",
    ]),
    data=Markup(as_script(data)),
  )  # fmt: skip


def make_page(workdirs: Sequence[epath.Path]) -> str:
  """The page about one or several runs, as HTML.

  Args:
    workdirs: the runs' workdirs, the main one first.

  Raises:
    UserError: a file of a run is not what this program writes.
  """
  data = collect(workdirs)
  title = f"{', '.join(run['name'] for run in data['runs'])} - igpo_jax"
  return render(data, title).encode("utf-8", "replace").decode()
