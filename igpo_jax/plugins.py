"""Code that registers things by name: the package's own tasks, and files of a user's.

What is registered (tasks, verifiers, reward parts, sources, trim rules, protocols) lies in tables
of the rooms that it is for. They know a plug-in by its name only and never import one.
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
  """Says what an option of the config may name, such as "reward.verifier", for --help."""
  _VALUES[option] = names


def values_of(option: str) -> list[str]:
  """The names that an option of the config may have, plug-ins included; [] if it names nothing."""
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
