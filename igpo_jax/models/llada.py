"""LLaDA: a bidirectional Llama stack as Flax Linen, handed out as pure functions.

Linen stays in this room. The layers are one scanned block, so compile time does
not grow with depth; parameters carry a leading `layers` axis:

    wte/embedding [V,D]            blocks/attn_norm/scale [N,D]
    blocks/{q,k,v}_proj/kernel [N,D,H*E or K*E]   blocks/attn_out/kernel [N,H*E,D]
    blocks/ff_norm/scale [N,D]     blocks/{ff,up}_proj/kernel [N,D,F]
    blocks/ff_out/kernel [N,F,D]   ln_f/scale [D]   head/kernel [D,V] (untied)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from igpo_jax.config import ModelConfig
from igpo_jax.models import lora
from igpo_jax.models.attention import attend, platform
from igpo_jax.models.cache import Cache, write
from igpo_jax.models.cache import empty as empty_cache
from igpo_jax.models.layers import Linear, RMSNorm, apply_rope, dot_f32, low_rank, rope_tables
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import LM, Array, Params

UNSTACKED_LAYERS = 16  # the most that `unstack` takes apart

# What the backward pass may keep of a block's forward pass, by name.
REMAT_POLICIES = {
  "full": None,  # keep the block's input only, recompute the rest
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _at(read: tuple[Array, int], x: Array, axis: int) -> Array:
  """The positions read[0] .. read[0] + read[1] - 1 of an axis."""
  return jax.lax.dynamic_slice_in_dim(x, *read, axis=axis)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)): one step of the scan over layers."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, cache, valid, start, tables, layer=None, read=None):
    c = self.config
    kw = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
    linear = functools.partial(Linear, lora=c.lora, **kw)
    # The two branches that write to the residual stream start small, so that its
    # size does not grow with depth.
    linear_out = functools.partial(linear, init_scale=1.0 / (2 * c.n_layers))
    b, t, d = x.shape
    # Between the branches the stream may be split by position over the devices that share
    # a row's heads: norms are then shared out, too, and what is kept for the backward pass.
    stream = ("act_batch", "act_sequence" if c.shard_sequence else "act_length", "act_embed")
    query_heads, kv_heads = (b, -1, c.n_heads, c.head_size), (b, t, c.kv_heads, c.head_size)

    h = RMSNorm(c.rms_norm_eps, name="attn_norm", **kw)(x)
    h = constrain(h, "act_batch", "act_length", "act_embed")
    asking, asked_tables = h, tables
    if read is not None:  # every position has keys and values, few are asked for
      x, asking = _at(read, x, 1), _at(read, h, 1)
      asked_tables = [_at(read, table, 0) for table in tables]
    q = linear(c.n_heads * c.head_size, ("embed", "heads"), name="q_proj")(asking)
    k = linear(c.kv_heads * c.head_size, ("embed", "kv_heads"), name="k_proj")(h)
    v = linear(c.kv_heads * c.head_size, ("embed", "kv_heads"), name="v_proj")(h)
    q = constrain(q.reshape(query_heads), "act_batch", "act_length", "act_heads", None)
    k = constrain(k.reshape(kv_heads), "act_batch", "act_length", "act_kv_heads", None)
    v = constrain(v.reshape(kv_heads), "act_batch", "act_length", "act_kv_heads", None)
    k, q = apply_rope(k, *tables), apply_rope(q, *asked_tables)
    if cache is not None:
      k, v, cache = write(cache, layer, k, v, start)
    h = attend(q, k, v, valid, c.attention).reshape(b, -1, c.n_heads * c.head_size)
    h = linear_out(d, ("heads", "embed"), name="attn_out")(h)
    x = constrain(x + h, *stream)

    h = RMSNorm(c.rms_norm_eps, name="ff_norm", **kw)(x)
    h = constrain(h, "act_batch", "act_length", "act_embed")
    gate = linear(c.mlp_hidden, ("embed", "mlp"), name="ff_proj")(h)
    up = linear(c.mlp_hidden, ("embed", "mlp"), name="up_proj")(h)
    h = constrain(jax.nn.silu(gate) * up, "act_batch", "act_length", "act_mlp")
    h = linear_out(d, ("mlp", "embed"), name="ff_out")(h)
    return constrain(x + h, *stream), cache


class Transformer(nn.Module):
  """Embedding, N scanned blocks and the final norm; the head is applied outside."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens, valid):
    c = self.config
    kw = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
    embedding_init = nn.with_logical_partitioning(
      nn.initializers.normal(stddev=c.d_model**-0.5), ("vocab", "embed")
    )
    x = nn.Embed(c.vocab_size, c.d_model, embedding_init=embedding_init, name="wte", **kw)(tokens)
    x = constrain(x, "act_batch", "act_length", "act_embed")
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast,) * 4,
      length=c.n_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    # Before the loop: inside it, XLA's CPU backend fuses sine and cosine into every element
    # of every query and key (docs/LOG.md).
    tables = rope_tables(jnp.arange(tokens.shape[1]), c.head_size, c.rope_theta)
    x, _ = blocks(c, name="blocks")(x, None, valid, 0, tables)
    x = RMSNorm(c.rms_norm_eps, name="ln_f", **kw)(x)
    if self.is_initializing() and not c.tie_embeddings:
      Linear(c.vocab_size, ("embed", "vocab"), name="head", **kw)(x)
    return x


