"""coupled_grpo: coupled-GRPO as published (DiffuCoder, arXiv 2506.20639).

There are three views: the whole completion masked, a random mask, and its complement. A token's
estimate is the mean of two numbers: its log-probability in the first view, and that in the one of
the other views that masks it, divided by this view's masking ratio. `coupled` has the pair only,
with a ratio of its own for each completion and without weights.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from igpo_jax.config import Range, require
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.types import Array

Ratio = Annotated[float, Range(0, 1, above=True, below=True)]


@register_estimator("coupled_grpo")
@dataclasses.dataclass(frozen=True)
class CoupledGRPO(Estimator):
  """l_k = (l_k in the full view + w * l_k in the view that masks k) / 2, with w = 1/m or 1/(1-m).

  It is a weighted sum and not a log-probability: the weights sum to 1/2 + 1/(2m) or
  1/2 + 1/(2(1-m)).

  Attributes:
    ratio_low, ratio_high: the masking ratio m ~ U[ratio_low, ratio_high] is drawn once for each
      group (official code: once for a batch).
  """

  ratio_low: Ratio = 0.2
  ratio_high: Ratio = 0.8

  def __post_init__(self):
    super().__post_init__()
    require(
      self.ratio_low <= self.ratio_high,
      f"estimator.coupled_grpo.ratio_low={self.ratio_low} is above ratio_high={self.ratio_high}",
    )

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=1, own=2)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    ratio_key, mask_key = jax.random.split(key)
    ratio = jax.random.uniform(ratio_key, minval=self.ratio_low, maxval=self.ratio_high)
    return self.of_masks(jax.random.uniform(mask_key, group.completion.shape) < ratio, ratio)

  def of_masks(self, masked: Array, ratio: Array) -> Views:
    """The views for given masks bool[G,L] of the second view, drawn with a ratio f32[]."""
    views = jnp.stack([jnp.ones_like(masked), masked, ~masked])
    factor = 0.5 / jnp.stack([jnp.ones_like(ratio), ratio, 1 - ratio])
    return Views(masked=views, scored=views, weights=jnp.where(views, factor[:, None, None], 0.0))
