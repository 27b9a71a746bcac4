"""The network of every family: a Llama stack with switches, as pure functions (`LM`).

Only this folder uses Linen. The layers are one scanned block, so compile time does not grow with
depth. Parameters have a leading axis for layers; those that a family does not have are left out:

    wte/embedding [V,D]            blocks/attn_norm/scale [N,D]
    blocks/{q,k,v}_proj/kernel [N,D,H*E or K*E]   and bias [N,H*E or K*E]
    blocks/qkv_proj/kernel [N,D,(H+2K)*E], in place of these three
    blocks/{q,k}_norm/scale [N,E]  blocks/attn_out/kernel [N,H*E,D]
    blocks/ff_norm/scale [N,D]     blocks/{ff,up}_proj/kernel [N,D,F]
    blocks/ff_out/kernel [N,F,D]   ln_f/scale [D]   head/kernel [D,V] (untied)

With experts instead of the MLP (models/moe.py), the first, dense layers are `first_blocks`, and
`blocks` has the others:

    blocks/router/{scores [N,D,X], bias [N,X]}    blocks/shared_{ff_proj,up_proj,ff_out}/kernel
    blocks/experts/{ff_proj,up_proj,ff_out}/kernel [N,X,D,F or F,D]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import ModelConfig
from igpo_jax.models import lora, moe
from igpo_jax.models.attention import attend, platform
from igpo_jax.models.cache import Cache, write
from igpo_jax.models.cache import empty as empty_cache
from igpo_jax.models.family import Design
from igpo_jax.models.layers import Linear, RMSNorm, apply_rope, dot_f32, low_rank, rope_tables
from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import LM, Array, Params, Routing

UNSTACKED_LAYERS = 16  # `unstack` leaves a model with more layers as it is
STACKS = ("first_blocks", "blocks")  # in the order of the layers

# What the backward pass may keep of a block's forward pass, by name.
REMAT_POLICIES = {
  "full": None,  # keep the block's input only, recompute the rest
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Places(NamedTuple):
  """What depends on where the t positions of a call are.

  Attributes:
    sin, cos: f32[t,S], RoPE's tables; f32[B,t,S] if each row counts its own positions.
    visible: bool[B or 1,t,T], which keys each position attends to; None: all.
  """

  sin: Array
  cos: Array
  visible: Array | None = None

  def at(self, read: tuple[Array, int]) -> Places:
    """The same for the positions that are read only."""
    sin, cos = (_at(read, table, -2) for table in self[:2])
    return Places(sin, cos, None if self.visible is None else _at(read, self.visible, -2))


def _at(read: tuple[Array, int], x: Array, axis: int) -> Array:
  """Cuts the positions first .. first + width - 1 from an axis of x, where read = (first, width).

  If `first` is i32[B], each row has its own: x is then [B or 1,...], or a table [T,S] of which
  every row gets its own cut.
  """
  first, width = read
  axis %= x.ndim
  if jnp.ndim(first) == 0:
    return jax.lax.dynamic_slice_in_dim(x, first, width, axis=axis)
  if axis == 0:
    return x[first[:, None] + jnp.arange(width)]
  rows = jnp.broadcast_to(x, (len(first), *x.shape[1:]))
  return jax.vmap(
    lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, width, axis=axis - 1)
  )(rows, first)


def stack_sizes(config: ModelConfig) -> dict[str, int]:
  """How many layers each stack of a model has."""
  first = config.moe.dense_layers if config.moe.experts else 0
  sizes = dict(zip(STACKS, (first, config.n_layers - first), strict=True))
  return {name: size for name, size in sizes.items() if size}


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)): one step of the scan over layers.

  `first`: one of the layers without experts, in a model that has some.
  """

  config: ModelConfig
  design: Design = Design()
  first: bool = False

  @nn.compact
  def __call__(self, x, cache, valid, start, places, layer=None, read=None):
    c = self.config
    kw = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
    linear = functools.partial(Linear, lora=c.lora, **kw)
    # The two branches that write to the residual stream start small, so that its
    # size does not grow with depth.
    linear_out = functools.partial(linear, init_scale=1.0 / (2 * c.n_layers))
    b, _, d = x.shape
    # Between the branches the stream may be split by position over the devices that share
    # a row's heads: norms are then shared out, too, and what is kept for the backward pass.
    stream = ("act_batch", "act_sequence" if c.shard_sequence else "act_length", "act_embed")

    h = RMSNorm(c.rms_norm_eps, name="attn_norm", **kw)(x)
    h = constrain(h, "act_batch", "act_length", "act_embed")
    asking, asked = h, places
    if read is not None:  # every position has keys and values, few are asked for
      x, asking, asked = _at(read, x, 1), _at(read, h, 1), places.at(read)
    q, k, v = self._queries_keys_values(h, asking, read, linear)
    if self.design.qk_norm:
      q, k = (RMSNorm(c.rms_norm_eps, name=f"{n}_norm", **kw)(y) for n, y in (("q", q), ("k", k)))
    k, q = apply_rope(k, *places[:2]), apply_rope(q, *asked[:2])
    if cache is not None:
      k, v, cache = write(cache, layer, k, v, start)
    h = attend(q, k, v, valid, c.attention, asked.visible)
    h = h.reshape(b, -1, c.n_heads * c.head_size)
    h = linear_out(d, ("heads", "embed"), name="attn_out")(h)
    x = constrain(x + h, *stream)

    h = RMSNorm(c.rms_norm_eps, name="ff_norm", **kw)(x)
    h = constrain(h, "act_batch", "act_length", "act_embed")
    if self.design.router is not None and not self.first:
      return constrain(x + self._experts(h, linear, linear_out), *stream), cache
    h = _mlp(h, c.mlp_hidden, linear, linear_out)
    return constrain(x + h, *stream), cache

  def _queries_keys_values(self, h, asking, read, linear):
    """Queries [B,t',H,E] of the positions that are read, keys and values [B,t,K,E] of all."""
    c, bias = self.config, {"use_bias": True} if self.design.qkv_bias else {}
    b, t, _ = h.shape
    query_heads, kv_heads = (b, -1, c.n_heads, c.head_size), (b, t, c.kv_heads, c.head_size)
    q_size, kv_size = c.n_heads * c.head_size, c.kv_heads * c.head_size
    if self.design.fused_qkv:
      fused = linear(q_size + 2 * kv_size, ("embed", "qkv"), name="qkv_proj", **bias)(h)
      q, k, v = jnp.split(fused, (q_size, q_size + kv_size), axis=-1)
      q = q if read is None else _at(read, q, 1)
    else:
      q = linear(q_size, ("embed", "heads"), name="q_proj", **bias)(asking)
      k = linear(kv_size, ("embed", "kv_heads"), name="k_proj", **bias)(h)
      v = linear(kv_size, ("embed", "kv_heads"), name="v_proj", **bias)(h)
    q = constrain(q.reshape(query_heads), "act_batch", "act_length", "act_heads", None)
    k = constrain(k.reshape(kv_heads), "act_batch", "act_length", "act_kv_heads", None)
    v = constrain(v.reshape(kv_heads), "act_batch", "act_length", "act_kv_heads", None)
    return q, k, v

  def _experts(self, h, linear, linear_out):
    """The output of a token's experts, plus that of the shared expert if there is one."""
    c, router = self.config, self.design.router
    logits, bias = moe.RouterScores(c, router, name="router")(h)
    choice = moe.route(logits, router, c.moe, bias)
    self.sow("routing", "choice", (choice.probabilities, choice.experts))
    out = moe.Experts(c, name="experts")(h, choice)
    if c.moe.shared_hidden:
      out = out + _mlp(h, c.moe.shared_hidden, linear, linear_out, "shared_")
    return out


