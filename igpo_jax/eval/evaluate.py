"""Evaluation through the same sampler that makes the rollouts.

A row of a batch is one sample of one problem. Batches are always cut in the same places, and the
noise of a row depends on its problem and sample only. Rows that are on disk are not made again. So
an evaluation that was killed and continued ends with the same rows as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from igpo_jax.config import Config, SamplerConfig
from igpo_jax.data.pipeline import PromptBatch, PromptStream
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.diffusion.completions import row_keys, sample_rows
from igpo_jax.diffusion.sampler import NOT_A_NUMBER
from igpo_jax.errors import UserError
from igpo_jax.eval.generations import Generations, params_digest, records_digest
from igpo_jax.eval.metrics import benchmark_metrics
from igpo_jax.eval.protocols import PLAIN, Setting, Task
from igpo_jax.io.jsonl import Row
from igpo_jax.parallel.distributed import share
from igpo_jax.parallel.mesh import local_rows, shard_rows
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rewards import registry
from igpo_jax.rewards.score import Scorer
from igpo_jax.types import LM, Params

BUCKET_STEP = 64  # a prompt longer than every bucket gets one that is a multiple of this

Progress = Callable[[Sequence[int], str], Iterable[int]]


class Problem(NamedTuple):
  """One row: the problem's record, the record with the prompt as it is asked, the sample's
  number."""

  record: Record
  asked: Record
  sample: int


def problems_of(
  setting: Setting, records: Sequence[Record], examples: Sequence[Record] = ()
) -> list[Problem]:
  """`setting.samples` rows for every problem, with the prompt that the setting asks for.

  Each row has an id of its own, and so noise of its own. The first sample has the problem's id, so
  that pass@1 does not depend on the number of samples.
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
  """Batches of the rows that divide over devices and processes. No problem is left out.

  Rows are sorted by prompt length, the longest first, and rows of equal length are in the order of
  the problems. So a batch has prompts of similar length, and one long problem pads one batch only.

  Args:
    problems: the rows.
    tokenizer: of the model.
    batch_size: rows of a batch. It is at most the number of rows, rounded up to a multiple of
      devices (data x fsdp) and processes.
    buckets: prompt lengths in tokens. A longer one is added if the longest prompt needs it.
    mesh: the device mesh.
    embedding_rows: see `PromptStream`.
  """
  processes = jax.process_count()
  ways = math.lcm(num_shards("act_batch", mesh=mesh), processes)
  lengths = {  # samples of a problem are asked alike
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
    0,  # of an order that evaluations do not use
    jax.process_index(),
    processes,
    embedding_rows=embedding_rows,
  )


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
) -> list[Row]:
  """Completes and grades one batch; returns this process's rows. A collective.

  Args:
    batch: this process's share of the batch.
    problems: id of the row -> the problem.
    key: for the noise at temperatures above 0; it is folded with the id of each row.

  Raises:
    UserError: all rows have logits that are NaN or infinite.
  """
  p, length = len(batch.records), setting.sampler.gen_length
  canvas = np.full((p, length), lm.mask_id, np.int32)
  arrays = (batch.tokens, batch.valid, canvas, np.zeros_like(canvas, bool), batch.row_id)
  prompt, valid, canvas, fixed, ids = shard_rows(mesh, arrays)
  keys = row_keys(key, ids, jnp.zeros(ids.shape, jnp.int32))
  completion, _, _, finite = sample_rows(
    lm, params, prompt, valid, canvas, fixed, keys, setting.sampler
  )
  completion, finite = local_rows((completion, finite))
  if not finite.any():  # the weights are to blame, not a problem
    raise UserError(NOT_A_NUMBER)
  real = np.flatnonzero(batch.real)
  texts = [tokenizer.decode(completion[i]) for i in real]
  made = [problems[batch.records[i].id] for i in real]
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
) -> dict[str, float]:
  """The metrics of one benchmark (`benchmark_metrics`). Rows on disk are not made again.

  Args:
    setting: sampler and number of samples.
    problems: the rows, see `problems_of`.
    stream: the batches of these rows, see `make_stream`.
    key: for the noise at temperatures above 0.
    generations: the rows that are on disk; new rows are added.
    progress: called with the numbers of the batches that are left; yields them and shows progress.
  """
  by_id = {problem.asked.id: problem for problem in problems}
  key_of = lambda problem: (problem.record.id, problem.sample)
  keys, size = [key_of(problem) for problem in problems], stream.batch_size
  sampled = [key_of(by_id[name]) for name in stream.ids]
  left = [
    batch
    for batch in range(stream.num_ordered_batches())
    if any(k not in generations.rows for k in sampled[batch * size : (batch + 1) * size])
  ]
  for number in progress(left):
    # A batch that is half known is made whole again: the same batch gives the same rows.
    batch = next(stream.ordered_batches(number))
    generations.add(generate_rows(lm, params, tokenizer, scorer, setting, batch, by_id, mesh, key))
  generations.close(keys)
  # One process decides: grading may time out on one machine and not on another.
  summary = []
  if jax.process_index() == 0:
    rows = [generations.rows[k] for k in keys]
    k = setting.samples
    groups = [rows[i : i + k] for i in range(0, len(rows), k)]
    summary = [benchmark_metrics(groups, scorer.same_answer) | _by_task(problems[::k], groups)]
  return share(summary)[0]


