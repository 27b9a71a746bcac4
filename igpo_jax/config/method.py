"""Options of the method: the model, the sampler, the hints and the objective.

`igpo_jax.config.run` has the options of a run: stages, data, devices and so on. Defaults are the
paper's where the paper states them (docs/method.md#defaults).
"""

from __future__ import annotations

import dataclasses
import math
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
  """Low-rank adapters: y = x W + (x A) B alpha / rank (models/lora.py).

  Attributes:
    rank: inner dimension of the adapters. 0: no adapters, and every parameter is trained.
    alpha: numerator of the scale alpha / rank.
    targets: which linear layers get an adapter: a regular expression that must match a layer's
      whole path, such as "blocks/(q|k|v)_proj" or "blocks/.*|head".
    dropout: probability with which an entry of x is dropped before the adapter in fine-tuning. The
      head's adapter has no dropout. Must be 0 for a run with RL.
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
  """The full name of a dtype: "bfloat16" for "bf16", "BF16" or "torch.bfloat16".

  What is not the name of a `Dtype` is returned unchanged; `check_dtype` refuses it.
  """
  if not isinstance(name, str):
    return name
  plain = name.lower().removeprefix("torch.")
  plain = SHORT_DTYPES.get(plain, plain)
  return plain if plain in typing.get_args(Dtype) else name


def check_dtype(name: Any, option: str) -> str:
  """The full name of the dtype that a command-line option gives.

  Args:
    name: the option's value, such as "bf16".
    option: the option's name for the message, such as "--dtype".

  Raises:
    UserError: it is not one of `Dtype`.
  """
  full = full_dtype(name)
  if full not in typing.get_args(Dtype):
    known = ", ".join(typing.get_args(Dtype))
    raise UserError(f"{option}={name!r} is not one of {known}{meant(name, typing.get_args(Dtype))}")
  return full


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """The experts of a mixture-of-experts model, for the families that have experts (models/moe.py).

  Attributes:
    experts: number of experts in each layer. 0: the model has none.
    experts_per_token: how many of them work on each token.
    expert_hidden: hidden width of one expert.
    shared_hidden: hidden width of the shared expert, which works on every token. 0: there is none.
    dense_layers: how many layers, counted from the first, have an MLP of `model.mlp_hidden`
      instead of experts.
    groups: number of groups that a layer's experts are divided into. 0: experts are not grouped.
    groups_kept: a token's experts are chosen from this many of the groups, the best ones for it.
    scale: factor on the weights of a token's experts.
  """

  experts: Natural = 0
  experts_per_token: Natural = 0
  expert_hidden: Natural = 0
  shared_hidden: Natural = 0
  dense_layers: Natural = 0
  groups: Natural = 0
  groups_kept: Natural = 0
  scale: Positive = 1.0

  def __post_init__(self):
    check_section(self, "model.moe")
    require(
      self.experts_per_token <= self.experts,
      f"model.moe.experts_per_token={self.experts_per_token} is above "
      f"model.moe.experts={self.experts}",
    )
    require(
      not self.groups or self.experts % self.groups == 0,
      f"model.moe.experts={self.experts} is not a multiple of model.moe.groups={self.groups}",
    )
    require(
      self.groups_kept <= self.groups,
      f"model.moe.groups_kept={self.groups_kept} is above model.moe.groups={self.groups}",
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
  """The options of a model that its weights fix (docs/method.md#model).

  If weights are loaded, all of these come with them. If a model is made from scratch,
  `vocab_size`, `mask_id`, `eos_id` and `stop_ids` come from the tokenizer.

  Attributes:
    family: name of the model family (models/families.py), such as "llada" or "dream".
    d_model: width of the residual stream. A multiple of `n_heads`, unless `head_dim` is given.
    n_layers: number of transformer blocks.
    n_heads: number of query heads.
    n_kv_heads: number of key-value heads; divides `n_heads`. 0: as many as `n_heads`.
    head_dim: size of a head. 0: `d_model / n_heads`.
    mlp_hidden: hidden width of the SwiGLU.
    vocab_size: number of rows of the embedding. 0: the tokenizer's.
    mask_id: id of the mask token, the absorbing token of the forward process.
    eos_id: id of the end-of-text token.
    stop_ids: ids of the tokens that end a completion. (): `eos_id` alone.
    rope_theta: base of the rotary position frequencies.
    rotary_share: the share of each head that is rotated.
    rms_norm_eps: added to the mean square in every norm.
    tie_embeddings: the head is the transposed embedding.
    shift_logits: the network's output at a position predicts the next position's token. Only for
      families that have models of both kinds.
    attention_block: number of positions of a block, for a block-causal family. 0: the family's.
    moe: experts.
  """

  family: str = "llada"
  d_model: Annotated[int, Range(1, 10**8)] = 96  # XLA ends the process past 2**63 elements
  n_layers: Count = 3
  n_heads: Count = 4
  n_kv_heads: Natural = 0
  head_dim: Natural = 0
  mlp_hidden: Count = 256
  vocab_size: Natural = 0
  mask_id: Natural = 0
  eos_id: Natural = 0
  stop_ids: tuple[Natural, ...] = ()
  rope_theta: Positive = 500_000.0
  rotary_share: Annotated[float, Range(0, 1, above=True)] = 1.0
  rms_norm_eps: Positive = 1e-5
  tie_embeddings: bool = False
  shift_logits: bool = False
  attention_block: Natural = 0
  moe: MoEConfig = MoEConfig()


@dataclasses.dataclass(frozen=True)
class ModelRun:
  """The options of a model that a run chooses, whatever the weights are.

  Attributes:
    dtype: dtype of the computations.
    param_dtype: dtype in which the parameters are kept.
    remat: what the backward pass recomputes to save memory: "none"; "full": every block from its
      input; "dots": everything but the matrix products.
    shard_sequence: shard the positions of the residual stream over the mesh's tensor axis.
    attention: the implementation; "auto" takes the fastest for the platform (models/attention.py).
    expert_products: how tokens are multiplied with their experts: "ragged" sorts tokens by expert
      and computes only what is needed; "dense" lets every expert work on every token, a simple
      and slow check of the other (models/moe.py).
    router_loss: weight of the load-balancing loss, in fine-tuning and in RL; 0: none.
    lora: low-rank adapters.
  """

  dtype: Dtype = "float32"
  param_dtype: Dtype = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  shard_sequence: bool = False
  attention: Literal["einsum", "dot_product", "splash", "auto"] = "einsum"
  expert_products: Literal["ragged", "dense"] = "ragged"
  router_loss: NonNegative = 0.0
  lora: LoRAConfig = LoRAConfig()


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelRun, Architecture):
  """The model: the options that its weights fix (`Architecture`) and the run's own (`ModelRun`)."""

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):  # one name, however it was written
      object.__setattr__(self, name, full_dtype(getattr(self, name)))
    check_section(self, "model")
    require(
      self.head_dim or self.d_model % self.n_heads == 0,
      f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}",
    )
    name = "model.head_dim" if self.head_dim else "model.d_model / model.n_heads"
    require(self.rotary_size % 2 == 0, f"{name} = {self.rotary_size} must be even (RoPE)")
    require(
      self.n_heads % self.kv_heads == 0,
      f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads={self.kv_heads}",
    )

  @property
  def head_size(self) -> int:
    """Size of one attention head."""
    return self.head_dim or self.d_model // self.n_heads

  @property
  def kv_heads(self) -> int:
    """Number of key and value heads."""
    return self.n_kv_heads or self.n_heads

  @property
  def mlp_units(self) -> int:
    """How many hidden units of a layer work on one token, over all of the token's experts."""
    moe = self.moe
    active = moe.experts_per_token * moe.expert_hidden + moe.shared_hidden
    return active if moe.experts else self.mlp_hidden

  @property
  def stored_mlp_units(self) -> int:
    """How many hidden units a layer has weights for, over all of its experts."""
    moe = self.moe
    return moe.experts * moe.expert_hidden + moe.shared_hidden if moe.experts else self.mlp_hidden

  @property
  def rotary_size(self) -> int:
    """How many dimensions of a head are rotated by RoPE."""
    return int(self.head_size * self.rotary_share)