def unstack(config: ModelConfig, params: Params, length: int) -> Params:
  """`params` with a tuple of layers, on the CPU and if they are few; else as they are.

  XLA's CPU backend copies a layer's weights out of the stack at every use, and fuses the
  sines and cosines of RoPE into every element that they rotate. A caller with a loop around
  `LM.hidden` has both done once, before the loop, and pays with a copy of the layers and a
  program that grows with their number. The tables, for `length` positions, are at "rope".
  """
  if platform() != "cpu" or config.n_layers > UNSTACKED_LAYERS:
    return params
  layers = tuple(
    jax.tree.map(lambda w, i=i: w[i], params["blocks"]) for i in range(config.n_layers)
  )
  tables = rope_tables(jnp.arange(length), config.head_size, config.rope_theta)
  return {**params, "blocks": layers, "rope": tables}


def read_hidden(
  config: ModelConfig, params: Params, tokens, valid, start, cache, read
) -> tuple[Array, Cache | None]:
  """`Transformer` for sampling: with a cache, and only what is read of the last layer.

  The layers are a loop that indexes the stacked parameters and writes to the cache in
  place (a scan would copy the whole cache at every call), or unrolled if `unstack`ed.
  """
  kw = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
  # Few positions need not divide over the devices, and nothing is kept for a backward pass.
  block = Block(dataclasses.replace(config, shard_sequence=False))
  last, stack = config.n_layers - 1, params["blocks"]
  if "rope" in params:
    tables = [_at((start, tokens.shape[1]), table, 0) for table in params["rope"]]
  else:
    positions = start + jnp.arange(tokens.shape[1])
    tables = rope_tables(positions, config.head_size, config.rope_theta)

  def layer(i, carry, read=None):
    x, cache = carry
    weights = stack[i] if isinstance(stack, tuple) else jax.tree.map(lambda w: w[i], stack)
    return block.apply({"params": weights}, x, cache, valid, start, tables, i, read)

  embed = nn.Embed(config.vocab_size, config.d_model, **kw)
  x = embed.apply({"params": params["wte"]}, tokens)
  carry = constrain(x, "act_batch", "act_length", "act_embed"), cache
  if isinstance(stack, tuple):
    for i in range(last):
      carry = layer(i, carry)
  else:
    carry = jax.lax.fori_loop(0, last, layer, carry)
  x, cache = layer(last, carry, read)
  return RMSNorm(config.rms_norm_eps, **kw).apply({"params": params["ln_f"]}, x), cache


@functools.lru_cache(maxsize=32)
def make_lm(config: ModelConfig) -> LM:
  """The model's pure functions.

  The same config gives the same object, so jitted programs that take an `LM`
  as a static argument are shared between callers.
  """
  model = Transformer(config)
  # Parameters do not depend on how attention is computed, nor on where they are made.
  plain = Transformer(dataclasses.replace(config, attention="einsum"))
  dummy = jnp.zeros((1, 2), jnp.int32)

  def init_boxed(key) -> Any:
    return dict(plain.init(key, dummy, None)["params"])

  def init(key) -> Params:
    return lora.add(nn.meta.unbox(init_boxed(key)), key, config.lora)

  def logical_axes():
    boxed = jax.eval_shape(init_boxed, jax.random.key(0))
    names = lambda x: tuple(x.names) if isinstance(x, nn.meta.AxisMetadata) else (None,) * x.ndim
    axes = jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    return lora.add_axes(axes, config.lora)

  def hidden(params, tokens, valid=None, *, start=0, cache=None, read=None, dropout_key=None):
    if cache is not None or read is not None:
      return read_hidden(config, params, tokens, valid, start, cache, read)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply({"params": params}, tokens, valid, rngs=rngs), None

  def head(params, h):
    if config.tie_embeddings:
      weights = {"kernel": params["wte"]["embedding"].T}
    else:
      weights = params["head"]
    dtype = jnp.dtype(config.dtype)
    h = h.astype(dtype)
    y = dot_f32(h, constrain(weights["kernel"].astype(dtype), "embed", "vocab"))
    if "lora_a" in weights:
      y = y + low_rank(h, weights["lora_a"], weights["lora_b"], config.lora.alpha)
    return y

  def logits(params, tokens, valid=None):
    h, _ = hidden(params, tokens, valid)
    return head(params, h)

  return LM(
    init=init,
    hidden=hidden,
    head=head,
    logits=logits,
    unstack=functools.partial(unstack, config),
    init_cache=functools.partial(empty_cache, config),
    logical_axes=logical_axes,
    mask_id=config.mask_id,
    eos_id=config.eos_id,
    stop_ids=config.stop_ids or (config.eos_id,),
    vocab_size=config.vocab_size,
  )