def _by_task(problems: Sequence[Problem], groups: Sequence[Sequence[Row]]) -> dict[str, float]:
  """ "TASK/accuracy" of each task, where the problems are of several.

  Args:
    problems: one for each group.
    groups: the rows of each problem's completions.
  """
  correct: dict[str, list[float]] = {}
  for problem, rows in zip(problems, groups, strict=True):
    correct.setdefault(problem.record.task, []).extend(row["correct"] for row in rows)
  if len(correct) < 2:
    return {}
  return {f"{task}/accuracy": sum(c) / len(c) for task, c in sorted(correct.items()) if task}


class Evaluation:
  """Evaluates parameters on every benchmark of a config.

  Args:
    config: of the run.
    tasks: the evaluations, `protocols.plan(config)`.
    lm, tokenizer, mesh: of the run.
    scorer: of the run; it grades where the protocol does not.
    key: for the noise at temperatures above 0.
    directory: rows are written to directory/LABEL/PROTOCOL/NAME-XXXXXXXX.jsonl (`Generations`).
    load: reads the records of a source, given its URI.
    progress: called with the numbers of batches and a description; yields the numbers and shows
      progress.

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
    self.tasks = list(tasks)
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
    """Benchmark -> its metrics, the published number to compare with, and the settings.

    Args:
      params: the parameters to evaluate.
      label: name of this evaluation, such as "rl 100"; also of the folder with its rows.
    """
    weights = params_digest(params)
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
    )
    with self._scorer(setting) as scorer:
      result: dict[str, Any] = evaluate(
        self.lm, params, self.tokenizer, scorer, setting, problems, self._streams[task.name],
        self.mesh, self.key, generations, lambda left: self.progress(left, task.name),
      )  # fmt: skip
    result["cache"] = setting.sampler.cache
    result["settings"] = in_words(setting)
    if task.protocol != PLAIN:
      result["protocol"] = task.protocol
      if setting.published is not None:
        shots = f", {setting.shots}-shot" if setting.shots and not task.examples else ""
        result |= {"published": setting.published, "published_source": setting.source + shots}
    return result

  def _extraction(self, setting: Setting) -> dict[str, str]:
    """How answers are found, where that is neither the protocol's nor the default."""
    extraction = self.config.reward.extraction
    return {"extraction": extraction} if extraction and not setting.rules else {}

  def _tasks(self, setting: Setting, problems: Sequence[Problem]) -> dict[str, list[str]]:
    """The tasks of the problems, where they decide which verifier grades."""
    if setting.rules or self.config.reward.verifier != registry.BY_TASK:
      return {}
    return {"tasks": sorted({problem.record.task for problem in problems})}

  def _scorer(self, setting: Setting) -> contextlib.AbstractContextManager[Scorer]:
    """The protocol's grader, or the run's."""
    if not setting.rules:
      return contextlib.nullcontext(self.scorer)
    reward = self.config.reward
    return Scorer("math", None, reward.workers, reward.timeout, setting.rules)


# Options of the sampler that there were not from the beginning.
LATER_OPTIONS = ("alg_temp", "top_p", "schedule", "edit_passes")


def in_words(setting: Setting) -> str:
  """The sampler's options as text, without the cache: "gen_length=32, steps=16, ...".

  Options that are None or False are left out; so are `batch_sizes`, on which completions do not
  depend, and `LATER_OPTIONS` where nobody set them: texts of older runs are to stay equal.
  """
  default = dataclasses.asdict(SamplerConfig())
  options = dataclasses.asdict(setting.sampler)
  return ", ".join(
    f"{name}={value}"
    for name, value in options.items()
    if name not in ("cache", "batch_sizes")
    and value is not None
    and value is not False
    and not (name in LATER_OPTIONS and value == default[name])
  )
