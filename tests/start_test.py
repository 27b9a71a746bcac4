"""What a run starts from: weights, adapters, tokenizer and mesh have to belong together."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from igpo_jax import generate
from igpo_jax.config import LoRAConfig, ModelConfig, SamplerConfig, freeze
from igpo_jax.convert import open
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.data.pipeline import PromptStream, SFTStream
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import CharTokenizer, load_tokenizer
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.errors import UserError
from igpo_jax.models import lora, make_lm
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.parallel.sharding import check_divides, tree_shardings
from igpo_jax.train.run import train
from igpo_jax.train.setup import make_model, make_tokenizer, with_lora
from igpo_jax.types import Canvas
from tests.convert_helpers import convert, copy_tiny, edit_config, edit_tensors, write_peft
from tests.paths import run_on_devices
from tests.tiny_config import get_config
from tests.tiny_tokenizer import make_directory

SHAPES = {f"model.transformer.blocks.{{}}.{name}": (64, 64) for name in ("q_proj", "v_proj")}
ASKED = LoRAConfig(rank=4, alpha=8.0, targets="blocks/(q|v)_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  directory = copy_tiny(tmp_path_factory.mktemp("start") / "base")
  return make_directory(directory)


@pytest.fixture(scope="module")
def adapted(base):
  """The base with adapters of rank 4 and alpha 8 on queries and values, as we keep them."""
  adapter = write_peft(base.parent / "adapter", shapes=SHAPES, target_modules=["q_proj", "v_proj"])
  return convert(base, base.parent / "adapted", f"--adapter={adapter}")


def config_of(directory, adapters=None, **model):
  config = freeze(get_config())
  return dataclasses.replace(
    config,
    init_from=str(directory),
    model=dataclasses.replace(config.model, lora=adapters or LoRAConfig(), **model),
  )


def start(config):
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    return make_model(config, load_tokenizer(config.init_from), mesh)


# Adapters that the weights bring


def test_without_lora_the_adapters_of_the_weights_are_merged(adapted):
  model = start(config_of(adapted))
  pre = load_pretrained(adapted, dtype="float32")
  expected = lora.merge(pre.params, pre.config.lora)
  assert "lora_a" not in model.params["blocks"]["q_proj"]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0), model.params, expected
  )
  base = pre.params["blocks"]["q_proj"]["kernel"]
  assert np.abs(expected["blocks"]["q_proj"]["kernel"] - base).max() > 1e-3


def test_a_merge_into_float32_parameters_is_not_rounded_to_the_files_dtype(base, adapted, tmp_path):
  adapter = base.parent / "adapter"
  half = convert(base, tmp_path / "half", f"--adapter={adapter}", "--dtype=bfloat16")
  kernel = start(config_of(half)).params["blocks"]["q_proj"]["kernel"]
  pre = load_pretrained(half, dtype="float32")
  exact = lora.merge(pre.params, pre.config.lora)["blocks"]["q_proj"]["kernel"]
  np.testing.assert_allclose(kernel, exact, atol=1e-6, rtol=0)
  assert np.abs(kernel - kernel.astype(jnp.bfloat16).astype(np.float32)).max() > 1e-4


@pytest.mark.parametrize("targets", [ASKED.targets, "blocks/q_proj|blocks/v_proj"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_lora_goes_on_with_the_adapters_of_the_weights(adapted, targets, dropout):
  asked = dataclasses.replace(ASKED, targets=targets, dropout=dropout)
  model = start(config_of(adapted, asked))
  expected = load_pretrained(adapted, dtype="float32").params
  jax.tree.map(np.testing.assert_array_equal, model.params, expected)
  # The dropout is the training's own.
  assert with_lora(open.open_source(adapted), asked).config.lora.dropout == dropout


@pytest.mark.parametrize("change", [
  {"rank": 8}, {"alpha": 64.0}, {"targets": "blocks/.*"}, {"targets": "blocks/q_proj"},
  {"rank": 2, "alpha": 4.0},
])  # fmt: skip
def test_another_lora_than_the_weights_have_is_told_before_there_is_a_workdir(
  adapted, tmp_path, change
):
  asked = dataclasses.replace(ASKED, **change)
  with pytest.raises(UserError) as error:
    train(config_of(adapted, asked), epath.Path(tmp_path / "run"))
  for name, value in change.items():
    assert f"model.lora.{name}={value!r}" in str(error.value)
    assert f"model.lora.{name}={getattr(ASKED, name)!r}" in str(error.value) or name == "targets"
  assert not (tmp_path / "run").exists()


# Tokenizers of other models


def test_a_tokenizer_of_another_model_is_told_and_not_kept(base, tmp_path):
  bare = copy_tiny(tmp_path / "bare")
  CharTokenizer("ab").save(tmp_path / "chars")
  shifted = {"mask_token_id": 511, "eos_token_id": 509}
  make_directory(tmp_path / "shifted", config=shifted)
  for directory, spec, message in (
    (bare, "char", "mask token is 1, the model's 511"),
    (base, str(tmp_path / "chars"), "mask token is 1, the model's 511"),
    (base, str(tmp_path / "shifted"), "end-of-text token is 509, the model's 510"),
    (bare, "sentencepiece:280", "mask token is"),
  ):
    config = config_of(directory)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=spec))
    with pytest.raises(UserError, match=message):
      make_tokenizer(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
  with pytest.raises(UserError, match="mask token is 1"):  # kept in a workdir by an older version
    make_model(config_of(bare), CharTokenizer("ab"), make_mesh(devices=jax.devices()[:1]))


def test_the_runs_own_tokenizer_says_where_answers_end(base, tmp_path):
  tokenizer = load_tokenizer(base)
  assert tokenizer.turn_id in start(config_of(base)).lm.stop_ids


# Token ids that the embedding has no row for


def test_a_vocabulary_smaller_than_the_tokenizer_is_told():
  config = freeze(get_config())
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=4))
  with pytest.raises(UserError, match=r"vocab_size=4 is less than the 5 tokens"):
    make_model(config, CharTokenizer("ab"), make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("prompt, trace, message", [
  ("acz", "b", "the prompt of record 'one' has the token id"),
  ("a", "bz", "the trace of record 'one' has the token id"),
])  # fmt: skip
def test_records_with_ids_past_the_embedding_are_told_by_name(prompt, trace, message):
  tokenizer = CharTokenizer("abcz")  # z is 6
  one = Record("one", ({"role": "user", "content": prompt},), trace, "")
  make = lambda stream, rows, *rest: stream([one], tokenizer, 1, (8,), 0, *rest,
                                            embedding_rows=rows)  # fmt: skip
  for rows in (None, 7, 8):
    assert len(make(PromptStream, rows)) == len(make(SFTStream, rows, 4)) == 1
  for stream, rest in ((PromptStream, ()), (SFTStream, (4,))):
    with pytest.raises(UserError, match=message):
      make(stream, 6, *rest)


@pytest.fixture(scope="module")
def small():
  """A model of 40 tokens and its parameters."""
  lm = make_lm(ModelConfig(d_model=16, n_layers=1, n_heads=2, mlp_hidden=16, vocab_size=40,
                           mask_id=39, eos_id=38))  # fmt: skip
  return lm, jax.jit(lm.init)(jax.random.key(0))


SAMPLER = SamplerConfig(gen_length=4, block_length=2, steps=4)


def canvas(*prompts):
  tokens = np.concatenate([np.array(prompts, np.int32), np.full((len(prompts), 4), 39)], axis=1)
  fixed = np.arange(tokens.shape[1])[None] < tokens.shape[1] - 4
  fixed = np.broadcast_to(fixed, tokens.shape)
  return Canvas(tokens.astype(np.int32), fixed, np.ones_like(fixed))


@pytest.mark.parametrize("token", [40, -1])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_canvas_with_ids_past_the_embedding_is_told(small, token, array):
  bad = jax.tree.map(array, canvas([1, token]))
  with pytest.raises(UserError, match=f"the canvas has the token id {token}, .* 40 rows"):
    denoise(*small, bad, jax.random.key(0), SAMPLER)


def test_generate_tells_prompts_and_hints_with_ids_past_the_embedding(tmp_path):
  directory = make_directory(copy_tiny(tmp_path / "hf"))
  ids = load_tokenizer(directory).encode("eggs")
  special = load_tokenizer(directory).special_ids
  # The special tokens have rows, some of the pieces have none.
  rows = max(ids)
  assert rows > 256
  keep = lambda t: np.ascontiguousarray(t[:rows])
  edit_tensors(directory, lambda tensors: tensors.update({
    key: keep(tensors[key]) for key in ("model.transformer.wte.weight",
                                        "model.transformer.ff_out.weight")}))  # fmt: skip
  eos, mask, turn = 0, 1, 2
  description = {"type": "hf", "mask_token_id": mask, "eos_token_id": eos, "pad_token_id": eos,
                 "eot_token_id": turn}  # fmt: skip
  (directory / "igpo_tokenizer.json").write_text(json.dumps(description))
  edit_config(directory, embedding_size=rows, vocab_size=rows, mask_token_id=mask,
              eos_token_id=eos, pad_token_id=eos)  # fmt: skip
  assert special  # they are in the vocabulary of the files all the same
  command = [f"--model={directory}", "--raw", "--gen_length=8", "--block_length=8", "--steps=2"]
  with pytest.raises(UserError, match=f"the prompt has the token id {rows}"):
    generate.main([*command, "--prompt=eggs"])
  with pytest.raises(UserError, match=f"a hint has the token id {rows}"):
    generate.main([*command, "--prompt=e", "--hint=eggs@0"])


# Weights that are no numbers


def test_a_row_whose_logits_are_no_numbers_says_so_and_its_neighbours_do_not(small):
  lm, params = small
  poisoned = jax.tree.map(jnp.copy, params)
  poisoned["wte"]["embedding"] = params["wte"]["embedding"].at[7].set(jnp.nan)
  out = denoise(lm, poisoned, canvas([1, 7], [1, 2]), jax.random.key(0), SAMPLER)
  assert out.finite.tolist() == [False, True]
  plain = denoise(lm, params, canvas([1, 7], [1, 2]), jax.random.key(0), SAMPLER)
  assert plain.finite.tolist() == [True, True]
  np.testing.assert_array_equal(out.tokens[1], plain.tokens[1])


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["ff_out", "ln_f", "blocks.1.attn_norm"])
def test_generate_has_no_answer_where_the_logits_are_no_numbers(tmp_path, name, value, capsys):
  directory, key = make_directory(copy_tiny(tmp_path / "hf")), f"model.transformer.{name}.weight"
  edit_tensors(directory, lambda tensors: tensors[key].reshape(-1).__setitem__(5, value))
  command = [f"--model={directory}", "--gen_length=8", "--block_length=8", "--steps=2"]
  with pytest.raises(UserError, match="logits are not finite"):
    generate.main([*command, "--prompt=eggs"])
  assert capsys.readouterr().out == ""


# Names of dtypes


@pytest.mark.parametrize("name, full", [
  ("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp32", "float32"), ("torch.float16", "float16"),
  ("bfloat16", "bfloat16"), ("half", "float16"),
])  # fmt: skip
def test_short_names_of_dtypes_are_understood(name, full, base, tmp_path):
  config = get_config()
  config.model.dtype = config.model.param_dtype = name
  config.model.lora.rank = 2  # without adapters, parameters of 16 bits are another mistake
  model = freeze(config).model
  assert (model.dtype, model.param_dtype) == (full, full)
  assert load_pretrained(base, dtype=name).config.dtype == full
  back = convert(base, tmp_path / "back", "--to=hf", f"--dtype={name}")
  stored = safetensors.numpy.load_file(back / "model.safetensors")
  assert {value.dtype.name for value in stored.values()} == {full}


@pytest.mark.parametrize("name", ["int8", "float64", "bf8", "", "x"])
def test_other_names_of_dtypes_are_told(name, base, tmp_path):
  config = get_config()
  config.model.dtype = name
  with pytest.raises(UserError, match=r"model\.dtype="):
    freeze(config)
  for attempt in (
    lambda: load_pretrained(base, dtype=name),
    lambda: convert(base, tmp_path / "x", f"--dtype={name or '?'}"),
    lambda: generate.main([f"--model={base}", "--prompt=x", f"--dtype={name or '?'}"]),
  ):
    with pytest.raises(UserError, match="is not one of float32, bfloat16, float16"):
      attempt()


# Devices

SCRIPT = """
import collections, sys
import jax, numpy as np
from igpo_jax.errors import UserError
from igpo_jax.config import freeze
from igpo_jax.convert import open
from igpo_jax.convert.pretrained import fitting_mesh, load_pretrained
from igpo_jax.convert.safetensors_io import Reader
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.train.setup import make_model
from tests.tiny_config import get_config

