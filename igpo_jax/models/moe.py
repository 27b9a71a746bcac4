"""Experts: a router sends every token to a few of many small MLPs.

    h [B,t,D] -> scores of X experts -> the k best, and their weights -> sum of weight * expert(h)

No token is dropped and no expert has a limit: the B t k pairs of a token and an expert are
sorted by expert, and each expert multiplies its own rows (`jax.lax.ragged_dot`). The plain twin
lets every expert work on every token and gives most of them the weight 0.

Over a mesh every device works on its own rows. Experts are gathered over its fsdp axis layer by
layer, as other weights are, and their hidden units are shared out over its tensor axis. Along its
expert axis it is the other way round: a device keeps its experts, is sent the rows of all devices
along that axis, and sends back what its experts made of them. Still no token is dropped: there is
room for all of them to come to one device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from igpo_jax.config import ModelConfig, MoEConfig
from igpo_jax.models import family
from igpo_jax.models.layers import dot_f32, low_rank, parameter
from igpo_jax.parallel.sharding import constrain, num_shards, partition_spec
from igpo_jax.types import Array, Params

KERNEL_AXES = {
  "ff_proj": ("experts", "expert_embed", "mlp"),
  "up_proj": ("experts", "expert_embed", "mlp"),
  "ff_out": ("experts", "mlp", "expert_embed"),
}
LOWEST = float(jnp.finfo(jnp.float32).min)


class Choice(NamedTuple):
  """A router's decision.

  Attributes:
    probabilities: f32[...,X], the scores of all experts, before any bias.
    experts: i32[...,k], the chosen ones, the best first.
    weights: f32[...,k], the factors of their outputs.
  """

  probabilities: Array
  experts: Array
  weights: Array


def route(logits: Array, router: family.Router, moe: MoEConfig, bias: Array | None) -> Choice:
  """Chooses the experts of every token, in float32.

  Args:
    logits: f32[...,X].
    router: the family's rule.
    moe: the numbers of experts and groups.
    bias: f32[X], added to the scores when experts are chosen, but not to their weights; None: none.

  Example: softmax scores 0.5, 0.3, 0.2 and k = 2 give experts 0 and 1 with weights 0.5 and 0.3,
  or 0.625 and 0.375 if weights are divided by their sum.
  """
  if router.scores == "sigmoid":
    scores = jax.nn.sigmoid(logits)
  else:
    scores = jax.nn.softmax(logits, axis=-1)
  ranked = scores if bias is None else scores + bias
  if moe.groups:
    grouped = ranked.reshape(*ranked.shape[:-1], moe.groups, -1)
    # The worth of a group is the sum of its two highest scores.
    worth = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    _, kept = jax.lax.top_k(worth, moe.groups_kept)
    in_kept = jnp.any(jax.nn.one_hot(kept, moe.groups, dtype=bool), axis=-2)
    ranked = jnp.where(in_kept[..., None], grouped, LOWEST).reshape(ranked.shape)
  _, experts = jax.lax.top_k(ranked, moe.experts_per_token)
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if router.renormalise:
    weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
  return Choice(scores, experts, weights * moe.scale)


class RouterScores(nn.Module):
  """The router's logits f32[...,X] of h, by one linear layer with float32 results; and its bias."""

  config: ModelConfig
  router: family.Router

  @nn.compact
  def __call__(self, h: Array) -> tuple[Array, Array | None]:
    c = self.config
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    # It is not called "kernel", so that adapters leave it alone: they are not for choices.
    shape, made_in = (h.shape[-1], c.moe.experts), jnp.dtype(c.param_dtype)
    weights = parameter(self, "scores", init, ("embed", None), shape, made_in)
    bias = None
    if self.router.bias:
      bias = parameter(self, "bias", nn.initializers.zeros, (None,), shape[1:], made_in)
      bias = bias.astype(jnp.float32)
    dtype = jnp.dtype(c.dtype)
    rows = h.reshape(-1, h.shape[-1]).astype(dtype)
    logits = dot_f32(rows, constrain(weights.astype(dtype), "embed", None))
    return logits.reshape(*h.shape[:-1], -1), bias


