"""What the tests of conversions share: tiny model directories, and comparing bits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import safetensors.numpy

from igpo_jax.convert.__main__ import main
from tests.fakes import REPO

GOLDENS = REPO / "tests" / "goldens"
MODELS = ("llada_tiny", "llada_tiny_gqa")


def load(directory):
  """All tensors of a directory, read by the safetensors library, as unsigned integers."""
  tensors = {}
  for file in directory.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
  return {key: value.view(f"u{value.dtype.itemsize}") for key, value in tensors.items()}


def assert_same_bits(left, right):
  assert left.keys() == right.keys()
  for key in left:
    np.testing.assert_array_equal(left[key], right[key], strict=True)


def convert(source, target, *options):
  main([f"--source={source}", f"--target={target}", *options])
  return target


def copy_tiny(directory):
  """A Hugging Face directory that a test may damage."""
  directory.mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(GOLDENS / "llada_tiny" / name, directory)
  return directory


def edit_tensors(directory, change):
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **options):
  config = json.loads((directory / "config.json").read_text()) | options
  (directory / "config.json").write_text(json.dumps(config))
