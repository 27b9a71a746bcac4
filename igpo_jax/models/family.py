"""What a model family is: the facts that tell it from the others, in one dataclass.

A family is a folder of this room. It says how its blocks are made (`Design`), what its
config.json means in our terms, how its tensors are called, and its published sizes. The
network itself is shared (models/network.py). Nobody else compares a family's name: who needs a
fact about a model asks its `LM`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from igpo_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Router:
  """How a token's experts are chosen, and what each counts (models/moe.py).

  Attributes:
    scores: "softmax" over all experts, or "sigmoid" of each.
    renormalise: the weights of the chosen ones are divided by their sum.
    bias: the parameters hold a bias for each expert, which counts when experts are chosen but
      not in their weights.
  """

  scores: str = "softmax"
  renormalise: bool = False
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class Design:
  """How the blocks of a model are made, beyond what its sizes say.

  Attributes:
    qkv_bias: queries, keys and values have biases.
    qk_norm: every head of the queries and keys is normalised, before RoPE.
    fused_qkv: queries, keys and values are one product, in this order.
    counts_positions: the first position that is not padding is number 0, and padding within a
      row is not counted; else a position's number is its place.
    shift: the hidden state of position k - shift predicts the token of position k: 0 or 1.
    block_length: 0: every position sees all others. Else of position k those up to the end of
      its block of so many positions, counted from the row's first one that is not padding.
    router: of the layers that have experts; None: none has.
  """

  qkv_bias: bool = False
  qk_norm: bool = False
  fused_qkv: bool = False
  counts_positions: bool = False
  shift: int = 0
  block_length: int = 0
  router: Router | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """A published architecture that our network computes exactly.

  Attributes:
    name: what `model.family` says.
    model_types: the values of config.json's key of that name.
    marks: options that a config.json has in this family, where another family has the same
      model_type.
    design: ModelConfig -> its `Design`.
    reads: options of ModelConfig that this family has and others have not.
    fields: our field -> their key ("moe.experts" is a field of the section moe).
    defaults: values of our fields where config.json has none.
    instead: our field -> the key that is read where config.json has not its own.
    required: option -> the only values under which the mathematics is ours.
    stated: those of `required` that must be present, because the published code's default for
      them is something else.
    inert: options that do not change what the network computes at evaluation.
    derive: (config.json, problems) -> more of our fields, for what no single key says; adds to
      the problems what is wrong.
    autoregressive: the model_type of the causal models that this family's can be made of
      (`convert --as-diffusion`); "": of none.
    written: what a config.json of a model that was trained here has besides.
    top, block, first_block: our parameter -> their key; `{}` is the layer, and `{expert}` the
      expert. `first_block` is for layers without experts, where the others have some.
    code_files, auto_map: the released PyTorch code, and what config.json calls it.
    published: name -> fields of ModelConfig, of the released models.
    tiny: fields of ModelConfig for a model that tests can afford.
  """

  name: str
  model_types: tuple[str, ...]
  design: Callable[[ModelConfig], Design]
  fields: Mapping[str, str]
  required: Mapping[str, tuple[Any, ...]]
  inert: frozenset[str]
  top: Mapping[str, str]
  block: Mapping[str, str]
  first_block: Mapping[str, str] = dataclasses.field(default_factory=dict)
  marks: frozenset[str] = frozenset()
  reads: frozenset[str] = frozenset()
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stated: frozenset[str] = frozenset()
  derive: Callable[[Mapping[str, Any], list[str]], dict[str, Any]] = lambda hf, problems: {}
  autoregressive: str = ""
  code_files: tuple[str, ...] = ()
  auto_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
  written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  published: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
