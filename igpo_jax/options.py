"""Options of the method itself: the model, the sampler, the hints, the objective.

The other half, how it is run, is in `config`, which offers these too; callers import
from there. Defaults are the paper's where the paper states them (docs/method.md#defaults).
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any, Literal

from igpo_jax.cli import UserError


def require(condition: Any, message: str) -> None:
  """Raises `UserError("config: message")` unless the condition holds."""
  if not condition:
    raise UserError(f"config: {message}")


def check_choices(section: Any, name: str) -> None:
  """Checks every `Literal` field of a dataclass against its choices."""
  for field, hint in typing.get_type_hints(type(section)).items():
    if typing.get_origin(hint) is Literal:
      value, choices = getattr(section, field), typing.get_args(hint)
      require(
        value in choices, f"{name}.{field}={value!r} is not one of {', '.join(map(str, choices))}"
      )


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank adapters: y = x W + (x A) B alpha / rank (see models/lora.py).

  Attributes:
    rank: 0 trains every parameter instead.
    alpha: the scale's numerator.
    targets: a regular expression that the whole path of a linear layer has to
      match, such as "blocks/(q|k|v)_proj" or "blocks/.*|head".
    dropout: of the adapters' input, where a caller passes `dropout_key`.
  """

  rank: int = 0
  alpha: float = 64.0
  targets: str = "blocks/.*"
  dropout: float = 0.0

  def __post_init__(self):
    require(self.rank >= 0, f"model.lora.rank={self.rank} must not be negative")
    require(self.alpha > 0, f"model.lora.alpha={self.alpha} must be positive")
    require(0 <= self.dropout < 1, f"model.lora.dropout={self.dropout} must be in [0, 1)")
    try:
      re.compile(self.targets)
    except re.error as error:
      require(False, f"model.lora.targets={self.targets!r} is no regular expression: {error}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The transformer (docs/method.md#model). `vocab_size`, `mask_id`, `eos_id` and `stop_ids`
  come from the tokenizer when a model is made from scratch, and from config.json
  when weights are loaded."""

  d_model: int = 96
  n_layers: int = 3
  n_heads: int = 4
  n_kv_heads: int = 0  # 0: as many as n_heads
  mlp_hidden: int = 256
  vocab_size: int = 0
  mask_id: int = 0
  eos_id: int = 0
  stop_ids: tuple[int, ...] = ()  # empty: (eos_id,)
  rope_theta: float = 500_000.0
  rms_norm_eps: float = 1e-5
  tie_embeddings: bool = False
  dtype: str = "float32"  # compute
  param_dtype: str = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  shard_sequence: bool = False  # positions of the residual stream over the tensor axis
  attention: Literal["einsum", "dot_product", "splash", "auto"] = "einsum"  # models/attention.py
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    check_choices(self, "model")
    require(self.d_model % self.n_heads == 0, "model.d_model must be a multiple of model.n_heads")
    require(self.head_size % 2 == 0, "model.d_model / model.n_heads must be even (RoPE)")
    require(
      self.n_heads % self.kv_heads == 0, "model.n_heads must be a multiple of model.n_kv_heads"
    )

  @property
  def head_size(self) -> int:
    return self.d_model // self.n_heads

  @property
  def kv_heads(self) -> int:
    return self.n_kv_heads or self.n_heads


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """The denoising loop (docs/method.md#sampling).

  Attributes:
    gen_length: L, positions to fill.
    block_length: positions of a block; must divide gen_length.
    steps: denoising steps over all blocks; a multiple of the number of blocks.
    temperature: 0 is argmax; T samples from softmax(logits / T).
    remasking: which candidates are committed first: the most confident, or at random.
    cfg_scale: classifier-free guidance, logits = un + (scale + 1) (cond - un).
    threshold: also commit every candidate whose confidence exceeds it.
    factor: also commit the n surest, n the largest with (n + 1) (1 - c_(n)) < factor.
    cache: "none" recomputes every position at every step, and is exact; "prefix" keeps
      what lies before the active block, "dual" all but the block (diffusion/network.py).
    refresh_every: steps after which a cache is renewed within a block; 0: only at the
      beginning of each block.
    batch_sizes: how many static batch sizes are compiled, each half of the one before:
      rows that are finished leave the batch between blocks.
    early_stop: "row": a row whose finished block is all end-of-text is filled with
      it; "batch": only when all rows are (official code); "none": never.
    allow_mask: the mask token may be chosen (official code).
    suppress_eos: candidates that are stop tokens are committed last.
  """

  gen_length: int = 256
  block_length: int = 32
  steps: int = 128
  temperature: float = 0.0
  remasking: Literal["low_confidence", "random"] = "low_confidence"
  cfg_scale: float = 0.0
  threshold: float | None = None
  factor: float | None = None
  cache: Literal["none", "prefix", "dual"] = "none"
  refresh_every: int = 0
  batch_sizes: int = 1
  early_stop: Literal["row", "batch", "none"] = "row"
  allow_mask: bool = False
  suppress_eos: bool = False

  def __post_init__(self):
    check_choices(self, "sampler")
    for name in ("gen_length", "block_length", "steps"):
      require(getattr(self, name) >= 1, f"sampler.{name} must be at least 1")
    require(
      self.gen_length % self.block_length == 0,
      f"sampler.gen_length={self.gen_length} is not a multiple of "
      f"sampler.block_length={self.block_length}",
    )
    require(
      self.steps % self.num_blocks == 0,
      f"sampler.steps={self.steps} is not a multiple of the {self.num_blocks} blocks "
      f"(gen_length / block_length)",
    )
    require(self.temperature >= 0, "sampler.temperature must not be negative")
    require(self.cfg_scale >= 0, "sampler.cfg_scale must not be negative")
    require(
      self.threshold is None or 0 < self.threshold <= 1, "sampler.threshold must be in (0, 1]"
    )
    require(self.factor is None or self.factor > 0, "sampler.factor must be positive")
    require(
      self.threshold is None or self.factor is None,
      "sampler.threshold and sampler.factor are two rules for one thing: give one of them",
    )
    require(self.refresh_every >= 0, "sampler.refresh_every must not be negative")
    require(
      not self.refresh_every or self.cache != "none",
      "sampler.refresh_every needs a cache: sampler.cache='prefix' or 'dual'",
    )
    require(self.batch_sizes >= 1, "sampler.batch_sizes must be at least 1")

  @property
  def num_blocks(self) -> int:
    return self.gen_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    return self.steps // self.num_blocks


@dataclasses.dataclass(frozen=True)
class HintConfig:
  """Inpainting hints (docs/method.md#exploration).

  Attributes:
    ratio_low, ratio_high: eta ~ U[low, high], the share of chunks a canvas gets.
    chunk_min, chunk_max: chunk lengths in tokens, uniform.
    replace_fraction: lambda, at most this share of a group is replaced.
    placement: "index": a token stays at its index in the trace; "stretch": spread
      by up to 1.5 x, the last 30 positions free (official code).
    hide_answer_value: also drop chunks that overlap the answer's value in the
      trace. Off as in the paper, on for synthetic tasks.
    leak_answer: every hinted canvas also shows the trace from its answer on, as the official
      code's always-revealed last chunk does. A fault, here to be studied (benchmarks/claims):
      the policy gets the answer without the reasoning.
  """

  ratio_low: float = 0.2
  ratio_high: float = 0.6
  chunk_min: int = 5
  chunk_max: int = 10
  replace_fraction: float = 0.5
  placement: Literal["index", "stretch"] = "index"
  hide_answer_value: bool = False
  leak_answer: bool = False

  def __post_init__(self):
    check_choices(self, "hints")
    require(
      0 <= self.ratio_low <= self.ratio_high <= 1,
      f"hints.ratio_low={self.ratio_low}, hints.ratio_high={self.ratio_high}: "
      "need 0 <= low <= high <= 1",
    )
    require(
      1 <= self.chunk_min <= self.chunk_max,
      f"hints.chunk_min={self.chunk_min}, hints.chunk_max={self.chunk_max}: need 1 <= min <= max",
    )
    require(0 < self.replace_fraction <= 1, "hints.replace_fraction must be in (0, 1]")
    require(
      not (self.hide_answer_value and self.leak_answer),
      "hints.hide_answer_value and hints.leak_answer contradict each other: give one of them",
    )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The clipped policy loss (docs/method.md#objective).

  Attributes:
    ratio: "sequence" (paper: GSPO, carried to tokens so that a filtered token has
      no gradient), "token", or "sequence_official" (the authors' code).
    eps_low, eps_high: clipping range [1 - eps_low, 1 + eps_high].
    beta: weight of the k3 KL to the reference.
    entropy_keep: tau, the share of a row's hint positions that stays in the loss,
      those of highest entropy; 1 keeps all.
    normalize: "row": mean over a row's positions, then over rows; "token": one mean
      over the kept tokens of the whole update batch.
  """

  ratio: Literal["sequence", "token", "sequence_official"] = "sequence"
  eps_low: float = 0.2
  eps_high: float = 0.2
  beta: float = 0.01
  entropy_keep: float = 0.2
  normalize: Literal["row", "token"] = "row"

  def __post_init__(self):
    check_choices(self, "objective")
    require(self.eps_low >= 0 and self.eps_high >= 0, "objective.eps_* must not be negative")
    require(self.beta >= 0, "objective.beta must not be negative")
    require(0 <= self.entropy_keep <= 1, "objective.entropy_keep must be in [0, 1]")