WEIGHTS_FIX = tuple(field.name for field in dataclasses.fields(Architecture))
RUN_CHOOSES = tuple(field.name for field in dataclasses.fields(ModelRun))


def check_trainable(model: ModelConfig, stages: tuple[str, ...]) -> None:
  """Checks that the stages can train this model.

  Raises:
    UserError: all parameters are trained but kept in 16 bits, which would round updates away; or
      RL with dropout, which would make the ratio of policy to sampler noise.
  """
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

  The confidence of a masked position is the probability of its chosen token under the softmax of
  the logits, at temperature 1.

  Attributes:
    gen_length: L, the number of positions of a completion.
    block_length: number of positions of a block; divides `gen_length`.
    steps: number of denoising steps of a completion; a multiple of its number of blocks.
    temperature: T samples tokens from softmax(logits / T); 0 takes the likeliest token.
    remasking: which masked positions of the block are committed first. "low_confidence": those of
      highest confidence (LLaDA). "random". "sequential": from left to right. Three rules of Dream
      go by the distribution that is sampled from, after `temperature` and `top_p`: "maskgit_plus",
      the highest probability of the chosen token; "topk_margin", the largest difference between
      the two highest probabilities; "entropy", the lowest entropy. "origin": each position is
      committed by chance, with the probability of Dream's linear schedule.
    alg_temp: above 0, positions are drawn at random, with weights exp(value / alg_temp), where
      value is what `remasking` ranks by (Dream). 0: those of highest value are taken.
    top_p: tokens are chosen from the smallest set of likeliest ones whose probabilities sum to
      this share.
    schedule: how many masks of a block are committed at each step. "even": equally many, the first
      steps one more (LLaDA). "linear": from time t to s, the share 1 - s / t of those left, rounded
      down (Dream). "rounded": the same, rounded to the nearest number (dllm). "full_block": as many
      as if the whole block had been masks (SDAR, LLaDA2).
    cfg_scale: classifier-free guidance: logits = un + (scale + 1) (cond - un). 0: none.
    threshold: also commit every candidate whose confidence is above this. None: no such rule.
    edit_threshold: tokens of the active block that were filled in are replaced where the model
      chooses another token with a confidence above this; a block without masks is edited until
      nothing changes (LLaDA2.1). None: filled positions stay.
    edit_passes: the largest number of editing steps for a block without masks.
    adaptive: commits by `threshold` or `factor` count towards the schedule: a row that is ahead of
      its schedule commits at least one position in a step, instead of its share. It never takes
      more steps.
    factor: also commit the n positions of highest confidence, where n is the largest number with
      (n + 1) (1 - c_(n)) < factor and c_(n) the n-th highest confidence. None: no such rule.
    cache: cache of keys and values (diffusion/network.py). "none" recomputes every position at
      every step, and is exact. "prefix" caches what lies before the active block, "dual" all but
      the active block.
    refresh_every: number of steps after which a cache is renewed within a block. 0: only at the
      beginning of each block.
    early_stop: which rows are filled with end-of-text from a finished block on. "row": a row whose
      block is all end-of-text. "stop_token": a row whose block has any stop token (SDAR). "batch":
      all rows, once the block is all end-of-text in every row (official code). "none": no row.
    allow_mask: the mask token may be chosen; the position then stays masked (official code).
    suppress_eos: positions whose chosen token is a stop token are committed last.
  """

  gen_length: Count = 256
  block_length: Count = 32
  steps: Count = 128
  temperature: NonNegative = 0.0
  remasking: Literal[
    "low_confidence", "random", "sequential", "maskgit_plus", "topk_margin", "entropy", "origin"
  ] = "low_confidence"
  alg_temp: NonNegative = 0.0
  top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
  schedule: Literal["even", "linear", "rounded", "full_block"] = "even"
  cfg_scale: NonNegative = 0.0
  threshold: Annotated[float, Range(0, 1, above=True)] | None = None
  edit_threshold: Annotated[float, Range(0, 1)] | None = None
  edit_passes: Count = 16
  factor: Positive | None = None
  adaptive: bool = False
  cache: Literal["none", "prefix", "dual"] = "none"
  refresh_every: Natural = 0
  early_stop: Literal["row", "stop_token", "batch", "none"] = "row"
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
      not self.adaptive or self.threshold is not None or self.factor is not None,
      "sampler.adaptive=True needs a rule that commits more than the schedule: give "
      "sampler.threshold or sampler.factor",
    )
    require(
      self.remasking != "origin"
      or (self.schedule == "even" and self.threshold is self.factor is None and not self.alg_temp),
      "sampler.remasking='origin' commits each position by chance, so sampler.schedule, threshold, "
      "factor and alg_temp have no effect: leave them at their defaults",
    )
    require(
      not self.refresh_every or self.cache != "none",
      f"sampler.refresh_every={self.refresh_every} needs a cache: sampler.cache='prefix' or 'dual'",
    )

  @property
  def num_blocks(self) -> int:
    """Number of blocks of a completion."""
    return self.gen_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    """Denoising steps of one block."""
    return self.steps // self.num_blocks


@dataclasses.dataclass(frozen=True)
class HintConfig:
  """Inpainting hints (docs/method.md#exploration).

  Attributes:
    ratio_low, ratio_high: bounds of eta ~ U[ratio_low, ratio_high], the share of the trace's
      chunks that a canvas shows.
    chunk_min, chunk_max: the length of a chunk, in tokens, is uniform in this range.
    replace_fraction: lambda, the largest share of a group that hinted completions may replace.
    placement: "index" puts a token at its index in the trace; "stretch" spreads the trace by up to
      1.5 times and leaves the last 30 positions free (official code).
    hide_answer_value: never show chunks that overlap the answer's value anywhere in the trace. Off
      as in the paper, on for synthetic tasks.
    leak_answer: every hinted canvas also shows the trace from its answer on, as the official code
      does. It is a fault, and an option only so that it can be studied (benchmarks/claims): the
      policy sees the answer without the reasoning.
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
  """The objective (docs/method.md#objective).

  `entropy_keep` and `filter_entropy`, the filter on hint tokens, are for every objective. The other
  options are those of `rl.objective="clipped"`; another objective NAME has its own,
  `objective.NAME`.

  Attributes:
    ratio: of the policy to the policy that sampled. "sequence": one value for a row, with the
      gradient of each token, so that a filtered token has none (paper: GSPO). "token": one for
      each token. "sequence_official": the authors' code.
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
    beta: weight of the KL term. 0: none.
    entropy_keep: tau, the share of a row's hint positions that stay in the loss: those of highest
      entropy. 1 keeps all.
    normalize: "row": the mean over a row's positions, then over rows. "token": one mean over the
      kept tokens of the whole update batch.
    filter_entropy: the policy whose entropy the filter goes by: the "current" one at each update,
      or the "old" one, which sampled (official code).
    kl: estimate of the KL for each token, "k3" (exp(d) - d - 1) or "k2" (d^2 / 2), where d is the
      log-probability under the policy of `kl_to` minus that under the current policy.
    kl_to: the policy that the KL term keeps the current one close to: the "reference", or the
      "old" one, which sampled.
    dual_clip: with an advantage A < 0, a token's loss is at most -dual_clip * A. None: no bound.
  """

  ratio: Literal["sequence", "token", "sequence_official"] = "sequence"
  eps_low: NonNegative = 0.2
  eps_high: NonNegative = 0.2
  beta: NonNegative = 0.01
  entropy_keep: Share = 0.2
  normalize: Literal["row", "token"] = "row"
  filter_entropy: Literal["current", "old"] = "current"
  kl: Literal["k3", "k2"] = "k3"
  kl_to: Literal["reference", "old"] = "reference"
  dual_clip: Annotated[float, Range(1, math.inf, above=True)] | None = None

  def __post_init__(self):
    check_section(self, "objective")
