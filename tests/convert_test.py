"""Conversions lose no bit, hold little in memory, and know what they can convert."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_jax.config import LoRAConfig, freeze
from igpo_jax.convert import arrays as arrays_lib
from igpo_jax.convert import open, writers
from igpo_jax.convert.__main__ import parse_size
from igpo_jax.convert.arrays import OrbaxArrays
from igpo_jax.convert.entries import Entry, entries
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.convert.safetensors_io import Reader
from igpo_jax.errors import UserError
from igpo_jax.models import FAMILIES
from tests.convert_helpers import (
  GOLDENS,
  MODELS,
  assert_same_bits,
  convert,
  copy_tiny,
  edit_config,
  load,
)
from tests.paths import REPO, run_on_devices
from tests.tiny_tokenizer import make_directory


@pytest.fixture
def hf(tmp_path):
  return copy_tiny(tmp_path / "hf")


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_every_bit(name, dtype, tmp_path):
  source = tmp_path / "hf"
  source.mkdir()
  shutil.copy(GOLDENS / name / "config.json", source)
  tensors = safetensors.numpy.load_file(GOLDENS / name / "model.safetensors")
  if dtype == "bfloat16":
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
  # Bits that arithmetic would not keep: a signalling NaN, minus zero, a denormal.
  word = next(iter(tensors.values())).view(f"u{np.dtype(dtype).itemsize}")
  shift = 16 if dtype == "float32" else 0
  word.reshape(-1)[:3] = [0x7F81 << shift, 0x8000 << shift, 1]
  safetensors.numpy.save_file(tensors, source / "model.safetensors")
  orbax = convert(source, tmp_path / "orbax")
  back = convert(orbax, tmp_path / "back", "--max_shard_size=200KB")
  assert_same_bits(load(back), load(source))
  assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
  index = json.loads((back / "model.safetensors.index.json").read_text())
  assert index["weight_map"].keys() == tensors.keys()
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  for file in back.glob("*.safetensors"):
    size = sum(t.nbytes for t in safetensors.numpy.load_file(file).values())
    assert size <= 200_000 and f"-of-{len(list(back.glob('*.safetensors'))):05d}." in file.name
  again = convert(back, tmp_path / "again", "--to=hf")
  assert_same_bits(load(again), load(source))
  assert not (again / "model.safetensors.index.json").exists()


@pytest.mark.slow
def test_small_blocks_change_nothing(hf, tmp_path, monkeypatch):
  monkeypatch.setattr(writers, "BLOCK_BYTES", 3000)
  orbax = convert(hf, tmp_path / "orbax")
  back = convert(orbax, tmp_path / "back")
  assert_same_bits(load(back), load(hf))
  chunk, inner = writers.chunk_shapes(entries(open.open_source(hf).config)[0], np.dtype(np.float32))
  assert chunk == inner == [1, 64]


@pytest.mark.slow
def test_no_part_larger_than_a_block_is_read(hf, tmp_path, monkeypatch):
  monkeypatch.setattr(writers, "BLOCK_BYTES", 3000)
  sizes = []
  for cls in (Reader, OrbaxArrays):
    read = cls.read

    def record(self, *args, read=read):
      part = read(self, *args)
      sizes.append(part.nbytes)
      return part

    monkeypatch.setattr(cls, "read", record)
  convert(convert(hf, tmp_path / "orbax"), tmp_path / "back")
  assert max(sizes) <= 3000 and sum(sizes) == 2 * 4 * 225_728


def test_dtype_can_be_changed_on_the_way(hf, tmp_path):
  edit_config(hf, torch_dtype="float32")
  half = convert(hf, tmp_path / "half", "--to=hf", "--dtype=bfloat16")
  tensors = safetensors.numpy.load_file(hf / "model.safetensors")
  expected = {k: v.astype(ml_dtypes.bfloat16).view(np.uint16) for k, v in tensors.items()}
  assert_same_bits(load(half), expected)
  assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_stock_orbax_restores_what_we_write(hf, tmp_path):
  orbax = convert(hf, tmp_path / "orbax")
  params = load_pretrained(hf, dtype="float32").params
  restored = ocp.StandardCheckpointer().restore(orbax / "params")
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
  restored = ocp.StandardCheckpointer().restore(orbax / "params", like)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
  jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_both_forms_load_the_same(hf, tmp_path):
  make_directory(hf)
  orbax = convert(hf, tmp_path / "orbax")
  one, two = (load_pretrained(d, dtype="bfloat16") for d in (hf, orbax))
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
  assert one.config == two.config and one.lm is two.lm
  assert one.tokenizer.encode("eggs") == two.tokenizer.encode("eggs")
  assert one.config.stop_ids == (510, one.tokenizer.turn_id)


def test_files_of_the_model_travel_and_weights_do_not(hf, tmp_path):
  make_directory(hf)
  (hf / "modeling_llada.py").write_text("# code")
  (hf / "pytorch_model.bin").write_bytes(b"never read")
  orbax = convert(hf, tmp_path / "orbax")
  back = convert(orbax, tmp_path / "back")
  expected = {f.name for f in hf.iterdir()} - {"pytorch_model.bin"}
  assert {f.name for f in back.iterdir()} == expected


@pytest.mark.parametrize("encoding", ["windows lines", "byte order mark", "tabs"])
def test_config_json_is_copied_byte_for_byte(hf, tmp_path, encoding):
  text = (hf / "config.json").read_text()
  text = text.replace("\n", "\r\n") if encoding == "windows lines" else text
  text = text.replace("  ", "\t") if encoding == "tabs" else text
  data = text.encode("utf-8-sig" if encoding == "byte order mark" else "utf-8")
  (hf / "config.json").write_bytes(data)
  orbax = convert(hf, tmp_path / "orbax")
  back = convert(orbax, tmp_path / "back")
  assert data == (orbax / "config.json").read_bytes() == (back / "config.json").read_bytes()


def test_a_link_to_nothing_that_nobody_needs_is_left_out(hf, tmp_path, capsys):
  make_directory(hf)
  for name in ("README.md", "modeling_llada.py", "assets"):
    (hf / name).symlink_to(tmp_path / "deleted")
  assert load_pretrained(hf).tokenizer is not None
  orbax = convert(hf, tmp_path / "orbax")
  assert not (orbax / "README.md").is_symlink() and (orbax / "tokenizer.json").exists()
  assert "README.md is left out: a link to nothing" in capsys.readouterr().err
  for name in ("tokenizer_config.json", "tokenizer.json"):
    (hf / name).unlink()
    (hf / name).symlink_to(tmp_path / "deleted")
    with pytest.raises(UserError, match=f"{name} is a link to nothing"):
      load_pretrained(hf)


def shards_of(directory, names):
  """Cuts a model into shards: tensor -> file."""
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  for name in set(names.values()):
    part = {key: tensors[key] for key in names if names[key] == name}
    safetensors.numpy.save_file(part, directory / name)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_the_index_says_which_copy_of_a_tensor_counts(hf):
  keys = sorted(safetensors.numpy.load_file(hf / "model.safetensors"))
  for names in (("a.safetensors", "b.safetensors"), ("b.safetensors", "a.safetensors")):
    directory = copy_tiny(hf.parent / names[0])
    shards_of(directory, {key: names["q_proj" in key] for key in keys})
    stale = safetensors.numpy.load_file(directory / names[0])
    stale |= {key: np.zeros((64, 64), np.float32) for key in keys if "q_proj" in key}
    safetensors.numpy.save_file(stale, directory / names[0])
    one, two = (load_pretrained(d, dtype="float32") for d in (directory, hf))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kept, dropped", [(WTE, HEAD), (HEAD, WTE)])
def test_a_tensor_may_be_named_in_the_metadata_only(hf, tmp_path, kept, dropped, tied):
  # torch writes tensors that share their memory once, the first by name.
  edit_config(hf, weight_tying=tied)
  tensors = safetensors.numpy.load_file(hf / "model.safetensors")
  whole = copy_tiny(tmp_path / "whole")
  edit_config(whole, weight_tying=tied)
  same = tensors | {dropped: tensors[kept]}
  safetensors.numpy.save_file(same, whole / "model.safetensors")
  del tensors[dropped]
  q = "model.transformer.blocks.{}.q_proj.weight"
  metadata = {"format": "pt", dropped: "again", "again": kept, q.format(0): q.format(1)}
  safetensors.numpy.save_file(tensors, hf / "model.safetensors", metadata)
  expected = load_pretrained(whole, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(hf, "float32").params,
               expected.params)  # fmt: skip
  back = convert(convert(hf, tmp_path / "orbax"), tmp_path / "back")
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(back, "float32").params,
               expected.params)  # fmt: skip


def test_metadata_that_leads_nowhere_helps_nobody(hf):
  tensors = safetensors.numpy.load_file(hf / "model.safetensors")
  del tensors[HEAD]
  for metadata in ({HEAD: "x", "x": HEAD}, {HEAD: "gone"}, {HEAD: "pt"}):
    safetensors.numpy.save_file(tensors, hf / "model.safetensors", metadata)
    with pytest.raises(UserError, match=f"{HEAD} is missing"):
      load_pretrained(hf)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 50), columns=st.integers(1, 9), layers=st.integers(1, 3),
       limit=st.integers(1, 400), transposed=st.booleans())  # fmt: skip
def test_blocks_cover_every_element_once(rows, columns, layers, limit, transposed):
  shape = (layers, rows, columns)
  entry = Entry(("blocks", "x"), shape, tuple(map(str, range(layers))), True, transposed)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(writers, "BLOCK_BYTES", limit)
    seen = np.zeros(shape, int)
    for block in writers.blocks(entry, np.dtype(np.float32), range(layers)):
      seen[block.index] += 1
      row_bytes = 4 * entry.hf_shape[1]
      assert 4 * seen[block.index].size <= max(limit, row_bytes)
  assert (seen == 1).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_shards_hold_every_tensor_once_and_are_not_too_large(rows, limit):
  made = [Entry((str(i),), (n,), (str(i),), False, False) for i, n in enumerate(rows)]
  dtypes = {entry.name: np.dtype(np.float32) for entry in made}
  shards = writers.plan_shards(made, dtypes, 4 * limit)
  assert sorted(t.key for s in shards.values() for t in s) == sorted(e.name for e in made)
  assert all(sum(t.nbytes for t in s) <= 4 * limit or len(s) == 1 for s in shards.values())


MESH_SCRIPT = """
import collections, sys
import jax, numpy as np
from igpo_jax.convert.arrays import OrbaxArrays
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.convert.safetensors_io import Reader
from igpo_jax.parallel.mesh import make_mesh

