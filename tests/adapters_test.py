"""Adapters on disk: PEFT directories both ways, and checkpoints of training runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from igpo_jax.config import Config, LoRAConfig, ModelConfig
from igpo_jax.convert import open, peft
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.inference.settings import find_run
from igpo_jax.models import FAMILIES, lora, make_lm
from igpo_jax.models.families import model_config
from tests.convert_helpers import (
  GOLDENS,
  SHAPES,
  assert_same_bits,
  convert,
  load,
  save_adapters,
  save_run,
  write_peft,
)

BASE = GOLDENS / "llada_tiny_gqa"
BASE_CONFIG = open.open_source(BASE).config
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 512)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(lm, params):
  return lm.logits(params, TOKENS)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_peft_round_trip_keeps_every_bit(tmp_path, dtype):
  source = write_peft(tmp_path / "peft", dtype)
  back = convert(BASE, tmp_path / "back", "--to=peft", f"--adapter={source}")
  assert_same_bits(load(back), load(source))
  assert sorted(f.name for f in back.iterdir()) == [
    "adapter_config.json", "adapter_model.safetensors"
  ]  # fmt: skip
  theirs, ours = (json.loads((d / "adapter_config.json").read_text()) for d in (source, back))
  for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora"):
    assert ours[key] == theirs[key]
  assert peft.read_config(back, BASE_CONFIG) == peft.read_config(source, BASE_CONFIG)


def test_adapters_survive_orbax(tmp_path):
  source = write_peft(tmp_path / "peft")
  orbax = convert(BASE, tmp_path / "orbax", f"--adapter={source}")
  one = load_pretrained(BASE, dtype="float32", adapter=source)
  two = load_pretrained(orbax, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
  assert one.config == two.config
  back = convert(orbax, tmp_path / "back", "--to=peft")
  assert_same_bits(load(back), load(source))


@pytest.mark.slow
def test_merged_and_adapted_models_agree(tmp_path):
  source = write_peft(tmp_path / "peft")
  merged = convert(BASE, tmp_path / "merged", "--to=hf", f"--adapter={source}", "--merge_lora")
  adapted = load_pretrained(BASE, dtype="float32", adapter=source)
  plain = load_pretrained(merged, dtype="float32")
  expected = lora.merge(adapted.params, adapted.config.lora)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0), plain.params, expected
  )
  logits = logits_of(adapted.lm, adapted.params)
  # The logits of this model reach 13, where float32 itself is 4e-5 off.
  np.testing.assert_allclose(logits_of(plain.lm, plain.params), logits, atol=1e-4, rtol=0)
  base = load_pretrained(BASE, dtype="float32")
  assert np.abs(logits_of(base.lm, base.params) - logits).max() > 0.05


def test_the_delta_is_that_of_peft(tmp_path):
  source = write_peft(tmp_path / "peft")
  merged = convert(BASE, tmp_path / "merged", "--to=hf", f"--adapter={source}", "--merge_lora")
  pair = safetensors.numpy.load_file(source / "adapter_model.safetensors")
  weights, base = (safetensors.numpy.load_file(d / "model.safetensors") for d in (merged, BASE))
  for key in weights:
    name = f"base_model.model.{key.removesuffix('.weight')}"
    expected = base[key].astype(np.float64)
    if f"{name}.lora_A.weight" in pair:
      # y = x W^T + (alpha / r) (x A^T) B^T
      expected = expected + 8 / 4 * pair[f"{name}.lora_B.weight"] @ pair[f"{name}.lora_A.weight"]
      np.testing.assert_allclose(weights[key], expected, atol=1e-6, rtol=0)
    else:
      np.testing.assert_array_equal(weights[key], base[key])


@pytest.mark.parametrize("modules, expected", [
  (["q_proj", "v_proj"], "blocks/q_proj|blocks/v_proj"),
  (["ff_out"], "blocks/ff_out|head"),  # as in PEFT: both end so
  (["blocks.0.ff_out"], "blocks/ff_out"),
  ("all-linear", "blocks/q_proj|blocks/k_proj|blocks/v_proj|blocks/attn_out|blocks/ff_proj|"
                 "blocks/up_proj|blocks/ff_out"),
  (r".*\.ff_out", "blocks/ff_out|head"),
  (r"model\.transformer\.blocks\.\d+\.ff_out", "blocks/ff_out"),
])  # fmt: skip
def test_target_modules_mean_what_peft_means(tmp_path, modules, expected):
  directory = write_peft(tmp_path / "peft", target_modules=modules)
  one_layer = dataclasses.replace(BASE_CONFIG, n_layers=1)
  assert peft.read_config(directory, one_layer).targets == expected


@pytest.mark.parametrize("modules, excluded, expected", [
  (["ff_out"], ["model.transformer.ff_out"], "blocks/ff_out"),
  (["ff_out"], r"model\.transformer\.ff_out", "blocks/ff_out"),
  ("all-linear", ["ff_out", "up_proj"], "blocks/q_proj|blocks/k_proj|blocks/v_proj|"
                                        "blocks/attn_out|blocks/ff_proj"),
  ("ALL-linear", r".*blocks\.\d+\.ff_.*", "blocks/q_proj|blocks/k_proj|blocks/v_proj|"
                                          "blocks/attn_out|blocks/up_proj"),
  (["q_proj", "v_proj"], [], "blocks/q_proj|blocks/v_proj"),
  (["q_proj"], ["blocks.7.q_proj"], "blocks/q_proj"),  # there is no layer 7
  (["q_proj"], ["proj"], "blocks/q_proj"),  # no whole part of a name
])  # fmt: skip
def test_exclude_modules_mean_what_peft_means(tmp_path, modules, excluded, expected):
  directory = write_peft(tmp_path / "peft", target_modules=modules, exclude_modules=excluded)
  assert peft.read_config(directory, BASE_CONFIG).targets == expected


def test_an_adapter_with_exclude_modules_is_the_one_without(tmp_path):
  shapes = {"model.transformer.blocks.{}.ff_out": (192, 64)}
  options = {"target_modules": ["ff_out"], "exclude_modules": ["model.transformer.ff_out"]}
  directory = write_peft(tmp_path / "peft", shapes=shapes, **options)
  plain = write_peft(tmp_path / "plain", shapes=shapes, target_modules=[
    f"blocks.{n}.ff_out" for n in range(3)])  # fmt: skip
  one, two = (load_pretrained(BASE, dtype="float32", adapter=d) for d in (directory, plain))
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
  assert one.config == two.config


@pytest.mark.parametrize("options, message", [
  ({"exclude_modules": ["blocks.1.q_proj"]}, "adapt blocks/q_proj in 2 of 3 layers"),
  ({"target_modules": ["blocks.2.q_proj"]}, "adapt blocks/q_proj in 1 of 3 layers"),
  ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "names no linear layer"),
])  # fmt: skip
def test_modules_that_cannot_be_meant_are_told(tmp_path, options, message):
  directory = write_peft(tmp_path / "peft", **options)
  with pytest.raises(UserError, match=message):
    load_pretrained(BASE, adapter=directory)


def test_a_regular_expression_that_never_ends_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(peft, "MATCH_SECONDS", 0.5)
  directory = write_peft(tmp_path / "peft", target_modules=r"([a-z0-9_.]+)+X")
  with pytest.raises(UserError, match=r"adapter_config.json: .* takes more than 0.5 s to match"):
    load_pretrained(BASE, adapter=directory)


@pytest.mark.parametrize("start", [
  "pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "loftq", "lora_ga", "unheard-of",
])  # fmt: skip
def test_adapters_that_took_their_start_out_of_the_base_are_refused(tmp_path, start):
  directory = write_peft(tmp_path / "peft", init_lora_weights=start)
  for attempt in (
    lambda: load_pretrained(BASE, adapter=directory),
    lambda: convert(BASE, tmp_path / "x", "--to=hf", "--merge_lora", f"--adapter={directory}"),
  ):
    with pytest.raises(UserError, match=r"init_lora_weights=.* path_initial_model_for_weight"):
      attempt()


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal"])
def test_adapters_that_left_the_base_alone_load_whatever_they_began_with(tmp_path, start):
  directory = write_peft(tmp_path / "peft", init_lora_weights=start)
  assert peft.read_config(directory, BASE_CONFIG).rank == 4


@pytest.mark.parametrize("option, value", [
  ("r", "4"), ("r", 4.0), ("r", True), ("r", 0), ("r", None), ("r", [4]),
  ("lora_alpha", "8"), ("lora_alpha", None), ("lora_alpha", 0), ("lora_alpha", float("inf")),
  ("lora_dropout", "0.1"), ("lora_dropout", 1.5), ("lora_dropout", True),
  ("target_modules", 5), ("target_modules", None), ("target_modules", []),
  ("target_modules", ["q_proj", 3]), ("target_modules", {"q_proj": 1}), ("target_modules", "(q"),
  ("target_modules", "(" * 3000 + ")" * 3000), ("target_modules", "q{99999999999999999999}"),
  ("exclude_modules", 5), ("exclude_modules", [None]), ("exclude_modules", "(q"),
  ("peft_type", None), ("peft_type", ["LORA"]), ("bias", True), ("use_dora", "yes"),
  ("rank_pattern", [1]), ("layers_to_transform", 0), ("use_something_new", True),
  ("init_lora_weights", ["pissa"]), ("init_lora_weights", 3),
])  # fmt: skip
def test_values_of_wrong_kinds_in_adapter_config_json_are_told_by_name(tmp_path, option, value):
  directory = write_peft(tmp_path / "peft", **{option: value})
  with pytest.raises(UserError) as error:
    load_pretrained(BASE, adapter=directory)
  assert f"{option}={value!r}" in str(error.value)
  assert "adapter_config.json" in str(error.value)


def test_options_of_other_versions_of_peft_that_are_off_are_no_hindrance(tmp_path):
  off = {"use_something_new": False, "new_config": None, "new_pattern": {}, "new_list": []}
  written = {"peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16,
             "auto_mapping": {"unsloth_fixed": True}, "task_type": "CAUSAL_LM", "revision": None,
             "eva_config": None, "loftq_config": {}, "layers_to_transform": None}  # fmt: skip
  directory = write_peft(tmp_path / "peft", **off, **written)
  assert load_pretrained(BASE, adapter=directory).config.lora.rank == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
  "targets", ["blocks/(.*/)?ff_out", "blocks/.*|head", ".*blocks/.*", "blocks/(q|v|qkv)_proj"]
)
def test_our_targets_survive_the_trip_through_peft(tmp_path, family, targets):
  cfg = LoRAConfig(rank=4, alpha=8.0, targets=targets)
  tiny = {**FAMILIES[family].tiny, "tie_embeddings": False}
  model = model_config(family, tiny, vocab_size=16, lora=cfg)
  peft.write_config(tmp_path, model, "base")
  found = peft.read_config(tmp_path, model)
  plain = dataclasses.replace(model, lora=LoRAConfig())
  tree = jax.eval_shape(make_lm(plain).init, jax.random.key(0))
  assert lora.find_targets(tree, found) == lora.find_targets(tree, cfg)


@pytest.mark.parametrize("option, value", [
  ("use_rslora", True), ("use_dora", True), ("bias", "all"), ("modules_to_save", ["wte"]),
  ("rank_pattern", {"q_proj": 8}), ("layers_to_transform", [0]), ("peft_type", "IA3"),
  ("fan_in_fan_out", True),
])  # fmt: skip
def test_adapters_that_compute_something_else_are_refused(tmp_path, option, value):
  directory = write_peft(tmp_path / "peft", **{option: value})
  with pytest.raises(UserError, match=f"{option}="):
    load_pretrained(BASE, adapter=directory)


def test_adapters_that_do_not_fit_are_told_in_full(tmp_path):
  shapes = {**SHAPES, "model.transformer.ff_out": (64, 512)}
  shapes["model.transformer.blocks.{}.q_proj"] = (64, 63)
  directory = write_peft(tmp_path / "peft", shapes=shapes)
  with pytest.raises(UserError) as error:
    load_pretrained(BASE, adapter=directory)
  assert "model.transformer.ff_out.lora_A.weight is not part of this model" in str(error.value)
  assert "blocks.2.q_proj.lora_B.weight has shape [63, 4]" in str(error.value)


def test_the_formats_have_their_places_for_adapters(tmp_path):
  source = write_peft(tmp_path / "peft")
  with pytest.raises(UserError, match="--merge_lora adds them in, --to=peft writes them alone"):
    convert(BASE, tmp_path / "x", "--to=hf", f"--adapter={source}")
  for options in (["--to=peft"], ["--merge_lora"]):
    with pytest.raises(UserError, match="has no adapters"):
      convert(BASE, tmp_path / "x", *options)
  with pytest.raises(UserError, match="is a PEFT adapter: give its base as the source"):
    convert(source, tmp_path / "x")
  assert not (tmp_path / "x").exists()


# Training checkpoints


@pytest.mark.slow
def test_a_run_from_scratch_becomes_a_hugging_face_model(tmp_path):
  tokenizer = CharTokenizer("0123456789+= ")
  model = ModelConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, mlp_hidden=48)
  full = dataclasses.replace(model, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id,
                             eos_id=tokenizer.eos_id, stop_ids=tokenizer.stop_ids)  # fmt: skip
  lm = make_lm(full)
  params = jax.jit(lm.init)(jax.random.key(0))
  step = save_run(tmp_path / "run", Config(model=model), params, tokenizer)
  direct = load_pretrained(step, dtype="float32")
  back = load_pretrained(convert(step, tmp_path / "hf"), dtype="float32")
  for pre in (direct, back):
    jax.tree.map(np.testing.assert_array_equal, pre.params, params)
    assert pre.config == full and pre.tokenizer.encode("1+2") == tokenizer.encode("1+2")
  with pytest.raises(UserError, match=r"is a run, not a model: give one of .*checkpoints/rl/7"):
    open.open_source(tmp_path / "run")


@pytest.mark.slow
def test_a_link_to_a_step_is_the_step(tmp_path):
  """Links such as "best" or "latest", to a step, a stage or a run, and links to links."""
  tokenizer = CharTokenizer("0123456789+= ")
  model = ModelConfig(d_model=16, n_layers=1, n_heads=2, mlp_hidden=24)
  full = dataclasses.replace(model, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id,
                             eos_id=tokenizer.eos_id, stop_ids=tokenizer.stop_ids)  # fmt: skip
  params = jax.jit(make_lm(full).init)(jax.random.key(0))
  step = save_run(tmp_path / "run", Config(model=model), params, tokenizer)
  other = tmp_path / "elsewhere"
  other.mkdir()
  for name, target in {"best": step, "stage": step.parent, "run": tmp_path / "run"}.items():
    (other / name).symlink_to(target)
  (other / "relative").symlink_to("best")
  for link in ("best", "relative", "stage/7", "run/checkpoints/rl/7"):
    source = open.open_source(other / link)
    assert source.kind == "training" and os.path.samefile(
      source.tokenizer, tmp_path / "run/tokenizer"
    )
    assert os.path.samefile(find_run(epath.Path(other / link)), tmp_path / "run")
  back = load_pretrained(convert(other / "best", tmp_path / "hf"), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, back.params, params)


LORA = LoRAConfig(rank=2, alpha=4.0, targets="blocks/(q|k)_proj")


@pytest.mark.slow
@pytest.mark.parametrize("adapters_only", [True, False])
def test_a_run_with_adapters_can_be_merged_or_exported(tmp_path, adapters_only):
  base = load_pretrained(BASE, dtype="float32")
  adapters = lora.init(base.params, jax.random.key(0), LORA)
  adapters = jax.tree.map(lambda x: x + 0.01, adapters)
  params = lora.combine(base.params, adapters)
  config = Config(init_from=str(BASE), model=ModelConfig(lora=LORA))
  step = save_run(tmp_path / "run", config, adapters if adapters_only else params)
  pre = load_pretrained(step, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, pre.params, params)
  assert pre.config.lora == LORA

  with pytest.raises(UserError, match="--merge_lora"):
    convert(step, tmp_path / "hf")
  merged = load_pretrained(convert(step, tmp_path / "hf", "--merge_lora"), dtype="float32")
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0),
    merged.params, lora.merge(params, LORA),
  )  # fmt: skip
  exported = convert(step, tmp_path / "peft", "--to=peft")
  again = load_pretrained(BASE, dtype="float32", adapter=exported)
  jax.tree.map(np.testing.assert_array_equal, again.params, params)


def base_named_by(step, target, *options):
  exported = convert(step, target, "--to=peft", *options)
  return json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.slow
def test_a_peft_export_names_what_the_adapters_belong_to(tmp_path, monkeypatch, capsys):
  base = str(shutil.copytree(BASE, tmp_path / "base"))
  step = save_adapters(tmp_path / "run", base)
  assert base_named_by(step, tmp_path / "p1") == base
  # A run may have been told a relative path; from elsewhere that is another place.
  monkeypatch.chdir(tmp_path)
  step = save_adapters(tmp_path / "relative", "base")
  assert base_named_by(step, tmp_path / "p2") == base
  with monkeypatch.context() as elsewhere:
    elsewhere.chdir("/")
    with pytest.raises(UserError, match=r"init_from=base, and there is no such directory in /;"):
      open.open_source(step)
    assert base_named_by(step, tmp_path / "p3", f"--base={base}") == base
  # A run that went on with adapters, and adapters kept in an Orbax directory.
  step = save_adapters(tmp_path / "further", step)
  assert base_named_by(step, tmp_path / "p4") == base
  orbax = convert(base, tmp_path / "orbax", f"--adapter={tmp_path / 'p1'}")
  assert base_named_by(orbax, tmp_path / "p5") == base
  # Adapters on a model that a run trained: that is the base, and PEFT has to be told.
  params = load_pretrained(base, dtype="float32").params
  trained = save_run(tmp_path / "full", Config(init_from=base), params)
  capsys.readouterr()
  step = save_adapters(tmp_path / "on_full", trained)
  assert base_named_by(step, tmp_path / "p6") == str(trained)
  assert "PEFT cannot load: convert that with --to=hf" in capsys.readouterr().err


def test_a_run_of_another_version_is_told(tmp_path):
  step = save_adapters(tmp_path / "run", BASE)
  file = tmp_path / "run" / "config.json"
  whole = json.loads(file.read_text())
  for change in ({"lora": {"rank": 2, "flavour": 1}}, {"widths": 3}, {"lora": 5}):
    file.write_text(json.dumps(whole | {"model": whole["model"] | change}))
    with pytest.raises(UserError, match=r"config.json: its model is damaged or of another"):
      open.open_source(step)


def test_a_full_checkpoint_of_a_pretrained_model_keeps_its_config(tmp_path):
  base = load_pretrained(BASE, dtype="float32")
  params = jax.tree.map(lambda x: x + 1, base.params)
  step = save_run(tmp_path / "run", Config(init_from=str(BASE)), params)
  back = convert(step, tmp_path / "hf")
  assert json.loads((back / "config.json").read_text()) == json.loads(
    (BASE / "config.json").read_text()
  )
  pre = load_pretrained(back, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, pre.params, params)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_converted(tmp_path):
  """Changed bytes of arrays are read without an error."""
  step = save_run(tmp_path / "run", Config(init_from=str(BASE)), load_pretrained(BASE).params)
  convert(step, tmp_path / "hf")
  for file in (step / "default").rglob("d/*"):
    data = bytearray(file.read_bytes())
    if len(data) > 100_000:
      data[len(data) // 2] ^= 1
      file.write_bytes(bytes(data))
  for _ in range(2):
    with pytest.raises(UserError, match=rf"the checkpoint {step} is damaged: "):
      convert(step, tmp_path / "again")
    (step / "files.json").unlink(missing_ok=True)  # as a kill right after the save leaves it
  assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_a_checkpoint_of_adapters_needs_its_base(tmp_path):
  base = load_pretrained(BASE, dtype="float32")
  adapters = lora.init(base.params, jax.random.key(0), LORA)
  step = save_run(tmp_path / "run", Config(model=ModelConfig(lora=LORA)), adapters)
  with pytest.raises(UserError, match=r"adapters only and config.json names no base"):
    open.open_source(step)
  source = open.open_source(step, base=BASE)
  assert source.config.lora == LORA and "head/kernel" in source.arrays.shapes
