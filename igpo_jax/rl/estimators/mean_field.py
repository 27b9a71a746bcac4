"""mean_field: every position of the completion masked (diffu-GRPO, IGPO).

The input is then the same for all completions of a prompt and for all inner updates. So one forward
pass per prompt serves the whole group, and old and reference log-probabilities are computed once
per rollout.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.types import Array


@register_estimator("mean_field")
@dataclasses.dataclass(frozen=True)
class MeanField(Estimator):
  """log p(o^k | q, m ... m) at every position."""

  redrawn = False

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=1, own=0)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    every = jnp.ones((1, *group.completion.shape), bool)
    return Views(masked=every, scored=every)
