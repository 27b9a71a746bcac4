"""The parts of a transformer block: RMSNorm, linear layers, rotary embedding.

The conventions are those of the released weights (docs/method.md#model): half-rotation RoPE,
grouped key-value heads repeated in place, and softmax, norms and RoPE in float32 whatever
the compute dtype.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from igpo_jax.config import LoRAConfig
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import Array


def parameter(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  axes: tuple[str | None, ...],
  shape: tuple[int, ...],
  dtype: jnp.dtype,
) -> Array:
  """The parameter `name` of a module; `init` makes it if there is none yet.

  As `nn.Module.param`, which traces `init` again wherever the parameter is read, to compare shapes.

  Args:
    module: the module, in its compact method.
    name: of the parameter.
    init: (key, shape, dtype) -> array.
    axes: its logical axes.
    shape, dtype: its shape, and the dtype that it is made in.

  Raises:
    ValueError: the parameter has another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
  value = nn.meta.unbox(module.get_variable("params", name))
  if value.shape != shape:
    raise ValueError(f"{'/'.join((*module.path, name))} has shape {value.shape}, not {shape}")
  return value


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis; statistics in float32."""

  eps: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    size = (x.shape[-1],)
    scale = parameter(self, "scale", nn.initializers.ones, ("norm",), size, self.param_dtype)
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    # Back to the compute dtype before the weight: what the released code does in bf16.
    return x32.astype(self.dtype) * scale.astype(self.dtype)


@jax.custom_vjp
def dot_f32(x: Array, w: Array) -> Array:
  """The product of x [...,in] and w [in,out], which have the same dtype: f32[...,out].

  The products of the backward pass have operands of this dtype as well. (jax by itself would
  multiply a float32 gradient with w in float32, which is several times slower than in 16 bits.)
  """
  return jnp.dot(x, w, preferred_element_type=jnp.float32)


def _dot_f32_fwd(x, w):
  return dot_f32(x, w), (x, w)


def _dot_f32_bwd(operands, gradient):
  x, w = operands
  gradient = gradient.astype(x.dtype)
  return jnp.dot(gradient, w.T), jnp.einsum("...i,...o->io", x, gradient)


dot_f32.defvjp(_dot_f32_fwd, _dot_f32_bwd)


def low_rank(x: Array, a: Array, b: Array, alpha: float) -> Array:
  """The output of an adapter, (x A) B alpha / r: f32[...,out].

  Add it to x W in float32, and round the sum. One update moves an output by about a thousandth of
  the distance between two bfloat16 numbers. Added to an output that is already rounded, it would be
  lost. If the sum is rounded, one output in a thousand changes.

  Args:
    x: [...,in].
    a, b: A [in,r] and B [r,out].
    alpha: numerator of the scale.
  """
  h = dot_f32(x, a.astype(x.dtype)) * (alpha / a.shape[-1])
  return dot_f32(h.astype(x.dtype), b.astype(x.dtype))


class Linear(nn.Module):
  """y = x W, plus a bias with `use_bias`. W is [in,out] with the logical axes `axes`.

  If the parameters have `lora_a` and `lora_b` beside the kernel (models/lora.py), the adapter's
  output is added. Without them it is the layer of the base model.
  """

  features: int
  axes: tuple[str, str]
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  init_scale: float = 1.0
  lora: LoRAConfig = LoRAConfig()
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
    shape = (x.shape[-1], self.features)
    kernel = parameter(self, "kernel", init, self.axes, shape, self.param_dtype)
    # As one matrix: XLA's CPU backend is 2.4 times slower at the gradients of a product
    # that sums over two axes (docs/LOG.md).
    rows = x.shape[:-1]
    x = x.astype(self.dtype).reshape(-1, x.shape[-1])
    # The constraint keeps the parameters' sharding after the cast. So weights are gathered in the
    # dtype of the computation, and gradients are reduced into this sharding, never held whole.
    kernel = constrain(kernel.astype(self.dtype), *self.axes)
    adapted = self.has_variable("params", "lora_a")
    if not adapted and not self.use_bias:
      return jnp.dot(x, kernel).reshape(*rows, self.features)
    y = dot_f32(x, kernel)
    if self.use_bias:
      zeros = nn.initializers.zeros
      bias = parameter(self, "bias", zeros, self.axes[1:], shape[1:], self.param_dtype)
      y = y + bias.astype(self.dtype).astype(jnp.float32)
    if adapted:
      if self.lora.dropout and self.has_rng("dropout"):
        x = nn.Dropout(self.lora.dropout, deterministic=False)(x)
      a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
      y = y + low_rank(x, a, b, self.lora.alpha)
    return y.astype(self.dtype).reshape(*rows, self.features)


def rope_tables(positions: Array, size: int, theta: float) -> tuple[Array, Array]:
  """Sines and cosines f32[...,T,size] for positions i32[...,T]; the two halves are equal."""
  exponent = jnp.arange(0, size, 2, dtype=jnp.float32) / size
  angles = positions.astype(jnp.float32)[..., None] * (1.0 / theta**exponent)[None, :]
  angles = jnp.concatenate([angles, angles], axis=-1)
  return jnp.sin(angles), jnp.cos(angles)


def apply_rope(x: Array, sin: Array, cos: Array) -> Array:
  """Applies RoPE to heads x [B,T,H,E], by rotating their halves, in float32.

  Args:
    x: [B,T,H,E]. If S < E, only the first S dimensions of a head are rotated.
    sin, cos: of `rope_tables`, f32[T,S]; or f32[B,T,S] if each row counts its own positions.

  Returns:
    [B,T,H,E] in the dtype of x.
  """
  size = sin.shape[-1]
  if size < x.shape[-1]:
    return jnp.concatenate([apply_rope(x[..., :size], sin, cos), x[..., size:]], axis=-1)
  x32 = x.astype(jnp.float32)
  first, second = jnp.split(x32, 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)
  of_heads = lambda table: table[None, :, None, :] if table.ndim == 2 else table[:, :, None, :]
  out = x32 * of_heads(cos) + rotated * of_heads(sin)
  return out.astype(x.dtype)
