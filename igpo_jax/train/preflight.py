"""Checks on everything that a run reads, before weights are loaded.

All records are read, tokenized and measured, and gold answers are graded. So a wrong column, a
length that does not fit or a gold answer that the verifier cannot read is reported in the first
seconds of a run. The stages get the records that were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from igpo_jax.config import Config, RewardConfig
from igpo_jax.convert.open import open_source
from igpo_jax.data.pipeline import (
  BROKEN_TEXT,
  EMPTY_TRACE,
  NO_SPAN,
  PromptStream,
  SFTStream,
)
from igpo_jax.data.records import Record
from igpo_jax.data.sources import describe
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.errors import UserError
from igpo_jax.eval.evaluate import problems_of
from igpo_jax.eval.protocols import Task, plan
from igpo_jax.parallel.distributed import from_first
from igpo_jax.rewards import registry
from igpo_jax.rewards.score import Scorer
from igpo_jax.train import golds
from igpo_jax.train.setup import load_source

Tell = Callable[[str], None]


class Inputs:
  """The records of a run, read and checked.

  Args:
    config: the run's config.
    tokenizer: the run's tokenizer.
    scorer: the run's scorer.
    tell: called with each line for the user.
    arms: config of each arm by name.

  Raises:
    UserError: a source cannot be read, no record can be used, or the verifier does not accept
      enough of the gold answers.

  Attributes:
    sft, rl: the batches of the training stages. None if the stage is not run, or after `take`.
    arms: the batches of each arm by name.
  """

  def __init__(
    self,
    config: Config,
    tokenizer: Tokenizer,
    scorer: Scorer,
    tell: Tell,
    arms: Mapping[str, Config] | None = None,
  ):
    self._loaded: dict[str, list[Record]] = {}
    self._tell = tell
    self.sft: SFTStream | None = None
    self.rl: PromptStream | None = None
    if "sft" in config.stages:
      self.sft = sft_stream(config, tokenizer, load_source(config.data.sft, tell))
      for line in describe_sft(config, self.sft):
        tell(line)
    self.arms: dict[str, PromptStream] = {}
    if "rl" in config.stages:
      self.rl = self._prompts(config, tokenizer, scorer, tell)
      for name, arm in (arms or {}).items():
        same = (arm.data.rl, arm.rl.prompts_per_step) == (
          config.data.rl, config.rl.prompts_per_step,
        )  # fmt: skip
        told = lambda line, name=name: tell(f"arm {name}: {line}")
        self.arms[name] = self.rl if same else self._prompts(arm, tokenizer, scorer, told)
    for task in plan(config):
      self._check_task(config, task, tokenizer, scorer)

  @staticmethod
  def _prompts(config: Config, tokenizer: Tokenizer, scorer: Scorer, tell: Tell) -> PromptStream:
    """Reads and checks the prompts of an RL stage."""
    records = load_source(config.data.rl, tell)
    stream = rl_stream(config, tokenizer, records)
    for line in describe_rl(config, stream):
      tell(line)
    for name, some in by_verifier(records, config.reward):
      reward = dataclasses.replace(config.reward, verifier=name)
      graded = _graded(lambda some=some, r=reward: golds.check_traces(some, scorer, r))
      tell(f"rl: {graded}" if name == config.reward.verifier else f"rl, {name}: {graded}")
      check_floor(dataclasses.replace(config, reward=reward), graded)
    return stream

  def records(self, uri: str) -> list[Record]:
    """The records of a source of problems; each source is read once."""
    if uri not in self._loaded:
      self._loaded[uri] = load_source(uri, self._tell)
    return self._loaded[uri]

  def take(self, stage: str) -> SFTStream | PromptStream:
    """Returns the batches of a stage and drops them here, so that their memory can be freed."""
    stream = getattr(self, stage)
    setattr(self, stage, None)
    return stream

  def _check_task(self, config: Config, task: Task, tokenizer: Tokenizer, scorer: Scorer) -> None:
    records = self.records(task.uri)[: config.eval.limit or None]
    examples = self.records(task.examples) if task.examples else []
    asked = [problem.asked for problem in problems_of(task.setting, records, examples)]
    asked = asked[:: task.setting.samples]  # all samples of a problem have its prompt
    # A bucket for any length: what an evaluation asks is never left out.
    stream = PromptStream(asked, tokenizer, 1, (1 << 30,), 0, embedding_rows=embedding_rows(config))
    graded = _graded(lambda: golds.check_answers(records, scorer))
    more = f"; {graded}" if graded.unequal else ""
    prompts = f"prompts in tokens: {stream.prompt_lengths}"
    self._tell(f"eval {task.name}: {len(records):,} problems; {prompts}{more}")


def sft_stream(config: Config, tokenizer: Tokenizer, records: list[Record]) -> SFTStream:
  """The batches of SFT: this process's share."""
  return SFTStream(
    records,
    tokenizer,
    config.sft.batch_size,
    response_length=config.sft.response_lengths or config.sampler.gen_length,
    group_batches=config.sft.group_batches,
    **_of_the_run(config),
  )


def rl_stream(config: Config, tokenizer: Tokenizer, records: list[Record]) -> PromptStream:
  """The batches of RL: this process's share."""
  return PromptStream(records, tokenizer, config.rl.prompts_per_step, **_of_the_run(config))


