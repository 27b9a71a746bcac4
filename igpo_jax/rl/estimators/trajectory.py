"""Steps and hints of a recorded trajectory, for the trace estimators.

A completion's trajectory is the order in which the sampler committed its tokens. Hints were not
committed by the sampler: their commit step is -1, as if they had been there before step 0. So the
view of every step shows them, and the state before them is the completion with everything masked.
This state is the same for all completions of a group, so reading the hints in it takes one forward
pass per prompt.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from igpo_jax.rl.estimators.base import Forwards, Group, Views
from igpo_jax.types import Array

Hints = Literal["scored", "context"]


def distinct_steps(commit_step: Array, steps: int, counted: Array | None = None) -> Array:
  """bool[G,T]: the steps of the sampler that committed a token of a completion.

  Args:
    commit_step: i32[G,L]; -1 on hints, which have no step.
    steps: T.
    counted: bool[G,L], the tokens that count; None: all.
  """
  committed = commit_step[:, None] == jnp.arange(steps)[:, None]  # [G,T,L]
  if counted is not None:
    committed &= counted[:, None]
  return jnp.any(committed, axis=-1)


def merged_steps(commit_step: Array, steps: int, shrink: int) -> Array:
  """i32[G,L]: for each token the number of its merged step.

  The steps of a completion that committed something are counted in order, and every `shrink` of
  them are merged into one.

  Example: with commit steps [0, 3, 4, 9, -1] and shrink 2 the result is [0, 0, 1, 1, -1].
  """
  rank = jnp.cumsum(distinct_steps(commit_step, steps), axis=1) - 1  # [G,T]
  rank = jnp.take_along_axis(rank, jnp.maximum(commit_step, 0), axis=1)
  return jnp.where(commit_step < 0, -1, rank // shrink)


def with_hints(hints: Hints, own: int) -> Forwards:
  """The forward passes of `own` views, plus the one that reads the hints if they are scored."""
  return Forwards(shared=1 if hints == "scored" else 0, own=own)


def add_hints(views: Views, hints: Hints, group: Group) -> Views:
  """Puts a view that masks everything and scores the hints before the others, if hints are scored.

  `aux["of_hints"]` bool[R,G] is True for this view.
  """
  if hints == "context":
    return views
  first = lambda x, value: jnp.concatenate([jnp.full_like(x[:1], value), x])
  aux = {name: first(x, 0) for name, x in views.aux.items()}
  aux["of_hints"] = first(jnp.zeros(views.masked.shape[:2], bool), True)
  weights = views.weights
  if weights is not None:
    weights = jnp.concatenate([group.hinted[None].astype(weights.dtype), weights])
  return Views(
    masked=first(views.masked, True),
    scored=jnp.concatenate([group.hinted[None], views.scored]),
    weights=weights,
    aux=aux,
  )
