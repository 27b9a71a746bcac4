"""What a likelihood estimator declares, and the arrays that it is given and gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.struct

from igpo_jax.config import check_section, registry
from igpo_jax.types import Array

# The options of an estimator NAME are `config.estimator.NAME.*`.
register_estimator: Callable[[str], Callable[[type], type]] = functools.partial(
  registry.register, "estimator"
)


class Sizes(NamedTuple):
  """Numbers of a run that are known before it begins.

  Attributes:
    group: G, completions of a prompt.
    length: L, positions of a completion.
    steps: denoising steps of the sampler: commit steps are 0..steps-1.
    block_length: positions of a block of the sampler.
    inner_updates: mu.
    mask_id, eos_id: of the tokenizer.
    stop_ids: tokens that end a completion.
  """

  group: int
  length: int
  steps: int
  block_length: int
  inner_updates: int
  mask_id: int
  eos_id: int
  stop_ids: tuple[int, ...]


@flax.struct.dataclass
class Group:
  """The completions of one prompt.

  Attributes:
    prompt: i32[Tp], left-padded.
    prompt_valid: bool[Tp], False on the padding.
    completion: i32[G,L].
    hinted: bool[G,L], tokens that were fixed while the rest was sampled.
    commit_step: i32[G,L], the step at which the sampler decided a token; -1 on hints.
    region: bool[G,L], the loss region (`rl.loss_region`).
    length: i32[G], |o_i|: tokens through the first stop token, whatever the region is.
    commit_logp: f32[G,L], log-probability of a token when the sampler decided it; 0 on hints. None
      for completions that were not sampled here.
  """

  prompt: Array
  prompt_valid: Array
  completion: Array
  hinted: Array
  commit_step: Array
  region: Array
  length: Array
  commit_logp: Array | None = None


@flax.struct.dataclass
class Views:
  """Corrupted copies of completions: [R,G,...] of one group, [P,R,G,...] of a batch.

  Attributes:
    masked: bool[R,G,L], completion positions that the network sees as masks.
    scored: bool[R,G,L], positions whose log-probability the view gives. Views may overlap.
    weights: f32[R,G,L], factors of the log-probabilities in the estimate; None: 1.
    prompt_masked: bool[R,G,Tp], prompt positions seen as masks; None: none.
    aux: the estimator's own arrays [R,G,...], which an objective made for it reads.
    draws: how many independent draws the views are; ordered by draw, R is a multiple of it.
  """

  masked: Array
  scored: Array
  weights: Array | None = None
  prompt_masked: Array | None = None
  aux: dict[str, Array] = flax.struct.field(default_factory=dict)
  draws: int = flax.struct.field(pytree_node=False, default=1)


class Forwards(NamedTuple):
  """How many forward passes an estimate takes; views are ordered alike.

  Attributes:
    shared: views whose input is the same for all completions of a group: one forward a prompt.
    own: views that need a forward for each completion.
  """

  shared: int
  own: int

  @property
  def views(self) -> int:
    """R."""
    return self.shared + self.own

  def per_completion(self, group: int) -> float:
    """Forward passes for each completion and each evaluation of the policy."""
    return self.shared / group + self.own


class Estimator:
  """Base of all estimators, which are frozen dataclasses: their fields are their options.

  Attributes:
    name: the registered one.
    redrawn: masks are drawn anew for each inner update. False: they follow from the completions
      or their keys alone, and old and reference log-probabilities are computed once a rollout.
    temperature: of the distribution whose log-probabilities are read.
  """

  name: ClassVar[str] = ""
  redrawn: bool = True
  temperature: float = 1.0

  def __post_init__(self):
    check_section(self, f"estimator.{self.name}")

  def forwards(self, sizes: Sizes) -> Forwards:
    """How many views there are, and how many of them serve a whole group.

    aot, rehearsal, the sizes of a run and the documentation count from this.
    """
    raise NotImplementedError

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    """The views of one prompt's completions.

    Called once for each prompt (under `jax.vmap`), so that masks follow from the prompt's own key
    and never from what else is in a micro-batch. Old, reference and current policy read the same.

    Args:
      group: the completions.
      key: one PRNG key, of the rollout, the prompt, and (if `redrawn`) the inner update.
      sizes: static numbers.
    """
    raise NotImplementedError
