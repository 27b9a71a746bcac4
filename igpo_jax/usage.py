"""The text of --help for a command that takes a config: its flags, and every option."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from absl import flags
from etils import epath
from ml_collections import config_dict

from igpo_jax.config import Config
from igpo_jax.config.fields import KINDS, declarations, descriptions
from igpo_jax.plugins import values_of

WIDTH = 100


class Option(NamedTuple):
  """One option of the config.

  Attributes:
    name: dotted, such as "rl.steps".
    kind: the values it may have, in words.
    default: its default value.
    text: its description, from the docstring of its section.
  """

  name: str
  kind: str
  default: Any
  text: str


def options(cls: type = Config, default: Any = None, prefix: str = "") -> Iterator[Option]:
  """Every option of the config or of one section, in the order of the dataclass."""
  default = cls() if default is None else default
  texts = descriptions(cls)
  for name, hint in declarations(cls).items():
    value = getattr(default, name)
    if dataclasses.is_dataclass(value):
      yield from options(type(value), value, f"{prefix}{name}.")
    else:
      yield Option(f"{prefix}{name}", kind_of(hint), value, texts.get(name, ""))


def kind_of(hint: Any) -> str:
  """A type in words: "a whole number, at least 1", "none | full | dots", "a tuple of text"."""
  origin, parts = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    allowed = str(parts[1])
    return kind_of(parts[0]) + ("" if allowed == "finite" else f", {allowed}")
  if origin is Literal:
    return " | ".join(parts)
  if origin is tuple and ... in parts:
    return f"a tuple, each {kind_of(parts[0])}"
  if origin is tuple:
    return f"({', '.join(map(kind_of, parts))})"
  if parts:
    return kind_of(next(p for p in parts if p is not type(None))) + ", or none"
  return KINDS[hint][0]


def help_text(
  values: flags.FlagValues,
  usage: str,
  config: config_dict.ConfigDict | None = None,
  file: epath.Path | None = None,
) -> str:
  """Usage, flags, and every option with its kind, its default and its description.

  Args:
    values: the command's own flags.
    usage: the command's docstring.
    config, file: the config file that was named and its config, if there was one. Then the text
      also has the file's docstring and the options that it changes.
  """
  width = min(WIDTH, shutil.get_terminal_size().columns)

  def paragraph(text: str) -> str:
    indent = " " * 6
    return textwrap.fill(
      " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent
    )

  lines = [
    usage.strip(), "", "Flags:", "  --config=FILE[:ARGUMENT]",
    paragraph("The config file; ARGUMENT goes to its get_config, such as the name of a preset."),
    "  --help", paragraph("Print this; with --config=FILE also what is in FILE."),
  ]  # fmt: skip
  for name in sorted(n for n in values if not n.startswith("?")):
    flag = values[name]
    value = "" if flag.boolean else f"={flag.flag_type().upper().split()[-1]}"
    lines += [f"  --{name}{value}", paragraph(flag.help)]
  if config is not None:
    about = ast.get_docstring(ast.parse(file.read_text())) or "(no docstring)"
    lines += ["", f"{file}:", textwrap.indent(about, "  ")]
  lines += ["", "Options of the config, each --config.NAME=VALUE:"]
  for option in options():
    value, note = option.default, ""
    if config is not None:
      value = _value(config, option.name)
      note = "" if value == option.default else f"; default {option.default!r}"
    lines.append(f"  {option.name} = {value!r}    ({option.kind}{note})")
    known = ", ".join(values_of(option.name))
    text = f"{option.text} Known: {known}." if known else option.text
    lines.append(paragraph(text[:1].upper() + text[1:]))
  return "\n".join(lines)


def _value(config: config_dict.ConfigDict, name: str) -> Any:
  """The value of an option such as "rl.steps"."""
  *sections, last = name.split(".")
  for section in sections:
    config = config[section]
  return tuple(config[last]) if isinstance(config[last], list) else config[last]
