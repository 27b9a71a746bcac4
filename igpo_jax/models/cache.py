"""Keys and values of all layers, kept between calls of the network.

A bidirectional model has no exact cache: a token that is committed changes the keys of
every position. What is kept is therefore stale, and the sampler says when it is renewed.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from igpo_jax.config import ModelConfig
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import Array, Params

AXES = ("layers", "act_batch", "act_length", "act_kv_heads", None)


@flax.struct.dataclass
class Cache:
  """Rotated keys, and values, at their absolute positions.

  Each [N,B,T,K,E], or a tuple of N [B,T,K,E] where the layers are a tuple, too.
  """

  keys: Array | tuple[Array, ...]
  values: Array | tuple[Array, ...]


def empty(config: ModelConfig, params: Params, rows: int, length: int) -> Cache:
  """Zeros for `rows` of `length` positions, stacked as `params` are."""
  shape = (rows, length, config.kv_heads, config.head_size)

  def zeros():
    if isinstance(params["blocks"], tuple):
      layer = lambda: constrain(jnp.zeros(shape, jnp.dtype(config.dtype)), *AXES[1:])
      return tuple(layer() for _ in range(config.n_layers))
    return constrain(jnp.zeros((config.n_layers, *shape), jnp.dtype(config.dtype)), *AXES)

  return Cache(zeros(), zeros())


def write(cache: Cache, layer: Array | int, k: Array, v: Array, start: Array):
  """Puts k, v [B,t,K,E] at positions from `start`: (k, v [B,T,K,E] of the layer, cache)."""

  def put(old, new):
    if isinstance(old, tuple):
      new = jax.lax.dynamic_update_slice(old[layer], new, (0, start, 0, 0))
      return (*old[:layer], new, *old[layer + 1 :])
    return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, start, 0, 0))

  cache = Cache(put(cache.keys, k), put(cache.values, v))
  return cache.keys[layer], cache.values[layer], cache
