"""Evaluation with the sampler that also makes the rollouts.

A row is one sample of one problem. Rows whose prompts have the same padded length wait in one queue
on the devices; `eval.batch_size` of them are denoised at a time, and they are graded as they come
out. A row depends only on its problem and the number of its sample. Rows that are on disk are not
sampled again. So an evaluation that is killed and continued has the rows of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from igpo_jax.config import Config, SamplerConfig
from igpo_jax.data.pipeline import PromptBatch, PromptStream
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.diffusion.completions import Counts, RowQueue, Rows
from igpo_jax.diffusion.sampler import NOT_A_NUMBER
from igpo_jax.errors import UserError
from igpo_jax.eval.generations import Generations, params_digest, records_digest
from igpo_jax.eval.metrics import benchmark_metrics
from igpo_jax.eval.protocols import PLAIN, Setting, Task
from igpo_jax.io.jsonl import Row
from igpo_jax.io.versions import versions
from igpo_jax.parallel.distributed import share
from igpo_jax.parallel.mesh import over_processes
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rewards import registry
from igpo_jax.rewards.score import Scorer
from igpo_jax.types import LM, Params

BUCKET_STEP = 64  # for a prompt longer than every bucket, a bucket of a multiple of this is added

Progress = Callable[[Sequence[int], str], Iterable[int]]


class Problem(NamedTuple):
  """One row of an evaluation.

  Attributes:
    record: the problem's record.
    asked: the record with the prompt that the model is given, and with an id of this row's own.
    sample: number of the sample, from 0.
  """

  record: Record
  asked: Record
  sample: int


def problems_of(
  setting: Setting, records: Sequence[Record], examples: Sequence[Record] = ()
) -> list[Problem]:
  """`setting.samples` rows for every problem, with the prompt that the setting asks for.

  Each row has its own id and therefore its own noise. The first sample has the problem's id, so
  pass@1 does not depend on the number of samples.

  Args:
    setting: with the template, or without one to keep the records' own prompts.
    records: the problems.
    examples: solved examples to put before each question, if there is a template.
  """
  rows = []
  for record in records:
    prompt = record.prompt
    if setting.template:
      prompt = setting.messages(record.question, tuple(examples))
    for sample in range(setting.samples):
      name = record.id if sample == 0 else f"{record.id}#sample{sample}"
      rows.append(Problem(record, dataclasses.replace(record, id=name, prompt=prompt), sample))
  return rows


def make_stream(
  problems: Sequence[Problem],
  tokenizer: Tokenizer,
  batch_size: int,
  buckets: Sequence[int],
  mesh: jax.sharding.Mesh,
  embedding_rows: int | None = None,
) -> PromptStream:
  """Batches of rows whose size divides over devices and processes. No row is left out.

  Rows are sorted by prompt length, the longest first, and rows of equal length are in the order of
  the problems. So a batch has prompts of similar length, and one long problem pads one batch only.

  Args:
    problems: the rows.
    tokenizer: the model's tokenizer.
    batch_size: rows of a batch. It is lowered to the number of rows if there are fewer, then
      rounded up to a multiple of the devices (data x fsdp x expert) and of the processes.
    buckets: prompt lengths in tokens, ascending. A longer one is added if a prompt needs it.
    mesh: the device mesh.
    embedding_rows: number of tokens that the model knows, see `PromptStream`.
  """
  processes = jax.process_count()
  ways = math.lcm(num_shards("act_batch", mesh=mesh), processes)
  lengths = {  # all samples of a problem have one prompt
    p.record.id: len(tokenizer.encode_prompt(p.asked.prompt)) for p in problems if p.sample == 0
  }
  longest = max(lengths.values())
  if longest > buckets[-1]:
    buckets = (*buckets, -(-longest // BUCKET_STEP) * BUCKET_STEP)
  return PromptStream(
    [p.asked for p in sorted(problems, key=lambda p: -lengths[p.record.id])],
    tokenizer,
    -(-min(batch_size, len(problems)) // ways) * ways,
    buckets,
    0,  # seed of the shuffled order, which evaluations do not use
    jax.process_index(),
    processes,
    embedding_rows=embedding_rows,
  )


def parts_left(
  stream: PromptStream, made: Sequence[bool], sampler: SamplerConfig
) -> list[list[int]]:
  """The queues of an evaluation, as the numbers of the stream's rows: a bucket's that are not made.

  With `early_stop="batch"` a row depends on its batch: then each is a whole batch.

  Args:
    made: for each row of the stream whether it is on disk.
  """
  size = stream.batch_size
  if sampler.early_stop == "batch":
    batches = [range(first, first + size) for first in range(0, len(stream), size)]
    whole = [[k % len(stream) for k in batch] for batch in batches]
    return [batch for batch in whole if not all(made[k] for k in batch)]
  left = [k for k in range(len(stream)) if not made[k]]
  length = dict(zip(left, stream.buckets_of(left), strict=True))
  return [[k for k in left if length[k] == b] for b in sorted(set(length.values()), reverse=True)]


def generate_rows(
  lm: LM,
  params: Params,
  tokenizer: Tokenizer,
  scorer: Scorer,
  setting: Setting,
  batch: PromptBatch,
  problems: dict[str, Problem],
  mesh: jax.sharding.Mesh,
  key: jax.Array,
  slots: int,
  counted: Callable[[Counts], None] = lambda counts: None,
) -> Iterator[list[Row]]:
  """Completes and grades rows; yields this process's as they are done. A collective.

  Args:
    lm: the model.
    params: its parameters.
    tokenizer: decodes the completions.
    scorer: grades them.
    setting: sampler of the evaluation.
    batch: this process's share of the rows.
    problems: id of a row -> the row.
    mesh: the device mesh.
    key: root of the noise at temperatures above 0. The id of each row is folded in.
    slots: number of rows that are denoised at a time, over all processes.
    counted: called at the end with what the devices have done.

  Yields:
    Lists with one row for each problem that is done and not padding: "id", "sample", "question",
    "completion", "answer", "correct", "extracted" and "status". On every process as many lists as
    `RowQueue.rounds` says.

  Raises:
    UserError: the logits of all rows of a round are NaN or infinite.
  """
  p, length = len(batch.records), setting.sampler.gen_length
  canvas = np.full((p, length), lm.mask_id, np.int32)
  fixed = np.zeros_like(canvas, bool)
  canvas[~batch.real], fixed[~batch.real] = lm.eos_id, True  # they cost nothing
  rows = Rows(batch.tokens, batch.valid, canvas, fixed, batch.row_id, np.zeros(p, np.int32))
  queue = RowQueue(lm, params, mesh, setting.sampler, rows, key, slots)
  for made in queue:
    real = batch.real[made.rows]
    numbers = np.array([made.finite[real].sum(), real.sum()])
    finite, rows_done = over_processes(numbers, np.sum)  # all processes raise, or none
    if rows_done and not finite:  # then the weights are at fault
      raise UserError(NOT_A_NUMBER)
    texts = [tokenizer.decode(completion) for completion in made.completion[real]]
    yield _graded(scorer, texts, [problems[batch.records[i].id] for i in made.rows[real]])
  counted(queue.counts)


def _graded(scorer: Scorer, texts: Sequence[str], made: Sequence[Problem]) -> list[Row]:
  scores = scorer(texts, [problem.record for problem in made])
  return [
    {
      "id": problem.record.id,
      "sample": problem.sample,
      "question": problem.record.question,
      "completion": text,
      "answer": problem.record.answer,
      "correct": bool(correct),
      "extracted": extracted,
      "status": status,
    }
    for problem, text, correct, extracted, status in zip(
      made, texts, scores.correct, scores.extracted, scores.status, strict=True
    )
  ]


def evaluate(
  lm: LM,
  params: Params,
  tokenizer: Tokenizer,
  scorer: Scorer,
  setting: Setting,
  problems: Sequence[Problem],
  stream: PromptStream,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
  generations: Generations,
  progress: Callable[[Sequence[int]], Iterable[int]] = iter,
  counted: Callable[[Counts], None] = lambda counts: None,
) -> dict[str, float]:
  """Evaluates one benchmark. Rows that are on disk are not sampled again. A collective.

  Args:
    lm: the model.
    params: its parameters.
    tokenizer: decodes the completions.
    scorer: grades them.
    setting: sampler and number of samples.
    problems: all rows, from `problems_of`.
    stream: these rows, from `make_stream`.
    mesh: the device mesh.
    key: root of the noise at temperatures above 0.
    generations: the rows on disk. New rows are added to it.
    progress: called with the numbers of the rounds that are left, in each of which as many rows
      come out as are denoised at a time; yields them and shows progress.
    counted: called for each queue of rows with what the devices have done.

  Returns:
    The metrics of `benchmark_metrics`. If the problems belong to several tasks, also
    "TASK/accuracy" for each.

  Raises:
    UserError: the logits of all rows of a round are NaN or infinite.
  """
  by_id = {problem.asked.id: problem for problem in problems}
  key_of = lambda problem: (problem.record.id, problem.sample)
  keys = [key_of(problem) for problem in problems]
  made = [key_of(by_id[name]) in generations.rows for name in stream.ids]
  parts = parts_left(stream, made, setting.sampler)
  rounds = iter(progress(range(sum(-(-len(part) // stream.batch_size) for part in parts))))
  next(rounds, None)  # a round is timed from one step of this to the next
  for part in parts:
    batch = stream.batch_of(part, -(-len(part) // stream.process_count) * stream.process_count)
    for rows in generate_rows(
      lm, params, tokenizer, scorer, setting, batch, by_id, mesh, key, stream.batch_size, counted
    ):
      generations.add(rows)
      next(rounds, None)
  for _ in rounds:
    pass
  generations.close(keys)
  # Process 0 computes the metrics for all: comparing answers may time out on one machine only.
  summary = []
  if jax.process_index() == 0:
    rows = [generations.rows[k] for k in keys]
    k = setting.samples
    groups = [rows[i : i + k] for i in range(0, len(rows), k)]
    summary = [benchmark_metrics(groups, scorer.same_answer) | _by_task(problems[::k], groups)]
  return share(summary)[0]


def _by_task(problems: Sequence[Problem], groups: Sequence[Sequence[Row]]) -> dict[str, float]:
  """ "TASK/accuracy" for each task, if the problems belong to several tasks; else nothing.

  Args:
    problems: one for each group.
    groups: for each problem, the rows of its completions.
  """
  correct: dict[str, list[float]] = {}
  for problem, rows in zip(problems, groups, strict=True):
    correct.setdefault(problem.record.task, []).extend(row["correct"] for row in rows)
  if len(correct) < 2:
    return {}
  return {f"{task}/accuracy": sum(c) / len(c) for task, c in sorted(correct.items()) if task}


class Evaluation:
  """Evaluates parameters on every benchmark of a config: `evaluation(params, label)`.

  Args:
    config: the run's config.
    tasks: the evaluations, from `protocols.plan(config)`.
    lm, tokenizer, mesh: those of the run.
    scorer: the run's scorer. It grades benchmarks whose protocol has no extraction rules.
    key: root of the noise at temperatures above 0.
    directory: rows are written to directory/LABEL/PROTOCOL/NAME-XXXXXXXX.jsonl (`Generations`).
    load: reads the records of a source, given its URI.
    progress: called with the numbers of batches and the benchmark's name; yields the numbers and
      shows progress.

  Attributes:
    counts: what the devices have done in the last call, for all benchmarks.

  Raises:
    UserError: the problems of a benchmark cannot be read.
  """

  def __init__(
    self,
    config: Config,
    tasks: Sequence[Task],
    lm: LM,
    tokenizer: Tokenizer,
    scorer: Scorer,
    mesh: jax.sharding.Mesh,
    key: jax.Array,
    directory: epath.Path,
    load: Callable[[str], list[Record]],
    progress: Progress = lambda batches, description: batches,
  ):
    self.config, self.lm, self.tokenizer, self.scorer = config, lm, tokenizer, scorer
    self.mesh, self.key, self.directory, self.progress = mesh, key, directory, progress
    self.tasks, self.counts = list(tasks), Counts()
    self._problems: dict[str, list[Problem]] = {}
    self._streams: dict[str, PromptStream] = {}
    for task in self.tasks:
      records = load(task.uri)[: config.eval.limit or None]
      examples = load(task.examples) if task.examples else []
      problems = problems_of(task.setting, records, examples)
      self._problems[task.name] = problems
      self._streams[task.name] = make_stream(
        problems, tokenizer, config.eval.batch_size, config.data.prompt_buckets, mesh,
        lm.vocab_size,
      )  # fmt: skip

  def __call__(self, params: Params, label: str) -> dict[str, dict[str, Any]]:
    """Evaluates `params` on every benchmark. A collective.

    Args:
      params: the parameters to evaluate.
      label: name of this evaluation, such as "rl 100". The folder with its rows is named after it.

    Returns:
      Name of the benchmark -> its metrics (`evaluate`), "cache", "settings" (the sampler's options
      as text), "prompts" (a digest of their token ids), what the rows were made on (`made_on`; of
      several such evaluations of the same rows all, with "; " between them) and, with a protocol,
      "protocol" and the "published" number with its source.
    """
    weights, self.counts = params_digest(params), Counts()
    return {task.name: self._run(task, params, weights, label) for task in self.tasks}

  def _run(self, task: Task, params: Params, weights: str, label: str) -> dict[str, Any]:
    setting, problems = task.setting, self._problems[task.name]
    generations = Generations(
      self.directory / label.replace(" ", "-") / task.protocol,
      task.name,
      {
        "protocol": task.protocol,
        "setting": {
          name: value
          for name, value in dataclasses.asdict(setting).items()
          if name not in ("published", "source", "ours")
        },
        "problems": records_digest(problem.asked for problem in problems),
        "weights": weights,
        "compute_dtype": self.config.model.dtype,
        "verifier": "math" if setting.rules else self.config.reward.verifier,
        **self._extraction(setting),
        **self._tasks(setting, problems),
        "seed": self.config.seed,
      },
      made_on(self.config, self.mesh, self._streams[task.name].batch_size),
    )
    with self._scorer(setting) as scorer:
      result: dict[str, Any] = evaluate(
        self.lm, params, self.tokenizer, scorer, setting, problems, self._streams[task.name],
        self.mesh, self.key, generations, lambda left: self.progress(left, task.name), self._count,
      )  # fmt: skip
    result["cache"] = setting.sampler.cache
    result["settings"] = in_words(setting)
    result["prompts"] = self._streams[task.name].prompts_digest()
    for name in MADE_ON:
      texts = dict.fromkeys(made.get(name, NOT_RECORDED) for made in generations.made)
      result[name] = "; ".join(texts) or NOT_RECORDED
    if task.protocol != PLAIN:
      result["protocol"] = task.protocol
      if setting.published is not None:
        shots = f", {setting.shots}-shot" if setting.shots and not task.examples else ""
        result |= {"published": setting.published, "published_source": setting.source + shots}
    return result

  def _count(self, counts: Counts) -> None:
    self.counts = self.counts.plus(counts)

  def _extraction(self, setting: Setting) -> dict[str, str]:
    """The extraction rules of the run, if they are used and are not the default."""
    extraction = self.config.reward.extraction
    return {"extraction": extraction} if extraction and not setting.rules else {}

  def _tasks(self, setting: Setting, problems: Sequence[Problem]) -> dict[str, list[str]]:
    """The tasks of the problems, if each record is graded by its own task's verifier."""
    if setting.rules or self.config.reward.verifier != registry.BY_TASK:
      return {}
    return {"tasks": sorted({problem.record.task for problem in problems})}

  def _scorer(self, setting: Setting) -> contextlib.AbstractContextManager[Scorer]:
    """A scorer with the protocol's extraction rules; the run's scorer if it has none."""
    if not setting.rules:
      return contextlib.nullcontext(self.scorer)
    reward = self.config.reward
    return Scorer("math", None, reward.workers, reward.timeout, setting.rules)


