"""Options of the method itself: the model, the sampler, the hints, the objective.

`run` has the options of how it is run. Defaults are the paper's where the paper states them
(docs/method.md#defaults).
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Annotated, Any, Literal

from igpo_jax.config.fields import (
  Count,
  Natural,
  NonNegative,
  Positive,
  Range,
  Share,
  check_section,
  meant,
  require,
)
from igpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank adapters: y = x W + (x A) B alpha / rank (see models/lora.py).

  Attributes:
    rank: 0 trains every parameter instead.
    alpha: the scale's numerator.
    targets: a regular expression that the whole path of a linear layer has to
      match, such as "blocks/(q|k|v)_proj" or "blocks/.*|head".
    dropout: of the input of the blocks' adapters, in fine-tuning; with RL it is refused. The
      head's adapter has none.
  """

  rank: Natural = 0
  alpha: Positive = 64.0
  targets: str = "blocks/.*"
  dropout: Annotated[float, Range(0, 1, below=True)] = 0.0

  def __post_init__(self):
    check_section(self, "model.lora")
    try:
      re.compile(self.targets)
    except re.error as error:
      require(False, f"model.lora.targets={self.targets!r} is no regular expression: {error}")


Dtype = Literal["float32", "bfloat16", "float16"]
SHORT_DTYPES = {
  "fp32": "float32",
  "f32": "float32",
  "float": "float32",
  "bf16": "bfloat16",
  "fp16": "float16",
  "f16": "float16",
  "half": "float16",
}


def full_dtype(name: Any) -> Any:
  """ "bfloat16" for "bf16", "BF16" or "torch.bfloat16"; what is no such name as it is."""
  if not isinstance(name, str):
    return name
  plain = name.lower().removeprefix("torch.")
  plain = SHORT_DTYPES.get(plain, plain)
  return plain if plain in typing.get_args(Dtype) else name