def _mlp(h, hidden: int, linear, linear_out, prefix: str = ""):
  """A SwiGLU. It is called in a compact method, and its layers belong to that module."""
  gate = linear(hidden, ("embed", "mlp"), name=f"{prefix}ff_proj")(h)
  up = linear(hidden, ("embed", "mlp"), name=f"{prefix}up_proj")(h)
  y = constrain(jax.nn.silu(gate) * up, "act_batch", "act_length", "act_mlp")
  return linear_out(h.shape[-1], ("mlp", "embed"), name=f"{prefix}ff_out")(y)


class Transformer(nn.Module):
  """Embedding, N scanned blocks and the final norm; the head is applied outside."""

  config: ModelConfig
  design: Design = Design()

  @nn.compact
  def __call__(self, tokens, valid, places=None):
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
    # Before the loop: inside it, XLA's CPU backend fuses sine and cosine into every element
    # of every query and key (docs/LOG.md).
    places = find_places(c, self.design, tokens.shape[1], valid) if places is None else places
    for name, size in stack_sizes(c).items():
      first = name != "blocks"
      routed = self.design.router is not None and not first
      blocks = nn.scan(
        block,
        variable_axes={"params": 0, **({"routing": 0} if routed else {})},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * 4,
        length=size,
        metadata_params={nn.PARTITION_NAME: "layers"},
        # It traces a block twice; but without it a layer's random keys are others.
        check_constancy_invariants=self.is_initializing() or self.has_rng("dropout"),
      )
      x, _ = blocks(c, self.design, first, name=name)(x, None, valid, 0, places)
    x = RMSNorm(c.rms_norm_eps, name="ln_f", **kw)(x)
    if self.is_initializing() and not c.tie_embeddings:
      Linear(c.vocab_size, ("embed", "vocab"), name="head", **kw)(x)
    return x


