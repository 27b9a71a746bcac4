"""Small stand-ins that several tests share, and the way to find the shared real data."""

from __future__ import annotations

import os
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent


def shared_path(*parts: str) -> pathlib.Path:
  """A file of the shared data folder; skips the calling test where it is absent.

  The folder is `$IGPO_SHARED`, or `../shared` beside the repository. It is part
  of neither the package nor its tests: users do not have it.
  """
  root = pathlib.Path(os.environ.get("IGPO_SHARED", REPO.parent / "shared"))
  path = root.joinpath(*parts)
  if not path.exists():
    pytest.skip(f"real data not here: shared/{'/'.join(parts)}")
  return path
