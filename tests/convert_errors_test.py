"""Bad input: one clear line, exit code 2, and nothing half-written at the target."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from igpo_jax.convert import transfer, writers
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.errors import UserError
from tests.convert_helpers import (
  GOLDENS,
  assert_same_bits,
  convert,
  copy_tiny,
  edit_config,
  edit_tensors,
  load,
  save_adapters,
  write_peft,
)
from tests.paths import REPO


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


def edit_index(directory, change):
  file = directory / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  change(index["weight_map"])
  file.write_text(json.dumps(index))


HEAD = "model.transformer.ff_out.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index_names_the_wrong_shard(directory):
  shard(directory)
  edit_index(directory, lambda names: names.update({HEAD: SHARDS[names[HEAD] == SHARDS[0]]}))


def index_forgets_a_tensor(directory):
  shard(directory)
  edit_index(directory, lambda names: names.pop(HEAD))


def index_of_numbers(directory):
  shard(directory)
  edit_index(directory, lambda names: names.update({HEAD: 1}))


def index_that_leads_out(directory):
  shard(directory)
  edit_index(directory, lambda names: names.update({HEAD: f"../hf/{names[HEAD]}"}))


def index_nested_without_end(directory):
  shard(directory)
  (directory / "model.safetensors.index.json").write_text("[" * 100_000)


def header_nested_without_end(directory):
  edit_header(directory, lambda text: "[" * 100_000)


def weights_are_a_folder(directory):
  (directory / "model.safetensors").unlink()
  (directory / "model.safetensors").mkdir()


def weights_twice(directory):
  shutil.copy(directory / "model.safetensors", directory / "old.safetensors")
  shard(directory)
  (directory / "old.safetensors").rename(directory / "model.safetensors")


def edit_header(directory, change):
  file = directory / "model.safetensors"
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  text = change(data[8 : 8 + length].decode()).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def a_key_twice(directory):
  twice = lambda text: text.replace("blocks.0.q_proj", "blocks.1.q_proj")
  edit_header(directory, twice)


def overlapping_tensors(directory):
  def change(text):
    header = json.loads(text)
    one, two = (header[f"model.transformer.blocks.{n}.q_proj.weight"] for n in range(2))
    one["data_offsets"] = two["data_offsets"]
    return json.dumps(header)

  edit_header(directory, change)


def sizes_that_are_no_numbers(directory):
  edit_header(directory, lambda text: text.replace('"shape":[64]', '"shape":["64"]', 1))


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
  index_names_the_wrong_shard: (f"{HEAD} is in the index but not in model-0000",),
  index_forgets_a_tensor: (f"{HEAD} is in model-0000", "but not in the index"),
  index_of_numbers: ("index.json is damaged", "tensor -> file"),
  index_that_leads_out: ("index.json is damaged", "tensor -> file"),
  index_nested_without_end: ("index.json is damaged", "tensor -> file"),
  header_nested_without_end: ("damaged header",),
  weights_are_a_folder: ("model.safetensors cannot be read", "s a directory"),
  weights_twice: ("has weights twice: model.safetensors, and the shards",),
  a_key_twice: ("damaged header",),
  overlapping_tensors: ("overlaps another tensor or leaves a gap",),
  sizes_that_are_no_numbers: ("damaged header",),
  integers: ("ln_f.weight is stored as I64",),
  config_is_no_json: ("config.json: not JSON",),
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


def test_a_long_list_of_problems_is_cut(hf):
  edit_config(hf, n_layers=200)
  with pytest.raises(UserError, match=r"and \d+ more$") as error:
    load_pretrained(hf)
  assert len(str(error.value)) < 3000


def test_a_head_that_contradicts_tied_embeddings_is_told(hf, tmp_path):
  edit_config(hf, weight_tying=True)  # the file has a head of its own
  for attempt in (lambda: load_pretrained(hf), lambda: convert(hf, tmp_path / "x", "--to=hf")):
    with pytest.raises(UserError, match=r"ff_out.weight and .*wte.weight hold different numbers"):
      attempt()
  edit_tensors(hf, lambda t: t.update({HEAD: t["model.transformer.wte.weight"][:8].copy()}))
  with pytest.raises(UserError, match=r"ff_out.weight has shape \[8, 64\]"):
    load_pretrained(hf)
  assert nothing_beside(tmp_path, "hf")


def linked(link, directory):
  os.symlink(directory, link)
  return link


def files_that_lie_elsewhere(tmp_path, hf):
  """As a download cache has them: a directory of links to where the files are."""
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
  hf.rename(blobs)
  snapshot.mkdir()
  for number, name in enumerate(sorted(f.name for f in blobs.iterdir())):
    (blobs / name).rename(blobs / f"blob{number}")
    linked(snapshot / name, blobs / f"blob{number}")
  return snapshot, blobs


@pytest.mark.parametrize("case", ["link", "linked parent", "files elsewhere", "adapter", "base"])
def test_nothing_that_is_read_is_overwritten(hf, tmp_path, case):
  source, target, options = hf, hf, ["--to=hf", "--dtype=bfloat16"]
  if case == "link":
    source = linked(tmp_path / "link", hf)
  elif case == "linked parent":
    target = linked(tmp_path / "up", tmp_path) / "hf"
  elif case == "files elsewhere":
    source, target = files_that_lie_elsewhere(tmp_path, hf)
  elif case == "adapter":
    shapes = {"model.transformer.blocks.{}.q_proj": (64, 64)}
    target = write_peft(tmp_path / "adapter", shapes=shapes, target_modules=["q_proj"])
    options = ["--to=hf", "--merge_lora", f"--adapter={target}"]
  elif case == "base":
    source = save_adapters(tmp_path / "run", hf)
    options = ["--to=hf", "--merge_lora", f"--base={hf}"]
  before = {f: f.read_bytes() for f in sorted(target.iterdir())}
  with pytest.raises(UserError, match="overlap"):
    convert(source, target, *options, "--overwrite")
  assert {f: f.read_bytes() for f in sorted(target.iterdir())} == before


def test_a_target_that_is_a_link_is_written_where_it_leads(hf, tmp_path):
  real = tmp_path / "disk" / "model"
  real.parent.mkdir()
  link = linked(tmp_path / "link", real)  # to nothing yet
  convert(hf, link)
  assert link.is_symlink() and (real / "params").is_dir()
  convert(hf, link, "--to=hf", "--overwrite")
  assert link.is_symlink() and nothing_beside(real.parent, "model")
  assert_same_bits(load(real), load(hf))
  assert nothing_beside(tmp_path, "hf", "disk", "link")


@pytest.mark.parametrize("through_a_link", [False, True])
def test_what_no_conversion_made_is_not_deleted(hf, tmp_path, through_a_link):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("years")
  target = linked(tmp_path / "link", tmp_path / "mine") if through_a_link else tmp_path / "mine"
  with pytest.raises(UserError, match=r"no model directory.*thesis\.tex"):
    convert(hf, target, "--overwrite")
  assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
  with pytest.raises(UserError, match="is a file"):
    convert(hf, tmp_path / "mine" / "thesis.tex", "--overwrite")


@pytest.mark.parametrize("fails", [False, True])
def test_temporary_folders_of_other_processes_are_left_alone(hf, tmp_path, monkeypatch, fails):
  # A pid is no name of a process where containers share a disk.
  others = [tmp_path / f".out.{os.getpid()}.{end}" for end in ("tmp", "old")]
  for other in others:
    other.mkdir()
    (other / "half.safetensors").write_bytes(b"x")
  if fails:
    monkeypatch.setattr(writers, "write_orbax", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      convert(hf, tmp_path / "out")
  else:
    convert(hf, tmp_path / "out")
    convert(hf, tmp_path / "out", "--overwrite")
  assert all((other / "half.safetensors").exists() for other in others)
  assert nothing_beside(tmp_path, "hf", *(o.name for o in others), *([] if fails else ["out"]))


def test_a_rename_that_fails_gives_the_old_target_back(hf, tmp_path, monkeypatch):
  target = convert(hf, tmp_path / "out", "--to=hf")
  before, rename, calls = load(target), type(epath.Path(hf)).rename, []

  def fail_once(path, to):
    calls.append(path)
    if len(calls) == 2:
      raise OSError(errno.EIO, "")
    return rename(path, to)

  monkeypatch.setattr(type(epath.Path(hf)), "rename", fail_once)
  with pytest.raises(UserError, match="cannot write"):
    convert(hf, target, "--to=hf", "--dtype=bfloat16", "--overwrite")
  assert_same_bits(load(target), before)
  assert nothing_beside(tmp_path, "hf", "out")


@pytest.mark.parametrize("dtype, factor", [("float16", 1e6), ("bfloat16", 3.39e38)])
@pytest.mark.parametrize("how", ["convert", "load", "orbax"])
def test_numbers_that_a_dtype_cannot_hold_are_told(hf, tmp_path, how, dtype, factor):
  def change(tensors):
    tensors["model.transformer.blocks.1.attn_norm.weight"][5] = factor * 1.003
    tensors["model.transformer.ln_f.weight"][:3] = [np.inf, -np.inf, np.nan]  # are what they are

  edit_tensors(hf, change)
  source = convert(hf, tmp_path / "orbax") if how == "orbax" else hf
  with pytest.raises(UserError, match=rf"attn_norm.* {dtype} cannot hold"):
    if how == "convert":
      convert(source, tmp_path / "x", "--to=hf", f"--dtype={dtype}")
    else:
      load_pretrained(source, dtype=dtype)
  edit_tensors(hf, lambda t: t["model.transformer.blocks.1.attn_norm.weight"].fill(1))
  with np.errstate(all="raise"):  # infinities that were there are no overflow
    back = convert(hf, tmp_path / "y", "--to=hf", f"--dtype={dtype}")
  assert np.isinf(safetensors.numpy.load_file(back / "model.safetensors")[
    "model.transformer.ln_f.weight"][:2].astype(np.float32)).all()  # fmt: skip


WRONG_VALUES = [
  ("rope_theta", "500000", "a number above 0"),
  ("rope_theta", float("nan"), "a number above 0"),
  ("rope_theta", True, "a number above 0"),
  ("rms_norm_eps", "1e-5", "a number above 0"),
  ("rms_norm_eps", -1e-5, "a number above 0"),
  ("eos_token_id", "510", "a token id"),
  ("eos_token_id", [[510]], "a token id"),
  ("eos_token_id", [], "a token id"),
  ("eos_token_id", [510, None], "a token id"),
  ("eos_token_id", -1, "a token id"),
  ("eos_token_id", 510.0, "a token id"),
  ("eos_token_id", [510, 512], "eos_token_id=512 is past the embedding, which has 512 rows"),
  ("mask_token_id", 600, "mask_token_id=600 is past the embedding, which has 512 rows"),
  ("mask_token_id", "511", "a token id"),
  ("mask_token_id", 510, "mask_token_id and eos_token_id are both 510"),
  ("n_layers", 0, "a whole number"),
  ("n_layers", 3.0, "a whole number"),
  ("n_layers", 10**9, "a whole number"),
  ("n_heads", 0, "a whole number"),
  ("n_heads", 5, "d_model=64 is not a multiple of n_heads=5"),
  ("n_heads", 64, "should be even"),
  ("n_kv_heads", 0, "a whole number"),
  ("n_kv_heads", 3, "n_heads=4 is not a multiple of n_kv_heads=3"),
  ("d_model", [64], "a whole number"),
  ("d_model", None, "d_model is missing"),
  ("mlp_hidden_size", 0, "a whole number"),
  ("embedding_size", "512", "a whole number"),
  ("weight_tying", "false", "true or false"),
  ("weight_tying", 0, "true or false"),
  ("model_type", ["llada"], "is not one of"),
  ("model_type", None, "is not one of"),
]


@pytest.mark.parametrize("option, value, message", WRONG_VALUES)
def test_values_of_wrong_kinds_in_config_json_are_told_by_name(hf, option, value, message):
  edit_config(hf, **{option: value})
  with pytest.raises(UserError) as error:
    load_pretrained(hf)
  assert option in str(error.value) and message in str(error.value)
  assert "config.json" in str(error.value)


@pytest.mark.parametrize("option", ["rope_theta", "rms_norm_eps"])
def test_a_whole_number_of_any_size_is_read_as_a_float(hf, option):
  edit_config(hf, **{option: 10**12})
  config = load_pretrained(hf).config
  assert getattr(config, option) == 1e12 and type(getattr(config, option)) is float


@pytest.mark.parametrize("text", ["[]", "3", "null", '"llada"', "", "{'a': 1}"])
def test_a_config_json_that_is_no_object_is_told(hf, text):
  (hf / "config.json").write_text(text)
  with pytest.raises(UserError, match=r"config\.json"):
    load_pretrained(hf)
