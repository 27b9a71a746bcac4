"""Low-rank adapters beside the kernels they adapt: add, split, combine, merge.

An adapter is two more leaves in the parameter tree,

    blocks/q_proj/{kernel [N,in,out], lora_a [N,in,r], lora_b [N,r,out]}

so the same `LM` computes the adapted model with them, and the base model without them. The KL
reference is `split(params)[1]`, without a second copy. Training differentiates only the first part
of `split`; the other part has no gradient and no optimizer state. B starts at zero, so a fresh
adapter changes nothing. Adapters are float32 whatever the dtype of the base, since the optimizer
updates them by steps that bfloat16 would round away.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from igpo_jax.config import LoRAConfig
from igpo_jax.errors import UserError
from igpo_jax.types import Array, Params

ADAPTER_LEAVES = ("lora_a", "lora_b")


def linear_layers(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """The paths of all linear layers of a parameter tree, such as ("blocks", "q_proj")."""
  if "kernel" in params:
    yield path
    return
  for name in sorted(params):
    if isinstance(params[name], dict):
      yield from linear_layers(params[name], (*path, name))


def find_targets(params: Params, cfg: LoRAConfig) -> list[tuple[str, ...]]:
  """The paths of the linear layers that `cfg.targets` matches.

  Raises:
    UserError: it matches none; the message lists the layers.
  """
  layers = list(linear_layers(params))
  found = [path for path in layers if re.fullmatch(cfg.targets, "/".join(path))]
  if not found:
    names = ", ".join("/".join(path) for path in layers)
    raise UserError(f"model.lora.targets={cfg.targets!r} matches none of {names}")
  return found


def init(params: Params, key: Array, cfg: LoRAConfig) -> Params:
  """Fresh adapters: A ~ U(-1/sqrt(in), 1/sqrt(in)), as PEFT draws it, and B = 0, in float32.

  Args:
    params: the base, as arrays or ShapeDtypeStructs.
    key: one PRNG key.
    cfg: see `LoRAConfig`.

  Returns:
    A tree with the adapters' leaves only; `combine` puts them beside the kernels.

  Raises:
    UserError: `cfg.targets` matches no layer.
  """
  adapters: Params = {}
  for path in find_targets(params, cfg):
    *stack, fan_in, fan_out = _get(params, path)["kernel"].shape
    # Keyed by name, so that an adapter does not depend on which other layers have one.
    layer_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()) >> 1)
    bound = fan_in**-0.5
    a = jax.random.uniform(layer_key, (*stack, fan_in, cfg.rank), minval=-bound, maxval=bound)
    b = jnp.zeros((*stack, cfg.rank, fan_out), jnp.float32)
    adapters = combine(adapters, _nest(path, {"lora_a": a, "lora_b": b}))
  return adapters


def add(params: Params, key: Array, cfg: LoRAConfig) -> Params:
  """`params` with fresh adapters; `params` itself if the rank is 0."""
  return combine(params, init(params, key, cfg)) if cfg.rank else params


def add_axes(axes: Any, cfg: LoRAConfig) -> Any:
  """The logical axes of `add(params, ...)`, made from those of `params`."""
  if not cfg.rank:
    return axes
  out = axes
  for path in find_targets(axes, cfg):
    *stack, _, _ = _get(axes, path)["kernel"]
    pair = {
      "lora_a": (*stack, "lora_fan", "lora_rank"),
      "lora_b": (*stack, "lora_rank", "lora_fan"),
    }
    out = combine(out, _nest(path, pair))
  return out


def split(params: Params) -> tuple[Params, Params]:
  """Splits parameters into (trainable, frozen): the adapters, and everything else.

  Without adapters everything is trainable, and frozen is {}. It works for any tree with the
  structure of the parameters, such as logical axes or shardings.
  """
  trainable, frozen = _split(params)
  return (trainable, frozen) if trainable else (frozen, {})


def combine(frozen: Params, trainable: Params) -> Params:
  """The inverse of `split`: the union of two trees that have no leaf in common."""
  out = dict(frozen)
  for name, value in trainable.items():
    out[name] = combine(out[name], value) if name in out else value
  return out


def merge(params: Params, cfg: LoRAConfig) -> Params:
  """The parameters without adapters, each added to its kernel: W + A B alpha / r.

  The sum is made in float32 and rounded once, to the dtype of W.
  """
  if "lora_a" in params:
    kernel = merge_kernel(params["kernel"], params["lora_a"], params["lora_b"], cfg.alpha)
    return {**{k: v for k, v in params.items() if k not in ADAPTER_LEAVES}, "kernel": kernel}
  return {k: merge(v, cfg) if isinstance(v, dict) else v for k, v in params.items()}


def merge_kernel(kernel: Array, a: Array, b: Array, alpha: float) -> Array:
  """W + A B alpha / r in the dtype of W, for one layer [in,out] or a stack of them [N,in,out]."""
  delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
  merged = kernel.astype(jnp.float32) + delta * (alpha / a.shape[-1])
  return merged.astype(kernel.dtype)


def _split(tree: Params) -> tuple[Params, Params]:
  adapters, rest = {}, {}
  for name, value in tree.items():
    if name in ADAPTER_LEAVES:
      adapters[name] = value
    elif isinstance(value, dict):
      inner_adapters, inner_rest = _split(value)
      if inner_adapters:
        adapters[name] = inner_adapters
      if inner_rest:
        rest[name] = inner_rest
    else:
      rest[name] = value
  return adapters, rest


def _get(tree: Params, path: tuple[str, ...]) -> Params:
  for name in path:
    tree = tree[name]
  return tree


def _nest(path: tuple[str, ...], leaf: Params) -> Params:
  for name in reversed(path):
    leaf = {name: leaf}
  return leaf
