"""The package as others get it: a wheel, built from its sdist, where there is no checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

import igpo_jax
from igpo_jax import __main__ as igpo
from igpo_jax.config import default_config, file
from igpo_jax.errors import UserError
from igpo_jax.flags import load
from tests.paths import REPO

PARTS = ("igpo_jax", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"


def project():
  return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def run(command, folder, **more):
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
    "JAX_PLATFORMS": "cpu"
  }
  done = subprocess.run(
    [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True,
    check=False, **more,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The path of the wheel that the sdist gives."""
  folder = tmp_path_factory.mktemp("build")
  source = folder / "source"
  source.mkdir()
  for part in PARTS:
    if (REPO / part).is_dir():
      shutil.copytree(REPO / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(REPO / part, source)
  name = run([sys.executable, "-c", BUILD.format("sdist", "..")], source).stdout.split()[-1]
  shutil.unpack_archive(folder / name, folder)
  unpacked = folder / name.removesuffix(".tar.gz")
  return (
    folder / run([sys.executable, "-c", BUILD.format("wheel", "..")], unpacked).stdout.split()[-1]
  )


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """The folder bin/ of an environment that holds the wheel, and sees what the tests' one has.

  What the package needs is not installed again. The checkout is not seen: Python reads the .pth
  files of the environment's own folder only.
  """
  if importlib.util.find_spec("pip") is None:
    pytest.skip("this environment has no pip to install the wheel with")
  folder = tmp_path_factory.mktemp("installed") / "venv"
  venv.EnvBuilder(symlinks=True).create(folder)
  pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q"]
  run([*pip, "--no-deps", "--no-index", "--no-compile", wheel], folder)
  (packages,) = folder.glob("lib/python3*/site-packages")
  seen = [p for p in sys.path if pathlib.Path(p).name in ("site-packages", "dist-packages")]
  (packages / "tests.pth").write_text("".join(f"{p}\n" for p in seen))
  return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_page_and_every_config(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  package = {str(p.relative_to(REPO)) for p in (REPO / "igpo_jax").rglob("*.py")}
  page = {str(p.relative_to(REPO)) for p in (REPO / "igpo_jax").glob("*/page/*")}
  configs = {f"igpo_jax/presets/{p.name}" for p in (REPO / "configs").glob("*.py")}
  assert package | page | configs | {"igpo_jax/py.typed"} == {
    n for n in names if ".dist-info/" not in n
  }
  assert wheel.name.startswith(f"igpo_jax-{igpo_jax.__version__}-py3-none-any")


# The preset with fewer steps still: the notebook's test takes all of them.
SMOKE = ("train", "--config=configs/quickstart.py:smoke", "--workdir=run", "--config.arms=()",
         "--config.sft.steps=20", "--config.rl.steps=2", "--config.rl.eval_every=2",
         "--config.eval.initial=false", "--config.log.tensorboard=false")  # fmt: skip
# One process after the training, so that jax is loaded once.
AFTER = """
import json, pathlib, sys
import igpo_jax
from igpo_jax.__main__ import dispatch

def igpo(*words):
  sys.argv = ["igpo", *words]
  assert not dispatch()

row = json.loads(open("run/samples.jsonl").readline())
print(pathlib.Path(igpo_jax.__file__).parent)
print(igpo_jax.__version__)
igpo("generate", "--model=run", "--prompt=" + row["prompt"], "--raw")
igpo("convert", "--source=run/checkpoints/rl/2", "--target=hf")
igpo("grade", "--benchmark=gsm8k", "--generations=answers.jsonl", "--output=graded.jsonl")
igpo("report", "--workdir=run", "--output=page.html")
"""


@pytest.mark.slow
def test_the_wheel_alone_trains_generates_converts_grades_and_reports(installed, tmp_path):
  answer = {"question": "6 times 7?", "completion": "It is \\boxed{42}.", "answer": "42"}
  (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
  told = run([installed / "igpo", *SMOKE], tmp_path).stderr
  assert "config: there is no configs/quickstart.py here: it is the package's own" in told
  done = run([installed / "python", "-c", AFTER], tmp_path).stdout.splitlines()
  assert pathlib.Path(done[0]).is_relative_to(installed.parent), "not the checkout"
  assert done[1] == igpo_jax.__version__
  assert json.loads((tmp_path / "graded.jsonl").read_text())["correct"] is True
  assert (tmp_path / "hf" / "config.json").exists()
  assert "<html" in (tmp_path / "page.html").read_text()[:200]


def test_configs_of_the_package_are_found_wherever_one_is(tmp_path, monkeypatch, capsys):
  """A file of the user's comes first; of other paths nothing is guessed."""
  monkeypatch.chdir(tmp_path)
  config, path = load("configs/quickstart.py:smoke")
  assert config.rl.steps == 6 and path.name == "quickstart.py"
  assert (
    "there is no configs/quickstart.py here: it is the package's own" in capsys.readouterr().err
  )
  for path in ("quickstart.py", "configs/nowhere.py", "other/configs/quickstart.py", "configs/"):
    with pytest.raises(UserError, match="no such file; python -m igpo_jax configs lists"):
      load(path)
  (tmp_path / "configs").mkdir()
  own = "from igpo_jax.config import default_config as get_config\n"
  (tmp_path / "configs" / "quickstart.py").write_text(own)
  assert load("configs/quickstart.py")[0].to_dict() == default_config().to_dict()
  assert not capsys.readouterr().err


def igpo_command(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["igpo", *words])
  return igpo.dispatch()


def test_one_command_hands_over_to_every_other(monkeypatch, capsys, tmp_path):
  page = (REPO / "docs" / "commands.md").read_text()
  modules = set(re.findall(r"^\| `python -m igpo_jax\.(\w+)", page, re.MULTILINE))
  assert modules == {module.split(".")[0] for module, _ in igpo.COMMANDS.values()}
  for name in ("generate", "grade", "convert", "rewrite"):
    with pytest.raises(SystemExit):
      igpo_command(monkeypatch, name, "--help")
    assert f"usage: python -m igpo_jax.{name}" in capsys.readouterr().out
  assert not igpo_command(monkeypatch, "--version")
  assert capsys.readouterr().out.strip() == igpo_jax.__version__
  with pytest.raises(UserError, match="there is no command 'generat'; did you mean generate"):
    igpo_command(monkeypatch, "generat")
  igpo_command(monkeypatch, "configs")
  names = capsys.readouterr().out.split()
  assert names == [f"configs/{path.name}" for path in file.own_configs()]
  assert "configs/quickstart.py" in names
  igpo_command(monkeypatch, "configs", str(tmp_path / "mine"))
  assert len(list((tmp_path / "mine").iterdir())) == len(names)
  with pytest.raises(UserError, match="exists: nothing is overwritten"):
    igpo_command(monkeypatch, "configs", str(tmp_path / "mine"))


def test_what_is_tested_is_what_is_stated():
  """Each stack's constraints name every requirement, within its bounds."""
  packaging = pytest.importorskip("packaging.requirements")
  required = [packaging.Requirement(text) for text in project()["dependencies"]]
  files = sorted((REPO / "constraints").glob("*.txt"))
  assert len(files) == 2
  for path in files:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    for requirement in required:
      name = re.sub(r"[-_.]+", "-", requirement.name).lower()
      assert requirement.specifier.contains(pinned[name]), (path.name, name)
