"""The log-likelihood of a continuation: what evaluations by multiple choice ask a model for.

A masked diffusion model gives no exact value. As LLaDA's evaluation does, it is estimated by the
negative NELBO. With l tokens in the continuation and k of them masked, k uniform in 1..l and the
places uniform,

    log p(continuation | context) >= E[ (l / k) sum over masked of log p(token | the others) ]

which is exact for a model whose conditionals fit together. The masks of a continuation follow from
its tokens and the seed. So its value depends neither on the batch nor on the order of requests.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import SamplerConfig
from igpo_jax.convert.pretrained import Pretrained
from igpo_jax.diffusion.noisy import noisy_hidden
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.inference.requests import LENGTH_STEP
from igpo_jax.ops.masked import masked_sum
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.types import Canvas

FEWEST_COLUMNS = 8  # the head is applied to a power of two of columns, at least so many


class Continuation(NamedTuple):
  """Token ids of a context, which may be empty, and of what follows it, which may not."""

  context: tuple[int, ...]
  tokens: tuple[int, ...]


def masks_of(continuation: Continuation, draws: int, seed: int) -> np.ndarray:
  """bool[draws,l]: which tokens of the continuation are masked in each draw.

  The numbers of masks are spread evenly over 1..l: of `draws` of them each comes as often as any
  other, give or take one.
  """
  length = len(continuation.tokens)
  identity = zlib.crc32(
    np.array([*continuation.context, -1, *continuation.tokens], "<i8").tobytes()
  )
  rng = np.random.default_rng([seed, identity])
  counts = 1 + np.floor((rng.random() + np.arange(draws)) * length / draws).astype(int)
  return rng.random((draws, length)).argsort(axis=1) < np.minimum(counts, length)[:, None]


@functools.partial(jax.jit, static_argnames=("lm", "columns"))
def masked_logp(lm, params, noisy, clean, valid, masked, columns):
  """f32[B]: the sum of log p of the masked tokens, which lie in the last `columns` of the rows."""
  h, _ = noisy_hidden(lm, params, noisy, clean, valid)
  read = lambda x: x[:, -columns:]
  logp, _ = token_stats(lambda x: lm.head(params, x), read(h), read(clean)[:, None])
  return masked_sum(logp[:, 0], read(masked), axis=1)


def log_likelihoods(
  pre: Pretrained,
  continuations: Sequence[Continuation],
  draws: int = 128,
  seed: int = 0,
  batch_size: int = 8,
) -> list[float]:
  """The estimate for each continuation, in nats.

  Args:
    pre: the model.
    continuations: see `Continuation`.
    draws: forward passes for each; LLaDA's evaluation takes 128.
    seed: of the masks.
    batch_size: rows of a forward pass. Values differ with it by rounding only.
  """
  sums = np.zeros(len(continuations))
  masks = [masks_of(one, draws, seed) for one in continuations]
  for shape, jobs in _by_shape(continuations, range(draws)).items():
    for batch, count in _batches(jobs, batch_size):
      clean, valid, last = _rows(pre, [continuations[number] for number, _ in batch], shape)
      masked = np.zeros_like(valid)
      for row, (number, draw) in enumerate(batch):
        masked[row, last[row]] = masks[number][draw]
      noisy = np.where(masked, pre.lm.mask_id, clean)
      found = masked_logp(pre.lm, pre.params, noisy, clean, valid, masked, shape[1])
      for (number, draw), logp in zip(
        batch[:count], np.asarray(found).tolist()[:count], strict=True
      ):
        mask = masks[number][draw]
        sums[number] += logp * len(mask) / mask.sum() / draws
  return sums.tolist()


def are_greedy(
  pre: Pretrained, continuations: Sequence[Continuation], batch_size: int = 8
) -> list[bool]:
  """Whether decoding, the most confident token at each step, gives exactly the continuation."""
  out = [False] * len(continuations)
  for shape, jobs in _by_shape(continuations, range(1)).items():
    columns = shape[1]
    sampler = SamplerConfig(columns, columns, columns, early_stop="none")
    for batch, _ in _batches(jobs, batch_size):
      clean, valid, last = _rows(pre, [continuations[number] for number, _ in batch], shape)
      fixed = np.ones_like(valid)
      for row in range(len(batch)):
        fixed[row, last[row]] = False
      tokens = np.where(fixed, clean, pre.lm.mask_id)
      made = denoise(pre.lm, pre.params, Canvas(tokens, fixed, valid), jax.random.key(0), sampler)
      same = np.asarray(jnp.all(made.tokens == clean, axis=1))
      for (number, _), greedy in zip(batch, same.tolist(), strict=True):
        out[number] = greedy
  return out


Shape = tuple[int, int]  # positions of a row, and columns at its end that the head is applied to
Job = tuple[int, int]  # the number of a continuation, and of a draw


def _by_shape(continuations: Sequence[Continuation], draws: range) -> dict[Shape, list[Job]]:
  """The jobs of each shape; few shapes, because each is compiled."""
  jobs: dict[Shape, list[Job]] = {}
  for number, one in enumerate(continuations):
    columns = max(FEWEST_COLUMNS, 1 << (len(one.tokens) - 1).bit_length())
    length = max(len(one.context) + len(one.tokens), columns)
    shape = (-(-length // LENGTH_STEP) * LENGTH_STEP, columns)
    jobs.setdefault(shape, []).extend((number, draw) for draw in draws)
  return jobs


def _batches(jobs: Sequence[Job], size: int) -> Iterator[tuple[list[Job], int]]:
  """(`size` jobs, how many of them count): the last batch is filled up with its last job."""
  for start in range(0, len(jobs), size):
    batch = list(jobs[start : start + size])
    yield batch + batch[-1:] * (size - len(batch)), len(batch)


def _rows(
  pre: Pretrained, continuations: Sequence[Continuation], shape: Shape
) -> tuple[np.ndarray, np.ndarray, list[slice]]:
  """(tokens i32[B,T], valid bool[B,T], where each continuation is): rows end at the right."""
  tokens = np.full((len(continuations), shape[0]), pre.lm.eos_id, np.int32)
  valid = np.zeros(tokens.shape, bool)
  for row, one in enumerate(continuations):
    ids = (*one.context, *one.tokens)
    tokens[row, -len(ids) :], valid[row, -len(ids) :] = ids, True
  return tokens, valid, [slice(shape[0] - len(one.tokens), None) for one in continuations]
