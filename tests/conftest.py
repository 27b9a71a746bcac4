"""Tests compile many small programs and run each a few times: compiling fast matters more."""

from __future__ import annotations

import os

# Before any test imports jax; a user's own XLA_FLAGS win. Commands under test inherit it.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Tests neither read nor write the user's cache of compiled programs.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
