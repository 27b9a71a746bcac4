"""jax's persistent compilation cache: a run that was started before does not compile again."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import sys

import jax

from igpo_jax.errors import UserError

AUTO, OFF = "auto", "off"
MIN_SECONDS = 0.1  # what compiles faster is not worth a file


def cache_folder() -> pathlib.Path:
  """The folder for this machine's compiled programs, in $XDG_CACHE_HOME or else ~/.cache."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "igpo_jax" / "xla"


def cpu_name() -> str:
  """A name that two machines share if their CPUs run the same instructions.

  jax tells programs for different accelerators apart, but not those for different CPUs,
  and a home directory may be on a disk that several machines share.
  """
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return f"{platform.machine()}-{hashlib.blake2s(able.encode(), digest_size=4).hexdigest()}"


def use_cache(setting: str = AUTO) -> str | None:
  """Turns on jax's persistent compilation cache for everything that is compiled from now on.

  If the folder cannot be written, a line on stderr says so and the run goes on without a cache.

  Args:
    setting: "auto" ($JAX_COMPILATION_CACHE_DIR if it is set, else `cache_folder()`), "off", or a
      directory, which may be on gs:// and shared by all machines.

  Returns:
    The folder, or None where the cache is off.

  Raises:
    UserError: an empty setting.
  """
  if not setting:
    raise UserError(f"config: compilation_cache='': give a directory, {AUTO!r} or {OFF!r}")
  if setting == OFF:
    jax.config.update("jax_enable_compilation_cache", False)
  if not jax.config.jax_enable_compilation_cache:  # also by $JAX_ENABLE_COMPILATION_CACHE
    return None
  if setting == AUTO and jax.config.jax_compilation_cache_dir:
    return jax.config.jax_compilation_cache_dir
  try:
    folder = str(cache_folder()) if setting == AUTO else setting
    if "://" not in folder:
      path = pathlib.Path(folder).expanduser()
      if jax.default_backend() == "cpu":
        path /= cpu_name()
      path.mkdir(parents=True, exist_ok=True)
      if not os.access(path, os.W_OK):
        raise PermissionError(f"cannot be written: {path}")
      folder = str(path)
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
    print(f"compiled programs are not kept: {error}", file=sys.stderr, flush=True)
    return None
  jax.config.update("jax_compilation_cache_dir", folder)
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
  return folder
