"""coupled: a random mask and its complement, so that every position is scored once.

These are the two complementary views of DiffuCoder's coupled-GRPO, without its third view and its
weights (`coupled_grpo` has all of it).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

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


@register_estimator("coupled")
@dataclasses.dataclass(frozen=True)
class Coupled(Estimator):
  """`random_ratio`'s view and its complement; each scores what it masks."""

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=0, own=2)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    masked, _ = random_masks(key, group.completion.shape)
    both = jnp.stack([masked, ~masked])
    return Views(masked=both, scored=both)
