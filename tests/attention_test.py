"""Every implementation of attention is the same function, and says where it cannot run."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.config import MeshConfig, ModelConfig
from igpo_jax.errors import UserError
from igpo_jax.models import attention, make_lm
from igpo_jax.parallel.mesh import abstract_mesh, make_mesh

ROWS = 2


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def plain(q, k, v, valid):
  """One query at a time, in float64: the definition."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for row, t, head in np.ndindex(q.shape[:3]):
    scores = k[row, :, head // group] @ q[row, t, head] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores[valid[row]].max()) * valid[row]
    out[row, t, head] = weights @ v[row, :, head // group] / weights.sum()
  return out


def arrays(queries=7, keys=9, heads=4, kv_heads=2, size=8, seed=0):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(ROWS, queries, heads, size)).astype(np.float32)
  k, v = rng.normal(size=(2, ROWS, keys, kv_heads, size)).astype(np.float32)
  valid = np.arange(keys) >= np.array([[0], [3]])
  return 2 * q, k, v, valid


def interpreted(q, k, v, valid):
  return attention.splash(q, k, v, valid, interpret=True)


IMPLEMENTATIONS = {
  "einsum": attention.einsum,
  "dot_product": attention.dot_product,
  "splash": interpreted,
}
# Each call is one program: operation by operation there would be dozens to compile.
jitted = {name: jax.jit(attend) for name, attend in IMPLEMENTATIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_is_its_definition(name, kv_heads):
  q, k, v, valid = arrays(kv_heads=kv_heads)
  attend = IMPLEMENTATIONS[name]
  both = jax.jit(lambda *qkv: (attend(*qkv, valid), attend(*qkv, None)))
  some, all_seen = both(q, k, v)
  np.testing.assert_allclose(some, plain(q, k, v, valid), atol=1e-5)
  everything = np.ones(valid.shape, bool)
  np.testing.assert_allclose(all_seen, plain(q, k, v, everything), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot_product", "splash"])
def test_gradients_equal_the_plain_path(name):
  q, k, v, valid = arrays()
  weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

  def gradients(f):
    loss = lambda q, k, v: jnp.sum(f(q, k, v, valid) * weight)
    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

  expected = gradients(attention.einsum)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    gradients(IMPLEMENTATIONS[name]),
    expected,
  )


@pytest.mark.slow
def test_keys_that_are_not_valid_may_be_anything():
  """In any place, not only to the left; nothing they hold reaches the result or a gradient."""
  q, k, v, _ = arrays(keys=12)
  valid = np.random.default_rng(3).random((ROWS, 12)) < 0.5
  hidden = lambda x, value: np.where(valid[:, :, None, None], x, np.float32(value))

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
  def value_and_gradients(q, k, v):
    return jnp.sum(jnp.sin(attention.dot_product(q, k, v, valid)))

  expected = value_and_gradients(q, hidden(k, 0), hidden(v, 0))
  found = value_and_gradients(q, hidden(k, np.nan), hidden(v, np.inf))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  out = jitted["dot_product"](q, k, v, valid)
  np.testing.assert_allclose(out, plain(q, k, v, valid), atol=1e-5)


@pytest.mark.parametrize("name", ["einsum", "dot_product"])
def test_a_row_without_valid_keys_gets_a_mean(name):
  q, k, v, _ = arrays()
  out = jitted[name](q, k, v, np.zeros(k.shape[:2], bool))
  np.testing.assert_allclose(out[:, 0, 0], np.mean(v[:, :, 0], axis=1), atol=1e-5)


@pytest.mark.slow
def test_scores_are_summed_in_float32_in_bfloat16():
  """Hidden keys weigh nothing, and 300 equal keys give their common value exactly."""
  q, k, v, _ = arrays(keys=300)
  valid = np.arange(300) >= np.array([[0], [200]])
  v = np.where(valid[:, :, None, None], np.full_like(v, 1.5), 7.0)
  out = jitted["einsum"](*(x.astype(jnp.bfloat16) for x in (q, 0 * k, v)), valid)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), 1.5)


@pytest.mark.slow
def test_splash_pads_lengths_to_whole_blocks():
  q, k, v, valid = arrays(queries=130, keys=260)
  out = jitted["splash"](q, k, v, valid)
  np.testing.assert_allclose(out, jitted["einsum"](q, k, v, valid), atol=1e-5)


@pytest.mark.slow
def test_splash_under_a_mesh_keeps_rows_and_heads_where_they_are():
  q, k, v, valid = arrays()
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    out = jax.jit(interpreted)(q, k, v, valid)
  np.testing.assert_allclose(out, jitted["einsum"](q, k, v, valid), atol=1e-5)
  mesh = abstract_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 4)
  with jax.sharding.use_abstract_mesh(mesh):
    (one,) = jax.make_jaxpr(attention.splash)(q, k, v, valid).eqns
    (three,) = jax.make_jaxpr(attention.splash)(
      *(np.repeat(x, 3, 0)[:3] for x in (q, k, v, valid))
    ).eqns
  local = lambda eqn: [x.aval.shape for x in eqn.params["jaxpr"].invars][-4:]
  assert local(one) == [(1, 7, 2, 8), (1, 9, 1, 8), (1, 9, 1, 8), (1, 9)]
  assert local(three)[0] == (3, 7, 2, 8)  # three do not divide: all on each


@pytest.mark.slow
def test_a_kernel_for_another_platform_is_refused():
  cfg = ModelConfig(d_model=16, n_layers=1, n_heads=2, mlp_hidden=32, vocab_size=8)
  with pytest.raises(UserError, match=r"config: model.attention='flash' is not one of einsum"):
    ModelConfig(attention="flash")
  lm = make_lm(dataclasses.replace(cfg, attention="splash"))
  params = jax.jit(lm.init)(jax.random.key(0))  # made anywhere
  with pytest.raises(UserError, match="a kernel for TPU, and this program is for cpu"):
    jax.jit(lm.logits)(params, np.zeros((1, 4), np.int32))
  other = make_lm(dataclasses.replace(cfg, attention="dot_product"))
  tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
  expected = jax.jit(make_lm(cfg).logits)(params, tokens)
  np.testing.assert_allclose(jax.jit(other.logits)(params, tokens), expected, atol=1e-5)


@pytest.mark.parametrize(
  ("where", "chosen"), [("cpu", "einsum"), ("cuda", "dot_product"), ("tpu", "splash")]
)
def test_auto_is_the_kernel_of_the_platform(where, chosen, monkeypatch):
  called = []
  for name in ("einsum", "dot_product", "splash"):
    monkeypatch.setattr(attention, name, lambda *args, name=name: called.append(name))
  monkeypatch.setattr(attention, "platform", lambda: where)
  attention.attend(None, None, None, None, "auto")
  assert called == [chosen]
