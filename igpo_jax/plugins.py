"""Loads code that registers things by name: the package's own tasks, and a user's plug-in files.

Tasks, verifiers, reward parts, sources, trim rules and protocols are registered in tables, each in
the folder that uses it. These folders know a plug-in only by its name, and never import one.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
from collections.abc import Callable, Iterable, Sequence

from igpo_jax.config.file import load_python_file
from igpo_jax.errors import UserError

BUILT_IN = "igpo_jax.tasks"  # a package; importing it registers every task in it


_VALUES: dict[str, Callable[[], Iterable[str]]] = {}


def known_values(option: str, names: Callable[[], Iterable[str]]) -> None:
  """Declares, for --help, which names an option such as "reward.verifier" may have.

  Args:
    option: the option.
    names: returns the names that are registered at the time.
  """
  _VALUES[option] = names


def values_of(option: str) -> list[str]:
  """The names that an option may have, with those of plug-ins; [] for an option without names."""
  load_built_in()
  return list(_VALUES[option]()) if option in _VALUES else []


def load_built_in() -> None:
  """Registers the package's own tasks, once. Every lookup by name begins with it."""
  importlib.import_module(BUILT_IN)


def add_argument(parser: argparse.ArgumentParser) -> None:
  """Gives a command the option --plugins, for `load_files`."""
  parser.add_argument(
    "--plugins",
    action="append",
    default=[],
    metavar="FILE.py",
    help="a Python file that registers verifiers, reward parts, sources, tasks or trim rules, as a"
    " config file may; may be repeated",
  )


def load_files(files: Sequence[str]) -> None:
  """Runs plug-in files in their order.

  Raises:
    UserError: no such file, or what is wrong with one; says at which line.
  """
  for file in files:
    if not pathlib.Path(file).is_file():
      raise UserError(f"--plugins={file}: no such file")
    load_python_file(pathlib.Path(file), "plugins")
