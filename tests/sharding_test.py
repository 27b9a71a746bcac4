"""The same numbers on every mesh, with the constraints active on 8 fake devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.fakes import REPO

OTHERS = ("8x1x1", "1x8x1", "2x2x2", "1x2x4")


@pytest.fixture(scope="module")
def results():
  flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  done = subprocess.run(
    [sys.executable, "-m", "tests.mesh_program"],
    text=True, capture_output=True, cwd=REPO, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", OTHERS)
def test_losses_and_updated_parameters_are_the_same_on_every_mesh(results, mesh):
  one, other = results["one"], results[mesh]
  for name in ("sft_loss", "rl_loss", "grad_norm"):
    assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
  for name in ("sft_params", "rl_params"):
    expected, found = np.array(one[name]), np.array(other[name])
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", OTHERS)
def test_samples_at_temperature_one_are_the_same_on_every_mesh(results, mesh):
  assert results[mesh]["completion"] == results["one"]["completion"]


@pytest.mark.slow
def test_parameters_and_rows_are_laid_out_over_the_mesh(results):
  assert results["one"]["kernel_spec"] == []
  assert results["1x8x1"]["kernel_spec"] == [None, "fsdp"]
  for mesh in ("2x2x2", "1x2x4"):
    assert results[mesh]["kernel_spec"] == [None, "fsdp", "tensor"]
  for mesh, prompts in {"one": 8, "8x1x1": 1, "1x8x1": 1, "2x2x2": 2, "1x2x4": 4}.items():
    assert results[mesh]["rows_per_device"] == prompts, mesh
