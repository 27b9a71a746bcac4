"""The estimator and the objective of a config, found by their names."""

from __future__ import annotations

import dataclasses
from typing import Any

from igpo_jax.config import Config, ObjectiveConfig, registry
from igpo_jax.models.families import check
from igpo_jax.rl.estimate import forwards_of_model, largest_part, sizes_of
from igpo_jax.rl.estimators.base import Estimator, Forwards
from igpo_jax.rl.objectives.base import Objective


def estimator_of(config: Config) -> Estimator:
  """The estimator that `rl.estimator` names, with its options from `config.estimator`.

  Raises:
    UserError: no estimator is registered under this name.
  """
  return _method(config, "estimator")


def objective_of(config: Config) -> Objective:
  """The objective that `rl.objective` names, with its options from `config.objective`.

  Raises:
    UserError: no objective is registered under this name.
  """
  return _method(config, "objective")


def forwards_of(config: Config) -> Forwards:
  """How many forward passes an estimate takes with this config's estimator and model."""
  declared = estimator_of(config).forwards(sizes_of(config, config.model))
  return forwards_of_model(declared, check(config.model).design(config.model).block_length)


def rows_per_prompt(config: Config) -> int:
  """Rows of a prompt in one forward pass: 1 if every pass serves a whole group, else G."""
  return config.rl.group_size if forwards_of(config).own else 1


def views_kept(config: Config) -> int:
  """How many views' activations an update keeps in memory at the same time."""
  return sum(largest_part(count, config.rl.views_at_once) for count in forwards_of(config))


def _method(config: Config, kind: str) -> Any:
  name = getattr(config.rl, kind)
  cls, section = registry.find(kind, name), getattr(config, kind)
  if registry.owns_section(kind, name):
    fields = dataclasses.fields(ObjectiveConfig)
    return cls(**{field.name: getattr(section, field.name) for field in fields})
  return getattr(section, name, None) or cls()
