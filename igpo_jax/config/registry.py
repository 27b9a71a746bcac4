"""Estimators and objectives by name: where a config finds the options of a method.

A method is a frozen dataclass in a file of its own; its fields are its options. Those of the
package are the files in two folders, and no list of them is kept: they are found there. A config
file registers its own before it calls `default_config()`, which then has their options, too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from igpo_jax.config.fields import check_fields, meant
from igpo_jax.errors import UserError

T = TypeVar("T", bound=type)
FOLDERS = {"estimator": "igpo_jax.rl.estimators", "objective": "igpo_jax.rl.objectives"}
# The one whose options are those of the section itself, `config.objective.beta`.
OWNERS = {"objective": "clipped"}

_BUILT_IN: dict[tuple[str, str], type] = {}
_OWN: dict[tuple[str, str], type] = {}  # of config files


@dataclasses.dataclass(frozen=True)
class MethodOptions:
  """The options of methods by their names: `config.estimator`. Made by `section_class`."""


def register(kind: str, name: str) -> Callable[[T], T]:
  """Registers a method's class under `name`, as a decorator.

  The same class may be registered again, as when its file is loaded a second time.

  Args:
    kind: "estimator" or "objective".
    name: a Python identifier; options are then at `config.KIND.NAME.OPTION`.

  Raises:
    ValueError: the name is taken, or is no identifier.
    TypeError: the class is no frozen dataclass, or a field has no default or a type that an
      option cannot have.
  """
  if not name.isidentifier():
    raise ValueError(f"{kind} {name!r}: a name is made of letters, digits and underscores")

  def decorate(cls: T) -> T:
    _check_class(kind, name, cls)
    table = _BUILT_IN if cls.__module__.startswith("igpo_jax.") else _OWN
    known = (_BUILT_IN | _OWN).get((kind, name))
    if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
      raise ValueError(f"{kind} {name!r} is already registered, by {known.__module__}")
    cls.name = name
    table[kind, name] = cls
    return cls

  return decorate


def _check_class(kind: str, name: str, cls: type) -> None:
  what = f"{kind} {name!r}"
  if not getattr(getattr(cls, "__dataclass_params__", None), "frozen", False):
    raise TypeError(f"{what}: put @dataclasses.dataclass(frozen=True) below the registration")
  for field in dataclasses.fields(cls):
    if field.default is dataclasses.MISSING:
      raise TypeError(f"{what}: the option {field.name} needs a default")
  try:
    options = {field.name: field.default for field in dataclasses.fields(cls)}
    check_fields(cls, options, f"{kind}.{name}")
  except (KeyError, NameError) as error:
    raise TypeError(
      f"{what}: an option is an int, a float, a str, a bool, a Literal or a tuple of such, with "
      f"a range where it has one (igpo_jax.config.Count, Share, ...): {error}"
    ) from error


def classes(kind: str) -> Mapping[str, type]:
  """Every method of a kind by its name, those of the package first."""
  _load()
  return {name: cls for (of, name), cls in (_BUILT_IN | _OWN).items() if of == kind}


@functools.cache
def _load() -> None:
  """Imports every file of the two folders, which registers what is in it."""
  for folder in FOLDERS.values():
    package = importlib.import_module(folder)
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
      importlib.import_module(f"{folder}.{module}")


def find(kind: str, name: str) -> type:
  """The class of a method.

  Raises:
    UserError: there is none of that name; the message lists those there are.
  """
  known = classes(kind)
  if name not in known:
    raise UserError(
      f"config: rl.{kind}={name!r} is not one of {', '.join(known)}{meant(name, known)}"
    )
  return known[name]


def owns_section(kind: str, name: str) -> bool:
  """Whether a method's options are those of the section itself."""
  return OWNERS.get(kind) == name


def section_class(kind: str, base: type = MethodOptions) -> type:
  """The dataclass of a section: `base`'s options, and a subsection for every method with options.

  Args:
    kind: "estimator" or "objective".
    base: a frozen dataclass.
  """
  methods = {
    name: cls
    for name, cls in classes(kind).items()
    if not owns_section(kind, name) and dataclasses.fields(cls)
  }
  return _section_class(kind, base, tuple(methods.items()))


@functools.lru_cache(maxsize=64)
def _section_class(kind: str, base: type, methods: tuple[tuple[str, type], ...]) -> type:
  fields: list[Any] = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in methods]
  return dataclasses.make_dataclass(
    f"{kind.title()}Options", fields, bases=(base,), frozen=True,
    namespace={"__doc__": base.__doc__, "__module__": __name__},
  )  # fmt: skip