# devices that do not divide the model: one line, or fewer devices
devices = jax.devices()
for sizes, axis in (((1, 3, 1), "fsdp=3"), ((1, 1, 5), "tensor=5"), ((1, 3, 2), "fsdp=3")):
  count = int(np.prod(sizes))
  mesh = make_mesh(*sizes, devices=devices[:count])
  for attempt in (lambda: load_pretrained(sys.argv[1], mesh=mesh),
                  lambda: make_model(freeze(get_config()), CharTokenizer("abc"), mesh)):
    try:
      attempt()
    except UserError as error:
      assert "does not divide over the devices" in str(error) and axis in str(error), error
    else:
      raise AssertionError(sizes)
jax.device_count = lambda: 7
assert fitting_mesh(open.open_source(sys.argv[1])).size == 4
jax.device_count = lambda: 1
assert fitting_mesh(open.open_source(sys.argv[1])) is None
"""


@pytest.mark.slow
def test_devices_that_do_not_divide_the_model_are_told(base):
  done = run_on_devices(8, "-c", SCRIPT, str(base))
  assert "4 of 7 devices: the others stay idle" in done.stderr


def test_a_mesh_that_divides_is_no_mistake(small):
  lm, params = small
  check_divides(params, tree_shardings(lm.logical_axes(), make_mesh(devices=jax.devices()[:1])))
