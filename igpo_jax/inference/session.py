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
from igpo_jax.diffusion.sampler import NOT_A_NUMBER, denoise
from igpo_jax.errors import UserError
from igpo_jax.inference.requests import Request, batch_arrays
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.parallel.mesh import check_devices
from igpo_jax.token_ids import check_ids
from igpo_jax.types import Canvas


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
  """Yields the answers in the order of the requests; they are made a batch at a time.

  The noise of a request depends on its number only, so its answer does not depend on the batch.

  Args:
    pre: the model.
    requests: see `requests.make_request`.
    sampler: the sampler.
    key: one PRNG key.
    batch_size: requests per batch.

  Raises:
    UserError: a request's logits are NaN or infinite, so that it has no answer.
  """
  batch_size = min(batch_size, len(requests))
  for start in range(0, len(requests), batch_size):
    batch = list(requests[start : start + batch_size])
    missing = batch_size - len(batch)
    arrays = batch_arrays(batch + batch[-1:] * missing, sampler.gen_length, pre.tokenizer)
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(np.arange(batch_size) + start)
    out = denoise(pre.lm, pre.params, Canvas(*arrays), keys, sampler)
    if not np.asarray(out.finite)[: len(batch)].all():
      raise UserError(NOT_A_NUMBER)
    tokens = np.asarray(out.tokens)[:, -sampler.gen_length :]
    steps = np.asarray(out.commit_step)[:, -sampler.gen_length :]
    for row in range(len(batch)):
      yield Answer(pre.tokenizer.decode(tokens[row]), tokens[row], steps[row])


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
