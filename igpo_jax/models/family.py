"""What distinguishes a model family from the others, in one dataclass.

Each family is a folder beside this file. It says how its blocks are made (`Design`), what its
config.json means in our terms, how its tensors are called, and its published sizes. The network
itself is shared (models/network.py). No other code compares names of families: facts about a model
are fields of its `LM`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from igpo_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Router:
  """How a token's experts are chosen and weighted (models/moe.py).

  Attributes:
    scores: how logits become scores: "softmax" over all experts, or "sigmoid" of each.
    renormalise: whether the weights of the chosen experts are divided by their sum.
    bias: whether there is a bias for each expert, which is added to the scores when experts are
      chosen, but not to their weights.
  """

  scores: str = "softmax"
  renormalise: bool = False
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class Design:
  """How the blocks of a model are made, beyond its sizes.

  Attributes:
    qkv_bias: whether queries, keys and values have biases.
    qk_norm: whether each head of queries and keys is normalized, before RoPE.
    fused_qkv: whether queries, keys and values are one product, in this order.
    counts_positions: whether RoPE counts only positions that are not padding, from 0 on. Otherwise
      it counts all positions of the canvas.
    shift: 0 or 1: the network's state of position k - shift predicts the token of position k.
    block_length: 0: every position attends to all others. Else the model is block-causal, see
      `LM.block_length`.
    router: router of the layers that have experts; None if no layer has.
  """

  qkv_bias: bool = False
  qk_norm: bool = False
  fused_qkv: bool = False
  counts_positions: bool = False
  shift: int = 0
  block_length: int = 0
  router: Router | None = None

  def __post_init__(self):
    if self.shift and self.block_length:
      # The first position of a block would be predicted from the finished block before it, so it
      # would see nothing of its own block, and the noisy copy would have to read the clean one.
      raise NotImplementedError("a block-causal model that predicts one position ahead")


@dataclasses.dataclass(frozen=True)
class Family:
  """A published architecture that our network computes exactly.

  Attributes:
    name: its name in `model.family`.
    model_types: the values of "model_type" in config.json.
    marks: keys that tell its config.json from that of a family with the same model_type.
    design: `design(config) -> Design`, for a ModelConfig.
    reads: options of ModelConfig that not all families have, but this one has.
    fields: our field -> their key in config.json ("moe.experts" is a field of the section moe).
    defaults: our field -> its value if config.json has none.
    instead: our field -> another key that is read if config.json lacks the first one.
    required: their key -> the only values for which our network computes what theirs does.
    stated: the keys of `required` that must be present, because the published code has another
      default for them.
    inert: their keys that do not change what the network computes at evaluation.
    derive: `derive(config_json, problems) -> more of our fields`, for what no single key says. It
      appends to `problems` what is wrong.
    autoregressive: the model_type of causal models that can be made models of this family
      (`convert --as-diffusion`); "": there are none.
    written: further keys in the config.json of a model that was trained here.
    top, block, first_block: our parameter -> the key of their tensor; "{}" stands for the layer and
      "{expert}" for the expert. `first_block` is for layers without experts, if others have some.
    code_files, auto_map: files of the released PyTorch code, and how config.json refers to them.
    published: name of a released model -> its fields of ModelConfig.
    tiny: fields of ModelConfig of a model that is small enough for tests.
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
