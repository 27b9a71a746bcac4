"""Tests compile many small programs and run each a few times: compiling fast matters more.

One cache of compiled programs serves the whole run: all tests, their worker processes and the
commands that they start. It is made anew for each run of pytest and removed at its end.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before any test imports jax; a user's own XLA_FLAGS win. Commands under test inherit it.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Tests neither read nor write the user's cache of compiled programs. The first process makes the
# run's own; workers of pytest-xdist and commands under test inherit its name.
if "IGPO_TEST_CACHE" not in os.environ:
  folder = tempfile.mkdtemp(prefix="igpo_test_cache_")
  os.environ["IGPO_TEST_CACHE"] = folder
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["IGPO_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
