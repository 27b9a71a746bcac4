"""The same numbers on every mesh, with the constraints active on 8 fake devices."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.paths import run_on_devices

OTHERS = ("8x1x1", "1x8x1", "2x2x2", "1x2x4", "1x2x4 sequence", "lora 2x2x2")
WITHOUT_ADAMW = ("1x2x4 sequence", "lora 2x2x2")  # the program takes SGD steps only there
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
  return json.loads(run_on_devices(8, "-m", "tests.mesh_program").stdout.splitlines()[-1])


def pair(results, mesh):
  return results["lora one" if mesh.startswith("lora") else "one"], results[mesh]


@pytest.mark.parametrize("mesh", OTHERS)
def test_losses_and_gradients_are_the_same_on_every_mesh(results, mesh):
  one, other = pair(results, mesh)
  for name in ("sft_loss", "rl_loss", "grad_norm"):
    assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
  for name in ("sft_gradient", "rl_gradient"):
    expected, found = np.array(one[name]), np.array(other[name])
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("mesh", OTHERS)
def test_updated_parameters_are_the_same_on_every_mesh(results, mesh):
  one, other = pair(results, mesh)
  for name in ("sft_sgd", "rl_sgd"):
    expected, found = np.array(one[name]), np.array(other[name])
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), name
  assert ("sft_adamw" in other) == (mesh not in WITHOUT_ADAMW)
  if mesh in WITHOUT_ADAMW:
    return
  # AdamW divides by the gradient's size: where that is rounding error, so is the step.
  gradient = np.abs(np.array(one["sft_gradient"]))
  plain = gradient > 1e-3 * gradient.max()
  assert plain.mean() > 0.3
  np.testing.assert_allclose(
    np.array(other["sft_adamw"])[plain], np.array(one["sft_adamw"])[plain], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("mesh", OTHERS)
def test_samples_are_the_same_on_every_mesh(results, mesh):
  one, other = pair(results, mesh)
  names = [name for name in other if name.startswith("completion")]
  assert names
  for name in names:
    assert other[name] == one[name] and len(set(one[name])) > 3, name
  # One slice of all 8 prompts against two, of which the second has only short ones.
  sliced = mesh in ("1x8x1", "2x2x2", "lora 2x2x2")
  assert one["cuts"] == [[0, 8, 8]]
  assert other["cuts"] == ([[0, 4, 8], [4, 8, 6]] if sliced else [[0, 8, 8]])


@pytest.mark.parametrize("mesh", OTHERS)
def test_parameters_rounded_by_chance_are_the_same_bits_on_every_mesh(results, mesh):
  one, other = pair(results, mesh)
  assert other["rounded by chance"] == one["rounded by chance"]


def test_parameters_and_rows_are_laid_out_over_the_mesh(results):
  assert results["1x8x1"]["kernel_spec"] == [None, "fsdp"]
  for mesh in ("2x2x2", "1x2x4", "lora 2x2x2"):
    assert results[mesh]["kernel_spec"] == [None, "fsdp", "tensor"]
  shares = {"one": 1, "8x1x1": 1, "1x8x1": 1 / 8, "2x2x2": 1 / 4, "1x2x4": 1 / 8}
  prompts = {"one": 8, "8x1x1": 1, "1x8x1": 1, "2x2x2": 2, "1x2x4": 4}
  for mesh in shares:
    assert results[mesh]["kernel_share"] == shares[mesh], mesh
    assert max(results[mesh]["largest_shares"]) == shares[mesh], mesh  # of the optimizer, too
    assert results[mesh]["rows_per_device"] == prompts[mesh], mesh


def test_adapters_are_split_over_all_devices_that_split_anything(results):
  assert results["lora 2x2x2"]["largest_shares"] == [1 / 4, 1 / 4]


def moved(results, mesh, kinds):
  return {tuple(c) for c in results[mesh]["collectives"] if c[0] in kinds}


def test_devices_that_share_nothing_send_nothing(results):
  assert not moved(results, "one", ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"))


def test_data_parallelism_gathers_no_weights(results):
  # [2, ...] are the stacked layers, [32, 64] and [64, 32] a layer's kernels
  gathered = {shape for _, shape in moved(results, "8x1x1", ("all-gather",))}
  assert not gathered & {"f32[32,64]", "f32[64,32]", "f32[32,32]", "f32[2,32,64]"}


def test_parameters_are_gathered_a_layer_at_a_time(results):
  gathered = {shape for _, shape in moved(results, "1x8x1", ("all-gather",))}
  assert any(shape in gathered for shape in ("f32[32,64]", "f32[1,32,64]", "f32[64,32]"))
  assert not any(shape.startswith("f32[2,") for shape in gathered)


def test_sharded_sequences_are_gathered_before_the_branches(results):
  # a device of 1x2x4 has 2 of a micro-batch's 4 prompts, 24 positions and width 32
  plain, sequence = (
    results[mesh]["collectives"].count(["all-gather", "f32[2,24,32]"])
    for mesh in ("1x2x4", "1x2x4 sequence")
  )
  assert sequence >= plain + 4  # before two branches, forward and backward
