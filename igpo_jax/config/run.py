"""Options of a run: stages, optimizers, data, rewards, evaluation, checkpoints and devices.

`Config` holds these and those of the method (`igpo_jax.config.method`). Defaults are the paper's
where the paper states them (docs/method.md#defaults).
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from igpo_jax.config import registry
from igpo_jax.config.fields import (
  Count,
  Finite,
  Natural,
  NonNegative,
  Positive,
  Range,
  Seed,
  Share,
  check_section,
  require,
)
from igpo_jax.config.method import HintConfig, ModelConfig, ObjectiveConfig, SamplerConfig
from igpo_jax.config.registry import MethodOptions

STAGES = ("sft", "rl", "eval")
# Sections that have a subsection for every registered method with options.
METHOD_SECTIONS = {"estimator": MethodOptions, "objective": ObjectiveConfig}


def method_section(kind: str) -> type:
  """The dataclass of a section of `Config` with a subsection for each method registered so far.

  Args:
    kind: "estimator" or "objective".
  """
  return registry.section_class(kind, METHOD_SECTIONS[kind])


def _method_field(kind: str) -> Any:
  """A field whose default is made when a Config is: methods are registered after this runs."""
  return dataclasses.field(default_factory=lambda: method_section(kind)())


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """The reinforcement-learning stage (docs/method.md).

  Attributes:
    steps: number of rollouts, each followed by `inner_updates` updates.
    prompts_per_step: P, the number of prompts of a step.
    group_size: G, the number of completions of each prompt.
    inner_updates: mu, the number of updates after each rollout.
    micro_batches: M, the number of slices of the prompts over which an update's gradient is summed.
      0: chosen to fit the devices' memory (train/sizes.py).
    sample_slices: the prompts of a step, sorted by length, are sampled in this many slices. More
      slices need less memory and less padding, and one is graded while the next is sampled. 0:
      chosen to fit the devices.
    exploration: what is done about groups whose completions are all wrong. "inpaint": sample again
      with hints (IGPO). "resample": sample as many again without hints. "none": nothing (GRPO).
    estimator: the estimator of log-probabilities, such as "mean_field", "random_ratio" or
      "coupled", or a registered name (docs/method.md#likelihood). Its options are `estimator.NAME`.
    objective: the loss, such as "clipped", or a registered name (docs/method.md#objective). Its
      options are `objective.NAME`; those of "clipped" are in `objective` itself.
    views_at_once: how many corrupted views of a row an update keeps in memory at a time. With an
      estimator that has more views, the backward pass computes each of them again.
    loss_region: which positions are in the loss: "through_eos", up to and including the first stop
      token, or "all".
    advantage: "mean" subtracts the group's mean reward; "std" and "std_sample" also divide by a
      standard deviation; "leave_one_out" subtracts the mean of the others (docs/methods.md).
    accuracy_low, accuracy_high: a group gets no advantage if its share of correct completions,
      inserted ones included, is outside this range. TraceRL trains on 0.2 to 0.8.
    refill: DAPO's dynamic sampling: a step samples up to this many further batches of prompts,
      until `prompts_per_step` groups have an advantage. Each step has 1 + refill batches of the
      data to itself; those that it does not need are not seen in that epoch.
    rounding: how float32 parameters are rounded to bfloat16 for sampling, scores and updates, if
      `model.dtype` is bfloat16 and all parameters are trained. "nearest" hides most of the first
      updates; "stochastic" is right on average, with some noise
      (docs/scaling.md#full-fine-tuning-in-bfloat16). Evaluations round to the nearest number.
    eval_every: number of steps between evaluations; 0: only at the end.
  """

  steps: Natural = 100
  prompts_per_step: Count = 8
  group_size: Annotated[int, Range(2, why="a group of one has no advantage")] = 8
  inner_updates: Count = 4
  micro_batches: Natural = 1
  sample_slices: Natural = 1
  exploration: Literal["inpaint", "resample", "none"] = "inpaint"
  estimator: str = "mean_field"
  objective: str = "clipped"
  views_at_once: Count = 2
  loss_region: Literal["through_eos", "all"] = "through_eos"
  advantage: Literal["mean", "std", "std_sample", "leave_one_out"] = "mean"
  accuracy_low: Share = 0.0
  accuracy_high: Share = 1.0
  refill: Natural = 0
  rounding: Literal["nearest", "stochastic"] = "nearest"
  eval_every: Natural = 0

  def __post_init__(self):
    check_section(self, "rl")
    require(
      self.accuracy_low <= self.accuracy_high,
      f"rl.accuracy_low={self.accuracy_low} is above rl.accuracy_high={self.accuracy_high}",
    )
    require(
      self.prompts_per_step % (self.micro_batches or 1) == 0,
      f"rl.prompts_per_step={self.prompts_per_step} is not a multiple of "
      f"rl.micro_batches={self.micro_batches}",
    )


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """The supervised stage, which minimizes the NELBO of responses (docs/method.md#sft).

  Attributes:
    steps: number of updates.
    batch_size: number of rows of each update, over all processes.
    epochs: if above 0, the number of passes over the records; it replaces `steps`.
    micro_batches: the gradient is summed over this many slices of the batch. 0: chosen to fit the
      devices' memory.
    eps: the smallest masking probability: p = (1 - eps) t + eps with t ~ U(0, 1).
    response_lengths: lengths that responses are padded to; (): `sampler.gen_length`. With several
      lengths, a batch is made of responses of similar length.
    group_batches: with several lengths, this many batches are sorted by length together.
    eval_every: number of steps between evaluations; 0: only at the end.
    select: which parameters the next stage starts from: the "last" ones, or the "best" ones by
      `checkpoint.best_metric`.
  """

  steps: Natural = 1000
  batch_size: Count = 64
  epochs: NonNegative = 0.0
  micro_batches: Natural = 1
  eps: Annotated[float, Range(0, 1, above=True, below=True)] = 1e-3
  response_lengths: tuple[Count, ...] = ()
  group_batches: Count = 16
  eval_every: Natural = 0
  select: Literal["last", "best"] = "last"

  def __post_init__(self):
    check_section(self, "sft")
    lengths = self.response_lengths
    require(
      list(lengths) == sorted(set(lengths)),
      f"sft.response_lengths={lengths}: give increasing lengths",
    )
    require(
      self.batch_size % (self.micro_batches or 1) == 0,
      f"sft.batch_size={self.batch_size} is not a multiple of "
      f"sft.micro_batches={self.micro_batches}",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with warm-up, optional decay and global-norm clipping.

  Attributes:
    learning_rate: the rate after the warm-up.
    warmup_steps: number of updates in which the rate rises linearly to `learning_rate`.
    schedule: the rate after the warm-up: constant, or decaying to 0 at the last update.
    b1, b2: decay rates of the gradient's first and second moment.
    eps: added to the square root of the second moment.
    weight_decay: decoupled weight decay, on every parameter that is trained.
    clip_norm: a gradient with a global norm above this is scaled down to it.
  """

  learning_rate: NonNegative = 5e-7
  warmup_steps: Natural = 0
  schedule: Literal["constant", "cosine", "linear"] = "constant"
  b1: Annotated[float, Range(0, 1, below=True)] = 0.9
  b2: Annotated[float, Range(0, 1, below=True)] = 0.99
  eps: Positive = 1e-8
  weight_decay: NonNegative = 0.1
  clip_norm: Positive = 0.2

  def __post_init__(self):
    check_section(self, "optimizer")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where problems come from, as URIs (docs/data.md).

  Attributes:
    sft, rl: sources of the two training stages.
    eval: benchmarks, as "NAME=SOURCE" strings.
    tokenizer: a directory; or "char:TASK" or "words:TASK", the characters or words of a generated
      task ("char:A+B" for several tasks, "char" for chains); or "sentencepiece:VOCAB_SIZE", which
      is trained on the sft source in the first run and kept in the workdir.
    prompt_buckets: the prompt lengths, in tokens, for which programs are compiled. A slice of the
      rollout (`rl.sample_slices`), and every other batch, is padded to the smallest that fits.
  """

  sft: str = ""
  rl: str = ""
  eval: tuple[str, ...] = ()
  tokenizer: str = "char"
  prompt_buckets: tuple[Count, ...] = (256,)

  def __post_init__(self):
    check_section(self, "data")
    buckets = self.prompt_buckets
    require(
      len(buckets) > 0 and list(buckets) == sorted(set(buckets)),
      f"data.prompt_buckets={buckets}: give increasing lengths, at least one",
    )
    for item in self.eval:
      require("=" in item, f"data.eval: {item!r} has no name: write NAME=SOURCE, as in test={item}")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Which verifier grades completions, and which weighted parts add up to the reward.

  Attributes:
    verifier: "math", "exact" or another registered name (docs/grading.md), or "task": each record
      is graded by the verifier of its own task (docs/data.md).
    weights: (name, weight) of each part of the reward; "correct" is the verdict itself.
    extraction: where "math" looks for the answer: some of boxed, tag, hashes, phrase and
      last_number, separated by commas, the preferred one first; "": as `igpo_jax.grade` does.
    gold_floor: RL does not start if the verifier calls a smaller share of the gold traces correct.
    workers: number of grading processes of the verifier "math".
    timeout: seconds that grading one answer may take; after that it counts as wrong.
  """

  verifier: str = "math"
  weights: tuple[tuple[str, Finite], ...] = (("correct", 1.0),)
  extraction: str = ""
  gold_floor: Share = 0.5
  workers: Count = 2
  timeout: Positive = 5.0

  def __post_init__(self):
    check_section(self, "reward")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation, with the sampler that RL uses (docs/evaluation.md).

  Attributes:
    protocol: name of a registered protocol (eval/protocols.py), which then decides prompts,
      lengths, temperature, samples and grading. The items of `data.eval` are named after its
      benchmarks. "": no protocol; the options below and those of `sampler` decide.
    lengths: which of the protocol's completion lengths are run; (): all.
    examples: solved examples for a protocol that shows some, as "BENCHMARK=SOURCE" strings.
    batch_size: number of rows that are sampled at a time, rounded up to a multiple of devices and
      processes. 0: chosen to keep the devices busy.
    limit: the largest number of problems of a benchmark; 0: all.
    samples: k, the number of completions of each problem (for avg@k, pass@k and majority@k). They
      differ only at a temperature above 0.
    steps: number of denoising steps; 0: `sampler.steps`.
    temperature: temperature in evaluations, usually 0. Rollouts have `sampler.temperature`.
    parallel: also commit by `sampler.threshold` or `sampler.factor`, where rollouts do. False: by
      the schedule alone, so that cheaper rollouts are judged by an exact evaluation.
    cache: cache of keys and values, with a protocol and without one. "none" is exact, and is what
      all published numbers except Fast-dLLM's were made with. Results name the cache.
    initial: also evaluate before the first training stage.
  """

  protocol: str = ""
  lengths: tuple[Count, ...] = ()
  examples: tuple[str, ...] = ()
  batch_size: Natural = 64
  limit: Natural = 0
  samples: Count = 1
  steps: Natural = 0
  temperature: NonNegative = 0.0
  parallel: bool = True
  cache: Literal["none", "prefix", "dual"] = "none"
  initial: bool = True

  def __post_init__(self):
    check_section(self, "eval")
    require(
      not self.protocol
      or (self.samples, self.steps, self.temperature, self.parallel) == (1, 0, 0.0, True),
      f"eval.protocol={self.protocol!r} decides eval.samples, eval.steps, eval.temperature and "
      "eval.parallel: leave them at their defaults, or set eval.protocol=''",
    )
    require(
      self.protocol or not self.lengths,
      f"eval.lengths={self.lengths} needs eval.protocol; without one, sampler.gen_length is the "
      "length",
    )
    for item in self.examples:
      require("=" in item, f"eval.examples: {item!r} has no name: write BENCHMARK=SOURCE")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Orbax checkpoints of the training state.

  Attributes:
    every: number of steps between checkpoints; 0: only at the end of a stage.
    minutes: also save whenever this many minutes have passed since the last checkpoint, by the
      clock of process 0; 0: never. A run that is killed loses at most this much work.
    keep: how many of the latest checkpoints are kept.
    best_metric: a metric, such as "eval/test/accuracy", whose best checkpoint is kept as well;
      higher is better. "": none is.
  """

  every: Natural = 100
  minutes: NonNegative = 30.0
  keep: Count = 2
  best_metric: str = ""

  def __post_init__(self):
    check_section(self, "checkpoint")


def stop_rule(text: str) -> tuple[str, bool, float]:
  """Parses a rule of `log.stop_when`.

  Args:
    text: "METRIC < NUMBER" or "METRIC > NUMBER".

  Returns:
    (metric, True for ">", number).

  Raises:
    UserError: the text is not such a rule.

  Example: `stop_rule("rl/entropy < 0.01") == ("rl/entropy", False, 0.01)`.
  """
  match = re.fullmatch(r"\s*([\w/.@-]+)\s*([<>])\s*([-+\d.eE]+)\s*", text)
  metric, sign, number = match.groups() if match else ("", "", "nan")
  try:
    limit = float(number)
  except ValueError:
    limit = math.nan
  require(
    math.isfinite(limit),
    f"log.stop_when: {text!r} should be METRIC < NUMBER or METRIC > NUMBER, such as "
    "'rl/repeated > 0.9'",
  )
  return metric, sign == ">", limit


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written besides metrics.jsonl.

  Attributes:
    every: number of steps between rows of metrics.jsonl; 0: only at the end.
    samples_every: number of RL steps between writes of samples.jsonl (docs/samples.md); 0: never.
    samples_per_step: rows of samples.jsonl per write; 0: the whole batch. All-wrong groups, and the
      completions that replaced some of theirs, come first. A row has about 25 bytes per token of
      `sampler.gen_length`, or 55 with `token_stats`.
    token_stats: rows of samples.jsonl also say for each token what the likelihood estimate gave for
      it before and after the update. It costs two more forward passes in steps that are written.
    report_every: number of steps between refreshes of report.html, the run's page
      (docs/samples.md). 0: it is written at the end only.
    tensorboard: also write the metrics to TensorBoard. Steps are counted on over the stages.
    wandb: also write the metrics to Weights & Biases (wandb must be installed). A run that is
      continued stays one run there; its id is in WORKDIR/wandb_id.
    wandb_project: name of the wandb project.
    max_skipped: stop after this many updates in a row with a loss or gradient that is not finite,
      or this many steps in a row with completions from such logits.
    stop_when: rules about metrics of metrics.jsonl, such as "rl/repeated > 0.9" or
      "rl/entropy_floor < 0.01". When one holds, the state is saved and the run stops.
    stop_patience: a rule has to hold in this many logged rows in a row.
    profile_steps: number of steps of each stage of which an xprof trace is written to
      WORKDIR/profile; 0: none. The first two steps after a start, which compile, are left out.
  """

  every: Natural = 1
  samples_every: Natural = 10
  samples_per_step: Natural = 8
  token_stats: bool = False
  report_every: Natural = 100
  tensorboard: bool = True
  wandb: bool = False
  wandb_project: str = "igpo_jax"
  max_skipped: Count = 5
  stop_when: tuple[str, ...] = ()
  stop_patience: Count = 3
  profile_steps: Natural = 0

  def __post_init__(self):
    check_section(self, "log")
    for rule in self.stop_when:
      stop_rule(rule)


AxisSize = Annotated[int, Range(1, also=-1)]
AutoAxisSize = Annotated[int, Range(-1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The devices that a run is for, and how many of them lie along each mesh axis.

  One axis may be -1: it takes the rest of the devices. `data` and `fsdp` may be 0: they are then
  chosen for the devices (train/sizes.py). With LoRA each device gets a copy of the parameters, if
  that fits its memory; full fine-tuning splits them over the devices of a machine. Both split
  further where memory requires it.

  Attributes:
    slice: the name of a TPU slice, such as "v5e-64", whose sizes (parallel/tpu.py) replace `data`,
      `fsdp` and `tensor`.
    hardware: the devices that the config is for: "cpu", "gpu" or "tpu", or one model of them, such
      as "h100". A machine with another platform is refused. "": any.
    devices: the number of devices that the config is made for; fewer are refused. 0: any number.
    data: size of the axis that splits the rows of a batch; parameters are copied along it.
    fsdp: size of the axis that splits both rows and parameters.
    expert: size of the axis that splits both rows and experts; divides `model.moe.experts`. Each
      device holds some of the experts, which work on the rows of all devices along this axis
      (docs/models.md#experts).
    tensor: size of the axis that splits heads, hidden units and the vocabulary.
  """

  slice: str = ""
  hardware: str = ""
  devices: Natural = 0
  data: AutoAxisSize = -1
  fsdp: AutoAxisSize = 1
  expert: AxisSize = 1
  tensor: AxisSize = 1

  def __post_init__(self):
    check_section(self, "mesh")


@dataclasses.dataclass(frozen=True)
class Config:
  """All options of a run.

  Attributes:
    seed: the seed of all randomness; the same seed repeats the run.
    stages: the stages to run, in order, out of "sft", "rl" and "eval".
    arms: further RL stages to compare with this run's. Each starts where this run's RL starts, with
      some options changed, as "NAME: OPTION=VALUE, OPTION=VALUE" strings (docs/arms.md). Its files
      are in WORKDIR/arms/NAME.
    init_from: directory of the model to start from: a Hugging Face model of a known family, one
      that igpo_jax.convert wrote, or a step of a run (WORKDIR/checkpoints/STAGE/STEP). "": random
      weights.
    compilation_cache: where compiled programs are kept for the next run: a directory, "auto"
      (the user's cache folder, parallel/compile_cache.py) or "off".
    model, mesh, data, reward, sampler, hints, estimator, objective: sections of options.
    sft, sft_optimizer, rl, rl_optimizer, eval, checkpoint, log: sections of options.
  """

  seed: Seed = 0
  stages: tuple[Literal["sft", "rl", "eval"], ...] = ("sft", "rl")
  arms: tuple[str, ...] = ()
  init_from: str = ""
  compilation_cache: str = "auto"
  model: ModelConfig = ModelConfig()  # noqa: RUF009  frozen
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  reward: RewardConfig = RewardConfig()
  sampler: SamplerConfig = SamplerConfig(temperature=1.2)  # noqa: RUF009  frozen
  hints: HintConfig = HintConfig()  # noqa: RUF009  frozen
  estimator: MethodOptions = dataclasses.field(
    default_factory=lambda: method_section("estimator")()
  )
  objective: ObjectiveConfig = dataclasses.field(
    default_factory=lambda: method_section("objective")()
  )
  sft: SFTConfig = SFTConfig()
  sft_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, clip_norm=1.0)
  rl: RLConfig = RLConfig()
  rl_optimizer: OptimizerConfig = OptimizerConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
