"""Settings for all tests. They run each program a few times only, so fast compilation matters most.

One cache of compiled programs serves the whole run: all tests, their worker processes and the
commands that they start. It is made anew for each run of pytest and removed at its end.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import mmap
import os
import pathlib
import shutil
import sys
import tempfile
import time

import pytest
from jaxtyping import install_import_hook

from igpo_jax import cli


def xla_flags() -> str:
  """XLA's options for programs that run a few times: quick to compile, slower to run.

  The emitters for fusions take three quarters of what compiling takes. XLA ends the process at an
  option that it does not know, and newer versions have no other emitters: so it is asked first.
  """
  flags = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
  (jaxlib,) = importlib.util.find_spec("jaxlib").submodule_search_locations
  for path in pathlib.Path(jaxlib).glob("libjax_common.*"):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      if content.find(b"\0xla_cpu_use_fusion_emitters\0") >= 0:
        flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)


# Before any test imports jax; a user's own XLA_FLAGS win. Commands under test inherit it.
os.environ.setdefault("XLA_FLAGS", xla_flags())
gc.set_threshold(*cli.SEARCH_AFTER)  # as commands do, and for the same reason
# By default glibc gives freed memory back at once, to take it anew: a tenth of a short run. Workers
# of pytest-xdist and commands under test read this when they begin.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
os.environ.setdefault("MALLOC_TOP_PAD_", str(64 << 20))
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

MANY_MAPS, TOO_MANY_MAPS = 20_000, 45_000
LOOK_EVERY = 10  # seconds; twenty programs a second are compiled at most, of some 60 maps each
_looked = [0.0]  # when maps were counted

# Files that take 20 seconds of CPU time or more, about the longest first: begun early, none is
# what one worker is still busy with when the other has nothing left (pytest -n 2 --dist loadfile).
LONG_FILES = (
  "hosts_test",
  "claims_test",
  "own_data_test",
  "main_test",
  "families_test",
  "sharding_test",
  "rehearse_test",
  "notebook_test",
  "real_path_test",
  "update_test",
  "sampler_cache_test",
  "cuda_programs_test",
  "sft_test",
  "eval_test",
  "rollout_test",
  "eval_program_test",
  "launch_test",
  "benchmarks_test",
  "package_test",
  "generate_test",
  "models_test",
)


def pytest_configure(config):
  if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of many tests
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
  place = {name: number for number, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_runtest_teardown(item, nextitem):
  """Gives up compiled programs where one file ends, if there are many, and in a file if too many.

  Each is mapped into memory in several pieces, and Linux allows a process 65,530 of them: a worker
  that keeps every program of the suite gets there, and XLA can then compile no more. One file alone
  (families_test on jax 0.12) makes about 30,000. Counting takes a while, so it is not done often.
  """
  now = time.monotonic()
  if "jax" not in sys.modules or now - _looked[0] < LOOK_EVERY:
    return
  _looked[0] = now
  limit = MANY_MAPS if nextitem is None or nextitem.path != item.path else TOO_MANY_MAPS
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > limit:
    sys.modules["jax"].clear_caches()
    gc.collect()


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
