"""Settings for asking a model: those of the run that trained it, changed by flags. Needs no jax."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from igpo_jax.config import Config, EvalConfig, SamplerConfig
from igpo_jax.config.renamed import upgraded
from igpo_jax.data.sources import Prompting
from igpo_jax.errors import UserError
from igpo_jax.eval.protocols import plain_setting
from igpo_jax.io.jsonl import resolved
from igpo_jax.io.text import read_object

CONFIG_FILE = "config.json"
STAGES = ("rl", "sft")  # of two stages' checkpoints, the later stage's


class Settings(NamedTuple):
  """The settings with which a model is asked.

  Attributes:
    sampler: lengths, steps, temperature and the other options of the sampler.
    prompting: the system message and the template around a prompt.
    origin: workdir of the run that the settings come from; None if they are the defaults.
  """

  sampler: SamplerConfig
  prompting: Prompting
  origin: epath.Path | None


def find_model(model: str) -> epath.Path:
  """The directory to read a model from. For the workdir of a run it is its newest checkpoint.

  Raises:
    UserError: there is no such directory, or the run has no checkpoint.
  """
  path = epath.Path(model)
  if not model or not path.exists():
    raise UserError(f"--model={model}: no such directory")
  if not path.is_dir():
    raise UserError(f"--model={model} is a file; give the directory of the model")
  if not (_is_run(path) and (path / "checkpoints").is_dir()):
    return path
  for stage in STAGES:
    folder = path / "checkpoints" / stage
    steps = [s for s in folder.iterdir() if s.name.isdecimal()] if folder.is_dir() else []
    if steps:
      return max(steps, key=lambda step: int(step.name))
  raise UserError(f"--model={model} is a run without a checkpoint; let it train first")


def _is_run(folder: epath.Path) -> bool:
  file = folder / CONFIG_FILE
  return file.exists() and "stages" in read_object(file)


def find_run(model: epath.Path) -> epath.Path | None:
  """The workdir of the run that a checkpoint belongs to; None for any other directory."""
  for folder in resolved(model).parents:
    if folder.name == "checkpoints":
      return folder.parent if _is_run(folder.parent) else None
  return None


def settings_of(model: epath.Path) -> Settings:
  """The settings of the run that a checkpoint belongs to; the defaults for any other model.

  The sampler is the one of the run's evaluations: `sampler` with `eval.temperature`, `eval.steps`
  and `eval.cache`. The system message and the template are those of the source `data.rl`, or else
  `data.sft`.

  Raises:
    UserError: the run's config.json cannot be read, or has options that are not known.
  """
  run = find_run(model)
  if run is None:
    return Settings(SamplerConfig(), Prompting(), None)
  file = run / CONFIG_FILE
  values = upgraded(read_object(file))
  config = dataclasses.replace(
    Config(),
    sampler=_section(SamplerConfig, values, "sampler", file),
    eval=_section(EvalConfig, values, "eval", file),
  )
  data = values.get("data")
  uris = [data.get(name) for name in ("rl", "sft")] if isinstance(data, dict) else []
  uri = next((uri for uri in uris if isinstance(uri, str) and uri), "")
  options = dict(urllib.parse.parse_qsl(uri.partition("?")[2]))
  prompting = Prompting(**{k: v for k, v in options.items() if k in ("system", "template")})
  return Settings(plain_setting(config).sampler, prompting, run)


def _section(cls: type, values: Mapping[str, Any], name: str, file: epath.Path) -> Any:
  """One section of a run's config.json; an option that it lacks has its default."""
  section = values.get(name, {})
  if not isinstance(section, dict):
    raise UserError(f"{file}: {name} should be an object, not {type(section).__name__}")
  known = {field.name for field in dataclasses.fields(cls)}
  if unknown := sorted(set(section) - known):
    raise UserError(f"{file}: {name}.{unknown[0]} is no option of this version")
  try:
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in section.items()})
  except UserError as error:
    raise UserError(f"{file}: {error}") from error


def override(sampler: SamplerConfig, given: Mapping[str, Any]) -> SamplerConfig:
  """A sampler with the options in `given`; lengths and steps that are not given are made to fit.

  Examples with the defaults, 256 tokens in blocks of 32 and 128 steps: gen_length=64 gives blocks
  of 32 and 32 steps. gen_length=100 gives blocks of 25 and 48 steps. block_length=48 gives 288
  tokens, since 256 is not a multiple of 48. steps=256 changes nothing else.

  Raises:
    UserError: an option cannot have its value, or the other options cannot be made to fit it.
  """
  lengths = ("gen_length", "block_length", "steps")
  if not any(name in given for name in lengths):
    return dataclasses.replace(sampler, **given)
  gen = given.get("gen_length", sampler.gen_length)
  block = given.get("block_length")
  if block is None:
    per = sampler.block_length
    divisors = [d for d in range(1, gen + 1) if gen % d == 0]
    if "steps" in given:  # a share of the steps for every block
      divisors = [d for d in divisors if given["steps"] % (gen // d) == 0] or divisors
    # The nearest, and of two as near the shorter.
    block = min(divisors, key=lambda d: (abs(math.log(d / per)), d))
  elif "gen_length" not in given:
    gen = -(-gen // block) * block
  blocks = max(1, gen // block)
  density = sampler.steps / sampler.gen_length  # steps for a token
  steps = given.get("steps") or blocks * max(1, math.floor(block * density))
  fitted = dict(zip(lengths, (gen, block, steps), strict=True))
  return dataclasses.replace(sampler, **{**given, **fitted})


def describe(settings: Settings, given: Mapping[str, Any]) -> str:
  """One line: lengths, steps, temperature, other options that differ from their defaults, and the
  run that the settings come from."""
  sampler, plain = settings.sampler, SamplerConfig()
  shown = ["gen_length", "block_length", "steps", "temperature"]
  shown += [
    field.name
    for field in dataclasses.fields(sampler)
    if field.name not in shown and getattr(sampler, field.name) != getattr(plain, field.name)
  ]
  text = " ".join(f"{name}={getattr(sampler, name)}" for name in shown)
  whose = "the defaults" if settings.origin is None else f"as {settings.origin} evaluates"
  return f"{text} ({whose}{', with ' + ', '.join(given) + ' as given' if given else ''})"
