"""Models for tests: a real one with one layer, one that reads logits off a table, the goldens'."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import ModelConfig
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.models import make_lm
from igpo_jax.types import LM
from tests.paths import REPO

GOLDENS = REPO / "tests" / "goldens"
EOS, MASK = 0, 1  # as in the character tokenizer


@functools.lru_cache
def golden_model(name):
  return load_pretrained(GOLDENS / name, dtype="float32")


@functools.lru_cache
def tiny_model(vocab_size=12, sharpness=4.0, seed=0, n_layers=1):
  """(lm, params) with random weights, whose choices are far from even."""
  config = ModelConfig(
    d_model=16,
    n_layers=n_layers,
    n_heads=2,
    mlp_hidden=32,
    vocab_size=vocab_size,
    mask_id=MASK,
    eos_id=EOS,
  )
  lm = make_lm(config)
  # One program, and the rest in numpy: operation by operation there are a hundred to compile.
  params = jax.tree.map(np.array, jax.jit(lm.init)(jax.random.key(seed)))
  head = params["head"]["kernel"]
  head *= sharpness
  # The mask token is near to two others, so that it is chosen where it may be.
  head[:, MASK] = 0.9 * head[:, -1] + 0.5 * head[:, -3]
  params["blocks"]["attn_out"]["kernel"] *= 3
  return lm, jax.tree.map(jnp.asarray, params)


@functools.lru_cache
def table_lm(stop_ids=(EOS,)):
  """An LM whose parameters are its logits: f32[V] for every position, or f32[T,V]."""

  def hidden(params, tokens, valid=None, *, start=0, cache=None, read=None):
    del valid, start
    h = jnp.broadcast_to(params, (*tokens.shape, params.shape[-1]))
    if read is not None:
      places = jnp.reshape(read[0], (-1, 1)) + jnp.arange(read[1])
      h = jnp.take_along_axis(h, jnp.broadcast_to(places, (len(h), read[1]))[..., None], axis=1)
    return h, cache

  return LM(
    init=lambda key: jnp.zeros(6),
    hidden=hidden,
    head=lambda params, h: h,
    logits=lambda params, tokens, valid=None: hidden(params, tokens)[0],
    unstack=lambda params, length: params,
    init_cache=lambda params, batch, length: None,
    logical_axes=lambda: (None,),
    mask_id=MASK,
    eos_id=EOS,
    stop_ids=stop_ids,
    vocab_size=6,
  )
