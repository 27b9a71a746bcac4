"""Where the repository and the shared data are, what is slow, Python on fake devices."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

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


def others_slow(values, every: int) -> list:
  """Parameters of a test: one in `every` is tried by `-m "not slow"`, too."""
  slow = pytest.mark.slow
  return [pytest.param(v, marks=() if k % every == 0 else slow) for k, v in enumerate(values)]


def with_devices(count: int) -> dict[str, str]:
  """The environment of a process that has so many CPU devices and compiles as the tests do."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def for_long_runs() -> dict[str, str]:
  """The environment of a process whose programs run hundreds of times: a little optimized.

  And on one thread each, as another test has the other core.
  """
  flags = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")
  flags += " --xla_cpu_multi_thread_eigen=false"
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run_on_devices(count: int, *arguments: str) -> subprocess.CompletedProcess:
  """Runs `python ARGUMENTS` on so many CPU devices; a failure shows the end of what it printed."""
  done = subprocess.run(
    [sys.executable, *arguments], cwd=REPO, env=with_devices(count), capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  return done