def _of_the_run(config: Config) -> dict[str, Any]:
  """The arguments that the streams of both stages get."""
  return {
    "buckets": config.data.prompt_buckets,
    "seed": config.seed,
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
    "embedding_rows": embedding_rows(config),
  }


def embedding_rows(config: Config) -> int | None:
  """The number of rows that the model's embedding will have; None: its tokenizer's vocabulary."""
  if config.init_from:
    return open_source(config.init_from).config.vocab_size
  return config.model.vocab_size or None


def sft_steps(config: Config, stream: SFTStream) -> int:
  """The number of updates of SFT: `sft.steps`, or as many as `sft.epochs` takes."""
  return stream.num_steps(config.sft.epochs) if config.sft.epochs else config.sft.steps


def describe_sft(config: Config, stream: SFTStream) -> list[str]:
  """Lines for the user about the records of SFT: their number, their lengths and their faults."""
  steps = sft_steps(config, stream)
  epochs = steps * config.sft.batch_size / len(stream)
  buckets, lengths = config.data.prompt_buckets, stream.response_lengths
  return [
    f"sft: {len(stream)} records, left out: {describe(stream.dropped)};"
    f" {steps} steps are {epochs:.1f} epochs",
    f"sft: prompts in tokens: {stream.prompt_lengths}; buckets {_joined(buckets)}; responses:"
    f" {stream.trace_lengths}, and one that ends them; lengths {_joined(lengths)}",
    *(f"sft: {text}" for text in stream.advice()),
    *_broken("sft", stream),
  ]


def describe_rl(config: Config, stream: PromptStream) -> list[str]:
  """Lines for the user about the records of RL: their number, their lengths and their faults."""
  canvas, notes, n = config.sampler.gen_length, stream.notes, len(stream)
  inpaint = config.rl.exploration == "inpaint"
  lines = [
    f"rl: {n} records, left out: {describe(stream.dropped)}",
    f"rl: prompts in tokens: {stream.prompt_lengths}; buckets"
    f" {_joined(config.data.prompt_buckets)}; traces: {stream.trace_lengths}; canvas {canvas}"
    " (sampler.gen_length)",
    *(f"rl: {text}" for text in stream.advice()),
    *_broken("rl", stream),
  ]
  bare = notes.get(EMPTY_TRACE, 0)
  if inpaint and bare == n:
    lines.append(
      "rl: no record has a trace, so nothing can be inpainted and IGPO is plain GRPO here:"
      " name the field with the reasoning (trace=FIELD in data.rl), or set rl.exploration='none'"
    )
  elif inpaint:
    if bare:
      lines.append(f"rl: {bare} records have no trace; used, but cannot be hinted")
    found = n - bare - notes.get(NO_SPAN, 0)
    lines.append(
      f"rl: the answer is found in {found} of {n - bare} traces ({found / (n - bare):.1%})"
      + ("; a hint may show it in the others" if found < n - bare else "")
    )
    longer = stream.trace_lengths.beyond(canvas)
    if longer:
      lines.append(
        f"rl: {longer} traces are longer than the canvas: hints come from their first {canvas}"
        " tokens"
      )
    if "last_number" in config.reward.extraction and not config.hints.hide_answer_value:
      lines.append(
        "rl: with 'last_number' in reward.extraction a hint that shows the answer's value may be"
        " graded as the answer: set hints.hide_answer_value"
      )
  return lines


def _broken(stage: str, stream: SFTStream | PromptStream) -> list[str]:
  count = stream.notes.get(BROKEN_TEXT, 0)
  return [f"{stage}: {count} records have broken characters (U+FFFD) in them"] if count else []


def _joined(lengths: tuple[int, ...]) -> str:
  return ", ".join(map(str, lengths))


def by_verifier(records: list[Record], reward: RewardConfig) -> list[tuple[str, list[Record]]]:
  """The records that each verifier grades; with `reward.verifier` = "task" there may be several.

  Raises:
    UserError: a record that no verifier can be told for.
  """
  groups: dict[str, list[Record]] = {}
  for record in records:
    groups.setdefault(registry.verifier_of(record, reward.verifier), []).append(record)
  return sorted(groups.items())


def check_floor(config: Config, graded: golds.Golds) -> None:
  """Checks that the verifier calls at least `reward.gold_floor` of the gold traces correct.

  A user's own verifier is checked only if it was registered with `reads_golds`.

  Raises:
    UserError: fewer are called correct; the message says why and what would help.
  """
  reward = config.reward
  if graded.share >= reward.gold_floor or not registry.reads_golds(reward.verifier):
    return
  help = [*graded.remedies, f"reward.gold_floor={_below(graded.share)} to train all the same"]
  raise UserError(
    f"data.rl: the verifier {reward.verifier!r} calls {graded.passed:,} of {graded.traces:,} gold"
    f" traces correct, fewer than reward.gold_floor={reward.gold_floor:g} asks for: the policy"
    f" would not be rewarded for what it is to learn ({graded.why}). What helps:"
    f" {'; or '.join(help)}"
  )


def _below(share: float) -> float:
  return int(share * 100) / 100


def _graded(grade: Callable[[], golds.Golds]) -> golds.Golds:
  """Grades on process 0 and shares the result, since timeouts may differ between machines."""
  return golds.from_json(from_first(lambda: golds.as_json(grade())))
