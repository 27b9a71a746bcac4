"""The interface of likelihood estimators: what one declares, is given, and returns."""

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
    group: G, the number of completions of a prompt.
    length: L, the number of positions of a completion.
    steps: number of denoising steps of the sampler: commit steps are 0 .. steps - 1.
    block_length: number of positions of a block of the sampler.
    inner_updates: mu, the number of updates on one rollout.
    mask_id, eos_id: ids of the mask and of the end of text.
    stop_ids: ids of the tokens that end a completion.
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
    hinted: bool[G,L], True where a token was a hint.
    commit_step: i32[G,L], the step at which the sampler committed a token; -1 on hints.
    region: bool[G,L], the loss region (`rl.loss_region`).
    length: i32[G], tokens up to and including the first stop token, whatever the region is.
    commit_logp: f32[G,L], log-probability of a token when the sampler committed it; 0 on hints.
      None for completions that were not sampled here.
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
    masked: bool[R,G,L], completion positions that are replaced by masks.
    scored: bool[R,G,L], positions whose log-probability is read. Views may score the same ones.
    weights: f32[R,G,L], factors of the log-probabilities in the estimate; None: all are 1.
    prompt_masked: bool[R,G,Tp], prompt positions that are replaced by masks; None: no position.
    aux: further arrays [R,G,...] of this estimator, for objectives that are made for it.
    draws: number of independent draws that the views come from. R is a multiple of it, and the
      views of a draw are next to each other.
  """

  masked: Array
  scored: Array
  weights: Array | None = None
  prompt_masked: Array | None = None
  aux: dict[str, Array] = flax.struct.field(default_factory=dict)
  draws: int = flax.struct.field(pytree_node=False, default=1)


class Forwards(NamedTuple):
  """How many forward passes an estimate takes. Shared views come before own ones.

  Attributes:
    shared: number of views whose input is the same for all completions of a group. Each takes one
      forward pass per prompt.
    own: number of views that take a forward pass for each completion.
  """

  shared: int
  own: int

  @property
  def views(self) -> int:
    """R, the number of views."""
    return self.shared + self.own

  def per_completion(self, group: int) -> float:
    """Forward passes per completion each time the policy is read, for groups of size `group`."""
    return self.shared / group + self.own


class Estimator:
  """Base of all estimators. They are frozen dataclasses, and their fields are their options.

  Attributes:
    name: the name under which it is registered.
    redrawn: whether each inner update draws new masks. If False, masks depend on the completions
      and their keys only, and old and reference log-probabilities are computed once per rollout.
    temperature: log-probabilities are those of softmax(logits / temperature).
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

    It is called for one prompt at a time (under `jax.vmap`). So masks depend on the prompt's own
    key, and never on what else is in a micro-batch. The old, the reference and the current policy
    are read in the same views.

    Args:
      group: the completions.
      key: one PRNG key, made from the step, the prompt and (if `redrawn`) the inner update.
      sizes: static numbers of the run.

    Returns:
      [R,G,...], with R = `forwards(sizes).views`.
    """
    raise NotImplementedError
