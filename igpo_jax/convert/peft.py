"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors, both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.config import LoRAConfig
from igpo_jax.convert import families
from igpo_jax.convert.safetensors_io import Reader, raise_problems
from igpo_jax.data import tokenizer as tokenizer_lib

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options under which an adapter is plainly x A B alpha / r on whole layers. Each has
# one value that is supported, and PEFT's default is that value.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_rslora": (False,),
  "use_dora": (False,),
  "use_qalora": (False,),
  "lora_bias": (False,),
  "fan_in_fan_out": (False,),
  "modules_to_save": (None, []),
  "layers_to_transform": (None, []),
  "layers_pattern": (None, []),
  "rank_pattern": (None, {}),
  "alpha_pattern": (None, {}),
  "layer_replication": (None, []),
  "trainable_token_indices": (None, []),
  "target_parameters": (None, []),
  "alora_invocation_tokens": (None, []),
}


def module_name(family: families.Family, path: str) -> str:
  """Their name of our linear layer, for example "model.transformer.blocks.{}.q_proj"."""
  if path.startswith("blocks/"):
    key = family.block[f"{path.removeprefix('blocks/')}/kernel"]
  else:
    key = family.top[f"{path}/kernel"]
  return key.removesuffix(".weight")


def linear_layers(family: families.Family) -> list[str]:
  """Our names of all linear layers of a family."""
  names = [f"blocks/{n}" for n in family.block] + list(family.top)
  return [name.removesuffix("/kernel") for name in names if name.endswith("/kernel")]


def read_config(directory: epath.PathLike, family_name: str) -> LoRAConfig:
  """The adapter's options in our terms.

  Raises:
    UserError: no such file, or an option that changes what an adapter computes.
  """
  file = epath.Path(directory) / CONFIG_FILE
  if not file.exists():
    raise UserError(f"{directory} has no {CONFIG_FILE}; is it a PEFT adapter?")
  theirs = tokenizer_lib.read_json(file)
  problems = [
    f"{option}={theirs[option]!r} is not supported (only {allowed[0]!r})"
    for option, allowed in _REQUIRED.items()
    if option in theirs and theirs[option] not in allowed
  ]
  problems += [f"{k} is missing" for k in ("r", "lora_alpha", "target_modules") if k not in theirs]
  raise_problems(file, problems)
  targets = _our_targets(theirs["target_modules"], families.FAMILIES[family_name], file)
  return LoRAConfig(
    rank=int(theirs["r"]),
    alpha=float(theirs["lora_alpha"]),
    targets=targets,
    dropout=float(theirs.get("lora_dropout") or 0.0),
  )


def _our_targets(modules: Any, family: families.Family, where: epath.Path) -> str:
  """Our regular expression for PEFT's target_modules.

  As in PEFT, a string is a regular expression for whole names ("all-linear" means
  all but the head), and a list holds names or the ends of names.
  """

  def matches(module: str) -> bool:
    if modules == "all-linear":
      return module != module_name(family, "head")
    if isinstance(modules, str):
      return re.fullmatch(modules, module) is not None
    return any(module == m or module.endswith(f".{m}") for m in modules)

  found = [n for n in linear_layers(family) if matches(module_name(family, n).format(0))]
  if not found:
    raise UserError(f"{where}: target_modules={modules!r} names no linear layer of this model")
  return "|".join(found)


def hf_config(cfg: LoRAConfig, family_name: str, base: str) -> dict[str, Any]:
  """An adapter_config.json that PEFT reads.

  target_modules is a regular expression over whole names: in LLaDA both a block's
  down projection and the head end in "ff_out", so a list could not tell them apart.
  """
  family = families.FAMILIES[family_name]
  names = [n for n in linear_layers(family) if re.fullmatch(cfg.targets, n)]
  modules = [re.escape(module_name(family, n)).replace(r"\{\}", r"\d+") for n in names]
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


def write_config(directory: epath.PathLike, cfg: LoRAConfig, family_name: str, base: str) -> None:
  """Writes adapter_config.json."""
  text = json.dumps(hf_config(cfg, family_name, base), indent=2) + "\n"
  epath.Path(directory).joinpath(CONFIG_FILE).write_text(text)


def open_adapter(directory: epath.PathLike, family_name: str) -> tuple[LoRAConfig, Reader]:
  """An adapter's options and its tensors.

  Raises:
    UserError: a missing or damaged file, or an unsupported option.
  """
  directory = epath.Path(directory)
  cfg = read_config(directory, family_name)
  return cfg, Reader(directory, single_file=WEIGHTS_FILE)
