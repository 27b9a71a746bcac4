"""Attention over grouped key-value heads, in three implementations.

    einsum       plain JAX, the reference for the other two; scores [B,H,t,T] exist
    dot_product  jax.nn.dot_product_attention: cuDNN's fused kernel on GPU in 16 bits
    splash       the Pallas flash kernel for TPU; scores never leave the chip's memory

All take and return the same arrays. `ModelConfig.attention` names one of them, or "auto", which is
"splash" on a TPU, "dot_product" on a GPU and "einsum" elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from igpo_jax.errors import UserError
from igpo_jax.parallel.sharding import num_shards, partition_spec
from igpo_jax.types import Array

# Added to the scores of keys that a query must not see. It is half of the lowest number, so that no
# score can make the sum infinite.
HIDDEN = float(jnp.finfo(jnp.float32).min) / 2
BEST = {"tpu": "splash", "gpu": "dot_product", "cuda": "dot_product"}  # "auto", by platform
SPLASH_BLOCKS = (512, 256, 128)  # of queries and keys; the chip's vectors have 128 lanes


def attend(
  q: Array,
  k: Array,
  v: Array,
  valid: Array | None,
  implementation: str = "einsum",
  visible: Array | None = None,
) -> Array:
  """Attention without a causal mask: a query sees every valid key that is visible to it.

  Args:
    q: [B,t,H,E] queries.
    k: [B,T,K,E] keys; key-value head j serves query heads j*H/K .. (j+1)*H/K - 1.
    v: [B,T,K,E] values.
    valid: bool[B,T], False on keys that no query sees; None: all are valid.
    implementation: "einsum", "dot_product", "splash" or "auto".
    visible: bool[B or 1,t,T], which keys each query sees; None: all. The fused kernels do not
      support it, so with it "auto" and "dot_product" are "einsum".

  Returns:
    [B,t,H,E]. A query that sees no key gets the mean of the values, not NaN.

  Raises:
    UserError: the platform does not have the implementation, or "splash" is given `visible`.
  """
  if visible is not None:
    if implementation == "splash":
      raise UserError(
        "config: model.attention='splash' cannot hide keys from some queries, which a "
        "block-causal model needs: use 'auto', 'dot_product' or 'einsum'"
      )
    return einsum(q, k, v, valid, visible)
  if implementation == "auto":
    implementation = BEST.get(platform(), "einsum")
  if implementation == "splash":
    if platform() != "tpu":
      raise UserError(
        f"config: model.attention='splash' is a kernel for TPU, and this program is for "
        f"{platform()}: use 'einsum' or 'dot_product'"
      )
    return splash(q, k, v, valid)
  return {"einsum": einsum, "dot_product": dot_product}[implementation](q, k, v, valid)


# In the body of `with program_for("cuda"):` programs are traced for that platform, whatever this
# machine has. jax keeps separate caches of traced programs for each value.
program_for = jax.make_user_context("")


def platform() -> str:
  """The platform for which a program is being traced, such as "cpu", "gpu", "cuda" or "tpu".

  It is what `program_for` says; else that of the mesh in context; else the default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  known = device.platform if device is not None else jax.default_backend()
  return program_for.value or known


