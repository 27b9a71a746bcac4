"""Evaluation through the same sampler that makes the rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from igpo_jax.config import Config, SamplerConfig
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.parallel.mesh import local_rows, over_processes, shard_rows
from igpo_jax.rewards.score import Scorer
from igpo_jax.rl.rollout import prompt_keys, sample_groups
from igpo_jax.types import LM, Params


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """Pass@1 of one benchmark.

  Attributes:
    accuracy: share of correct completions.
    stderr: its standard error, sqrt(a (1 - a) / n).
    n: problems.
    unparseable, timeout: shares.
  """

  accuracy: float
  stderr: float
  n: int
  unparseable: float
  timeout: float


def eval_sampler(config: Config) -> SamplerConfig:
  """The sampler of evaluations: the rollouts', at its own temperature and steps."""
  return dataclasses.replace(
    config.sampler,
    temperature=config.eval.temperature,
    steps=config.eval.steps or config.sampler.steps,
  )


def evaluate(
  lm: LM,
  params: Params,
  tokenizer: Tokenizer,
  scorer: Scorer,
  stream: PromptStream,
  cfg: SamplerConfig,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
  progress: Callable = lambda batches, total: batches,
) -> EvalResult:
  """Accuracy on every problem of a stream, each exactly once.

  Args:
    stream: problems; its tail is padded with repeats that are not counted.
    cfg: the sampler's settings (see `eval_sampler`).
    key: noise at temperature above 0, per problem.
    progress: wraps the batches to show how far they are.
  """
  counts = np.zeros(4)
  length = cfg.gen_length
  for batch in progress(stream.ordered_batches(), stream.num_ordered_batches()):
    p = len(batch.records)
    canvas = np.full((p, 1, length), lm.mask_id, np.int32)
    arrays = (batch.tokens, batch.valid, canvas, np.zeros_like(canvas, bool), batch.row_id)
    prompt, valid, canvas, fixed, ids = shard_rows(mesh, arrays)
    completion, _ = sample_groups(
      lm, params, prompt, valid, canvas, fixed, prompt_keys(key, ids), cfg
    )
    texts = [tokenizer.decode(row) for row in local_rows(completion)[:, 0]]
    real = np.flatnonzero(batch.real)
    scores = scorer([texts[i] for i in real], [batch.records[i] for i in real])
    counts += [
      scores.correct.sum(),
      len(real),
      scores.status.count("unparseable"),
      scores.status.count("timeout"),
    ]
  correct, n, unparseable, timeout = over_processes(counts, np.sum)
  accuracy = float(correct / n)
  return EvalResult(
    accuracy=accuracy,
    stderr=math.sqrt(accuracy * (1 - accuracy) / n),
    n=int(n),
    unparseable=float(unparseable / n),
    timeout=float(timeout / n),
  )