def find_places(
  config: ModelConfig,
  design: Design,
  length: int,
  valid: Array | None,
  start: Array | int | None = None,
  tables: tuple[Array, Array] | None = None,
) -> Places:
  """The `Places` of positions start .. start + length - 1 of a canvas.

  Args:
    config, design: the model.
    length: t.
    valid: bool[B,T], for the whole canvas; None if it has no padding.
    start: i32[], or i32[B] with each row's own; None: the positions are the whole canvas, T is t.
    tables: RoPE's tables for the positions from 0 on, if they are known already.
  """
  rope = lambda positions: rope_tables(positions, config.rotary_size, config.rope_theta)
  places = jnp.arange(length)
  if start is not None:
    places = (start if jnp.ndim(start) == 0 else start[:, None]) + places
  if valid is None or not design.counts_positions:
    sin, cos = (
      rope(places) if tables is None else [_at((start, length), table, 0) for table in tables]
    )
    if not design.block_length:
      return Places(sin, cos)
  if valid is None:
    keys = asking = jnp.atleast_2d(places)
  else:
    keys = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)  # i32[B,T]
    asking = keys if start is None else _at((start, length), keys, 1)
  if valid is not None and design.counts_positions:
    sin, cos = rope(asking) if tables is None else [table[asking] for table in tables]
  visible = visible_keys(asking, keys, design.block_length) if design.block_length else None
  return Places(sin, cos, visible)


def visible_keys(asking: Array, keys: Array, block_length: int) -> Array:
  """Block-causal visibility: bool[B,t,T], True where the key's block is not after the query's.

  Args:
    asking, keys: i32[B,t] and i32[B,T], the numbers of the queries' and the keys' positions.
    block_length: positions of a block.

  Blocks of 2, four positions:  1 1 . .
                                1 1 . .
                                1 1 1 1
                                1 1 1 1
  """
  return keys[:, None, :] // block_length <= asking[:, :, None] // block_length