MADE_ON = ("devices", "dtype", "batch_size", "versions")
NOT_RECORDED = "not recorded"  # of rows that an earlier version made


def made_on(config: Config, mesh: jax.sharding.Mesh, batch_size: int) -> dict[str, str]:
  """What rows are made on, each as text: the names in `MADE_ON`."""
  devices, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
  processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
  texts = (
    f"{devices} x {kind}{processes}",
    config.model.dtype,
    str(batch_size),
    ", ".join(f"{name} {version}" for name, version in versions().items()),
  )
  return dict(zip(MADE_ON, texts, strict=True))


# Options that were added to the sampler after the first runs.
LATER_OPTIONS = ("alg_temp", "top_p", "schedule", "edit_passes")


def in_words(setting: Setting) -> str:
  """The sampler's options as text, without the cache: "gen_length=32, steps=16, ...".

  Left out are options that are None or False, and options of `LATER_OPTIONS` that have their
  default, so that texts of older runs stay equal.
  """
  default = dataclasses.asdict(SamplerConfig())
  options = dataclasses.asdict(setting.sampler)
  return ", ".join(
    f"{name}={value}"
    for name, value in options.items()
    if name != "cache"
    and value is not None
    and value is not False
    and not (name in LATER_OPTIONS and value == default[name])
  )
