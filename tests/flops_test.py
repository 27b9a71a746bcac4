"""The FLOP count: by hand, and against the products that the traced program really makes."""

from __future__ import annotations

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.config import LoRAConfig, ModelConfig
from igpo_jax.models import make_lm
from igpo_jax.models.flops import forward_flops, product_flops

CONFIG = ModelConfig(d_model=12, n_layers=3, n_heads=3, mlp_hidden=20, vocab_size=24)


def traced_flops(jaxpr):
  """FLOPs of every dot_general of a jaxpr, the bodies of its scans as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval
      summed = int(np.prod([left.shape[i] for i in contract]))
      total += 2 * summed * eqn.outvars[0].aval.size
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      total += eqn.params.get("length", 1) * traced_flops(inner)
  return total


def test_one_layer_by_hand():
  cfg = ModelConfig(d_model=2, n_layers=1, n_heads=1, mlp_hidden=3, vocab_size=7)
  assert product_flops(2, 3, 5) == 60
  # q, k, v, out: 8 each; scores and values: 16 each; gate, up, down: 12 each.
  assert forward_flops(cfg, rows=1, queries=1, keys=4) == 4 * 8 + 2 * 16 + 3 * 12
  assert forward_flops(cfg, 1, 1, 4, head_positions=2) == 100 + 2 * 28
  # Two queries of which one is read: the keys and values of both, the rest of one.
  assert forward_flops(cfg, 1, 2, 4, read=1) == 2 * 8 + 4 * 8 + 2 * 16 + 3 * 12
  assert forward_flops(cfg, 5, 1, 4) == 500


def test_the_bench_models_forward():
  """2 x 59.9 M parameters less the embedding and head, and attention, at 8 x 256 positions."""
  from benchmarks.common import BENCH_MODEL

  linear = 8 * (4 * 512 * 512 + 3 * 512 * 1536)
  expected = 2 * linear * 8 * 256 + 8 * 4 * 256 * 512 * 8 * 256
  assert forward_flops(BENCH_MODEL, 8, 256, 256) == expected


@pytest.mark.parametrize(
  "cfg",
  [
    CONFIG,
    dataclasses.replace(CONFIG, n_kv_heads=1),
    dataclasses.replace(CONFIG, lora=LoRAConfig(rank=2, targets="blocks/(q|up)_proj|head")),
  ],
  ids=["plain", "grouped", "lora"],
)
def test_the_program_makes_the_products_that_are_counted(cfg):
  lm = make_lm(cfg)
  params = jax.eval_shape(lm.init, jax.random.key(0))
  tokens = jnp.zeros((2, 10), jnp.int32)
  traced = jax.make_jaxpr(lm.logits)(params, tokens)
  assert traced_flops(traced.jaxpr) == forward_flops(cfg, 2, 10, 10, head_positions=10)
  read = lambda params, tokens: lm.head(params, lm.hidden(params, tokens, read=(3, 4))[0])
  traced = jax.make_jaxpr(read)(params, tokens)
  assert traced_flops(traced.jaxpr) == forward_flops(cfg, 2, 10, 10, head_positions=4, read=4)
  cached = lambda params, cache: lm.hidden(params, tokens[:, 4:7], start=4, cache=cache)
  traced = jax.make_jaxpr(cached)(params, jax.eval_shape(lambda: lm.init_cache(params, 2, 10)))
  assert traced_flops(traced.jaxpr) == forward_flops(cfg, 2, 3, 10)