class ExpertKernel(nn.Module):
  """The kernels [X,in,out] of one linear layer of all experts, with their adapters if any."""

  config: ModelConfig
  axes: tuple[str, str, str]
  fan_in: int
  fan_out: int
  init_scale: float = 1.0

  @nn.compact
  def __call__(self) -> Params:
    c = self.config
    init = nn.initializers.variance_scaling(
      self.init_scale, "fan_in", "truncated_normal", batch_axis=(0,)
    )
    shape = (c.moe.experts, self.fan_in, self.fan_out)
    kernel = parameter(self, "kernel", init, self.axes, shape, jnp.dtype(c.param_dtype))
    out = {"kernel": constrain(kernel.astype(jnp.dtype(c.dtype)), *self.axes)}
    for name in ("lora_a", "lora_b"):
      if self.has_variable("params", name):
        out[name] = self.get_variable("params", name)
    return out


class Experts(nn.Module):
  """The sum over a token's experts of weight * ff_out(silu(ff_proj(h)) * up_proj(h))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, h: Array, choice: Choice) -> Array:
    c, d = self.config, h.shape[-1]
    sizes = {"ff_proj": (d, c.moe.expert_hidden), "up_proj": (d, c.moe.expert_hidden),
             "ff_out": (c.moe.expert_hidden, d)}  # fmt: skip
    kernels = {
      name: ExpertKernel(
        c, KERNEL_AXES[name], *size, 1.0 / (2 * c.n_layers) if name == "ff_out" else 1.0, name=name
      )()
      for name, size in sizes.items()
    }
    compute = {"ragged": ragged, "dense": dense}[c.expert_products]
    compute = functools.partial(compute, alpha=c.lora.alpha)
    return on_own_rows(compute, h, choice, kernels)


def on_own_rows(compute, h: Array, choice: Choice, kernels: Params) -> Array:
  """Calls `compute(h, experts, weights, kernels)` on every device of the mesh in context.

  Each device works on its own rows, experts and hidden units. The results that devices have for
  the same row are added up. Along the expert axis a device gets the rows of all devices.

  Args:
    compute: `ragged` or `dense`.
    h: [B,t,D].
    choice: of the router.
    kernels: name -> kernels [X,in,out] of all experts, with their adapters if any.

  Returns:
    [B,t,D] in the dtype of h.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return compute(h, choice.experts, choice.weights, kernels).astype(h.dtype)
  rows = partition_spec(("act_batch",))[0]
  if h.shape[0] % num_shards("act_batch", mesh=mesh):
    rows = None  # too few rows to share: whole on every device
  owners, hidden = partition_spec(("experts", "mlp"))
  of_row, spec = PartitionSpec(rows, None, None), {}
  for name, tree in kernels.items():
    inner, outer = (hidden, None) if name == "ff_out" else (None, hidden)
    place = {"kernel": (inner, outer), "lora_a": (inner, None), "lora_b": (None, outer)}
    spec[name] = {leaf: PartitionSpec(owners, *place[leaf]) for leaf in tree}
  alone = mesh.shape[owners] == 1  # one device has all experts
  sent = rows is not None and not alone

  def part(h, experts, weights, kernels):
    if sent:
      gather = lambda x: jax.lax.all_gather(x, owners, axis=0, tiled=True)
      h, experts, weights = gather(h), gather(experts), gather(weights)
    if not alone:
      # Experts are numbered within the device; those of other devices get the number `count`.
      count = kernels["ff_proj"]["kernel"].shape[0]
      experts = experts - jax.lax.axis_index(owners) * count
      experts = jnp.where((experts >= 0) & (experts < count), experts, count)
    out = compute(h, experts, weights, kernels)
    if sent:
      out = jax.lax.psum_scatter(out, owners, scatter_dimension=0, tiled=True)
    return out[None]

  # A new first axis holds the parts of a row; the compiler makes their sum.
  over = (owners, hidden) if rows is None else hidden
  parts = jax.shard_map(
    part,
    in_specs=(of_row, of_row, of_row, spec),
    out_specs=PartitionSpec(over, rows, None, None),
    check_vma=False,
  )(h, choice.experts, choice.weights, kernels)
  return jnp.sum(parts, axis=0).astype(h.dtype)


