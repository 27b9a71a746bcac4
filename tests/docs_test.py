"""The documentation: every link leads somewhere; what is said beside the code is true."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import urllib.parse

import pytest

import igpo_jax
from igpo_jax import flags as config_flags
from igpo_jax.config.file import load_python_file
from igpo_jax.errors import UserError
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
  # Older ones run on Node 20, which GitHub's machines no longer have (since September 2026).
  fewest = {"actions/checkout": 5, "actions/setup-python": 6}
  used = [step["uses"].split("@v") for job in jobs.values() for step in job["steps"]
          if "uses" in step]  # fmt: skip
  assert len(used) == 4 and all(int(version) >= fewest[name] for name, version in used)
  stacks = jobs["tests"]["strategy"]["matrix"]["include"]
  assert {stack["python"] for stack in stacks} == {"3.11", "3.12", "3.13"}
  pinned = {stack["constraints"] for stack in stacks if "constraints" in stack}
  assert pinned == {f"constraints/{path.name}" for path in (REPO / "constraints").iterdir()}


# --- commands -----------------------------------------------------------------------------

# Why a command of a page is not looked at here: where it is run, or what it would need.
NOT_HERE = {
  r"python3 -m venv |\S*pip install |pre-commit ": "installs; .ci/run installs so, afresh",
  r"\S*ruff |\S*python -m pytest": "CI runs them",
  r"(gcloud|hf download|curl|mv) ": "needs the network or an account",
  r"export ": "sets what the next lines read; launch_test and hosts_test set it so",
  r"launch/tpu/(?!resume|run)": "launch_test runs every line of launch.md with stand-ins",
  r"python make_data\.py": "own_data_test runs the blocks of its page",
  r"\S*python -m igpo_jax\.lm_eval ": "the harness' own command line; lm_eval_test runs it",
}
# What stands for something of the reader's in a command.
STANDS_FOR = {"DATA": "data", "HARDWARE": "gpu", "configs/X.py": "configs/quickstart.py",
              "own.py": "configs/quickstart.py"}  # fmt: skip
LAUNCHERS = r"(?:bash )?launch/(?:gpu\.sh|slurm\.sbatch|tpu/(?:resume|run)\.sh)"


def commands(text):
  """The commands of a page: every line of its shell blocks, and of others what begins as one."""
  begins = rf"(?:[A-Z_]+=\S+ )*(?:\S*python3? -m |python \S+\.py|{LAUNCHERS}|sbatch |pip install )"
  found = []
  for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
    lines = re.sub(r" *\\\n", " ", block).splitlines()
    found += [x for x in lines if kind in ("bash", "sh") or (not kind and re.match(begins, x))]
  rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
  indented = re.findall(r"^ {4}(\S.*)$", re.sub(r" *\\\n", " ", rest), re.MULTILINE)
  for line in [*found, *(x for x in indented if re.match(begins, x))]:
    line = re.sub(r"(^|\s)#.*", "", line).strip()
    yield from filter(None, map(str.strip, line.split("&&")))


class Parsed(Exception):
  """A command has read its command line, and would begin to work."""


def parse(line, monkeypatch):
  """Lets a command read its words: raises UserError, or SystemExit, if it would refuse them."""
  words = [STANDS_FOR.get(word, word) for word in shlex.split(line)]
  while re.match(r"[A-Z_]+=", words[0]):
    del words[0]
  words = [re.sub("|".join(STANDS_FOR), lambda m: STANDS_FOR[m[0]], word) for word in words]
  if words[0] in ("sbatch", "bash") or words[0].startswith("launch/"):
    script = next(k for k, word in enumerate(words) if word.startswith("launch/"))
    assert (REPO / words[script]).is_file(), line
    module, words = "igpo_jax.main", words[script + 1 :]
    words = words[words.index("--") + 1 :] if "--" in words else words
  elif words[1] == "-m":
    module, words = words[2], words[3:]
  else:
    module, words = words[1].removesuffix(".py").replace("/", "."), words[2:]
  spec = importlib.util.find_spec(module)
  assert spec, f"{line}: there is no {module}"
  if spec.submodule_search_locations:
    module += ".__main__"
  command = importlib.import_module(module)
  if hasattr(command, "FLAGS"):
    config_flags.parse(command.FLAGS, [module, *words], "")
    return
  read = argparse.ArgumentParser.parse_args

  def parsed(parser, args=None, namespace=None):
    read(parser, args, namespace)
    raise Parsed

  monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
  monkeypatch.setattr(sys, "argv", [module, *words])
  with pytest.raises(Parsed):
    command.main()


COMMANDS = [
  (path.name, line)
  for path in PAGES
  if path.name not in ("LOG.md", "CHANGELOG.md", "mistakes.md")
  for line in commands(path.read_text())
]


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}))
def test_the_commands_of_a_page_would_be_accepted_or_it_says_here_why_not(page, monkeypatch):
  monkeypatch.chdir(REPO)
  for line in [line for name, line in COMMANDS if name == page]:
    if any(re.match(pattern, line) for pattern in NOT_HERE):
      continue
    with monkeypatch.context() as patched:
      parse(line, patched)


def test_a_command_that_would_be_refused_is_found(monkeypatch):
  monkeypatch.chdir(REPO)
  text = "```bash\nexport A=1 && ls\n```\n    A=1 python -m igpo_jax.x \\\n      --y   # z\n"
  assert sorted(commands(text)) == ["A=1 python -m igpo_jax.x       --y", "export A=1", "ls"]
  for line, error in (
    ("python -m igpo_jax.main --config=configs/math500.py:data,h100-9", UserError),
    ("python -m igpo_jax.main --config=configs/quickstart.py --config.rl.stepz=3", UserError),
    ("python -m igpo_jax.generate --model=DIR --promt=x", (UserError, SystemExit)),
    ("python -m benchmarks.denoise --repeat=3", (UserError, SystemExit)),
    ("launch/gpu.sh --config=configs/nowhere.py --workdir=x", UserError),
    ("python -m igpo_jax.nowhere", AssertionError),
  ):
    with pytest.raises(error), monkeypatch.context() as patched:
      parse(line, patched)
  used = {p for p in NOT_HERE if any(re.match(p, line) for _, line in COMMANDS)}
  assert used == set(NOT_HERE) and len(COMMANDS) > 80
