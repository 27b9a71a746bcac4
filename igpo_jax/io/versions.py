"""The versions of what decides a run's numbers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import platform

import igpo_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
  """The versions of this package, of Python, and of the packages that decide a run's numbers."""
  known = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {"igpo_jax": igpo_jax.__version__, "python": platform.python_version(), **known}


def source() -> str:
  """A digest of this package's source files: two versions of them may have one number."""
  folder = pathlib.Path(igpo_jax.__file__).parent
  digest = hashlib.blake2s(digest_size=4)
  for path in sorted(folder.rglob("*.py")):
    digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
  return digest.hexdigest()
