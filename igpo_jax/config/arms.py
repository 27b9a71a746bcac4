"""Arms: the RL stage of a config once more, with some options changed, from the same start.

    config.arms = ("GRPO: rl.exploration=none", "careful: rl.exploration=none, objective.beta=0.1")

The run itself is what the arms are compared with. So the example is three times RL after one SFT
stage (train/arms.py). An arm may change what only RL reads: another SFT stage or another model is a
run of its own. What it changes of the sampler is how its rollouts are made; all arms are evaluated
as the run is.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from igpo_jax.config.fields import meant, require
from igpo_jax.config.renamed import new_name
from igpo_jax.config.run import Config
from igpo_jax.errors import UserError

# Sections and single options that an arm may change.
CHANGEABLE = (
  "rl", "rl_optimizer", "hints", "estimator", "objective", "reward.weights", "data.rl",
  *(f"sampler.{name}" for name in ("temperature", "steps", "cache", "refresh_every", "threshold",
                                   "factor", "adaptive")),
)  # fmt: skip
_SEPARATOR = re.compile(r",\s*(?=\w+(?:\.\w+)+=)")  # a comma before the next OPTION=


def arms_of(config: Config) -> dict[str, Config]:
  """The config of each arm by its name, in the order of `config.arms`; {} without an RL stage.

  Each is a config of its own, without arms and without the stage "eval". An arm that changes
  nothing of this config, because its options were given to the run itself, is left out.

  Raises:
    UserError: an arm is not written as NAME: OPTION=VALUE, ..., changes an option that it may not
      change, or gives an option a value that it cannot have.
  """
  if "rl" not in config.stages:
    return {}
  stages = tuple(stage for stage in config.stages if stage != "eval")
  plain = dataclasses.replace(config, arms=(), stages=stages)
  out: dict[str, Config] = {}
  for text in config.arms:
    name, changes = _parsed(text)
    require(name not in out, f"arms: {name!r} is there twice")
    try:
      out[name] = _changed(plain, "", changes)
    except UserError as error:
      raise UserError(f"config: arms: {name}: {str(error).removeprefix('config: ')}") from None
  return {name: arm for name, arm in out.items() if arm != plain}


def _parsed(text: str) -> tuple[str, dict[str, str]]:
  """(name, option -> value) of "NAME: OPTION=VALUE, ..."."""
  name, colon, rest = text.partition(":")
  pairs = [item.partition("=") for item in _SEPARATOR.split(rest.strip())]
  require(
    re.fullmatch(r"\w[\w.-]*", name)
    and colon
    and all(option and sign for option, sign, _ in pairs),
    f"arms: {text!r} should be NAME: OPTION=VALUE, OPTION=VALUE, such as "
    "'GRPO: rl.exploration=none'; NAME is also that of a folder",
  )
  return name, {option.strip(): value.strip() for option, _, value in pairs}


def _changed(section: Any, place: str, changes: dict[str, str]) -> Any:
  """A section with some options set, all at once: they may be allowed together only.

  Args:
    section: a section of a config.
    place: its dotted name with a dot at the end; "" for the whole config.
    changes: dotted name of an option of this section -> its value as text.
  """
  known, inner, values = [field.name for field in dataclasses.fields(section)], {}, {}
  for path, text in changes.items():
    name, dot, rest = path.partition(".")
    option = place + path
    if name not in known or bool(dot) != dataclasses.is_dataclass(getattr(section, name)):
      now = new_name(option)
      raise UserError(
        f"{option} is {now} now" if now else f"there is no option {option}{meant(name, known)}"
      )
    if dot:
      inner.setdefault(name, {})[rest] = text
      continue
    require(
      any(f"{option}.".startswith(f"{other}.") for other in CHANGEABLE),
      f"{option} is not RL's alone; an arm may change {', '.join(CHANGEABLE)}",
    )
    values[name] = _value(text, getattr(section, name))
  for name, of_section in inner.items():
    values[name] = _changed(getattr(section, name), f"{place}{name}.", of_section)
  return dataclasses.replace(section, **values)


def _value(text: str, old: Any) -> Any:
  """The value that a text stands for: text where the option's value is text, else as in Python."""
  if isinstance(old, str):
    return text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text  # which the option's own check refuses
  if isinstance(value, (list, tuple)):
    return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
  return value