def two_copies(config: ModelConfig, design: Design, length: int, valid: Array | None) -> Places:
  """The `Places` of 2T positions: a noisy copy of T positions, then a clean one.

  Both copies have the same position numbers. A noisy position attends to its own noisy block and to
  the clean blocks before it, a clean one to the clean blocks up to its own. So one call gives every
  noisy block the context that it has in decoding. Blocks of 2, four positions, noisy then clean:

      1 1 . .  . . . .
      1 1 . .  . . . .
      . . 1 1  1 1 . .
      . . 1 1  1 1 . .
      . . . .  1 1 . .
      . . . .  1 1 . .
      . . . .  1 1 1 1
      . . . .  1 1 1 1
  """
  one = find_places(config, design, length, valid)
  twice = lambda x: jnp.concatenate([x, x], axis=-2)
  if valid is None:
    numbers = jnp.arange(length)[None]
  else:
    numbers = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
  block = numbers // design.block_length
  same, before = block[:, :, None] == block[:, None, :], block[:, :, None] > block[:, None, :]
  visible = jnp.concatenate([
    jnp.concatenate([same, before], axis=-1),
    jnp.concatenate([jnp.zeros_like(same), same | before], axis=-1),
  ], axis=-2)  # fmt: skip
  return Places(twice(one.sin), twice(one.cos), visible)


def unstack(config: ModelConfig, params: Params, length: int) -> Params:
  """See `LM.unstack`: on the CPU, and with few layers, `params` with a tuple of layers.

  XLA's CPU backend copies a layer's weights out of the stack at every use, and computes sines and
  cosines again for every element that RoPE rotates. Here both is done once, before a loop around
  `LM.hidden`. It costs a copy of the layers, and a program that grows with their number. RoPE's
  tables for `length` positions are at "rope".
  """
  if platform() != "cpu" or config.n_layers > UNSTACKED_LAYERS:
    return params
  layers = {
    name: tuple(jax.tree.map(lambda w, i=i: w[i], params[name]) for i in range(size))
    for name, size in stack_sizes(config).items()
  }
  tables = rope_tables(jnp.arange(length), config.rotary_size, config.rope_theta)
  return {**params, **layers, "rope": tables}


def read_hidden(
  config: ModelConfig, design: Design, params: Params, tokens, valid, start, cache, read
) -> tuple[Array, Cache | None]:
  """`Transformer` for sampling: with a cache, and a last layer that computes only what is read.

  The layers are a loop that indexes the stacked parameters and writes into the cache in place. (A
  scan would copy the whole cache at every call.) If `params` are unstacked, the loop is unrolled.
  """
  kw = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
  # Few positions need not divide over the devices, and nothing is kept for a backward pass.
  plain = dataclasses.replace(config, shard_sequence=False)
  sizes, last = stack_sizes(config), config.n_layers - 1
  places = find_places(config, design, tokens.shape[1], valid, start, params.get("rope"))

  def stack_of(name, offset):
    stack, block = params[name], Block(plain, design, name != "blocks")

    def layer(i, carry, read=None):
      x, cache = carry
      own = i - offset if offset else i
      weights = stack[own] if isinstance(stack, tuple) else jax.tree.map(lambda w: w[own], stack)
      return block.apply({"params": weights}, x, cache, valid, start, places, i, read)

    return layer

  embed = nn.Embed(config.vocab_size, config.d_model, **kw)
  x = embed.apply({"params": params["wte"]}, tokens)
  carry, begin = (constrain(x, "act_batch", "act_length", "act_embed"), cache), 0
  for name, size in sizes.items():
    layer, end = stack_of(name, begin), min(begin + size, last)
    if isinstance(params[name], tuple):
      for i in range(begin, end):
        carry = layer(i, carry)
    else:
      carry = jax.lax.fori_loop(begin, end, layer, carry)
    begin += size
  x, cache = layer(last, carry, read)
  return RMSNorm(config.rms_norm_eps, **kw).apply({"params": params["ln_f"]}, x), cache