def check_dtype(name: Any, option: str) -> str:
  """`full_dtype` of what a command's option says.

  Raises:
    UserError: no dtype that a model can have.
  """
  full = full_dtype(name)
  if full not in typing.get_args(Dtype):
    known = ", ".join(typing.get_args(Dtype))
    raise UserError(f"{option}={name!r} is not one of {known}{meant(name, typing.get_args(Dtype))}")
  return full


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The transformer (docs/method.md#model). `vocab_size`, `mask_id`, `eos_id` and `stop_ids`
  come from the tokenizer when a model is made from scratch, and from config.json
  when weights are loaded.

  Attributes:
    d_model: width of the residual stream; a multiple of `n_heads`.
    n_layers: transformer blocks.
    n_heads: query heads.
    n_kv_heads: key-value heads; divides `n_heads`. 0: as many as `n_heads`.
    mlp_hidden: hidden width of the SwiGLU.
    vocab_size: rows of the embedding; 0: the tokenizer's.
    mask_id, eos_id: ids of the absorbing token and of the end of text.
    stop_ids: ids that end a completion; (): `eos_id` alone.
    rope_theta: base of the rotary position frequencies.
    rms_norm_eps: added to the mean square in every norm.
    tie_embeddings: the head is the embedding, transposed.
    dtype: of computations.
    param_dtype: that parameters are kept in.
    remat: what the backward pass computes again to save memory: "none"; "full", every
      block; "dots", all but the matrix products.
    shard_sequence: positions of the residual stream lie over the mesh's tensor axis.
    attention: implementation; "auto" takes the fastest for the platform (models/attention.py).
    lora: low-rank adapters.
  """

  d_model: Count = 96
  n_layers: Count = 3
  n_heads: Count = 4
  n_kv_heads: Natural = 0
  mlp_hidden: Count = 256
  vocab_size: Natural = 0
  mask_id: Natural = 0
  eos_id: Natural = 0
  stop_ids: tuple[Natural, ...] = ()
  rope_theta: Positive = 500_000.0
  rms_norm_eps: Positive = 1e-5
  tie_embeddings: bool = False
  dtype: Dtype = "float32"
  param_dtype: Dtype = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  shard_sequence: bool = False
  attention: Literal["einsum", "dot_product", "splash", "auto"] = "einsum"
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):  # one name, however it was written
      object.__setattr__(self, name, full_dtype(getattr(self, name)))
    check_section(self, "model")
    require(
      self.d_model % self.n_heads == 0,
      f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}",
    )
    require(
      self.head_size % 2 == 0,
      f"model.d_model / model.n_heads = {self.head_size} must be even (RoPE)",
    )
    require(
      self.n_heads % self.kv_heads == 0,
      f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads={self.kv_heads}",
    )

  @property
  def head_size(self) -> int:
    return self.d_model // self.n_heads

  @property
  def kv_heads(self) -> int:
    return self.n_kv_heads or self.n_heads


def check_trainable(model: ModelConfig, stages: tuple[str, ...]) -> None:
  """Raises `UserError` where the training stages would teach such a model nothing, or noise."""
  require(
    model.lora.rank > 0 or model.param_dtype == "float32" or set(stages) <= {"eval"},
    f"model.param_dtype={model.param_dtype!r} with model.lora.rank=0: updates are too small for "
    "16 bits and would be rounded away; use model.param_dtype='float32' (the network still "
    "computes in model.dtype), or adapters",
  )
  require(
    not model.lora.dropout or "rl" not in stages,
    f"model.lora.dropout={model.lora.dropout} is for fine-tuning, and stages has 'rl': there the "
    "ratio of policy to sampler would be noise; set it to 0, or run 'sft' alone",
  )


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

  gen_length: Count = 256
  block_length: Count = 32
  steps: Count = 128
  temperature: NonNegative = 0.0
  remasking: Literal["low_confidence", "random"] = "low_confidence"
  cfg_scale: NonNegative = 0.0
  threshold: Annotated[float, Range(0, 1, above=True)] | None = None
  factor: Positive | None = None
  cache: Literal["none", "prefix", "dual"] = "none"
  refresh_every: Natural = 0
  batch_sizes: Count = 1
  early_stop: Literal["row", "batch", "none"] = "row"
  allow_mask: bool = False
  suppress_eos: bool = False

  def __post_init__(self):
    check_section(self, "sampler")
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
    require(
      self.threshold is None or self.factor is None,
      f"sampler.threshold={self.threshold} and sampler.factor={self.factor} are two rules for "
      "one thing: give one of them",
    )
    require(
      not self.refresh_every or self.cache != "none",
      f"sampler.refresh_every={self.refresh_every} needs a cache: sampler.cache='prefix' or 'dual'",
    )

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

  ratio_low: Share = 0.2
  ratio_high: Share = 0.6
  chunk_min: Count = 5
  chunk_max: Count = 10
  replace_fraction: Annotated[float, Range(0, 1, above=True)] = 0.5
  placement: Literal["index", "stretch"] = "index"
  hide_answer_value: bool = False
  leak_answer: bool = False

  def __post_init__(self):
    check_section(self, "hints")
    require(
      self.ratio_low <= self.ratio_high,
      f"hints.ratio_low={self.ratio_low} is above hints.ratio_high={self.ratio_high}",
    )
    require(
      self.chunk_min <= self.chunk_max,
      f"hints.chunk_min={self.chunk_min} is above hints.chunk_max={self.chunk_max}",
    )
    require(
      not (self.hide_answer_value and self.leak_answer),
      "hints.hide_answer_value and hints.leak_answer contradict each other: give one of them",
    )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The objective (docs/method.md#objective): the filter on hint tokens, which every objective has,
  and the options of `rl.objective="clipped"`. Those of another objective NAME are `objective.NAME`.

  Attributes:
    ratio: "sequence" (paper: GSPO, carried to tokens so that a filtered token has
      no gradient), "token", or "sequence_official" (the authors' code).
    eps_low, eps_high: clipping range [1 - eps_low, 1 + eps_high].
    beta: weight of the k3 KL to the reference.
    entropy_keep: tau, the share of a row's hint positions that stays in the loss,
      those of highest entropy; 1 keeps all.
    normalize: "row": mean over a row's positions, then over rows; "token": one mean
      over the kept tokens of the whole update batch.
    filter_entropy: whose entropy the filter goes by: that of the policy "current" at each update,
      or of the "old" one that sampled (official code).
  """

  ratio: Literal["sequence", "token", "sequence_official"] = "sequence"
  eps_low: NonNegative = 0.2
  eps_high: NonNegative = 0.2
  beta: NonNegative = 0.01
  entropy_keep: Share = 0.2
  normalize: Literal["row", "token"] = "row"
  filter_entropy: Literal["current", "old"] = "current"

  def __post_init__(self):
    check_section(self, "objective")
