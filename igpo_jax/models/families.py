"""The table of model families, and the way from a config to a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from igpo_jax.config import ModelConfig, MoEConfig
from igpo_jax.errors import UserError
from igpo_jax.models import a2d, dream, illada, llada, llada2, llada_moe, sdar
from igpo_jax.models.family import Family
from igpo_jax.models.network import make_network
from igpo_jax.types import LM

FAMILIES: Mapping[str, Family] = {
  family.name: family
  for family in (
    llada.FAMILY,
    illada.FAMILY,
    dream.FAMILY,
    a2d.QWEN2,
    a2d.QWEN3,
    a2d.LLAMA,
    llada_moe.FAMILY,
    sdar.FAMILY,
    llada2.FAMILY,
  )
}

# Options that not all families have.
NOT_EVERYWHERE = ("head_dim", "rotary_share", "shift_logits", "attention_block", "moe",
                  "expert_products", "router_loss")  # fmt: skip


def find(name: str) -> Family:
  """The family with this name.

  Raises:
    UserError: there is none; the message lists the families.
  """
  if name not in FAMILIES:
    raise UserError(f"config: model.family={name!r} is not one of {', '.join(FAMILIES)}")
  return FAMILIES[name]


def check(config: ModelConfig) -> Family:
  """The family of a model, after checking that it has the options that the config sets.

  Raises:
    UserError: there is no such family, or it does not have an option that is set. The option would
      be ignored in silence otherwise.
  """
  family = find(config.family)
  unset = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
  strange = [
    name
    for name in NOT_EVERYWHERE
    if name not in family.reads and getattr(config, name) != unset[name]
  ]
  if strange:
    told = ", ".join(f"model.{name}" for name in strange)
    raise UserError(f"config: {told}: the model family {family.name!r} has no such option")
  if "moe" in family.reads and not config.moe.experts_per_token:
    raise UserError(
      f"config: model.family={family.name!r} needs model.moe.experts, experts_per_token and "
      "expert_hidden"
    )
  return family


@functools.lru_cache(maxsize=32)
def make_lm(config: ModelConfig) -> LM:
  """The model's pure functions.

  The same config gives the same object, so jitted programs that take an `LM`
  as a static argument are shared between callers.

  Raises:
    UserError: as `check`.
  """
  return make_network(config, check(config).design(config))


def model_config(name: str, fields: Mapping[str, Any], **more: Any) -> ModelConfig:
  """Makes a ModelConfig from fields such as those of `Family.published` and `Family.tiny`.

  Args:
    name: name of the family.
    fields: fields by name; "moe.experts" is the field experts of the section moe.
    **more: further fields.
  """
  experts = {k.removeprefix("moe."): v for k, v in fields.items() if k.startswith("moe.")}
  rest = {k: v for k, v in fields.items() if not k.startswith("moe.")}
  return ModelConfig(**{"family": name, "moe": MoEConfig(**experts), **rest, **more})
