"""The parts of a LLaDA block: RMSNorm, linear layers, rotary embedding.

The conventions are those of the released weights (docs/method.md#model): half-rotation RoPE
on absolute positions, grouped key-value heads repeated in place, no biases, and
softmax, norms and RoPE in float32 whatever the compute dtype.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from igpo_jax.config import LoRAConfig
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import Array


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis; statistics in float32."""

  eps: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    # Back to the compute dtype before the weight: what the released code does in bf16.
    return x32.astype(self.dtype) * scale.astype(self.dtype)


def low_rank(x: Array, a: Array, b: Array, alpha: float, **dot_kwargs) -> Array:
  """(x A) B alpha / r in the dtype of x, for A [in,r] and B [r,out]."""
  h = jnp.dot(x, a.astype(x.dtype)) * (alpha / a.shape[-1])
  return jnp.dot(h, b.astype(x.dtype), **dot_kwargs)


class Linear(nn.Module):
  """y = x W without bias; W is [in, out] with logical axes `axes`.

  Where the parameters hold `lora_a` and `lora_b` beside the kernel, their product is
  added (models/lora.py puts them there); without them this is the base model.
  """

  features: int
  axes: tuple[str, str]
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  init_scale: float = 1.0
  lora: LoRAConfig = LoRAConfig()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(init, self.axes),
      (x.shape[-1], self.features),
      self.param_dtype,
    )
    # As one matrix: XLA's CPU backend is 2.4 times slower at the gradients of a product
    # that sums over two axes (docs/LOG.md).
    rows = x.shape[:-1]
    x = x.astype(self.dtype).reshape(-1, x.shape[-1])
    # In the parameters' own layout after the cast: what is gathered is in the compute
    # dtype, and the gradient is reduced straight into this layout, never whole.
    y = jnp.dot(x, constrain(kernel.astype(self.dtype), *self.axes))
    if self.has_variable("params", "lora_a"):
      if self.lora.dropout and self.has_rng("dropout"):
        x = nn.Dropout(self.lora.dropout, deterministic=False)(x)
      a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
      y = y + low_rank(x, a, b, self.lora.alpha)
    return y.reshape(*rows, self.features)


def rope_tables(positions: Array, head_size: int, theta: float) -> tuple[Array, Array]:
  """Sines and cosines f32[T,E] for positions i32[T]; the two halves are equal."""
  exponent = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
  angles = positions.astype(jnp.float32)[:, None] * (1.0 / theta**exponent)[None, :]
  angles = jnp.concatenate([angles, angles], axis=-1)
  return jnp.sin(angles), jnp.cos(angles)


def apply_rope(x: Array, sin: Array, cos: Array) -> Array:
  """Rotates the halves of each head of x [B,T,H,E] by tables f32[T,E], in float32."""
  x32 = x.astype(jnp.float32)
  first, second = jnp.split(x32, 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)
  out = x32 * cos[None, :, None, :] + rotated * sin[None, :, None, :]
  return out.astype(x.dtype)
