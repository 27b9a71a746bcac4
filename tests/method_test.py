"""docs/method.md: what it names exists, and the sections that code cites are there."""

from __future__ import annotations

import ast
import re

import pytest

from igpo_jax.config import default_config
from tests.paths import REPO

PAGE = (REPO / "docs" / "method.md").read_text()
FOLDERS = ("igpo_jax", "configs", "benchmarks", "tests", "docs")
NAMED = re.compile(r"`((?:igpo_jax|tests)/[\w/]+\.py):(\w+)`")
SECTIONS = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
            for h in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}  # fmt: skip


def texts():
  for folder in FOLDERS:
    for path in sorted((REPO / folder).rglob("*")):
      if path.suffix in (".py", ".md", ".ipynb") and path.is_file():
        yield path.relative_to(REPO), path.read_text()
  yield "README.md", (REPO / "README.md").read_text()


def test_every_section_that_is_cited_is_there():
  cited = {}
  for path, text in texts():
    for section in re.findall(r"method\.md#([\w-]+)", text):
      cited.setdefault(section, []).append(str(path))
  assert len(cited) > 5  # the pattern finds them
  assert not {s: paths for s, paths in cited.items() if s not in SECTIONS}


def test_no_citation_is_of_a_text_that_is_not_here():
  pattern = re.compile(r"\bMETHOD\s*" + r"\d")
  assert not [str(path) for path, text in texts() if pattern.search(text)]


@pytest.mark.parametrize("file, name", NAMED.findall(PAGE))
def test_every_function_and_test_that_is_named_exists(file, name):
  tree = ast.parse((REPO / file).read_text())
  assert name in {getattr(node, "name", None) for node in tree.body}


def test_every_formula_has_a_function_and_a_test():
  numbers = {int(n) for n in re.findall(r"^ +\((\d+)\) ", PAGE, re.MULTILINE)}
  assert numbers == set(range(1, max(numbers) + 1))
  placed = set()
  for row in PAGE.partition("## Where it is")[2].splitlines():
    cells = row.split("|")
    if len(cells) > 4 and len(NAMED.findall(row)) == 2:
      for first, last in re.findall(r"\((\d+)\)(?: to \((\d+)\))?", cells[1]):
        placed |= set(range(int(first), int(last or first) + 1))
  assert placed == numbers


def test_every_option_that_is_named_exists():
  config = default_config()
  sections = "|".join(name for name in config if hasattr(config[name], "keys"))
  named = set(re.findall(rf"`({sections})\.(\w+)[`=]", PAGE))
  assert len(named) > 10
  assert not [f"{a}.{b}" for a, b in named if b not in config[a]]
