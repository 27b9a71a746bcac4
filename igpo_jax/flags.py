"""--config=configs/X.py[:ARGUMENT] and --config.a.b=value, for the commands that take a config.

A command defines its own flags in the values that `config_flag` gives and hands its command
line to `parse`, which also answers --help and --print_config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from typing import NoReturn

from absl import flags
from etils import epath
from ml_collections import config_dict, config_flags

from igpo_jax.cli import say, underscored
from igpo_jax.config import Config, freeze, load_config_file
from igpo_jax.config.fields import meant
from igpo_jax.config.file import own_config
from igpo_jax.config.renamed import new_name, removed
from igpo_jax.errors import UserError
from igpo_jax.usage import help_text, options

PRINT = "print_config"
LONGEST_ARGUMENT = 64  # characters of it in a run's name


def config_flag() -> flags.FlagValues:
  """A new set of flags for one command. The command adds its own; `parse` adds --config."""
  values = flags.FlagValues()
  flags.DEFINE_bool(
    PRINT, False, "Print the whole config as JSON, and do nothing else.", flag_values=values
  )
  return values


def parse(values: flags.FlagValues, argv: list[str], usage: str) -> tuple[Config, str]:
  """Parses a command line into `values`; returns the frozen config and the run's name (`run_name`).

  With --help or --print_config it prints what is asked for and exits with code 0. It may be called
  again with another command line; nothing of the earlier one is kept.

  Args:
    values: the flags that `config_flag` made.
    argv: the program's name and the words after it.
    usage: the command's docstring, for --help.

  Raises:
    UserError: an unknown flag, option or file, a value of the wrong type, or what the config
      file itself raises.
  """
  forget(values)
  argv = underscored(argv)
  name, argv = _take_config(argv)
  helping = "--help" in argv or "-h" in argv
  if name is None and helping:
    _leave(help_text(values, usage))
  if name is None:
    raise UserError("command line: --config=configs/X.py is missing (see --help)")
  config, file = load(name)
  if helping:
    _leave(help_text(values, usage, config, file))
  _override(values, config, argv)
  frozen = freeze(values.config)
  if values[PRINT].value:
    _leave(json.dumps(dataclasses.asdict(frozen), indent=2))
  return frozen, run_name(name)


def forget(values: flags.FlagValues) -> None:
  """Removes from `values` what an earlier `parse` put there."""
  for name in [n for n in values if n == "config" or n.startswith("config.")]:
    delattr(values, name)
  values.unparse_flags()


def _leave(text: str) -> NoReturn:
  print(text)
  raise SystemExit(0)


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
  """What --config names, the last one if there are several, and the rest of the words."""
  name, rest, words = None, [], iter(argv)
  for word in words:
    if word in ("--config", "-config"):
      name = next(words, "")
    elif word.startswith(("--config=", "-config=")):
      name = word.partition("=")[2]
    else:
      rest.append(word)
  return name, rest


def load(name: str) -> tuple[config_dict.ConfigDict, epath.Path]:
  """The config that a config file makes, and the path of the file.

  Where there is no file of this name, "configs/NAME.py" is the package's own.

  Args:
    name: "FILE" or "FILE:ARGUMENT"; ARGUMENT is passed to the file's get_config.

  Raises:
    UserError: there is no such file, or `load_config_file` cannot load it.
  """
  path, colon, argument = name.partition(":")
  file = epath.Path(path)
  if not path or not file.is_file():
    own = own_config(path)
    if own is None:
      raise UserError(
        f"--config={path}: no such file; python -m igpo_jax configs lists the package's own"
      )
    say(f"config: there is no {path} here: it is the package's own, {own}")
    file = epath.Path(own)
  config = load_config_file(file, *([argument] if colon else []))
  return config, file


def run_name(name: str) -> str:
  """The default folder name of a run, from its --config "FILE" or "FILE:ARGUMENT".

  Characters of the argument other than letters, digits, "-" and "." become "_". A long argument is
  cut to its end, after a digest of all of it.
  Example: run_name("configs/quickstart.py:smoke") == "quickstart_smoke".
  """
  path, _, argument = name.partition(":")
  words = re.sub(r"[^\w.-]+", "_", argument, flags=re.ASCII).strip("_")
  if len(words) > LONGEST_ARGUMENT:
    digest = hashlib.sha256(argument.encode()).hexdigest()[:8]
    words = f"{digest}_{words[-LONGEST_ARGUMENT:]}"
  return f"{epath.Path(path).stem}_{words}" if words else epath.Path(path).stem


# --- overrides ---------------------------------------------------------------------------


def _override(values: flags.FlagValues, config: config_dict.ConfigDict, argv: list[str]) -> None:
  """Parses the rest of a command line: --config.a.b=value and the command's own flags."""
  for word in itertools.takewhile(lambda word: word != "--", argv[1:]):
    if match := re.match(r"--?(?:no)?config\.([^=]*)", word):
      _check_name(match[1])
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    rest = values(argv)
  except flags.UnrecognizedFlagError as error:
    known = [name for name in values if not name.startswith("config.")]
    near = meant(error.flagname, known) or " (see --help)"
    raise UserError(f"command line: there is no flag --{error.flagname}{near}") from None
  except flags.IllegalFlagValueError as error:
    raise UserError(f"command line: {_illegal(str(error))}") from None
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f"command line: {error}") from None
  if len(rest) > 1:
    raise UserError(f"command line: unexpected argument {rest[1]!r} (see --help)")


def _check_name(name: str) -> None:
  """Raises `UserError` unless `name`, such as "rl.steps" or "data.eval[0]", is an option."""
  plain = re.sub(r"\[\d+\]$", "", name)
  known = {option.name for option in options()}
  if plain in known:
    return
  if any(option.startswith(f"{plain}.") for option in known):
    raise UserError(f"command line: --config.{name} is a section: give --config.{name}.OPTION=...")
  if now := new_name(plain):
    raise UserError(f"command line: --config.{name} is --config.{now} now: use the new name")
  if why := removed(plain):
    raise UserError(f"command line: --config.{name}: {why}")
  raise UserError(
    f"command line: the config has no option {name!r}{meant(plain, known) or ' (--help lists all)'}"
  )


def _illegal(message: str) -> str:
  """absl's words for a value of another type, in ours where it is an option of the config."""
  match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
  kinds = {option.name: option.kind for option in options()}
  if not match or match[1] not in kinds:
    return message.removeprefix("flag ")
  return f"--config.{match[1]}={match[2]}: should be {kinds[match[1]]}"
