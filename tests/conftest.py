"""Tests compile many small programs and run each a few times: compiling fast matters more.

One cache of compiled programs serves the whole run: all tests, their worker processes and the
commands that they start. It is made anew for each run of pytest and removed at its end.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

import pytest
from jaxtyping import install_import_hook

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

# The shapes and dtypes that public functions declare are checked in every test (jaxtyping). This
# comes before anything imports them. Commands under test run without the check.
install_import_hook(
  ["igpo_jax.hints", "igpo_jax.ops", "igpo_jax.rl.advantages", "igpo_jax.rl.objectives.clipped"],
  "beartype.beartype",
)

# Files that take a minute or more, the longest first: begun early, none of them is what one worker
# is still busy with when the other has nothing left (pytest -n 2 --dist loadfile).
LONG_FILES = (
  "sharding_test",
  "claims_test",
  "hosts_test",
  "update_test",
  "main_test",
  "rehearse_test",
  "notebook_test",
  "sampler_cache_test",
  "eval_test",
  "rollout_test",
  "generate_test",
  "models_test",
)


def pytest_configure(config):
  if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of many tests
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
  place = {name: number for number, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


# module -> its tables of what was registered by name
REGISTRIES = {
  "igpo_jax.rewrite.trim": ("_RULES",),
  "igpo_jax.data.sources": ("_SOURCES",),
  "igpo_jax.data.task_registry": ("_TASKS",),
  "igpo_jax.eval.protocols": ("PROTOCOLS",),
  "igpo_jax.rewards.registry": ("_VERIFIERS", "_READS_GOLDS", "_SHOWN", "_REWARDS"),
}


@pytest.fixture(autouse=True)
def _what_a_test_registers_goes_with_it():
  """Else messages that list the known names would depend on which tests ran before."""
  import igpo_jax.tasks  # noqa: F401  what they register stays

  tables = [
    getattr(sys.modules[module], name)
    for module, names in REGISTRIES.items()
    if module in sys.modules
    for name in names
  ]
  before = [table.copy() for table in tables]
  yield
  for table, kept in zip(tables, before, strict=True):
    table.clear()
    table.update(kept)
