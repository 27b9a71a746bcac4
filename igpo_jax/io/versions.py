"""The versions of what decides a run's numbers."""

from __future__ import annotations

import importlib.metadata
import platform

import igpo_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
  """The versions of this package, of Python, and of the packages that decide a run's numbers."""
  known = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {"igpo_jax": igpo_jax.__version__, "python": platform.python_version(), **known}
