"""Loading Python files of a user's by path: config files, and plug-ins that register things."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ml_collections import config_dict

from igpo_jax.cli import mistake
from igpo_jax.config.renamed import removed_leaves, renamed_leaves
from igpo_jax.errors import UserError

# Modules that were public under another name -> where their names are today.
MOVED = {
  "igpo_jax.align": "igpo_jax.rewrite",
  "igpo_jax.config_file": "igpo_jax.config",
  "igpo_jax.convert.sources": "igpo_jax.convert.open",
  "igpo_jax.data.maps": "igpo_jax.tasks.letter_maps",
  "igpo_jax.data.synthetic": "igpo_jax.tasks.chains",
  "igpo_jax.fields": "igpo_jax.config.fields",
  "igpo_jax.options": "igpo_jax.config",
  "igpo_jax.parallel.slices": "igpo_jax.parallel.tpu",
  "igpo_jax.parallel.watch": "igpo_jax.parallel.liveness",
  "igpo_jax.rewards.countdown": "igpo_jax.tasks.countdown",
  "igpo_jax.rewards.sudoku": "igpo_jax.tasks.sudoku",
  "igpo_jax.rl.estimator": "igpo_jax.rl.estimate",
  "igpo_jax.rl.objective": "igpo_jax.rl.objectives.clipped",
  "igpo_jax.rowfile": "igpo_jax.io.jsonl",
  "igpo_jax.textfiles": "igpo_jax.io.text",
  "igpo_jax.train.programs": "igpo_jax.train.ahead_of_time",
  "igpo_jax.train.update": "igpo_jax.train.policy_update",
}

CONFIGS = "configs"  # the folder whose files `own_config` finds wherever a command is run


def own_configs() -> list[pathlib.Path]:
  """The package's own config files, by name: of the checkout, or of the wheel (setup.py)."""
  package = pathlib.Path(__file__).resolve().parent.parent
  installed = package / "presets"
  folder = installed if installed.is_dir() else package.parent / CONFIGS
  return sorted(folder.glob("*.py"))


def own_config(path: str) -> pathlib.Path | None:
  """The package's own file that "configs/NAME.py" names; None for any other path.

  With it the commands of the documentation run in any folder, also where the package is installed
  and nobody has a checkout.
  """
  folder, _, name = path.removeprefix("./").rpartition("/")
  found = {file.name: file for file in own_configs()}
  return found.get(name) if folder == CONFIGS else None


def load_config_file(path: os.PathLike, *args: Any) -> config_dict.ConfigDict:
  """The config that `get_config(*args)` of a config file returns.

  The file can import modules that lie beside it, such as one with the user's own reward.

  Args:
    path: path of the file. Its folder need not be on Python's path.
    args: passed to get_config: nothing, or the ARGUMENT of --config=FILE:ARGUMENT.

  Raises:
    UserError: the file has no get_config, it does not take `args`, or it fails; the message gives
      the file and the line. A UserError that the file raises is passed on.
  """
  path = pathlib.Path(path)
  module = load_python_file(path, "config")
  with _mistakes_of(path):
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise UserError(f"{path} has no function get_config")
    try:
      inspect.signature(get_config).bind(*args)
    except TypeError:
      given = f"takes no argument {args[0]!r}" if args else "needs an argument: FILE:ARGUMENT"
      raise UserError(f"{path}: get_config {given} (--config=FILE --help tells more)") from None
    config = get_config(*args)
  if not isinstance(config, config_dict.ConfigDict):
    raise UserError(
      f"{path}: get_config returned {config!r}; return a config, from "
      "igpo_jax.config.default_config()"
    )
  return config


def load_python_file(path: os.PathLike, what: str) -> ModuleType:
  """Runs a Python file and returns it as a module; what it registers is registered.

  Modules beside the file can be imported from it.

  Args:
    what: the kind of file, for messages: "config" or "plugins".

  Raises:
    UserError: what the file raises, or what is wrong with it; says at which line.
  """
  path = pathlib.Path(path)
  name = f"{what}_{path.stem}"
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise UserError(f"{path}: a {what} file is Python and ends in .py")
  # The last place: a config called json.py should not hide a module of the same name.
  folder = str(path.resolve().parent)
  if folder not in sys.path:
    sys.path.append(folder)
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  with _mistakes_of(path):
    spec.loader.exec_module(module)
  return module


@contextlib.contextmanager
def _mistakes_of(path: pathlib.Path) -> Iterator[None]:
  """Whatever the file's code raises becomes a `UserError` that says at which line."""
  try:
    yield
  except Exception as error:
    if known := mistake(error):
      raise known from None
    if isinstance(error, ModuleNotFoundError) and error.name in MOVED:
      raise UserError(
        f"{_place(error, path)}: {error.name} is {MOVED[error.name]} now: import from there"
      ) from None
    if isinstance(error, LookupError | AttributeError) and (now := _renamed(error)):
      raise UserError(f"{_place(error, path)}: {now}") from None
    text = error.msg if isinstance(error, SyntaxError) else error
    raise UserError(f"{_place(error, path)}: {type(error).__name__}: {text}") from error


def _renamed(error: BaseException) -> str:
  """What to say of a config file that reads an option that was renamed or removed; "" if none."""
  name = re.sub(r"\W", "", str(error))  # ml_collections quotes the last part of it
  names = renamed_leaves(name)
  if not names:
    return "; ".join(removed_leaves(name))
  return f"there is no option {name}: it is {' or '.join(names)} now"


def _place(error: BaseException, path: pathlib.Path) -> str:
  """ "FILE, line N": where in the config file an error came from."""
  if isinstance(error, SyntaxError) and error.filename:
    same = pathlib.Path(error.filename).resolve() == path.resolve()
    return f"{path if same else error.filename}, line {error.lineno}"
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if pathlib.Path(f.filename).resolve() == path.resolve()]
  return f"{path}, line {lines[-1]}" if lines else str(path)
