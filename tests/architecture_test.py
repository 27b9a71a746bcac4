"""The structure of the package, read from its source: imports, circles, captions, safety."""

from __future__ import annotations

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

from tests.paths import REPO

PACKAGE = REPO / "igpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 500

# Imports run downwards only: a file may import from its own package and from the floors below.
FLOORS = (
  ("__main__",),
  (
    "api",
    "aot",
    "chat",
    "generate",
    "grade",
    "lm_eval",
    "main",
    "rehearse",
    "replay",
    "report",
    "serve",
    "show",
  ),
  ("train", "inference"),
  ("viewer",),
  ("eval", "convert", "rewrite"),
  ("rl",),
  ("tasks",),
  ("diffusion", "models", "data", "hints", "rewards"),
  ("ops",),
  ("parallel", "checkpoint", "outputs", "flags"),
  ("io", "usage", "types"),
  ("plugins",),
  ("config", "token_ids"),
  ("cli",),
  ("errors",),
)
# Between packages of one floor: graders read records, a trace's answer is where the grader finds
# one, and hints ask where an answer's value stands. Their modules make no circle all the same.
ALONG = {("rewards", "data"), ("data", "rewards"), ("hints", "data")}
HOST_PACKAGES = ("data", "hints", "rewards")
NO_JAX_PACKAGES = (*HOST_PACKAGES, "tasks", "rewrite")
NO_JAX = ("jax", "jaxlib", "flax", "optax", "orbax")


def module_name(path):
  parts = path.relative_to(REPO).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
  """The full names that a file imports, at its top or inside functions, with a line each."""
  return imported(ast.parse(path.read_text()), path)


def imported(tree, path):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: a relative import"
      for alias in node.names:
        yield f"{node.module}.{alias.name}", node.lineno


def subpackage(name):
  """The subpackage of a module: the part after the package's name."""
  parts = name.split(".")
  return parts[1] if len(parts) > 1 else "__init__"


def floor_of(name):
  for number, subpackages in enumerate(FLOORS):
    if name in subpackages:
      return number
  raise AssertionError(f"{name}: which floor is it on?")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path):
  here = subpackage(module_name(path))
  if here == "__init__":
    return  # the lazy door: it imports nothing by itself
  for name, line in imports(path):
    if not name.startswith("igpo_jax."):
      continue
    there = subpackage(name)
    if there in (here, "__version__") or (here, there) in ALONG:
      continue
    assert floor_of(there) > floor_of(here), f"{path}:{line}: {here} imports {there}"


def modules_imported(path, modules):
  """The modules among `modules` that a file imports, at its top or inside functions.

  Imports for annotations only (`if TYPE_CHECKING:`) do not run, so they are left out.
  """
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
      node.body = []
  here = module_name(path)
  for name, _ in imported(tree, path):
    found = name if name in modules else name.rpartition(".")[0]
    if found in modules and found != here:
      yield found


def circle(graph):
  """Nodes along a circle of a graph {node: its successors}, the first one again at the end."""
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return error.args[1][::-1]
  return []


@pytest.mark.slow
def test_no_module_imports_itself_in_a_circle():
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])
  modules = {module_name(path): path for path in FILES}
  graph = {name: set(modules_imported(path, modules)) for name, path in modules.items()}
  assert graph["igpo_jax.data.tokenizer"] >= {"igpo_jax.data.hf_tokenizer"}, "inside a function"
  assert not circle(graph), " imports ".join(circle(graph))


@pytest.mark.parametrize(
  "path", [p for p in FILES if subpackage(module_name(p)) in NO_JAX_PACKAGES], ids=lambda p: p.stem
)
def test_host_packages_import_no_jax(path):
  bad = [f"{n} (line {k})" for n, k in imports(path) if n.split(".")[0] in NO_JAX]
  assert not bad


