"""Keys and values of all layers, kept between calls of the network.

A bidirectional model has no exact cache: a committed token changes the keys of every position. So
cached keys and values are out of date to some degree, and the sampler decides when to renew them.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from igpo_jax.config import ModelConfig
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import Array, Params

AXES = ("layers", "act_batch", "act_kv_heads", "act_length", None)


@flax.struct.dataclass
class Cache:
  """Keys, after RoPE, and values of all layers at their absolute positions.

  Each is [N,B,K,T,E], or a tuple of N arrays [B,K,T,E] if the layers of the parameters are a tuple
  (`LM.unstack`). Heads come before positions, as attention multiplies them: else the whole cache
  would be transposed at every call.
  """

  keys: Array | tuple[Array, ...]
  values: Array | tuple[Array, ...]


def empty(config: ModelConfig, params: Params, rows: int, length: int) -> Cache:
  """A cache of zeros.

  Args:
    config: the model.
    params: its parameters; the cache has a tuple of layers if they have one.
    rows: B.
    length: T, the number of positions.
  """
  shape = (rows, config.kv_heads, length, config.head_size)

  def zeros():
    if isinstance(params["blocks"], tuple):
      layer = lambda: constrain(jnp.zeros(shape, jnp.dtype(config.dtype)), *AXES[1:])
      return tuple(layer() for _ in range(config.n_layers))
    return constrain(jnp.zeros((config.n_layers, *shape), jnp.dtype(config.dtype)), *AXES)

  return Cache(zeros(), zeros())


def write(cache: Cache, layer: Array | int, k: Array, v: Array, start: Array):
  """Writes the keys and values of some positions of one layer into the cache.

  Args:
    cache: the cache.
    layer: number of the layer.
    k, v: [B,t,K,E].
    start: i32[], the first of the t positions; or i32[B], each row's own first position.

  Returns:
    (k, v [B,T,K,E], the layer's keys and values at all positions; the new cache).
  """

  def put(old, new):
    new = jnp.swapaxes(new, 1, 2)
    if isinstance(old, tuple):
      new = _put(old[layer], new, start)
      return (*old[:layer], new, *old[layer + 1 :])
    return _put(old, new, start, layer)

  cache = Cache(put(cache.keys, k), put(cache.values, v))
  of_layer = lambda x: jnp.swapaxes(x[layer], 1, 2)  # attention swaps them back: no copy is made
  return of_layer(cache.keys), of_layer(cache.values), cache


def _put(old: Array, new: Array, start: Array, layer: Array | int | None = None) -> Array:
  """Writes new [B,K,t,E] from position `start` on into old [B,K,T,E], or [N,B,K,T,E] at `layer`."""
  layers = [] if layer is None else [layer]
  if jnp.ndim(start) == 0:
    new = new if layer is None else new[None]
    return jax.lax.dynamic_update_slice(old, new, (*layers, 0, 0, start, 0))
  # One window for each row. A scatter with rows as its batch dimension writes in place, on the
  # device that holds the row. A vmap over axis 1 of the stack would transpose all of it.
  rows = len(layers)
  indices = jnp.stack([*(jnp.broadcast_to(n, start.shape) for n in layers), start], axis=1)
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3),
    inserted_window_dims=tuple(range(rows)),
    scatter_dims_to_operand_dims=(*range(rows), rows + 2),
    operand_batching_dims=(rows,),
    scatter_indices_batching_dims=(0,),
  )
  return jax.lax.scatter(
    old, indices, new, numbers, indices_are_sorted=True, unique_indices=True, mode="clip"
  )
