"""Bad input: one clear line, exit code 2, and nothing half-written at the target."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from igpo_jax.cli import UserError
from igpo_jax.convert import transfer, writers
from tests.convert_helpers import GOLDENS, assert_same_bits, convert, copy_tiny, edit_tensors, load
from tests.fakes import REPO


@pytest.fixture
def hf(tmp_path):
  return copy_tiny(tmp_path / "hf")


def nothing_beside(directory, *expected):
  return sorted(p.name for p in directory.iterdir()) == sorted(expected)


def shard(directory):
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  names = {k: f"model-0000{1 + sum(k.encode()) % 2}-of-00002.safetensors" for k in tensors}
  for name in set(names.values()):
    part = {k: v for k, v in tensors.items() if names[k] == name}
    safetensors.numpy.save_file(part, directory / name)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def missing_shard(directory):
  shard(directory)
  (directory / "model-00002-of-00002.safetensors").unlink()


def truncated(directory):
  data = (directory / "model.safetensors").read_bytes()
  (directory / "model.safetensors").write_bytes(data[:-100])


def truncated_in_the_header(directory):
  data = (directory / "model.safetensors").read_bytes()
  (directory / "model.safetensors").write_bytes(data[:100])


def damaged_header(directory):
  data = bytearray((directory / "model.safetensors").read_bytes())
  data[8:12] = b"@@@@"
  (directory / "model.safetensors").write_bytes(bytes(data))


def wrong_shape(directory):
  def change(tensors):
    tensors["model.transformer.blocks.1.q_proj.weight"] = np.zeros((64, 32), np.float32)

  edit_tensors(directory, change)


def wrong_keys(directory):
  def change(tensors):
    tensors["model.transformer.blocks.0.q_proj.bias"] = np.zeros(64, np.float32)
    del tensors["model.transformer.ln_f.weight"]
    tensors["model.transformer.wte.weight"] = np.zeros((512, 65), np.float32)

  edit_tensors(directory, change)


def mixed_dtypes(directory):
  def change(tensors):
    key = "model.transformer.blocks.2.up_proj.weight"
    tensors[key] = tensors[key].astype(np.float16)

  edit_tensors(directory, change)


def pickled(directory):
  (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory):
  (directory / "model.safetensors").unlink()


def index_disagrees(directory):
  shard(directory)
  file = directory / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  index["weight_map"]["invented"] = "model-00001-of-00002.safetensors"
  file.write_text(json.dumps(index))


def integers(directory):
  edit_tensors(directory, lambda t: t.update({"model.transformer.ln_f.weight": np.zeros(64, int)}))


def config_is_no_json(directory):
  (directory / "config.json").write_text("{")


BAD = {
  missing_shard: ("shard model-00002-of-00002.safetensors is missing",),
  truncated: ("model.safetensors is truncated", "bytes"),
  truncated_in_the_header: ("model.safetensors is truncated",),
  damaged_header: ("damaged header",),
  wrong_shape: ("blocks.1.q_proj.weight has shape [64, 32], config.json says [64, 64]",),
  wrong_keys: (
    "blocks.0.q_proj.bias is not part of this model",
    "ln_f.weight is missing",
    "wte.weight has shape [512, 65]",
  ),
  mixed_dtypes: ("the layers of blocks/up_proj/kernel have different dtypes",),
  pickled: ("only pickled weights (pytorch_model.bin)", "safe_serialization"),
  no_weights: ("neither model.safetensors nor model.safetensors.index.json",),
  index_disagrees: ("invented is in the index but not in model-00001-of-00002",),
  integers: ("ln_f.weight is stored as I64",),
  config_is_no_json: ("config.json is not JSON",),
}


@pytest.mark.parametrize("damage", BAD, ids=lambda f: f.__name__)
def test_damage_is_told_and_nothing_is_written(damage, hf, tmp_path):
  damage(hf)
  with pytest.raises(UserError) as error:
    convert(hf, tmp_path / "target")
  for text in BAD[damage]:
    assert text in str(error.value)
  assert nothing_beside(tmp_path, "hf")


def test_the_command_says_it_in_one_line_and_exits_with_two(tmp_path):
  command = [sys.executable, "-m", "igpo_jax.convert", f"--source={tmp_path / 'nowhere'}"]
  command.append(f"--target={tmp_path / 'target'}")
  done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == f"error: no such directory: {tmp_path / 'nowhere'}\n"


def test_an_existing_target_needs_overwrite(hf, tmp_path):
  target = convert(hf, tmp_path / "target")
  before = (target / "params" / "_METADATA").stat().st_mtime_ns
  with pytest.raises(UserError, match="--overwrite"):
    convert(hf, target)
  assert (target / "params" / "_METADATA").stat().st_mtime_ns == before
  convert(hf, target, "--to=hf", "--overwrite")
  assert_same_bits(load(target), load(hf))
  assert not (target / "params").exists() and nothing_beside(tmp_path, "hf", "target")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_failure_half_way_leaves_the_old_target(hf, tmp_path, monkeypatch, to):
  target = convert(hf, tmp_path / "target", "--to=hf")
  before = load(target)
  calls = []

  def full(*args):
    calls.append(args)
    if len(calls) > 5:
      raise OSError(errno.ENOSPC, "No space left on device")
    return read(*args)

  read = writers.read_block
  monkeypatch.setattr(writers, "read_block", full)
  with pytest.raises(UserError, match=r"cannot write .*target: no space left on device"):
    convert(hf, target, f"--to={to}", "--overwrite")
  assert_same_bits(load(target), before)
  assert nothing_beside(tmp_path, "hf", "target")


def test_an_interrupt_cleans_up(hf, tmp_path, monkeypatch):
  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(writers, "read_block", interrupt)
  with pytest.raises(KeyboardInterrupt):
    convert(hf, tmp_path / "target")
  assert nothing_beside(tmp_path, "hf")


def test_too_little_space_is_noticed_before_writing(hf, tmp_path, monkeypatch):
  monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
  with pytest.raises(UserError, match=r"no space left .* needs 0\.90 MB"):
    convert(hf, tmp_path / "target")


@pytest.mark.parametrize("target", ["hf", "hf/inside", "."])
def test_the_source_is_never_overwritten(hf, tmp_path, target):
  with pytest.raises(UserError, match="overlap"):
    convert(hf, tmp_path / target, "--overwrite")
  assert_same_bits(load(hf), load(GOLDENS / "llada_tiny"))