def einsum(
  q: Array, k: Array, v: Array, valid: Array | None, visible: Array | None = None
) -> Array:
  """The implementation in plain JAX; see `attend`. The softmax is computed in float32."""
  b, t, h, e = q.shape
  kv_heads = k.shape[2]
  # Heads first and the queries of a key-value head as one matrix, and the division by
  # the softmax's sum after the product with the values: on the CPU four times as fast
  # as grouped einsums around jax.nn.softmax (docs/LOG.md).
  q = jnp.moveaxis(q.reshape(b, t, kv_heads, -1, e) * (e**-0.5), 1, 3)  # [B,K,G,t,E]
  q = q.reshape(b, kv_heads, -1, e)
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B,K,T,E]
  scores = jnp.einsum("bkqe,bkse->bkqs", q, k, preferred_element_type=jnp.float32)
  if valid is not None:
    scores = scores + jnp.where(valid, 0.0, HIDDEN)[:, None, None, :]
  if visible is not None:
    hide = jnp.where(visible, 0.0, HIDDEN)[:, None]  # [B,1,t,T]
    scores = scores + jnp.tile(hide, (1, 1, h // kv_heads, 1))
  highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - highest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  kw = {"preferred_element_type": jnp.float32}
  out = jnp.einsum("bkqs,bkse->bkqe", weights.astype(v.dtype), v, **kw) / total
  out = out.astype(v.dtype).reshape(b, kv_heads, h // kv_heads, t, e)
  return jnp.moveaxis(out, 3, 1).reshape(b, t, h, e)


def dot_product(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
  """`jax.nn.dot_product_attention`; see `attend`. Each device works on its own rows and heads.

  It is cuDNN's kernel on a GPU, for 16 bits and head sizes that are multiples of 8 up to 128; this
  needs compute capability 8.0. Elsewhere it is XLA's own program.
  """
  bits16 = q.dtype in (jnp.bfloat16, jnp.float16)
  kernel_size = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  fused = platform() in ("gpu", "cuda") and bits16 and kernel_size
  implementation = "cudnn" if fused else "xla"
  return _on_own_rows(
    functools.partial(_dot_product_local, implementation=implementation), q, k, v, valid
  )


def _dot_product_local(
  q: Array, k: Array, v: Array, valid: Array | None, implementation: str
) -> Array:
  """Fused attention on one device, with the valid keys of each row moved to the front.

  The kernel takes either a bias [B,H,t,T] or a number of keys for each row. A mask of keys would
  become a bias, written out for every query, and so would its gradient. Attention does not depend
  on the order of keys, so with valid keys in front their number is enough.
  """
  attention = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
  if valid is None:
    return attention(q, k, v)
  b, length = valid.shape
  order = jnp.argsort(~valid, axis=1, stable=True)
  count = jnp.sum(valid, axis=1, dtype=jnp.int32)
  # A row without any valid key sees all keys, set to zero: it gets the mean of the values.
  seen = jnp.where(count > 0, count, length)
  shown = jnp.arange(length) < seen[:, None]

  def valid_first(x, shown):
    # `order` has every index once, so the gradient needs no atomic additions.
    x = x.at[jnp.arange(b)[:, None], order].get(unique_indices=True, mode="promise_in_bounds")
    # Zeros, so that nothing depends on what the kernel reads there, or on the gradients it writes.
    return jnp.where(shown[:, :, None, None], x, 0)

  k = valid_first(k, shown & (count > 0)[:, None])
  return attention(q, k, valid_first(v, shown), key_value_seq_lengths=seen)


def splash(q: Array, k: Array, v: Array, valid: Array | None, interpret: bool = False) -> Array:
  """The Pallas kernel for TPU; see `attend`. Each device works on its own rows and heads.

  Args:
    q, k, v, valid: see `attend`.
    interpret: run the kernel's emulation, which works on any platform; for tests.
  """
  if valid is None:
    valid = jnp.ones(k.shape[:2], bool)
  return _on_own_rows(functools.partial(_splash_local, interpret=interpret), q, k, v, valid)


def _on_own_rows(
  attention: Callable[..., Array], q: Array, k: Array, v: Array, valid: Array | None
) -> Array:
  """Calls `attention(q, k, v, valid)` on every device of the mesh in context, on its own part.

  The compiler cannot see into a kernel, so it would gather the operands. It may also leave cuDNN's
  lengths whole where rows are sharded; each device would then read the lengths of the first rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return attention(q, k, v, valid)
  rows = partition_spec(("act_batch",))[0]
  if q.shape[0] % num_shards("act_batch", mesh=mesh):
    rows = None  # too few rows to share: whole on every device
  heads = partition_spec(("act_heads",))[0]
  spec = jax.sharding.PartitionSpec(rows, None, heads, None)
  return jax.shard_map(
    attention,
    in_specs=(spec, spec, spec, None if valid is None else jax.sharding.PartitionSpec(rows, None)),
    out_specs=spec,
    check_vma=False,
  )(q, k, v, valid)


def _splash_local(q: Array, k: Array, v: Array, valid: Array, interpret: bool) -> Array:
  """Splash attention on one device: heads first, lengths padded to whole blocks."""
  t, e = q.shape[1], q.shape[3]
  q = _pad_length(q * (e**-0.5))
  k, v, seen = _pad_length(k), _pad_length(v), _pad_length(valid)
  shape = (q.shape[1], k.shape[1])
  block_q, block_kv = (next(n for n in SPLASH_BLOCKS if length % n == 0) for length in shape)
  attention = kernel.make_splash_mha(
    masks.MultiHeadMask([masks.FullMask(shape)] * q.shape[2]),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=kernel.BlockSizes(
      block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
      block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
      block_q_dq=block_q, block_kv_dq=block_kv,
    ),
    interpret=interpret,
  )  # fmt: skip
  # A query sees the keys of its own segment: 1 is the text, 0 its padding.
  segments = lambda row: kernel.SegmentIds(jnp.ones(shape[0], jnp.int32), row.astype(jnp.int32))
  first = lambda x: jnp.swapaxes(x, 1, 2)
  out = jax.vmap(lambda q, k, v, row: attention(q, k, v, segments(row)))(
    first(q), first(k), first(v), seen
  )
  return first(out)[:, :t]


def _pad_length(x: Array) -> Array:
  """Zeros (False) at the end of axis 1, up to a multiple of the smallest block."""
  padding = -x.shape[1] % SPLASH_BLOCKS[-1]
  return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)])
