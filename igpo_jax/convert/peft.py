"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors, both ways."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from igpo_jax.config import LoRAConfig, ModelConfig
from igpo_jax.convert.entries import fill, key_pattern, layers_of
from igpo_jax.convert.safetensors_io import Reader, raise_problems
from igpo_jax.errors import UserError
from igpo_jax.io.text import read_object
from igpo_jax.models import lora, make_lm
from igpo_jax.models.families import find
from igpo_jax.models.network import stack_sizes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options that must have these values for an adapter to be x A B alpha / r on whole layers. The
# first value is PEFT's default.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
}
# Options that say where an adapter came from or how it was trained, not what it computes.
_INERT = frozenset({
  "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
  "task_type", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config",
  "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
_READ = frozenset({
  "r", "lora_alpha", "target_modules", "exclude_modules", "init_lora_weights",
})  # fmt: skip
# Initializations of A and B that leave the base as it was published. Others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) take something out of the base weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def module_name(family: str, path: str) -> str:
  """The Hugging Face name of one of our linear layers: "model.transformer.blocks.{}.q_proj"."""
  return key_pattern(family, f"{path}/kernel").removesuffix(".weight")


def linear_layers(base: ModelConfig) -> list[str]:
  """Our names of all linear layers of a model, including its head even if it is tied."""
  model = make_lm(dataclasses.replace(base, lora=LoRAConfig()))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  names = {"/".join(path) for path in lora.linear_layers(shapes)} | {"head"}
  family = find(base.family)
  # In the order of a block, which is that of the family's table.
  known = [f"{stack}/{name}" for stack, table in (
    ("first_blocks", family.first_block), ("blocks", family.block)) for name in table]  # fmt: skip
  ordered = [name.removesuffix("/kernel") for name in (*known, *family.top)]
  return [name for name in ordered if name in names]


def read_config(directory: epath.PathLike, base: ModelConfig) -> LoRAConfig:
  """Reads the options of a PEFT adapter.

  Args:
    directory: the directory of adapter_config.json.
    base: the model that the adapter is for.

  Raises:
    UserError: there is no such file, or it has an option that changes what an adapter computes.
  """
  file = epath.Path(directory) / CONFIG_FILE
  if not file.exists():
    raise UserError(f"{directory} has no {CONFIG_FILE}; is it a PEFT adapter?")
  theirs = read_object(file)
  problems = [
    f"{option}={theirs[option]!r} is not supported (only {allowed[0]!r})"
    for option, allowed in _REQUIRED.items()
    if theirs.get(option, allowed[0]) not in allowed
  ]
  problems += [
    f"{option}={value!r} is not supported (only {_off(value)!r})"
    for option, value in theirs.items()
    # Other options of PEFT, now and later, are off if they are empty. A 0 may be a layer's number.
    if option not in {*_REQUIRED, *_INERT, *_READ}
    and not (value is None or value is False or value in ([], {}, ""))
  ]
  problems += [f"{k} is missing" for k in ("r", "lora_alpha", "target_modules") if k not in theirs]
  problems += _wrong_kinds(theirs)
  start = theirs.get("init_lora_weights", True)
  if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
    problems.append(
      f"init_lora_weights={start!r} took its first A and B out of the base weights, so this "
      "adapter does not belong on the base as published; PEFT's save_pretrained makes a plain "
      "one of it with path_initial_model_for_weight_conversion"
    )
  raise_problems(file, problems)
  return LoRAConfig(
    rank=theirs["r"],
    alpha=float(theirs["lora_alpha"]),
    targets=_our_targets(theirs, base, file),
    dropout=float(theirs.get("lora_dropout") or 0.0),
  )


def base_of(directory: epath.Path) -> str:
  """The base model's name in an adapter_config.json; "" if it has none."""
  name = read_object(directory / CONFIG_FILE, missing={}).get("base_model_name_or_path")
  return name if isinstance(name, str) else ""


def _off(value: Any) -> Any:
  """The value with which an option of this kind is off."""
  return False if isinstance(value, bool) else None


def _wrong_kinds(theirs: Mapping[str, Any]) -> list[str]:
  """Problems: values of the wrong kind. JSON's true does not count as a number."""
  number = lambda v: type(v) in (int, float)
  names = lambda v: type(v) is list and bool(v) and all(type(m) is str for m in v)
  modules = lambda v: (type(v) is str and _compiles(v)) or names(v)
  wanted = {
    "r": ("a whole number from 1", lambda v: type(v) is int and 1 <= v <= 10**6),
    "lora_alpha": ("a number above 0", lambda v: number(v) and 0 < v < 1e30),
    "lora_dropout": ("a number from 0, below 1", lambda v: v is None or (number(v) and 0 <= v < 1)),
    "target_modules": ("a list of names, or a regular expression", modules),
    "exclude_modules": (
      "a list of names, or a regular expression", lambda v: v in (None, [], "") or modules(v)
    ),
  }  # fmt: skip
  return [
    f"{option}={theirs[option]!r} should be {what}"
    for option, (what, fits) in wanted.items()
    if option in theirs and not fits(theirs[option])
  ]


def _compiles(pattern: str) -> bool:
  try:
    re.compile(pattern)
  except (re.error, RecursionError, OverflowError):
    return False
  return True


def _meant(modules: str | list[str] | None, names: list[str], where: epath.Path) -> set[str]:
  """Those of the modules' names that PEFT's target_modules or exclude_modules matches.

  A string is a regular expression for the whole name. A list has names, or ends of names.
  """
  if isinstance(modules, str) and modules:
    return _matched(modules, names, where)
  return {n for n in names if any(n == m or n.endswith(f".{m}") for m in modules or ())}


def _matched(pattern: str, names: list[str], where: epath.Path) -> set[str]:
  """The names that a regular expression of a file matches, if it does so within a time limit."""
  # Repeats of repeats take exponential time, and Python's matching has no limit.
  command = [sys.executable, "-I", "-S", "-c", _MATCHER]
  try:
    done = subprocess.run(
      command, input=json.dumps([pattern, names]), capture_output=True, text=True, check=True,
      timeout=MATCH_SECONDS,
    )  # fmt: skip
  except subprocess.TimeoutExpired as error:
    raise UserError(
      f"{where}: {pattern!r} takes more than {MATCH_SECONDS} s to match; write it without repeats "
      "of repeats"
    ) from error
  return set(json.loads(done.stdout))


MATCH_SECONDS = 5
_MATCHER = """
import json, re, sys
pattern, names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
"""


def _our_targets(theirs: Mapping[str, Any], base: ModelConfig, where: epath.Path) -> str:
  """`LoRAConfig.targets` for PEFT's target_modules without its exclude_modules.

  "all-linear" means all linear layers but the head.
  """
  targets, excluded = theirs["target_modules"], theirs.get("exclude_modules")
  everything = isinstance(targets, str) and targets.lower() == "all-linear"
  head = module_name(base.family, "head")

  layers = {
    name: fill(module_name(base.family, name), base, name.partition("/")[0])
    for name in linear_layers(base)
  }
  every = [module for modules in layers.values() for module in modules]
  wanted = {m for m in every if m != head} if everything else _meant(targets, every, where)
  adapted = wanted - _meant(excluded, every, where)
  found, partly = [], []
  for name, modules in layers.items():
    count = len(adapted.intersection(modules))
    if count == len(modules):
      found.append(name)
    elif count:
      partly.append(f"{name} in {count} of {len(modules)} layers")
  if partly:
    raise UserError(
      f"{where}: target_modules={targets!r} and exclude_modules={excluded!r} adapt "
      f"{', '.join(partly)}; adapters of some layers only are not supported"
    )
  if not found:
    but = f" (exclude_modules={excluded!r})" if excluded else ""
    raise UserError(f"{where}: target_modules={targets!r}{but} names no linear layer of this model")
  return "|".join(found)


def hf_config(model: ModelConfig, base: str) -> dict[str, Any]:
  """The contents of an adapter_config.json that PEFT reads, for the adapters of a model.

  target_modules is a regular expression for whole names. A list would not do: in LLaDA the names of
  a block's down projection and of the head both end in "ff_out".

  Args:
    model: the model with its adapters.
    base: name or directory of the base model.
  """
  cfg = model.lora
  names = [n for n in linear_layers(model) if re.fullmatch(cfg.targets, n)]
  modules = [_pattern(model, name) for name in names]
  return {
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,
    "lora_dropout": cfg.dropout,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": cfg.rank,
    "target_modules": "|".join(modules),
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
  }


def _pattern(model: ModelConfig, name: str) -> str:
  """A regular expression for the Hugging Face names of one of our linear layers in all blocks."""
  module, stack = re.escape(module_name(model.family, name)), name.partition("/")[0]
  layer = r"\d+"
  if len(stack_sizes(model)) > 1:
    layer = f"({'|'.join(map(str, layers_of(model, stack)))})"
  return module.replace(r"\{\}", layer).replace(r"\{expert\}", r"\d+")


def write_config(directory: epath.PathLike, model: ModelConfig, base: str) -> None:
  """Writes adapter_config.json."""
  text = json.dumps(hf_config(model, base), indent=2) + "\n"
  epath.Path(directory).joinpath(CONFIG_FILE).write_text(text)


def open_adapter(directory: epath.PathLike, base: ModelConfig) -> tuple[LoRAConfig, Reader]:
  """Opens a PEFT adapter: its options, and a reader of its tensors.

  Args:
    directory: the adapter's directory.
    base: the model that it is for.

  Raises:
    UserError: a file is missing or damaged, or an option is not supported.
  """
  directory = epath.Path(directory)
  cfg = read_config(directory, base)
  return cfg, Reader(directory, single_file=WEIGHTS_FILE)
