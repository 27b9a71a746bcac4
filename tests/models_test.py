"""The model against the released PyTorch code, on two tiny models with random weights.

`tests/goldens/<name>/golden.npz` was made by that code: logits in float64 (its own
float32 is 3.7e-5 away), the residual stream in float32. `padded_*` is a second batch
with an attention mask. The weights are beside it as a Hugging Face directory.
"""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.models import make_lm, network
from tests.paths import REPO

GOLDENS = REPO / "tests" / "goldens"
MODELS = ("llada_tiny", "llada_tiny_gqa")
ATOL = 2e-4


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module", params=MODELS)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def golden(name):
  return dict(np.load(GOLDENS / name / "golden.npz"))


@pytest.fixture(scope="module")
def pre(name):
  return load_pretrained(GOLDENS / name, dtype="float32")


def write_shards(source, target):
  """The same weights in two shards, keys scattered over both, with an index."""
  tensors = safetensors.numpy.load_file(source / "model.safetensors")
  weight_map = {}
  for n in range(2):
    shard = f"model-0000{n + 1}-of-00002.safetensors"
    part = {key: value for key, value in tensors.items() if sum(key.encode()) % 2 == n}
    safetensors.numpy.save_file(part, target / shard)
    weight_map |= dict.fromkeys(part, shard)
  (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  (target / "config.json").write_text((source / "config.json").read_text())


def logits_of(lm, params, *inputs):
  """Logits by one program, traced anew: a test may have replaced a part of the network."""
  return np.asarray(jax.jit(lambda *arguments: lm.logits(*arguments))(params, *inputs))


def error(lm, params, golden):
  return np.abs(logits_of(lm, params, golden["input_ids"]) - golden["logits"]).max()


def residual_after(pre, num_blocks, tokens):
  """The residual stream after the first blocks: what ln_f of a shorter model is given."""
  shorter = jax.tree.map(lambda x: np.asarray(x)[:num_blocks], pre.params["blocks"])
  model = network.Transformer(dataclasses.replace(pre.config, n_layers=num_blocks))

  @jax.jit
  def residual(params):
    seen = []

    def record(next_method, args, kwargs, context):
      if context.module.name == "ln_f":
        seen.append(args[0])
      return next_method(*args, **kwargs)

    with nn.intercept_methods(record):
      model.apply({"params": params}, tokens, None)
    return seen[0]

  return residual({**pre.params, "blocks": shorter})


def test_logits_equal_the_released_code(pre, golden):
  assert error(pre.lm, pre.params, golden) < ATOL


def test_shards_give_the_same_parameters_as_one_file(pre, name, tmp_path):
  write_shards(GOLDENS / name, tmp_path)
  sharded = load_pretrained(tmp_path, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, sharded.params, pre.params)
  assert sharded.config == pre.config


def test_hidden_states_equal_the_released_code(pre, golden):
  tokens = golden["input_ids"]
  embedded = jnp.take(pre.params["wte"]["embedding"], tokens, axis=0)
  np.testing.assert_array_equal(embedded, golden["hidden_embed"])
  for n in range(pre.config.n_layers):
    expected = golden[f"hidden_after_block{n}"]
    np.testing.assert_allclose(residual_after(pre, n + 1, tokens), expected, atol=ATOL, rtol=0)
  hidden, _ = jax.jit(pre.lm.hidden)(pre.params, tokens)
  np.testing.assert_allclose(hidden, golden["hidden_after_ln_f"], atol=ATOL, rtol=0)


def test_padding_is_invisible_to_the_rest(pre, golden):
  valid = golden["padded_attention_mask"] == 1
  logits = logits_of(pre.lm, pre.params, golden["padded_input_ids"], valid)
  np.testing.assert_allclose(logits[valid], golden["padded_logits"][valid], atol=ATOL, rtol=0)
  seen = logits_of(pre.lm, pre.params, golden["padded_input_ids"])
  assert np.abs(seen - golden["padded_logits"])[valid].max() > 100 * ATOL


def test_bfloat16_stays_as_near_as_the_released_code_does(name, golden):
  pre = load_pretrained(GOLDENS / name, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(pre.params)} == {jnp.dtype("bfloat16")}
  assert error(pre.lm, pre.params, golden) < 1.5  # the PyTorch code in bf16: 0.87 and 0.61


def interleaved_rope(x, sin, cos):
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  half = x.shape[-1] // 2
  sin, cos = sin[None, :, None, :half], cos[None, :, None, :half]
  even, odd = pairs[..., 0], pairs[..., 1]
  return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


@pytest.mark.parametrize("wrong", ["rope", "theta", "swap", "eps"])
def test_a_wrong_convention_would_be_noticed(pre, golden, wrong, monkeypatch):
  config, params, floor = pre.config, pre.params, 1.0
  if wrong == "rope":
    monkeypatch.setattr(network, "apply_rope", interleaved_rope)
  elif wrong == "theta":
    config = dataclasses.replace(config, rope_theta=1e4)
  elif wrong == "swap":
    blocks = params["blocks"]
    blocks = {**blocks, "ff_proj": blocks["up_proj"], "up_proj": blocks["ff_proj"]}
    params = {**params, "blocks": blocks}
  else:
    config, floor = dataclasses.replace(config, rms_norm_eps=1e-6), 1.5 * ATOL
  assert error(make_lm(config), params, golden) > floor


def test_grouped_heads_in_the_wrong_order_would_be_noticed(monkeypatch):
  attend = network.attend

  def tiled(q, k, v, valid, *rest):
    repeats = (1, 1, q.shape[2] // k.shape[2], 1)
    return attend(q, jnp.tile(k, repeats), jnp.tile(v, repeats), valid, *rest)

  pre = load_pretrained(GOLDENS / "llada_tiny_gqa", dtype="float32")
  monkeypatch.setattr(network, "attend", tiled)
  assert error(pre.lm, pre.params, np.load(GOLDENS / "llada_tiny_gqa" / "golden.npz")) > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_what_is_read_alone_equals_what_is_read_from_all(pre, golden, form):
  tokens = jnp.asarray(golden["padded_input_ids"])
  params = pre.params
  if form == "unstacked":
    params = pre.lm.unstack(params, tokens.shape[1])
  assert isinstance(params["blocks"], tuple) == (form == "unstacked")
  valid = jnp.asarray(golden["padded_attention_mask"] == 1)
  everything, _ = jax.device_get(jax.jit(pre.lm.hidden)(pre.params, tokens, valid))
  read = jax.jit(
    lambda begin, cache: pre.lm.hidden(params, tokens, valid, read=(begin, 5), cache=cache)
  )
  for begin in (0, 11, tokens.shape[1] - 5):
    h, _ = read(begin, None)
    np.testing.assert_allclose(h, everything[:, begin : begin + 5], atol=5e-5, rtol=0)
    h, cache = read(begin, pre.lm.init_cache(params, *tokens.shape))
    np.testing.assert_allclose(h, everything[:, begin : begin + 5], atol=5e-5, rtol=0)

  # The cache now holds this text: any part of it may be asked again, alone.
  part = jax.jit(
    lambda begin, cache: pre.lm.hidden(
      params, tokens[:, 20:32], valid, start=20, read=(begin, 4), cache=cache
    )
  )
  for begin in (0, 8):
    h, after = part(begin, cache)
    expected = everything[:, 20 + begin : 24 + begin]
    np.testing.assert_allclose(h, expected, atol=5e-5, rtol=0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), after, cache)


@pytest.mark.slow
def test_what_is_not_asked_again_stays_in_the_cache(pre, golden):
  """Other tokens at 20..31 change nothing at the positions outside, stale as those become."""
  tokens = golden["input_ids"]
  hidden = jax.jit(pre.lm.hidden)
  _, cache = hidden(pre.params, tokens, cache=pre.lm.init_cache(pre.params, *tokens.shape))
  other = (tokens[:, 20:32] + 1) % 500
  h, after = hidden(pre.params, other, start=20, cache=cache)
  cache, after = jax.device_get((cache, after))
  inside = np.isin(np.arange(tokens.shape[1]), np.arange(20, 32))
  for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(new[..., ~inside, :], old[..., ~inside, :])
    assert (np.abs(new - old)[0][..., inside, :].max(axis=(1, 3)) > 1e-3).all()
  changed = tokens.copy()
  changed[:, 20:32] = other
  whole, _ = hidden(pre.params, changed)
  assert np.abs(h - whole[:, 20:32]).max() > 1e-2  # an approximation, as it should be


def test_a_parameter_of_another_shape_is_told_with_its_name(pre):
  params = dict(pre.params)
  kernel = params["blocks"]["q_proj"]["kernel"]
  params["blocks"] = params["blocks"] | {"q_proj": {"kernel": kernel[:, :, :-2]}}
  told = r"blocks/q_proj/kernel has shape \(64, 62\), not \(64, 64\)"
  with pytest.raises(ValueError, match=told):
    pre.lm.hidden(params, jnp.zeros((1, 4), jnp.int32))