def one_later(h: Array, first: Array | int = 0) -> Array:
  """The states that predict the positions from `first` on, if the network predicts one ahead.

  Args:
    h: [B,w,D], the network's own states, from position max(first - 1, 0) on.
    first: the first position to predict, or i32[B] with each row's own. Position 0 is predicted by
      its own state.

  Returns:
    [B,w,D].
  """
  moved = jnp.concatenate([h[:, :1], h[:, :-1]], axis=1)
  if isinstance(first, int):
    return h if first > 0 else moved
  return jnp.where(jnp.reshape(first > 0, (-1, 1, 1)), h, moved)


def make_network(config: ModelConfig, design: Design) -> LM:
  """The model's pure functions. Call `models.make_lm` instead, which checks the config."""
  model = Transformer(config, design)
  # Parameters do not depend on how attention is computed, nor on where they are made.
  plain = Transformer(dataclasses.replace(config, attention="einsum"), design)
  dummy = np.zeros((1, 2), np.int32)
  # A start asks for the shapes of parameters several times: jit traces this once, and `make_lm`
  # gives the same functions for the same config.
  init_boxed = jax.jit(lambda key: dict(plain.init(key, dummy, None)["params"]), inline=True)
  own_places = lambda h: one_later(h) if design.shift else h

  def init(key) -> Params:
    return lora.add(nn.meta.unbox(init_boxed(key)), key, config.lora)

  def logical_axes():
    boxed = jax.eval_shape(init_boxed, jax.random.key(0))
    names = lambda x: tuple(x.names) if isinstance(x, nn.meta.AxisMetadata) else (None,) * x.ndim
    axes = jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    return lora.add_axes(axes, config.lora)

  def rngs(dropout_key):
    return None if dropout_key is None else {"dropout": dropout_key}

  def hidden(params, tokens, valid=None, *, start=0, cache=None, read=None, dropout_key=None):
    if cache is None and read is None:
      h = model.apply({"params": params}, tokens, valid, rngs=rngs(dropout_key))
      return own_places(h), None
    first, width = (0, tokens.shape[1]) if read is None else read
    if design.shift:
      before = max(first - 1, 0) if isinstance(first, int) else jnp.maximum(first - 1, 0)
      read = (before, width)
    if valid is None and design.block_length and cache is not None:
      valid = jnp.ones((tokens.shape[0], cache_length(cache)), bool)
    h, cache = read_hidden(config, design, params, tokens, valid, start, cache, read)
    return one_later(h, first) if design.shift else h, cache

  def both_copies(noisy, clean, valid):
    places = two_copies(config, design, noisy.shape[1], valid)
    tokens = jnp.concatenate([noisy, clean], axis=1)
    return tokens, None if valid is None else jnp.concatenate([valid, valid], axis=1), places

  def routed(params, tokens, valid=None, *, clean=None, dropout_key=None):
    args = (tokens, valid) if clean is None else both_copies(tokens, clean, valid)
    kw = {"rngs": rngs(dropout_key), "mutable": ["routing"]}
    h, state = model.apply({"params": params}, *args, **kw)
    ((probabilities, experts),) = state["routing"]["blocks"]["choice"]
    return own_places(h[:, : tokens.shape[1]]), Routing(probabilities, experts)

  def hidden_of_two(params, noisy, clean, valid=None, *, dropout_key=None):
    args = both_copies(noisy, clean, valid)
    h = model.apply({"params": params}, *args, rngs=rngs(dropout_key))
    return own_places(h[:, : noisy.shape[1]])

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
    shift=design.shift,
    # In a block-causal model, the earlier positions of a block change with those that are read.
    left_context=max(design.shift, design.block_length - 1),
    block_length=design.block_length,
    hidden_of_two=hidden_of_two if design.block_length else None,
    routed=routed if design.router is not None else None,
    router_loss=config.router_loss,
  )


def cache_length(cache: Cache) -> int:
  """T, the number of positions that a cache has room for."""
  keys = cache.keys[0] if isinstance(cache.keys, tuple) else cache.keys
  return keys.shape[-2]