def test_within_rl_only_exploration_touches_the_host_packages():
  for path in (PACKAGE / "rl").glob("*.py"):
    subpackages = {subpackage(name) for name, _ in imports(path) if name.startswith("igpo_jax.")}
    if path.stem == "rollout":
      assert set(HOST_PACKAGES) <= subpackages
    elif path.stem not in ("sampling", "rows", "refill"):
      assert not subpackages & set(HOST_PACKAGES), path


def test_linen_stays_in_the_models_package():
  for path in FILES:
    if subpackage(module_name(path)) != "models":
      assert not any(name.startswith("flax.linen") for name, _ in imports(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_have_a_caption_and_a_readable_length(path):
  text = path.read_text()
  assert ast.get_docstring(ast.parse(text)), "what is this file for?"
  assert len(text.splitlines()) <= MOST_LINES


UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_evaluated_or_unpickled(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      name = getattr(node.func, "id", None)
      assert name not in UNSAFE_CALLS, f"line {node.lineno}: {name}()"
      for keyword in node.keywords:
        true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        assert not (keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and true)
  used = {name.split(".")[0] for name, _ in imports(path)}
  assert not used & UNSAFE_MODULES


TEXTS = [
  p
  for folder in ("igpo_jax", "configs", "examples", "tests", "benchmarks", "launch", ".ci")
  for p in sorted((REPO / folder).rglob("*"))
  if p.is_file() and (p.suffix in (".py", ".sh", ".json", ".md", ".toml") or p.name == "run")
] + [REPO / "pyproject.toml", REPO / "setup.py"]
# Folders that are one machine's or one person's; written so that this file has none of them.
ABSOLUTE = re.compile("|".join((r"/" + r"(home|root|Users|work|mnt)/\w", r"[A-Z]:\\\\")))


def test_no_path_is_one_machines():
  for path in filter(pathlib.Path.exists, TEXTS):
    if "goldens" in path.parts:
      continue
    for number, line in enumerate(path.read_text().splitlines(), start=1):
      assert not ABSOLUTE.search(line), f"{path.relative_to(REPO)}:{number}: {line.strip()}"


@pytest.mark.parametrize(
  "module",
  [
    "igpo_jax.rewards.score",
    "igpo_jax.data.sources",
    "igpo_jax.data.pipeline",
    "igpo_jax.main",
    "igpo_jax.generate",
    "igpo_jax.chat",
    "igpo_jax.grade",
    "igpo_jax.rewrite",
    "igpo_jax.convert.__main__",
    "igpo_jax.aot",
    "igpo_jax.rehearse",
    "igpo_jax.replay",
    "igpo_jax.report",
    "igpo_jax.serve.__main__",
    "igpo_jax.show",
  ],
)
def test_host_modules_start_without_jax(module):
  """A grading worker or a data builder should not pay for jax, nor need it. The command
  looks at the inputs and prints its first line before it loads jax, which takes seconds."""
  code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_the_public_names_are_those_of_the_contract():
  import igpo_jax

  contract = {"load_pretrained", "Canvas", "SamplerConfig", "denoise", "ObjectiveConfig",
              "policy_loss", "group_advantages", "hint_canvas"}  # fmt: skip
  assert contract <= set(dir(igpo_jax))
  for name in dir(igpo_jax):
    assert getattr(igpo_jax, name) is not None
  with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
    igpo_jax.nothing_of_the_kind  # noqa: B018


def test_editors_see_the_public_names():
  """What is imported lazily is also imported where only type checkers look."""
  import igpo_jax
  from igpo_jax import api

  seen = set()
  for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "igpo_jax.api":
      seen |= {alias.name for alias in node.names}
  assert seen == set(igpo_jax.__all__) == set(api.__all__)
  assert (PACKAGE / "py.typed").exists() and "py.typed" in (REPO / "pyproject.toml").read_text()


def test_no_name_is_known_to_getattr_alone():
  for path in FILES:
    for node in ast.parse(path.read_text()).body:
      assert getattr(node, "name", "") not in ("__getattr__", "__dir__"), path
