"""--config=configs/X.py[:ARGUMENT] and --config.a.b=value, for the commands that take a config."""

from __future__ import annotations

import itertools

from absl import flags
from etils import epath
from ml_collections import config_flags

from igpo_jax.cli import UserError
from igpo_jax.config import Config, freeze


def config_flag() -> flags.FlagValues:
  """Flags of a command of its own, with --config among them."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "Path of a config file.", flag_values=values)
  return values


def parse(values: flags.FlagValues, argv: list[str], usage: str) -> tuple[Config, str]:
  """Parses a command line into `values`; returns the frozen config and its file's stem.

  Prints `usage` and exits with 0 where --help is asked for.

  Raises:
    UserError: an unknown flag, option or file, or a value of the wrong type.
  """
  if "--help" in argv or "-h" in argv:
    print(usage)
    raise SystemExit(0)
  file = _config_file(argv)
  try:
    rest = values(argv)
  except (AttributeError, KeyError) as error:
    reason = error
    while isinstance(reason, Exception):  # one wraps the other
      reason = reason.args[0]
    raise UserError(f"command line: the config has no such option: {reason}") from None
  except (flags.Error, TypeError, ValueError) as error:
    cause = error
    while cause.__context__ is not None and not isinstance(cause, UserError):
      cause = cause.__context__
    if isinstance(cause, UserError):  # raised by get_config
      raise cause from None
    raise UserError(f"command line: {error}") from None
  if len(rest) > 1:
    raise UserError(f"command line: unexpected argument {rest[1]!r}")
  return freeze(values.config), file.stem


def _config_file(argv: list[str]) -> epath.Path:
  """The file that --config names; the flag would tell by a traceback that it is missing."""
  values = [a.partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
  values += [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
  if not values:
    raise UserError("command line: --config=configs/X.py is missing")
  # "configs/X.py:ARGUMENT": what follows the colon goes to get_config(ARGUMENT).
  path = epath.Path(values[-1].partition(":")[0])
  if not path.is_file():
    raise UserError(f"--config={path}: no such file")
  return path
