"""`python -m tests.kept_programs MODULE OPTION...`: runs a module; what it compiles is kept.

Of several processes jax keeps the programs of the first only, so that not all write one file. On
CPUs each process has keys of its own: without this, the others compile in each run.
"""

from __future__ import annotations

import runpy
import sys

from jax._src import compiler, distributed

if hasattr(compiler, "_cache_write"):  # without it nothing is lost but time
  _write = compiler._cache_write

  def _as_first(*args, **kwargs):
    own, distributed.global_state.process_id = distributed.global_state.process_id, 0
    try:
      return _write(*args, **kwargs)
    finally:
      distributed.global_state.process_id = own

  compiler._cache_write = _as_first

if __name__ == "__main__":
  sys.argv = sys.argv[1:]
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
