"""Low-rank adapters: no effect at the start, equal when merged, base weights unchanged."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpo_jax.config import LoRAConfig, ModelConfig
from igpo_jax.errors import UserError
from igpo_jax.models import lora, make_lm
from igpo_jax.models.layers import Linear
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.parallel.sharding import tree_shardings

LORA = LoRAConfig(rank=4, alpha=8.0, targets="blocks/.*|head")
CONFIG = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden=48,
                     vocab_size=40, mask_id=39, eos_id=38, lora=LORA)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(7), (2, 11), 0, 40)


@functools.partial(jax.jit, static_argnums=0)
def logits(lm, params):
  return lm.logits(params, TOKENS)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def lm():
  return make_lm(CONFIG)


@pytest.fixture(scope="module")
def params(lm):
  return jax.jit(lm.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def trained(params):
  """The parameters with adapters that do something."""
  adapters, frozen = lora.split(params)
  rng = np.random.default_rng(1)
  noise = lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32)
  return lora.combine(frozen, jax.tree.map(noise, adapters))


def paths(tree):
  return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_a_fresh_adapter_changes_nothing(lm, params):
  _, frozen = lora.split(params)
  np.testing.assert_array_equal(logits(lm, params), logits(lm, frozen))


def test_the_base_is_the_reference_without_a_copy(lm, params, trained):
  _, frozen = lora.split(trained)
  plain = make_lm(dataclasses.replace(CONFIG, lora=LoRAConfig()))
  np.testing.assert_array_equal(logits(lm, frozen), logits(plain, frozen))
  assert np.abs(logits(lm, trained) - logits(lm, frozen)).max() > 0.01
  assert frozen["blocks"]["q_proj"]["kernel"] is trained["blocks"]["q_proj"]["kernel"]


def test_merged_logits_equal_adapter_logits(lm, trained):
  merged = lora.merge(trained, LORA)
  assert paths(merged) == paths(lora.split(trained)[1])
  np.testing.assert_allclose(logits(lm, merged), logits(lm, trained), atol=1e-5, rtol=0)


def test_merging_keeps_the_dtype_of_the_kernel_and_rounds_once(trained):
  adapters, frozen = lora.split(trained)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
  merged = lora.merge(lora.combine(half, adapters), LORA)["blocks"]["q_proj"]["kernel"]
  kernel, pair = half["blocks"]["q_proj"]["kernel"], adapters["blocks"]["q_proj"]
  delta = np.einsum("nir,nro->nio", pair["lora_a"], pair["lora_b"]) * (8.0 / 4)
  assert merged.dtype == jnp.bfloat16
  exact = np.asarray(kernel, np.float32) + delta
  near = np.abs(np.asarray(merged, np.float32) - exact) <= np.abs(exact) * 2**-8
  assert near.all()


def test_split_and_combine_are_inverse(params):
  trainable, frozen = lora.split(params)
  assert not paths(trainable) & paths(frozen)
  jax.tree.map(np.testing.assert_array_equal, lora.combine(frozen, trainable), params)
  everything, nothing = lora.split(frozen)
  assert paths(everything) == paths(frozen) and nothing == {}


@pytest.mark.slow
def test_the_base_has_no_gradient_and_no_optimizer_state(lm, trained):
  trainable, frozen = lora.split(trained)

  def loss(trainable):
    return logits(lm, lora.combine(frozen, trainable)).var()

  gradient = jax.jit(jax.grad(loss))(trainable)
  assert paths(gradient) == {p for p in paths(trained) if "lora_" in p}
  assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradient))
  moments = optax.adamw(1e-3).init(trainable)[0].mu
  assert paths(moments) == paths(trainable)


def test_the_first_gradient_reaches_b_only(lm, params):
  trainable, frozen = lora.split(params)
  grads = jax.jit(jax.grad(lambda t: logits(lm, lora.combine(frozen, t)).var()))(trainable)
  # B is zero, so at the first step the gradient reaches B only.
  assert float(jnp.abs(grads["blocks"]["v_proj"]["lora_a"]).max()) == 0
  assert float(jnp.abs(grads["blocks"]["v_proj"]["lora_b"]).max()) > 0


@pytest.mark.parametrize("targets, expected", [
  ("blocks/(q|v)_proj", {"blocks/q_proj", "blocks/v_proj"}),
  ("head", {"head"}),
  (".*ff_out", {"blocks/ff_out"}),
])  # fmt: skip
def test_targets_are_chosen_by_their_whole_path(params, targets, expected):
  _, frozen = lora.split(params)
  found = lora.find_targets(frozen, dataclasses.replace(LORA, targets=targets))
  assert {"/".join(path) for path in found} == expected


def test_targets_that_match_nothing_are_refused(params):
  with pytest.raises(UserError, match=r"o_proj.* matches none of .*blocks/attn_out"):
    lora.init(params, jax.random.key(0), dataclasses.replace(LORA, targets="blocks/o_proj"))


def test_a_layers_adapter_does_not_depend_on_the_other_targets(params):
  _, frozen = lora.split(params)
  only = lora.add(frozen, jax.random.key(0), dataclasses.replace(LORA, targets="blocks/q_proj"))
  np.testing.assert_array_equal(
    only["blocks"]["q_proj"]["lora_a"], params["blocks"]["q_proj"]["lora_a"]
  )
  assert "lora_a" not in only["blocks"]["k_proj"]


def test_logical_axes_mirror_the_parameters(lm, params):
  axes = lm.logical_axes()
  shardings = tree_shardings(axes, make_mesh(devices=jax.devices()[:1]))
  assert paths(shardings) == paths(params)
  assert axes["blocks"]["q_proj"]["lora_a"] == ("layers", "lora_fan", "lora_rank")
  assert axes["blocks"]["attn_out"]["lora_b"] == ("layers", "lora_rank", "lora_fan")
  assert axes["head"]["lora_b"] == ("lora_rank", "lora_fan")


@pytest.mark.slow
def test_dropout_acts_only_where_a_key_is_given(trained):
  lm = make_lm(dataclasses.replace(CONFIG, lora=dataclasses.replace(LORA, dropout=0.5)))
  hidden = jax.jit(lambda params, key: lm.hidden(params, TOKENS, dropout_key=key)[0])
  plain, again = hidden(trained, None), hidden(trained, None)
  first, second = (hidden(trained, jax.random.key(n)) for n in range(2))
  np.testing.assert_array_equal(plain, again)
  assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3
  _, base = lora.split(trained)
  np.testing.assert_array_equal(hidden(base, None), hidden(base, jax.random.key(0)))


@pytest.mark.slow
def test_remat_and_bfloat16_take_adapters_too(trained):
  config = dataclasses.replace(CONFIG, remat="full", dtype="bfloat16")
  trainable, frozen = lora.split(trained)
  lm = make_lm(config)
  loss = lambda t: logits(lm, lora.combine(frozen, t)).var()
  gradient = jax.jit(jax.grad(loss))(trainable)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_in_bfloat16_an_adapter_has_its_whole_effect_after_one_update():
  """At LLaDA's width, the paper's rank and learning rate: B after one step of AdamW."""
  width, rank, rate, rows = 4096, 128, 5e-7, 8192
  keys = jax.random.split(jax.random.key(0), 4)
  bf16 = jnp.bfloat16
  kernel = (jax.random.normal(keys[0], (width, width)) * width**-0.5).astype(bf16)
  # Positions have a part in common, so that an update moves all of them.
  common = jax.random.normal(keys[1], (1, width))
  x = (0.8 * common + 0.6 * jax.random.normal(keys[2], (rows, width))).astype(bf16)
  a = jax.random.uniform(keys[3], (width, rank), minval=-(width**-0.5), maxval=width**-0.5)
  layer = Linear(width, ("embed", "heads"), bf16, bf16, lora=LoRAConfig(rank=rank, alpha=64.0))

  @jax.jit  # both at once, so that x @ kernel is computed once
  def plus_and_minus(kernel, x, a, b):
    params = {"kernel": kernel, "lora_a": a}
    return [layer.apply({"params": params | {"lora_b": sign * b}}, x) for sign in (1, -1)]

  # Adam's first step is the rate times the gradient's sign; here towards larger outputs.
  inner = x.astype(jnp.float32) @ a * (64.0 / rank)
  b = jnp.broadcast_to(rate * jnp.sign(inner.sum(0))[:, None], (rank, width))
  effect = inner @ b
  # Rounded: inside the jitted function XLA may leave out a rounding that is undone at once.
  plus, minus = plus_and_minus(kernel, x, a, b)
  assert plus.dtype == bf16
  moved = plus.astype(jnp.float32) - minus.astype(jnp.float32)
  share = jnp.sum(moved * effect) / jnp.sum(2 * effect**2)
  assert 0.99 < share < 1.01


def test_gradients_with_adapters_are_products_in_the_compute_dtype():
  """No product of the backward pass has a float32 operand: those take several times as long."""
  layer = Linear(32, ("embed", "heads"), jnp.bfloat16, jnp.bfloat16, lora=LoRAConfig(rank=4))
  x = jnp.ones((8, 16), jnp.bfloat16)
  leaves = {"kernel": (16, 32), "lora_a": (16, 4), "lora_b": (4, 32)}
  params = {name: jnp.ones(shape) for name, shape in leaves.items()}
  params["kernel"] = params["kernel"].astype(jnp.bfloat16)
  loss = lambda params, x: layer.apply({"params": params}, x).astype(jnp.float32).sum()
  text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).as_text()
  operands = re.findall(r"dot_general .*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", text)
  assert len(operands) >= 6
  assert all(dtype.endswith("bf16") for pair in operands for dtype in pair)