def ragged(h: Array, experts: Array, weights: Array, kernels: Params, alpha: float) -> Array:
  """The experts' outputs, by grouped products: each expert multiplies only the rows sent to it.

  Args:
    h: [B,t,D].
    experts: i32[B,t,k], indices into `kernels`. An index past the last one adds nothing: the expert
      is on another device.
    weights: f32[B,t,k].
    kernels: name -> kernels [X,in,out], with adapters if any.
    alpha: of the adapters.

  Returns:
    f32[B,t,D].
  """
  b, t, d = h.shape
  count, k = kernels["ff_proj"]["kernel"].shape[0], experts.shape[-1]
  flat = experts.reshape(-1)  # i32[B*t*k]
  order = jnp.argsort(flat, stable=True)
  sizes = jnp.bincount(flat, length=count).astype(jnp.int32)
  rows = h.reshape(-1, d)[order // k]

  def linear(x, name):
    return grouped_linear(x, kernels[name], sizes, alpha)

  out = linear(jax.nn.silu(linear(rows, "ff_proj")) * linear(rows, "up_proj"), "ff_out")
  # In rows that belong to no group, a grouped product may hold anything.
  out = jnp.where(jnp.arange(len(out))[:, None] < jnp.sum(sizes), out, 0)
  back = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(b, t, k, d)
  return jnp.einsum("btkd,btk->btd", back, weights, preferred_element_type=jnp.float32)


def grouped_linear(x: Array, tree: Params, sizes: Array, alpha: float) -> Array:
  """Multiplies each row of x [R,in], sorted by expert, with the kernel of its expert.

  Args:
    x: [R,in].
    tree: kernel [X,in,out], with adapters if any.
    sizes: i32[X], how many rows each expert has.
    alpha: of the adapters.

  Returns:
    [R,out] in the dtype of x.
  """
  f32 = {"preferred_element_type": jnp.float32}
  y = jax.lax.ragged_dot(x, tree["kernel"], sizes, **f32)
  if "lora_a" in tree:
    a, b = tree["lora_a"].astype(x.dtype), tree["lora_b"].astype(x.dtype)
    inner = jax.lax.ragged_dot(x, a, sizes, **f32) * (alpha / a.shape[-1])
    y = y + jax.lax.ragged_dot(inner.astype(x.dtype), b, sizes, **f32)
  return y.astype(x.dtype)


def dense(h: Array, experts: Array, weights: Array, kernels: Params, alpha: float) -> Array:
  """The plain twin of `ragged`: every expert works on every token. Arguments as `ragged`."""
  count = kernels["ff_proj"]["kernel"].shape[0]
  given = jnp.sum(jax.nn.one_hot(experts, count) * weights[..., None], axis=-2)  # [B,t,X]

  def one(total, expert):
    tree, weight = expert
    linear = lambda x, name: _linear(x, tree[name], alpha)
    y = linear(jax.nn.silu(linear(h, "ff_proj")) * linear(h, "up_proj"), "ff_out")
    return total + weight[..., None] * y.astype(jnp.float32), None

  zero = jnp.zeros(h.shape, jnp.float32)
  return jax.lax.scan(one, zero, (kernels, jnp.moveaxis(given, -1, 0)))[0]


def _linear(x: Array, tree: Params, alpha: float) -> Array:
  """x [B,t,in] times the kernel of one expert, in the dtype of x."""
  y = dot_f32(x, tree["kernel"])
  if "lora_a" in tree:
    y = y + low_rank(x, tree["lora_a"], tree["lora_b"], alpha)
  return y.astype(x.dtype)
