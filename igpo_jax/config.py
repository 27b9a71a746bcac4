"""Every option of the program, its default and what may not be combined.

The frozen dataclasses are the one definition: `default_config()` turns them into
an ml_collections ConfigDict for config files and flags to edit, `freeze()` turns
that back into dataclasses (hashable, so they can be static arguments of
`jax.jit`) and checks what no single field can know. Defaults are the paper's
where the paper states them (METHOD 7).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import typing
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from igpo_jax.cli import UserError

STAGES = ("sft", "rl", "eval")


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
  """The transformer (METHOD 1). `vocab_size`, `mask_id`, `eos_id` and `stop_ids`
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
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
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
  """The denoising loop (METHOD 2).

  Attributes:
    gen_length: L, positions to fill.
    block_length: positions of a block; must divide gen_length.
    steps: denoising steps over all blocks; a multiple of the number of blocks.
    temperature: 0 is argmax; T samples from softmax(logits / T).
    remasking: which candidates are committed first: the most confident, or at random.
    cfg_scale: classifier-free guidance, logits = un + (scale + 1) (cond - un).
    threshold: also commit every candidate whose confidence exceeds it.
    cache: "none" recomputes every position at every step.
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
  cache: Literal["none"] = "none"
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

  @property
  def num_blocks(self) -> int:
    return self.gen_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    return self.steps // self.num_blocks


@dataclasses.dataclass(frozen=True)
class HintConfig:
  """Inpainting hints (METHOD 3).

  Attributes:
    ratio_low, ratio_high: eta ~ U[low, high], the share of chunks a canvas gets.
    chunk_min, chunk_max: chunk lengths in tokens, uniform.
    replace_fraction: lambda, at most this share of a group is replaced.
    placement: "index": a token stays at its index in the trace; "stretch": spread
      by up to 1.5 x, the last 30 positions free (official code).
    hide_answer_value: also drop chunks that overlap the answer's value in the
      trace. Off as in the paper, on for synthetic tasks.
  """

  ratio_low: float = 0.2
  ratio_high: float = 0.6
  chunk_min: int = 5
  chunk_max: int = 10
  replace_fraction: float = 0.5
  placement: Literal["index", "stretch"] = "index"
  hide_answer_value: bool = False

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


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The clipped policy loss (METHOD 5).

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


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """The reinforcement-learning stage (METHOD 3 to 5).

  Attributes:
    steps: rollouts, each followed by `inner_updates` updates.
    prompts_per_step, group_size: P and G.
    inner_updates: mu.
    micro_batches: M; the gradient of an update is summed over this many slices of P.
    exploration: "inpaint" (IGPO), "resample" (as many samples, no hints), "none" (GRPO).
    estimator: "mean_field", "random_ratio" or "coupled" (METHOD 4).
    region: which positions are in the loss: up to and including the first stop
      token, or the whole canvas.
    advantage: "mean" (no division), "std", or "leave_one_out".
    entropy: of the policy "current" at each update, or the "old" one (official code).
    eval_every: steps between evaluations; 0: only at the end.
  """

  steps: int = 100
  prompts_per_step: int = 8
  group_size: int = 8
  inner_updates: int = 4
  micro_batches: int = 1
  exploration: Literal["inpaint", "resample", "none"] = "inpaint"
  estimator: Literal["mean_field", "random_ratio", "coupled"] = "mean_field"
  region: Literal["through_eos", "all"] = "through_eos"
  advantage: Literal["mean", "std", "leave_one_out"] = "mean"
  entropy: Literal["current", "old"] = "current"
  eval_every: int = 0

  def __post_init__(self):
    check_choices(self, "rl")
    for name in ("prompts_per_step", "inner_updates", "micro_batches"):
      require(getattr(self, name) >= 1, f"rl.{name} must be at least 1")
    require(
      self.group_size >= 2,
      f"rl.group_size={self.group_size}: a group of one has no advantage; use at least 2",
    )
    require(
      self.prompts_per_step % self.micro_batches == 0,
      f"rl.prompts_per_step={self.prompts_per_step} is not a multiple of "
      f"rl.micro_batches={self.micro_batches}",
    )


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """The supervised stage: NELBO on the response (METHOD 6).

  Attributes:
    steps, batch_size: updates, and rows of each.
    micro_batches: the gradient is summed over this many slices of the batch.
    eps: p = (1 - eps) t + eps.
    eval_every: steps between evaluations; 0: only at the end.
  """

  steps: int = 1000
  batch_size: int = 64
  micro_batches: int = 1
  eps: float = 1e-3
  eval_every: int = 0

  def __post_init__(self):
    require(self.batch_size >= 1, "sft.batch_size must be at least 1")
    require(
      self.micro_batches >= 1 and self.batch_size % self.micro_batches == 0,
      f"sft.batch_size={self.batch_size} is not a multiple of "
      f"sft.micro_batches={self.micro_batches}",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with warm-up, optional decay and global-norm clipping."""

  learning_rate: float = 5e-7
  warmup_steps: int = 0
  schedule: Literal["constant", "cosine", "linear"] = "constant"
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 0.2

  def __post_init__(self):
    check_choices(self, "optimizer")
    require(self.learning_rate >= 0, "optimizer.learning_rate must not be negative")
    require(self.clip_norm > 0, "optimizer.clip_norm must be positive")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where problems come from, by URI (see docs/data.md).

  Attributes:
    sft, rl: sources of the two training stages.
    eval: benchmark name -> source, as "name=uri" strings.
    tokenizer: a directory, "char" (built in), or "sentencepiece:VOCAB_SIZE" (trained
      on the sft source at the first run and kept in the workdir).
    prompt_buckets: prompt lengths that programs are compiled for.
  """

  sft: str = ""
  rl: str = ""
  eval: tuple[str, ...] = ()
  tokenizer: str = "char"
  prompt_buckets: tuple[int, ...] = (256,)

  def __post_init__(self):
    buckets = self.prompt_buckets
    require(
      len(buckets) > 0 and list(buckets) == sorted(set(buckets)) and buckets[0] > 0,
      f"data.prompt_buckets={buckets}: give increasing positive lengths",
    )
    for item in self.eval:
      require("=" in item, f"data.eval item {item!r} is not of the form name=uri")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Which verifier decides `correct`, and which weighted parts make the reward."""

  verifier: str = "math"
  parts: tuple[tuple[str, float], ...] = (("correct", 1.0),)
  workers: int = 2
  timeout: float = 5.0  # seconds per item


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation through the same sampler (docs/evaluation.md).

  Attributes:
    protocol: "igpo", "d1", "opencompass_block" (eval/protocols.py): prompts, lengths,
      temperature, samples and grading are the protocol's, and the items of `data.eval`
      are named after its benchmarks. "": the config's own, as follows.
    lengths: of the protocol's lengths, run only these; (): all.
    examples: solved examples for a protocol that shows some, as "name=uri" strings.
    batch_size: rows per call, rounded up to share them over devices and processes.
    limit: at most this many problems of a benchmark; 0: all.
    samples: completions of each problem (avg@k, pass@k, majority@k); needs a temperature
      above 0 to differ.
    steps: denoising steps; 0: as in `sampler`.
    temperature: usually 0; the rollouts' temperature is `sampler.temperature`.
    initial: also evaluate before the first training stage.
  """

  protocol: str = ""
  lengths: tuple[int, ...] = ()
  examples: tuple[str, ...] = ()
  batch_size: int = 64
  limit: int = 0
  samples: int = 1
  steps: int = 0
  temperature: float = 0.0
  initial: bool = True

  def __post_init__(self):
    require(self.batch_size >= 1, "eval.batch_size must be at least 1")
    require(self.limit >= 0, "eval.limit must not be negative")
    require(self.samples >= 1, "eval.samples must be at least 1")
    require(self.temperature >= 0, "eval.temperature must not be negative")
    require(
      not self.protocol or (self.samples, self.steps, self.temperature) == (1, 0, 0.0),
      f"eval.samples, eval.steps and eval.temperature are the protocol's ({self.protocol!r}):"
      " leave them alone, or set eval.protocol=''",
    )
    require(self.protocol or not self.lengths, "eval.lengths goes with eval.protocol")
    for item in self.examples:
      require("=" in item, f"eval.examples item {item!r} is not of the form name=uri")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Orbax checkpoints of the training state.

  Attributes:
    every: steps between checkpoints; 0: only at the end of a stage.
    keep: how many of the latest to keep.
    best_metric: metric whose best checkpoint is kept as well, for example
      "eval/test/accuracy"; "" keeps none. Higher is better.
  """

  every: int = 100
  keep: int = 2
  best_metric: str = ""

  def __post_init__(self):
    require(self.keep >= 1, "checkpoint.keep must be at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written besides metrics.jsonl.

  Attributes:
    every: steps between rows of metrics.jsonl.
    samples_every: RL steps between writes of samples.jsonl; 0: never.
    samples_per_step: rows of samples.jsonl per write; 0: all of the batch.
    tensorboard, wandb: also write there (wandb must be installed).
    wandb_project: the project's name there.
    max_skipped: stop after this many non-finite updates in a row.
  """

  every: int = 1
  samples_every: int = 10
  samples_per_step: int = 8
  tensorboard: bool = True
  wandb: bool = False
  wandb_project: str = "igpo_jax"
  max_skipped: int = 5


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 takes the rest of the devices."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole program. `stages` run in order; `init_from` is a Hugging Face LLaDA
  directory, or "" for a randomly initialised model."""

  seed: int = 0
  stages: tuple[str, ...] = ("sft", "rl")
  init_from: str = ""
  model: ModelConfig = ModelConfig()
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  reward: RewardConfig = RewardConfig()
  sampler: SamplerConfig = SamplerConfig(temperature=1.2)
  hints: HintConfig = HintConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  sft: SFTConfig = SFTConfig()
  sft_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, clip_norm=1.0)
  rl: RLConfig = RLConfig()
  rl_optimizer: OptimizerConfig = OptimizerConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()


