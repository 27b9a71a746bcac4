"""The values that an option may have: declared where the option is, checked in one place.

    steps: Natural = 100                          a whole number, 0 or more
    threshold: Annotated[float, Range(0, 1)]      a number from 0 to 1
    cache: Literal["none", "prefix"] = "none"     one of these words

`check_fields` checks a dataclass of options, `number` an option of a command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from igpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers that an option may have as its value. NaN and infinity are never among them.

  Attributes:
    low, high: the smallest and the largest number.
    above: True leaves out `low` itself.
    below: True leaves out `high` itself.
    also: one more number, outside the range, that has a meaning of its own, such as -1.
    why: why other numbers make no sense, for the message; "" for nothing.
  """

  low: float = -math.inf
  high: float = math.inf
  above: bool = False
  below: bool = False
  also: float | None = None
  why: str = ""

  def __contains__(self, value: float) -> bool:
    if value == self.also:
      return True
    if not abs(value) <= sys.float_info.max:  # whole numbers have no end
      return False
    return (value > self.low if self.above else value >= self.low) and (
      value < self.high if self.below else value <= self.high
    )

  def __str__(self) -> str:
    if self.high < math.inf:
      text = f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
    elif self.low > -math.inf:
      text = f"above {self.low}" if self.above else f"at least {self.low}"
    else:
      text = "finite"
    text += "" if self.also is None else f", or {self.also}"
    return text + (f": {self.why}" if self.why else "")


LARGEST_WHOLE = 2**31 - 1  # jax counts in int32

Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what jax and numpy both take
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]

KINDS = {
  int: ("a whole number", numbers.Integral),
  float: ("a number", numbers.Real),
  str: ("text", str),
  bool: ("True or False", bool),
}


@functools.cache
def declarations(cls: type, ranges: bool = True) -> dict[str, Any]:
  """Option -> its declared type, with its `Range` if it has one, of a dataclass of options.

  Args:
    cls: the dataclass.
    ranges: False leaves out every `Range`.
  """
  hints = typing.get_type_hints(cls, include_extras=ranges)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_fields(cls: type, values: Mapping[str, Any], section: str) -> None:
  """Checks the values of options against their declarations.

  Args:
    cls: the dataclass of the section.
    values: option -> value; options without a value here are not checked.
    section: name of the section for messages; "" for options outside of sections.

  Raises:
    UserError: a value has the wrong type, is out of range, or is not one of the choices.
  """
  for name, hint in declarations(cls).items():
    if name in values:
      path = f"{section}.{name}" if section else name
      wrong = _wrong(hint, values[name], f"{path}={values[name]!r}", path)
      if wrong:
        raise UserError(f"config: {wrong}")


def outside(kind: type, value: float, allowed: Range) -> str:
  """What a number outside its range should be, such as "at least 1"; "" for one inside.

  A whole number without a limit of its own may have 31 bits.
  """
  if value not in allowed:
    return str(allowed)
  endless = kind is int and allowed.high == math.inf
  return f"at most {LARGEST_WHOLE}" if endless and value > LARGEST_WHOLE else ""


def _wrong(hint: Any, value: Any, shown: str, path: str) -> str:
  """What is wrong with a value, as "`shown` should be ..."; "" if nothing is."""
  if typing.get_origin(hint) is Annotated:
    hint, *extras = typing.get_args(hint)
    kind = _wrong(hint, value, shown, path)
    if kind or value is None:
      return kind
    ranges = (extra for extra in extras if isinstance(extra, Range))
    wrong = (outside(hint, value, allowed) for allowed in ranges)
    return next((f"{shown} must be {what}" for what in wrong if what), "")
  origin, parts = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if value in parts:
      return ""
    return f"{shown} is not one of {', '.join(map(str, parts))}{meant(value, parts)}"
  if origin in (typing.Union, types.UnionType):  # of a kind and None
    if value is None:
      return ""
    return _wrong(next(p for p in parts if p is not type(None)), value, shown, path)
  if origin is tuple:
    return _wrong_tuple(parts, value, shown, path)
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return "" if isinstance(value, hint) else f"{shown} should be a section of options"
  what, kind = KINDS[hint]
  good = isinstance(value, kind) and (hint is bool) == isinstance(value, bool)
  if hint is float and type(value) is int:
    good = abs(value) <= sys.float_info.max
  return "" if good else f"{shown} should be {what}"


def _wrong_tuple(parts: tuple[Any, ...], value: Any, shown: str, path: str) -> str:
  if not isinstance(value, (tuple, list)):
    return f"{shown} should be a tuple, such as ({value!r},)"
  if len(parts) == 2 and parts[1] is ...:
    parts = parts[:1] * len(value)
  elif len(parts) != len(value):
    return f"{shown} should be a tuple of {len(parts)}"
  # Of a tuple the item is named that is wrong.
  wrong = (_wrong(p, v, f"{path}: {v!r}", path) for p, v in zip(parts, value, strict=True))
  return next(filter(None, wrong), "")


def meant(given: Any, known: Iterable[Any]) -> str:
  """ "; did you mean X?" for the known name most like `given`; "" if none is like it."""
  near = difflib.get_close_matches(str(given), [str(k) for k in known], n=1)
  return f"; did you mean {near[0]}?" if near else ""


def number(kind: Any) -> Callable[[str], Any]:
  """A function that parses an option of a command line, for argparse's `type`.

  It raises UserError for a text that is not such a number. `cli.ArgumentParser` adds the option's
  name: "--steps=0 must be at least 1".

  Args:
    kind: a number type with a `Range`, such as `Count` or `Share`.
  """
  base, *extras = typing.get_args(kind)
  what, allowed = KINDS[base][0], next(e for e in extras if isinstance(e, Range))

  def parse(text: str) -> Any:
    try:
      value = base(text)
    except ValueError:
      raise UserError(f"{text} should be {what}") from None
    if wrong := outside(base, value, allowed):
      raise UserError(f"{text} must be {wrong}")
    return value

  parse.allowed = allowed
  return parse


@functools.cache
def descriptions(cls: type) -> dict[str, str]:
  """Option -> what the docstring's "Attributes:" say of it, the base classes' among them."""
  out: dict[str, str] = {}
  for base in cls.__bases__:
    if dataclasses.is_dataclass(base):
      out |= descriptions(base)
  names: list[str] = []
  _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
  for line in text.splitlines():
    if line.strip() and not line.startswith(" "):
      break  # another heading
    head = re.fullmatch(r"  (\w+(?:, \w+)*): (.*)", line)
    if head:
      names = head[1].split(", ")
      out |= dict.fromkeys(names, head[2].strip())
    else:
      out |= {name: f"{out[name]} {line.strip()}".strip() for name in names}
  return out


def require(condition: Any, message: str) -> None:
  """Raises `UserError("config: message")` unless the condition holds."""
  if not condition:
    raise UserError(f"config: {message}")


def check_section(section: Any, name: str) -> None:
  """Holds a dataclass of options, called `name` in messages, to what they declare."""
  check_fields(type(section), vars(section), name)
