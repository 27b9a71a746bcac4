"""The options as a ConfigDict that can be edited, and as frozen dataclasses that a run gets.

Options are defined by the dataclasses of `method` and `run` only. `default_config()` turns them
into an ml_collections ConfigDict, which config files and flags edit. `freeze()` turns it back into
dataclasses, which are hashable and so can be static arguments of `jax.jit`, and checks the options
that depend on each other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from igpo_jax.config import registry
from igpo_jax.config.arms import arms_of
from igpo_jax.config.fields import check_fields, declarations, meant, require
from igpo_jax.config.method import Dtype, check_trainable, full_dtype
from igpo_jax.config.renamed import new_name, removed, upgraded
from igpo_jax.config.run import METHOD_SECTIONS, STAGES, Config, method_section
from igpo_jax.errors import UserError


def default_config() -> config_dict.ConfigDict:
  """All options at their defaults, as a ConfigDict to edit.

  Setting an option to a value of another type raises TypeError at once. A name that is not an
  option is reported by `freeze`.
  """
  return _to_config_dict(Config())


def _to_config_dict(section: Any) -> config_dict.ConfigDict:
  out = config_dict.ConfigDict()
  hints = declarations(type(section), ranges=False)
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      value = _to_config_dict(value)
    elif value is None:
      (kind,) = (t for t in typing.get_args(hints[field.name]) if t is not type(None))
      value = config_dict.placeholder(kind)
    out[field.name] = value
  return out


def freeze(config: ml_collections.ConfigDict) -> Config:
  """Checks a ConfigDict and turns it into frozen, hashable dataclasses.

  Raises:
    UserError: an unknown option, a value out of range, or a combination that
      cannot work; the message names the option.
  """
  frozen = _from_config_dict(Config, config, "")
  check(frozen)
  return frozen


def from_json(options: Mapping[str, Any], where: Any) -> Config:
  """The config that a run wrote as config.json; an option that it lacks has its default.

  Args:
    options: contents of the file.
    where: the file, for messages.

  Raises:
    UserError: an option that this version does not know, or a value that it cannot have.
  """
  defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
  known = {name: value for name, value in upgraded(options).items() if name != "resolved"}
  filled = config_dict.ConfigDict(_filled(known, defaults), type_safe=False)
  try:
    return freeze(filled)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error


def _filled(given: Any, defaults: Any) -> Any:
  """Nested options with the defaults of those that are not given; lists as tuples."""
  if isinstance(given, list):
    return tuple(_filled(item, None) for item in given)
  if not isinstance(given, dict):
    return given
  rest = defaults if isinstance(defaults, dict) else {}
  return {
    name: _filled(given.get(name, rest.get(name)), rest.get(name)) for name in (*rest, *given)
  }


def check(config: Config) -> None:
  """Raises `UserError` if options contradict each other that are each allowed on their own."""
  order = [STAGES.index(stage) for stage in config.stages]
  require(
    order == sorted(set(order)),
    f"stages={config.stages}: name each stage at most once, in the order {', '.join(STAGES)}",
  )
  for stage in ("sft", "rl"):
    if stage in config.stages:
      require(
        getattr(config.data, stage),
        f"stages has {stage!r} but data.{stage} names no source: give one, such as "
        f"data.{stage}='jsonl:FILE', or leave the stage out",
      )
  best = config.checkpoint.best_metric
  names = [item.partition("=")[0] for item in config.data.eval]
  require(
    config.sft.select == "last" or any(best.startswith(f"eval/{name}") for name in names),
    "sft.select='best' needs checkpoint.best_metric, such as 'eval/NAME/accuracy' with a NAME from "
    f"data.eval (it is {best!r})",
  )
  require(
    math.floor(config.hints.replace_fraction * config.rl.group_size) >= 1
    or config.rl.exploration == "none",
    f"hints.replace_fraction={config.hints.replace_fraction} of rl.group_size="
    f"{config.rl.group_size} completions replaces none; raise one of them",
  )
  for name, arm in arms_of(config).items():
    try:
      check(arm)
    except UserError as error:
      raise UserError(f"config: arms: {name}: {str(error).removeprefix('config: ')}") from None
  check_trainable(config.model, config.stages)
  for kind in METHOD_SECTIONS:
    registry.find(kind, getattr(config.rl, kind))
  if "rl" in config.stages and config.rl.rounding == "stochastic":
    rank, dtype = config.model.lora.rank, config.model.dtype
    require(
      not rank,
      f"rl.rounding='stochastic' is for training every parameter, and model.lora.rank={rank}: "
      "adapters are added in float32 and lose nothing; use rl.rounding='nearest'",
    )
    require(
      dtype != "float16",
      f"rl.rounding='stochastic' rounds to bfloat16, and model.dtype={dtype!r}: use bfloat16, or "
      "rl.rounding='nearest'",
    )


def _from_config_dict(cls: type, config: ml_collections.ConfigDict, path: str) -> Any:
  """A dataclass with the values of a ConfigDict; `path` is its name, "" for the whole."""
  hints = declarations(cls, ranges=False)
  inside = lambda name: f"{path}.{name}" if path else name
  for name in config:
    if name not in hints:
      if now := new_name(inside(name)):
        raise UserError(f"config: {inside(name)} is {now} now: use the new name")
      if why := removed(inside(name)):
        raise UserError(f"config: {why}")
      raise UserError(f"config: there is no option {inside(name)}{meant(name, hints)}")
  kwargs = {}
  for name, value in config.items():
    if dataclasses.is_dataclass(hints[name]):
      if not isinstance(value, ml_collections.ConfigDict):
        raise UserError(f"config: {inside(name)}={value!r} should be a section of options")
      section = method_section(name) if inside(name) in METHOD_SECTIONS else hints[name]
      value = _from_config_dict(section, value, inside(name))
    elif hints[name] == Dtype:
      value = full_dtype(value)
    elif isinstance(value, (list, tuple)):
      value = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
    kwargs[name] = value
  check_fields(cls, kwargs, path)
  for name, value in kwargs.items():
    # Also where it was written without a point: jax takes no whole number past int32.
    if type(value) is int and hints[name] in (float, float | None):
      kwargs[name] = float(value)
  return cls(**kwargs)
