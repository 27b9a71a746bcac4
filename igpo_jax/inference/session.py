"""A model that is loaded once and then asked many times."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from igpo_jax.config import SamplerConfig
from igpo_jax.convert.open import open_source
from igpo_jax.convert.pretrained import Pretrained, fitting_mesh, load_source
from igpo_jax.data.tokenizer import Tokenizer, load_tokenizer
from igpo_jax.diffusion.completions import RowQueue, Rows, prompt_keys
from igpo_jax.diffusion.sampler import NOT_A_NUMBER
from igpo_jax.errors import UserError
from igpo_jax.inference.requests import Request, batch_arrays, padded_length
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.parallel.mesh import check_devices, make_mesh
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.token_ids import check_ids
from igpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer to a request.

  Attributes:
    text: the answer up to the first stop token, without special tokens.
    tokens: i32[L], the whole completion.
    commit_step: i32[L], when each position was committed; -1 on hints.
  """

  text: str
  tokens: np.ndarray
  commit_step: np.ndarray


def generate(
  pre: Pretrained,
  requests: Sequence[Request],
  sampler: SamplerConfig,
  key: jax.Array,
  batch_size: int = 8,
) -> Iterator[Answer]:
  """Yields the answers in the order of the requests.

  Requests whose prompts are padded to one length wait in one queue, so that one program answers all
  of them: a request that is done is replaced by the next. The queue of the first request comes
  first; an answer that is made before its turn is kept until then. The noise of a request depends
  on its number only, so its answer does not depend on the others (except with
  `early_stop="batch"`, where requests are answered in batches).

  Args:
    pre: the model.
    requests: see `requests.make_request`.
    sampler: the sampler.
    key: one PRNG key.
    batch_size: how many requests are answered at a time, rounded up to a multiple of the devices.

  Raises:
    UserError: a request's logits are NaN or infinite, so that it has no answer.
  """
  mesh = _mesh_of(pre.params)
  ways = num_shards("act_batch", mesh=mesh)
  slots = -(-min(batch_size, len(requests)) // ways) * ways
  answers: dict[int, Answer] = {}  # those whose turn has not come
  told = 0
  for part in _queues(requests, sampler, slots):
    arrays = batch_arrays([requests[n] for n in part], sampler.gen_length, pre.tokenizer)
    numbers = np.array(part)
    rows = Rows(*arrays, numbers.astype(np.uint32), np.zeros_like(numbers, np.int32))
    by_number = lambda key, ids, _: prompt_keys(key, ids)
    queue = RowQueue(pre.lm, pre.params, mesh, sampler, rows, key, slots, by_number)
    for made in queue:
      if not made.finite.all():
        raise UserError(NOT_A_NUMBER)
      for n, tokens, steps in zip(
        numbers[made.rows].tolist(), made.completion, made.commit_step, strict=True
      ):
        answers[n] = Answer(pre.tokenizer.decode(tokens), tokens, steps)
      while told in answers:
        yield answers.pop(told)
        told += 1


def _queues(
  requests: Sequence[Request], sampler: SamplerConfig, slots: int
) -> Iterator[Sequence[int]]:
  """The numbers of the requests in each queue."""
  if sampler.early_stop == "batch":  # each answer depends on its batch: the last one is filled up
    for first in range(0, len(requests), slots):
      yield [min(n, len(requests) - 1) for n in range(first, first + slots)]
    return
  parts: dict[int, list[int]] = {}
  for n, request in enumerate(requests):
    parts.setdefault(padded_length(request), []).append(n)
  yield from parts.values()


def _mesh_of(params: Params) -> jax.sharding.Mesh:
  """The mesh that parameters lie on."""
  sharding = jax.tree.leaves(params)[0].sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    return sharding.mesh
  return make_mesh(1, 1, 1, devices=list(sharding.device_set))


class Session:
  """A model that can be asked many times.

  Making a session reads the tokenizer and the headers of the weights only, so mistakes in prompts
  are found before the weights are read.

  Args:
    model: a model directory; see `load_pretrained`.
    adapter: a PEFT directory whose adapter is put on the model; None for none.
    dtype: dtype of the computation; "" for bfloat16, or float32 on CPU.

  Attributes:
    tokenizer: the model's tokenizer.

  Raises:
    UserError: the model cannot be read or has no tokenizer, or jax finds no device.
  """

  tokenizer: Tokenizer

  def __init__(self, model: epath.Path, adapter: str | None = None, dtype: str = ""):
    check_devices()
    self._dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    self._pre: Pretrained | None = None
    self._mesh = None
    self._source = open_source(model, adapter=adapter)
    if self._source.tokenizer is None:
      raise UserError(f"{model} has no tokenizer: put its files (tokenizer.json, ...) there")
    self.tokenizer = load_tokenizer(self._source.tokenizer)

  def check(self, request: Request) -> None:
    """Raises `UserError` if a request has a token that the model has no embedding for."""
    for what, ids in (
      ("the prompt", request.prompt),
      *(("a hint", ids) for ids, _ in request.hints),
    ):
      check_ids(ids, self._source.config.vocab_size, what)

  def load(self) -> None:
    """Reads the weights. `answers` calls it if it was not called before."""
    if self._pre is None:
      use_cache()
      self._mesh = fitting_mesh(self._source)
      self._pre = load_source(self._source, self._dtype, self._mesh)

  @contextlib.contextmanager
  def loaded(self) -> Iterator[Pretrained]:
    """The model, with its mesh set while the body of the `with` runs. Loads it if need be."""
    self.load()
    with contextlib.ExitStack() as stack:
      if self._mesh is not None:
        stack.enter_context(jax.set_mesh(self._mesh))
      yield self._pre

  def answers(
    self,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    seed: int = 0,
    batch_size: int = 8,
  ) -> Iterator[Answer]:
    """Yields the answers in the order of the requests; see `generate`."""
    with self.loaded() as pre:
      yield from generate(pre, requests, sampler, jax.random.key(seed), batch_size)
