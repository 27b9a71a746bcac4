"""igpo_jax: Inpainting-Guided Policy Optimization for masked diffusion language models.

`igpo_jax.api` defines the public names. Each is loaded when it is first used, so that the parts
that need no jax (grading workers, data builders, --help) start without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers see
  from igpo_jax.api import (
    LM,
    Canvas,
    Config,
    HintConfig,
    ModelConfig,
    ObjectiveConfig,
    Pretrained,
    SamplerConfig,
    default_config,
    denoise,
    freeze,
    group_advantages,
    hint_canvas,
    load_pretrained,
    make_lm,
    policy_loss,
  )
else:  # what Python does

  def __getattr__(name: str):
    if name.startswith("_"):
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in __all__:
      return getattr(importlib.import_module("igpo_jax.api"), name)
    try:
      return importlib.import_module(f"igpo_jax.{name}")
    except ModuleNotFoundError as error:
      if error.name != f"igpo_jax.{name}":
        raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

  def __dir__():
    return sorted(__all__)


__all__ = [
  "LM",
  "Canvas",
  "Config",
  "HintConfig",
  "ModelConfig",
  "ObjectiveConfig",
  "Pretrained",
  "SamplerConfig",
  "default_config",
  "denoise",
  "freeze",
  "group_advantages",
  "hint_canvas",
  "load_pretrained",
  "make_lm",
  "policy_loss",
]

__version__ = "0.1.0"
