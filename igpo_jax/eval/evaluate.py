"""Evaluation through the same sampler that makes the rollouts.

A row of a batch is one problem and sample. Batches are always cut in the same places, a
row's noise follows the problem and sample, and what is on disk already is not made
again: so an evaluation that was killed and continued ends with the rows of one that was
not.
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

from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptBatch, PromptStream
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.diffusion.sampler import NOT_A_NUMBER
from igpo_jax.errors import UserError
from igpo_jax.eval.generations import Generations, params_digest, records_digest
from igpo_jax.eval.metrics import summarize
from igpo_jax.eval.protocols import PLAIN, Setting, Task
from igpo_jax.io.jsonl import Row
from igpo_jax.parallel.distributed import share
from igpo_jax.parallel.mesh import local_rows, shard_rows
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rewards.score import Scorer
from igpo_jax.rl.sampling import row_keys, sample_rows
from igpo_jax.types import LM, Params

BUCKET_STEP = 64  # a prompt longer than every bucket gets one that is a multiple of this

Progress = Callable[[Sequence[int], str], Iterable[int]]


class Problem(NamedTuple):
  """One row: a problem as its source gave it, as it is asked, and which sample this is."""

  record: Record
  asked: Record
  sample: int


def problems_of(
  setting: Setting, records: Sequence[Record], examples: Sequence[Record] = ()
) -> list[Problem]:
  """Every problem `setting.samples` times, asked as the setting wants it.

  The ids of the rows are distinct, so each has noise of its own; that of the first sample
  is the problem's, so that pass@1 does not depend on how many samples there are.
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
  """The rows as batches that devices and processes can share; no problem is left out.

  The longest prompts come first, equal lengths in the order of the problems: batches then
  hold prompts of like length, and one long problem pads one batch only.

  Args:
    batch_size: no more than there are rows, rounded up to a multiple of devices (data x
      fsdp) and processes.
    buckets: prompt lengths; one is added where the longest prompt needs it.
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
  """Completes and grades one batch; this process's rows.

  Args:
    batch: this process's share.
    problems: by the id of their rows.
    key: noise at temperature above 0, folded with each row's identity.

  Raises:
    UserError: the logits of every row are NaN or infinite.
  """
  p, length = len(batch.records), setting.sampler.gen_length
  canvas = np.full((p, length), lm.mask_id, np.int32)
  arrays = (batch.tokens, batch.valid, canvas, np.zeros_like(canvas, bool), batch.row_id)
  prompt, valid, canvas, fixed, ids = shard_rows(mesh, arrays)
  keys = row_keys(key, ids, jnp.zeros(ids.shape, jnp.int32))
  completion, _, finite = sample_rows(
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
  """All numbers of one benchmark (`metrics.summarize`), each row made exactly once.

  Args:
    setting: sampler and number of samples.
    problems: see `problems_of`.
    stream: the same rows as batches, see `make_stream`.
    key: noise at temperature above 0.
    generations: what is known already, and where new rows go.
    progress: wraps the numbers of the batches that are left.
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
    summary = [summarize(groups, scorer.same_answer)]
  return share(summary)[0]


class Evaluation:
  """Every benchmark that a config asks for, on any parameters.

  Args:
    config: the run's.
    tasks: `protocols.plan(config)`.
    lm, tokenizer, mesh: of the run.
    scorer: the run's; grades where no protocol does.
    key: noise at temperature above 0.
    directory: rows go to directory/LABEL/PROTOCOL/NAME-XXXXXXXX.jsonl (`Generations`).
    load: URI -> records.
    progress: (numbers of batches, description) -> the same, shown.

  Raises:
    UserError: problems that cannot be read.
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
    """Benchmark -> its numbers, and what to compare them with.

    Args:
      params: what to evaluate.
      label: of this evaluation, such as "rl 100"; names the folder of its rows.
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

  def _scorer(self, setting: Setting) -> contextlib.AbstractContextManager[Scorer]:
    """The protocol's grader, or the run's."""
    if not setting.rules:
      return contextlib.nullcontext(self.scorer)
    reward = self.config.reward
    return Scorer("math", None, reward.workers, reward.timeout, setting.rules)


def in_words(setting: Setting) -> str:
  """What completions were made with, besides the cache: "gen_length=32, steps=16, ...".

  Options at None or False are left out, and `batch_sizes`, on which no completion depends.
  """
  options = dataclasses.asdict(setting.sampler)
  return ", ".join(
    f"{name}={value}"
    for name, value in options.items()
    if name not in ("cache", "batch_sizes") and value is not None and value is not False
  )
