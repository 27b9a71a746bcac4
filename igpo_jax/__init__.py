"""igpo_jax: Inpainting-Guided Policy Optimization for masked diffusion language models.

What `import igpo_jax` offers is defined in `igpo_jax.api`. It is loaded on first
use, so that host-side parts (grading workers, data builders) start without jax.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
  if name.startswith("_"):
    raise AttributeError(name)
  try:
    return importlib.import_module(f"igpo_jax.{name}")
  except ModuleNotFoundError as error:
    if error.name != f"igpo_jax.{name}":
      raise
  return getattr(importlib.import_module("igpo_jax.api"), name)


def __dir__():
  return sorted(importlib.import_module("igpo_jax.api").__all__)
