"""The documentation: every link leads somewhere; what is said beside the code is true."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import urllib.parse

import pytest

import igpo_jax
from igpo_jax.config.file import load_python_file
from igpo_jax.usage import options
from tests.paths import REPO

PAGES = sorted(
  [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / ".github").rglob("*.md")]
)
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def prose(path):
  """A page without its blocks of code, code in a line, and comments."""
  text = re.sub(r"^(```|~~~).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
  return re.sub(r"`[^`\n]*`|<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(path):
  """The anchors of a page's headings, as GitHub makes them; a second one of a name gets -1."""
  text = re.sub(r"^(```|~~~).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
  found, counts = set(), {}
  for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
    count = counts[name] = counts.get(name, -1) + 1
    found.add(f"{name}-{count}" if count else name)
  return found


def broken(path):
  """What is wrong with the links of a page."""
  for target in LINK.findall(prose(path)):
    if re.match(r"[a-z][a-z+.-]*:", target):
      continue  # elsewhere: nothing is fetched by a test
    name, _, anchor = urllib.parse.unquote(target).partition("#")
    file = (path.parent / name).resolve() if name else path
    if not file.exists():
      yield f"{path.relative_to(REPO)}: {target}: there is no such file"
    elif anchor and file.suffix == ".md" and anchor not in anchors(file):
      yield f"{path.relative_to(REPO)}: {target}: the page has no such heading"


def test_every_link_of_the_documentation_leads_somewhere():
  assert not [line for path in PAGES for line in broken(path)]


def test_a_broken_link_is_found(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
  (tmp_path / "b.md").write_text("# One `x`, two\n## Same\n## Same\n```\n# No heading\n```\n")
  page = tmp_path / "a.md"
  page.write_text(
    "[1](b.md) [2](b.md#one-x-two) [3](b.md#same-1) [4](https://example.org/no) `[5](no.md)`\n"
    "```\n[6](no.md)\n```\n![[7]](no.png) [8](b.md#no-heading) [9](b.md#same-2)\n[10](#nowhere)\n"
  )
  told = [line.partition(": ")[2] for line in broken(page)]
  assert told == [
    "no.png: there is no such file", "b.md#no-heading: the page has no such heading",
    "b.md#same-2: the page has no such heading", "#nowhere: the page has no such heading",
  ]  # fmt: skip


def test_the_site_lists_every_page_and_every_option():
  listed = re.findall(r": (\S+\.md)$", (REPO / "mkdocs.yml").read_text(), re.MULTILINE)
  pages = {path.name for path in (REPO / "docs").glob("*.md")}
  assert len(listed) == len(set(listed)) and set(listed) == pages | {"options.md"}
  page = load_python_file(REPO / "mkdocs_hooks.py", "hooks").page()
  assert page.count("\n| `") == len(list(options())) > 150


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
  if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
    pytest.skip("mkdocs and mkdocstrings are not here: pip install -e '.[docs]'")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
    cwd=REPO, capture_output=True, text=True, check=False,
    env=os.environ | {"PYTHONPATH": str(REPO)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]  # --strict: a warning is an error
  assert "load_pretrained" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_one_version_is_told_everywhere():
  version = igpo_jax.__version__
  assert f"\nversion: {version}\n" in (REPO / "CITATION.cff").read_text()
  assert f"\n## {version}" in (REPO / "CHANGELOG.md").read_text()


def test_the_files_of_the_repository_can_be_read():
  yaml = pytest.importorskip("yaml")
  paths = [
    *(REPO / ".github").rglob("*.yml"),
    REPO / ".pre-commit-config.yaml",
    REPO / "CITATION.cff",
  ]
  read = {path.name: yaml.safe_load(path.read_text()) for path in paths}
  assert len(read) >= 6 and all(read.values())
  jobs = read["ci.yml"]["jobs"]
  assert jobs["tests"]["steps"][-1]["run"] == "bash .ci/run"
  stacks = jobs["tests"]["strategy"]["matrix"]["include"]
  assert {stack["python"] for stack in stacks} == {"3.11", "3.12", "3.13"}
  pinned = {stack["constraints"] for stack in stacks if "constraints" in stack}
  assert pinned == {f"constraints/{path.name}" for path in (REPO / "constraints").iterdir()}
