"""Options of the method itself: the model, the sampler, the hints, the objective.

`run` has the options of how it is run. Defaults are the paper's where the paper states them
(docs/method.md#defaults).
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
class MoEConfig:
  """The experts of a mixture-of-experts model, for the families that have some.

  Attributes:
    experts: of each layer; 0: the model has none.
    experts_per_token: how many of them work on a token.
    expert_hidden: hidden width of an expert.
    shared_hidden: hidden width of the part that works on every token; 0: there is none.
    dense_layers: so many layers, the first ones, have one MLP of `model.mlp_hidden` instead.
    groups, groups_kept: a token's experts are chosen from its `groups_kept` best of `groups`
      groups; 0: from all of them.
    scale: the weights of a token's experts are multiplied with it.
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
      f"model.moe.experts_per_token={self.experts_per_token} of model.moe.experts={self.experts}",
    )
    require(
      not self.groups or self.experts % self.groups == 0,
      f"model.moe.experts={self.experts} is not a multiple of model.moe.groups={self.groups}",
    )
    require(
      self.groups_kept <= self.groups,
      f"model.moe.groups_kept={self.groups_kept} of model.moe.groups={self.groups}",
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the weights fix (docs/method.md#model).

  Weights that are loaded bring all of it. `vocab_size`, `mask_id`, `eos_id` and `stop_ids` come
  from the tokenizer when a model is made from scratch.

  Attributes:
    family: which network it is: a name out of models/families.py.
    d_model: width of the residual stream; a multiple of `n_heads` unless there is a `head_dim`.
    n_layers: transformer blocks.
    n_heads: query heads.
    n_kv_heads: key-value heads; divides `n_heads`. 0: as many as `n_heads`.
    head_dim: size of a head; 0: `d_model / n_heads`.
    mlp_hidden: hidden width of the SwiGLU.
    vocab_size: rows of the embedding; 0: the tokenizer's.
    mask_id, eos_id: ids of the absorbing token and of the end of text.
    stop_ids: ids that end a completion; (): `eos_id` alone.
    rope_theta: base of the rotary position frequencies.
    rotary_share: the share of each head that is rotated.
    rms_norm_eps: added to the mean square in every norm.
    tie_embeddings: the head is the embedding, transposed.
    shift_logits: the network predicts the token of a position one position before it. For
      families that have both kinds of models.
    attention_block: of a block-causal model: positions of a block; 0: the family's.
    moe: experts.
  """

  family: str = "llada"
  d_model: Count = 96
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
  """What a run chooses, whatever the weights are.

  Attributes:
    dtype: of computations.
    param_dtype: that parameters are kept in.
    remat: what the backward pass computes again to save memory: "none"; "full", every
      block; "dots", all but the matrix products.
    shard_sequence: positions of the residual stream lie over the mesh's tensor axis.
    attention: implementation; "auto" takes the fastest for the platform (models/attention.py).
    expert_products: how a token meets its experts: "ragged", grouped products of the tokens of
      each expert; "dense", every expert on every token, its plain twin (models/moe.py).
    router_loss: weight of the load-balancing loss in fine-tuning; 0: none.
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
  """The transformer: what its weights fix, and what a run chooses.

  `Architecture` and `ModelRun` describe the options.
  """

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
    """Hidden units of a layer that work on one token: of its experts, where it has some."""
    moe = self.moe
    active = moe.experts_per_token * moe.expert_hidden + moe.shared_hidden
    return active if moe.experts else self.mlp_hidden

  @property
  def stored_mlp_units(self) -> int:
    """Hidden units that a layer has weights for: of all its experts, where it has some."""
    moe = self.moe
    return moe.experts * moe.expert_hidden + moe.shared_hidden if moe.experts else self.mlp_hidden

  @property
  def rotary_size(self) -> int:
    """How many numbers of a head are rotated."""
    return int(self.head_size * self.rotary_share)


WEIGHTS_FIX = tuple(field.name for field in dataclasses.fields(Architecture))
RUN_CHOOSES = tuple(field.name for field in dataclasses.fields(ModelRun))


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
    remasking: which candidates are committed first: "low_confidence", those whose choice is
      likeliest under the plain softmax (LLaDA); "random"; "sequential", from left to right. Of
      the distribution that is sampled from, with `temperature` and `top_p` (Dream):
      "maskgit_plus", those whose choice is likeliest; "topk_margin", whose two likeliest
      tokens are furthest apart; "entropy", whose entropy is least. "origin": every candidate
      by itself, with the chance that the linear schedule gives it.
    alg_temp: above 0: candidates are drawn with weights exp(value / alg_temp) of what
      `remasking` ranks them by, in place of the best (Dream).
    top_p: tokens are chosen from the likeliest ones that have this share of the probability.
    schedule: how the masks of a block are shared out over its steps: "even" (LLaDA: the first
      steps have one more), "linear" (Dream: what is left times 1 - s / t, cut off),
      "rounded" (dllm: the same to the nearest number), "full_block" (SDAR, LLaDA2: as if all
      of the block were masks).
    cfg_scale: classifier-free guidance, logits = un + (scale + 1) (cond - un).
    threshold: also commit every candidate whose confidence exceeds it.
    edit_threshold: positions of the active block that are filled, and no hints, are replaced
      where the model's choice is another one and its confidence exceeds this (LLaDA2.1); a block
      that is full is edited until nothing changes. None: what is filled stays.
    edit_passes: most calls for a block that is full.
    adaptive: with a threshold or a factor, what they committed counts towards the schedule: a row
      that is ahead of it commits one at least, in place of its share. It never takes more steps.
    factor: also commit the n surest, n the largest with (n + 1) (1 - c_(n)) < factor.
    cache: "none" recomputes every position at every step, and is exact; "prefix" keeps
      what lies before the active block, "dual" all but the block (diffusion/network.py).
    refresh_every: steps after which a cache is renewed within a block; 0: only at the
      beginning of each block.
    early_stop: "row": a row whose finished block is all end-of-text is filled with
      it; "stop_token": a row that has any stop token in a finished block (SDAR); "batch": only
      when all rows are all end-of-text (official code); "none": never.
    allow_mask: the mask token may be chosen (official code).
    suppress_eos: candidates that are stop tokens are committed last.
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
      "sampler.adaptive=True commits by how sure the model is: give sampler.threshold or factor",
    )
    require(
      self.remasking != "origin"
      or (self.schedule == "even" and self.threshold is self.factor is None and not self.alg_temp),
      "sampler.remasking='origin' fills every position by chance: sampler.schedule, threshold, "
      "factor and alg_temp have no part in it",
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
    beta: weight of the KL term.
    entropy_keep: tau, the share of a row's hint positions that stays in the loss,
      those of highest entropy; 1 keeps all.
    normalize: "row": mean over a row's positions, then over rows; "token": one mean
      over the kept tokens of the whole update batch.
    filter_entropy: whose entropy the filter goes by: that of the policy "current" at each update,
      or of the "old" one that sampled (official code).
    kl: the KL's estimate for each token, "k3" (exp(d) - d - 1) or "k2" (d^2 / 2).
    kl_to: the policy that the KL pulls to, the "reference" or the "old" one that sampled.
    dual_clip: where A < 0, a token's loss is at most -dual_clip A; None: no such bound.
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