def default_config() -> config_dict.ConfigDict:
  """All defaults as an editable ConfigDict: a wrong type raises, `freeze` tells unknown names."""
  return _to_config_dict(Config())


def _to_config_dict(section: Any) -> config_dict.ConfigDict:
  out = config_dict.ConfigDict()
  hints = typing.get_type_hints(type(section))
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      value = _to_config_dict(value)
    elif value is None:
      (kind,) = (t for t in typing.get_args(hints[field.name]) if t is not type(None))
      value = config_dict.placeholder(kind)
    out[field.name] = value
  return out


def load_config_file(path: os.PathLike, *args: Any) -> config_dict.ConfigDict:
  """`get_config(*args)` of another config file: those are found by path, not imported."""
  spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*args)


def freeze(config: ml_collections.ConfigDict) -> Config:
  """Checks a ConfigDict and turns it into frozen, hashable dataclasses.

  Raises:
    UserError: an unknown option, a value out of range, or a combination that
      cannot work; the message names the option.
  """
  frozen = _from_config_dict(Config, config, "config")
  check(frozen)
  return frozen


def check(config: Config) -> None:
  """Raises `UserError` for options that are fine alone but not together."""
  for stage in config.stages:
    require(stage in STAGES, f"stages: {stage!r} is not one of {', '.join(STAGES)}")
  order = [STAGES.index(stage) for stage in config.stages]
  require(order == sorted(set(order)), f"stages={config.stages}: each at most once, in order")
  for stage in ("sft", "rl"):
    if stage in config.stages:
      require(getattr(config.data, stage), f"stages has {stage!r} but data.{stage} names no source")
  require(
    math.floor(config.hints.replace_fraction * config.rl.group_size) >= 1
    or config.rl.exploration == "none",
    f"hints.replace_fraction={config.hints.replace_fraction} of a group of "
    f"{config.rl.group_size} replaces nothing; raise one of them",
  )


def _from_config_dict(cls: type, config: ml_collections.ConfigDict, path: str) -> Any:
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(config.keys()) - set(hints))
  require(not unknown, f"unknown option {path}.{unknown[0]}" if unknown else "")
  kwargs = {}
  for name, value in config.items():
    if dataclasses.is_dataclass(hints[name]):
      value = _from_config_dict(hints[name], value, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
      value = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
    kwargs[name] = value
  return cls(**kwargs)
