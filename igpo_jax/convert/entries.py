"""Our parameters and the Hugging Face tensors that they are made of."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np

from igpo_jax.config import ModelConfig
from igpo_jax.models import make_lm
from igpo_jax.models.families import find
from igpo_jax.models.lora import ADAPTER_LEAVES
from igpo_jax.models.network import STACKS, stack_sizes

PEFT_PREFIX = "base_model.model."  # how PEFT names the module it wraps
TRANSPOSED = ("kernel", "scores")  # theirs are [out, in], ours [in, out]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One of our parameters, and the Hugging Face tensors that it is made of.

  Attributes:
    path: its place in the parameter tree, such as ("blocks", "q_proj", "kernel").
    shape: its shape. A stacked parameter has layers as its first axis, and then perhaps experts.
    keys: the tensors' keys: one, or one for each layer, or one for each expert of each layer.
    stacked: how many of the first axes run over `keys`: 0, 1 or 2.
    transposed: True for kernels: their tensors are [out, in], ours [in, out].
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  keys: tuple[str, ...]
  stacked: int
  transposed: bool

  @property
  def name(self) -> str:
    """The path as text, its parts separated by "/"."""
    return "/".join(self.path)

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Shape of the part of our parameter that one key holds."""
    return self.shape[self.stacked :]

  @property
  def hf_shape(self) -> tuple[int, ...]:
    """Shape of the tensor of one key."""
    return self.slice_shape[::-1] if self.transposed else self.slice_shape

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  def part(self, number: int) -> tuple[slice, ...]:
    """The part of our parameter that key number `number` holds, as slices of the first axes."""
    place = np.unravel_index(number, self.shape[: self.stacked])
    return tuple(slice(int(n), int(n) + 1) for n in place)


@functools.lru_cache(maxsize=16)
def entries(config: ModelConfig) -> tuple[Entry, ...]:
  """Every parameter of a model with its keys, in the order of the tree.

  If `config.lora.rank` is above 0, adapters are among them, under the names that PEFT gives them.
  """
  shapes = jax.eval_shape(lambda: make_lm(config).init(jax.random.key(0)))
  out = []
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path = tuple(k.key for k in key_path)
    adapter = path[-1] in ADAPTER_LEAVES
    name = "/".join((*path[:-1], "kernel") if adapter else path)
    pattern = key_pattern(config.family, name)
    if adapter:
      part = {"lora_a": "lora_A", "lora_b": "lora_B"}[path[-1]]
      pattern = f"{PEFT_PREFIX}{pattern.removesuffix('weight')}{part}.weight"
    keys = fill(pattern, config, path[0])
    stacked = (path[0] in STACKS) + ("{expert}" in pattern)
    out.append(Entry(path, tuple(leaf.shape), keys, stacked, adapter or path[-1] in TRANSPOSED))
  return tuple(out)


def key_pattern(family: str, name: str) -> str:
  """The pattern of the keys of one of our parameters; "{}" in it stands for the layer.

  Example: `key_pattern("dream", "blocks/q_proj/bias")` is "model.layers.{}.self_attn.q_proj.bias".
  """
  facts, (stack, _, rest) = find(family), name.partition("/")
  if stack not in STACKS:
    return facts.top[name]
  return (facts.block if stack == "blocks" else facts.first_block)[rest]


def fill(pattern: str, config: ModelConfig, stack: str) -> tuple[str, ...]:
  """All keys of a pattern: one for each layer of a stack, and for each expert of a layer."""
  if stack not in STACKS:
    return (pattern,)
  experts = range(config.moe.experts) if "{expert}" in pattern else (0,)
  return tuple(pattern.format(n, expert=x) for n in layers_of(config, stack) for x in experts)


def layers_of(config: ModelConfig, stack: str) -> range:
  """The numbers of a stack's layers in the whole model."""
  begin = 0
  for name, size in stack_sizes(config).items():
    if name == stack:
      return range(begin, begin + size)
    begin += size
  return range(0)


def split_entries(all_entries: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
  """Splits entries into (those of the base, those of adapters)."""
  is_adapter = lambda entry: entry.path[-1] in ADAPTER_LEAVES
  return (
    tuple(e for e in all_entries if not is_adapter(e)),
    tuple(e for e in all_entries if is_adapter(e)),
  )


def tied_copies(config: ModelConfig) -> dict[str, str]:
  """Keys that files may also have for a tensor that is equal to one of our parameters: key -> name.

  It is the head's key, if the embedding and the head are tied.
  """
  head = find(config.family).top["head/kernel"]
  return {head: "wte/embedding"} if config.tie_embeddings else {}
