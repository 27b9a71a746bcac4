"""random_ratio: one view, each completion masked with a ratio of its own (UniGRPO)."""

from __future__ import annotations

import dataclasses

from igpo_jax.diffusion.corrupt import random_masks
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.types import Array


@register_estimator("random_ratio")
@dataclasses.dataclass(frozen=True)
class RandomRatio(Estimator):
  """Each position masked with probability t ~ U(0,1) of its row; masked positions are scored."""

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=0, own=1)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    masked, _ = random_masks(key, group.completion.shape)
    return Views(masked=masked[None], scored=masked[None])