read = collections.Counter()  # bytes of each array, or of each tensor of a file

def counted(cls, name_of):
  inner = cls.read
  def outer(self, *args, **kwargs):
    part = inner(self, *args, **kwargs)
    read[name_of(*args, **kwargs)] += part.nbytes
    return part
  cls.read = outer

counted(Reader, lambda key, *rows: key)
counted(OrbaxArrays, lambda name, index: name)

reference = load_pretrained(sys.argv[1], dtype="float32")
stored = sum(x.nbytes for x in jax.tree.leaves(reference.params))
for sizes in ((2, 2, 2), (1, 8, 1), (1, 1, 4), (1, 2, 4), (8, 1, 1)):
  mesh = make_mesh(*sizes, devices=jax.devices()[:int(np.prod(sizes))])
  for path in sys.argv[1:]:
    for dtype in ("float32", "bfloat16"):
      read.clear()
      pre = load_pretrained(path, dtype=dtype, mesh=mesh)
      assert sum(read.values()) == stored, (path, sizes, sum(read.values()) / stored)
      jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y).astype(x.dtype)),
        pre.params, reference.params)
      kernel = pre.params["blocks"]["q_proj"]["kernel"]
      assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
      part = (3, 64 // sizes[1], 64 // sizes[2])
      assert kernel.addressable_shards[0].data.shape == part
"""


@pytest.mark.slow
def test_a_mesh_is_filled_by_reading_each_byte_once(hf, tmp_path):
  orbax = convert(hf, tmp_path / "orbax")
  run_on_devices(8, "-c", MESH_SCRIPT, str(hf), str(orbax))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6),
       st.integers(1, 5))  # fmt: skip
def test_runs_of_rows_cover_what_is_wanted_once(wanted, step):
  wanted = [range(start, start + size) for start, size in wanted]
  rows = [row for run in arrays_lib._runs(wanted, step) for row in range(*run)]
  assert rows == sorted({row for part in wanted for row in part})
  assert all(0 < stop - start <= step for start, stop in arrays_lib._runs(wanted, step))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4,
                unique=True))  # fmt: skip
def test_boxes_fill_every_part_and_read_no_more_than_the_parts(cells):
  # Parts of a grid of 2 x 2 cells, as the devices of one host of several hold them.
  wanted = [((2 * i, 2 * i + 2), (2 * j, 2 * j + 2)) for i, j in cells]
  boxes = arrays_lib._boxes(wanted)
  assert sorted(k for _, members in boxes for k in members) == list(range(len(wanted)))
  size = lambda box: math.prod(stop - start for start, stop in box)
  assert sum(size(box) for box, _ in boxes) <= sum(map(size, wanted))
  for box, members in boxes:
    for k in members:
      assert all(o[0] <= w[0] and w[1] <= o[1] for w, o in zip(wanted[k], box, strict=True))


# Families


def test_options_that_change_the_mathematics_are_refused_by_name(hf):
  edit_config(hf, alibi=True, include_bias=True, attention_layer_norm=True, brand_new=3)
  with pytest.raises(UserError) as error:
    load_pretrained(hf)
  for text in ("alibi=True", "include_bias=True", "attention_layer_norm=True", "brand_new=3"):
    assert text in str(error.value)


@pytest.mark.parametrize("option", sorted(FAMILIES["llada"].required))
def test_no_required_option_is_forgotten(hf, option):
  edit_config(hf, **{option: "something else"})
  with pytest.raises(UserError, match=f"{option}='something else' is not supported"):
    open.open_source(hf)


@pytest.mark.parametrize("option", sorted(FAMILIES["llada"].stated))
def test_an_option_with_another_published_default_must_be_stated(hf, option):
  config = json.loads((hf / "config.json").read_text())
  del config[option]
  (hf / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=f"{option} is missing"):
    open.open_source(hf)


@pytest.mark.parametrize("options", [
  {"gradient_checkpointing": True, "use_cache": True},
  {"flash_attn_varlen": True, "use_flash_attention": False},
  {"_attn_implementation_autoset": True, "_attn_implementation": "sdpa", "_commit_hash": "0f"},
  {"unsloth_version": "2025.1", "unsloth_fixed": True},
  {"quantization_config": None, "pruned_heads": {}, "is_encoder_decoder": False},
  {"id2label": {"0": "LABEL_0"}, "temperature": 1.0, "top_k": 50, "problem_type": None},
])  # fmt: skip
def test_options_that_training_programs_leave_behind_change_nothing(hf, options):
  expected = load_pretrained(hf, dtype="float32")
  edit_config(hf, **options)
  pre = load_pretrained(hf, dtype="float32")
  assert pre.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, pre.params, expected.params)


@pytest.mark.parametrize("option, value", [
  ("quantization_config", {"bits": 4}), ("is_encoder_decoder", True), ("pruned_heads", {"0": [1]}),
])  # fmt: skip
def test_options_of_any_model_that_change_what_it_computes_are_refused(hf, option, value):
  edit_config(hf, **{option: value})
  with pytest.raises(UserError, match=f"{option}="):
    load_pretrained(hf)


DEFAULT_ROTATION = {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize("family", ["llada", "illada"])
@pytest.mark.parametrize("change, message", [
  ({"rope_parameters": DEFAULT_ROTATION, "rope_theta": None}, None),
  ({"rope_parameters": {**DEFAULT_ROTATION, "partial_rotary_factor": 1.0}}, None),
  ({"rope_scaling": {"type": "default"}}, None),
  ({"rope_parameters": None, "rope_scaling": None}, None),
  ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=500000.0, but"),
  ({"rope_parameters": {**DEFAULT_ROTATION, "rope_type": "yarn"}}, "only the default rotation"),
  ({"rope_parameters": {**DEFAULT_ROTATION, "partial_rotary_factor": 0.5}}, "only the default"),
  ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "only the default rotation"),
  ({"rope_parameters": {"full_attention": DEFAULT_ROTATION}}, "only the default rotation"),
  ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, "rope_theta is missing"),
  ({"rope_parameters": {**DEFAULT_ROTATION, "rope_theta": "5"}, "rope_theta": None},
   "rope_theta='5' should be"),
  ({"rope_parameters": "default"}, "rope_parameters='default'"),
])  # fmt: skip
def test_the_default_rotation_in_the_words_of_transformers_5(tmp_path, family, change, message):
  if family == "llada":
    directory = copy_tiny(tmp_path / "model")
  else:
    directory = illada_directory(tmp_path / "model", tied=False)
  expected = open.open_source(directory).config
  config = json.loads((directory / "config.json").read_text()) | change
  config = {k: v for k, v in config.items() if v is not None or not k.startswith("rope_theta")}
  (directory / "config.json").write_text(json.dumps(config))
  if message is None:
    assert open.open_source(directory).config == expected
  else:
    with pytest.raises(UserError, match=message):
      open.open_source(directory)


@pytest.mark.parametrize("change, message", [
  ({"model_type": "gemma"}, "model_type 'gemma' is not one of Dream, a2d-llama, "),
  ({"model_type": "qwen3"}, "is an autoregressive model: .* --as-diffusion"),
  ({"mask_token_id": None}, "mask_token_id is missing"),
  ({"n_heads": 5}, "multiple"),
])  # fmt: skip
def test_other_models_are_refused(hf, change, message):
  edit_config(hf, **change)
  with pytest.raises(UserError, match=message):
    open.open_source(hf)


def illada_directory(directory, tied, head_copy=False):
  """llada_tiny_gqa in the clothes of iLLaDA."""
  directory.mkdir()
  theirs = json.loads((GOLDENS / "llada_tiny_gqa" / "config.json").read_text())
  tensors = safetensors.numpy.load_file(GOLDENS / "llada_tiny_gqa" / "model.safetensors")
  llada, illada = (FAMILIES[name] for name in ("llada", "illada"))
  config = {
    illada.fields[ours]: theirs[llada.fields[ours]]
    for ours in illada.fields
    if ours not in ("tie_embeddings", "mask_id")
  }
  config |= {"model_type": "illada", "hidden_act": "silu", "mlp_bias": False}
  config |= {} if tied else {"tie_word_embeddings": False}
  names = {llada.top[ours]: illada.top[ours] for ours in llada.top}
  for n in range(3):
    names |= {llada.block[k].format(n): illada.block[k].format(n) for k in llada.block}
  out = {names[key]: value for key, value in tensors.items()}
  if tied:
    out["lm_head.weight"] = out["model.embed_tokens.weight"].copy()
    if not head_copy:
      del out["lm_head.weight"]
  safetensors.numpy.save_file(out, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def test_illada_names_give_the_same_model(tmp_path):
  pre = load_pretrained(illada_directory(tmp_path / "illada", tied=False), dtype="float32")
  same = load_pretrained(GOLDENS / "llada_tiny_gqa", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, pre.params, same.params)
  assert pre.config.mask_id == 5 and pre.config.kv_heads == 2


@pytest.mark.slow
@pytest.mark.parametrize("head_copy", [False, True])
def test_tied_embeddings_are_the_head(tmp_path, head_copy):
  directory = illada_directory(tmp_path / "illada", tied=True, head_copy=head_copy)
  pre = load_pretrained(directory, dtype="float32")
  assert "head" not in pre.params and pre.config.tie_embeddings
  tokens = jnp.arange(8)[None]
  hidden, _ = pre.lm.hidden(pre.params, tokens)
  expected = hidden @ pre.params["wte"]["embedding"].T
  np.testing.assert_allclose(pre.lm.logits(pre.params, tokens), expected, atol=1e-3)
  orbax = convert(directory, tmp_path / "orbax")
  back = load(convert(orbax, tmp_path / "back"))
  expected = load(directory)
  expected.pop("lm_head.weight", None)
  assert_same_bits(back, expected)


def test_dry_run_lists_everything_and_reads_no_tensor(hf, tmp_path, monkeypatch, capsys):
  make_directory(hf)
  orbax = convert(hf, tmp_path / "orbax")

  def refuse(*args):
    raise AssertionError("a tensor was read")

  capsys.readouterr()
  monkeypatch.setattr(Reader, "read", refuse)
  monkeypatch.setattr(OrbaxArrays, "read", refuse)
  convert(hf, tmp_path / "target", "--dry-run")
  text = capsys.readouterr().out
  assert "blocks/ff_out/kernel  float32[3, 192, 64]" in text and "tokenizer.json" in text
  assert "225,728 parameters, 0.90 MB" in text
  convert(orbax, tmp_path / "target", "--dry-run", "--max_shard_size=500KB")
  text = capsys.readouterr().out
  assert "model-00002-of-00002.safetensors" in text
  assert "model.transformer.blocks.2.ff_out.weight  float32[64, 192]" in text
  assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("text, size", [
  ("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("100", 100), ("1.5 KB", 1500),
])  # fmt: skip
def test_sizes(text, size):
  assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "0", "-1GB"])
def test_sizes_that_are_none(text):
  with pytest.raises(UserError, match="max_shard_size"):
    parse_size(text)


# Published sizes


@pytest.mark.parametrize("preset, count", [
  ("llada_8b", 8_015_581_184),  # as published
  ("illada_8b", 7_615_025_152),  # published as 7.62B
])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(preset, count):

  spec = importlib.util.spec_from_file_location(preset, REPO / "configs" / f"{preset}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  preset_config = module.get_config()
  preset_config.data.rl = "jsonl:train.jsonl"
  config = freeze(preset_config).model  # its options go together
  config = dataclasses.replace(config, lora=LoRAConfig())
  assert config.family == preset.removesuffix("_8b")
  assert sum(entry.size for entry in entries(config)) == count


def test_a_tokenizer_of_another_model_is_refused(hf):
  make_directory(hf)
  (hf / "igpo_tokenizer.json").write_text('{"type": "hf", "mask_token_id": 3}')
  with pytest.raises(UserError, match="mask token is 3, the model's 511"):
    load_pretrained(hf)


def test_illada_finds_its_mask_token_in_the_tokenizer(tmp_path):
  directory = illada_directory(tmp_path / "illada", tied=True)
  special = ("<[UNUSED]>", "<[MASK]>", "<|endoftext|>")
  make_directory(directory, special=special, template=None)
  tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
  mask = next(t["id"] for t in tokens if t["content"] == "<[MASK]>")
  with pytest.raises(UserError, match=f"mask token is {mask}, the model's 5"):
    load_pretrained(directory)
  edit_config(directory, mask_token_id=mask)
  assert load_pretrained(directory).tokenizer.mask_id == mask


def test_files_without_a_descriptor_are_read_too(hf, monkeypatch):
  expected = load_pretrained(hf, dtype="float32")
  opened = []

  def remote(path, mode="r"):
    opened.append(path.name)
    data = pathlib.Path(path).read_bytes()
    return io.BytesIO(data) if "b" in mode else io.StringIO(data.decode())

  monkeypatch.setattr(type(epath.Path(hf)), "open", remote)
  pre = load_pretrained(hf, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, pre.params, expected.params)
  assert "model.safetensors" in opened


def test_a_file_that_shrinks_while_it_is_read_is_noticed(hf):
  with Reader(hf) as reader:
    data = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(data[:-1000])
    last = max(reader.tensors, key=lambda key: reader.tensors[key].start)
    with pytest.raises(UserError, match="ended early"):
      reader.read(last)
