"""trace: the states that sampling went through, every few steps one (TraceRL, CJ-GRPO).

Each token is scored in the state in which it was decided (`shrink` 1, CJ-GRPO), or in the first of
a few neighbouring states (TraceRL, arXiv 2509.06949), so an estimate takes steps / shrink forwards.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from igpo_jax.config import Count, Natural
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.rl.estimators.trajectory import Hints, add_hints, merged_steps, with_hints
from igpo_jax.types import Array


@register_estimator("trace")
@dataclasses.dataclass(frozen=True)
class Trace(Estimator):
  """View j masks the tokens of merged step j and later, and scores those of step j.

  Attributes:
    shrink: s, neighbouring steps that become one; 1: each step its own view.
    hints: "scored": hint tokens are read in one more view, with the whole completion masked (a
      forward a prompt); "context": they are seen and never scored.
    end_tokens: how many end-of-text tokens of a completion may be scored, the first ones. None:
      the loss region alone decides. 0 is TraceRL's released code: stopping is then not trained.
  """

  shrink: Count = 8
  hints: Hints = "scored"
  end_tokens: Natural | None = None

  redrawn = False

  def forwards(self, sizes: Sizes) -> Forwards:
    return with_hints(self.hints, -(-sizes.steps // self.shrink))

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    step = merged_steps(group.commit_step, sizes.steps, self.shrink)
    view = jnp.arange(-(-sizes.steps // self.shrink))[:, None, None]
    scored = step == view
    if self.end_tokens is not None:
      ends = group.completion == sizes.eos_id
      scored &= ~ends | (jnp.cumsum(ends, axis=-1) <= self.end_tokens)
    return add_hints(Views(masked=step >= view, scored=scored), self.hints, group)
