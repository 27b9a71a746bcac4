"""coupled_grpo: coupled-GRPO as published (DiffuCoder, arXiv 2506.20639).

Three views: the whole completion masked, a random mask, and its complement. A token's estimate is
the mean of the first and of that one of the others that masks it, which counts 1/(its ratio).
`coupled` is the pair alone, with a ratio of its own for each completion and without weights.
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
  """l_k = (l_k of the full view + w l_k of the view that masks k) / 2, w = 1/m or 1/(1-m).

  A weighted sum, not a log-probability: its weights sum to 1/2 + 1/(2m) or 1/2 + 1/(2(1-m)).

  Attributes:
    ratio_low, ratio_high: m ~ U[low, high], one for a group (official code: one for a batch).
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
    """The views of the second view's masks bool[G,L] and the ratio f32[] they were drawn with."""
    views = jnp.stack([jnp.ones_like(masked), masked, ~masked])
    factor = 0.5 / jnp.stack([jnp.ones_like(ratio), ratio, 1 - ratio])
    return Views(masked=views, scored=views, weights=jnp.where(views, factor[:, None, None], 0.0))
