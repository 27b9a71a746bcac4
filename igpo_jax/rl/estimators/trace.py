"""trace: the states that sampling went through, or one of every few of them (TraceRL, CJ-GRPO).

Each token is scored in the state in which the sampler committed it (`shrink` 1, CJ-GRPO), or in the
first of a few neighboring states (TraceRL, arXiv 2509.06949). So an estimate takes steps / shrink
forward passes.
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
    shrink: s, the number of neighboring steps that are merged into one view.
    hints: "scored": hint tokens are read in one more view, in which the whole completion is masked
      (one forward pass per prompt); "context": they are visible in all views and never scored.
    end_tokens: how many end-of-text tokens of a completion are scored, the first ones. None: all
      in the loss region. 0 is TraceRL's released code, which does not train when to stop.
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
