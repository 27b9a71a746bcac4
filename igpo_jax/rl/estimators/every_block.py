"""every_block: each view masks a part of every block at once (EBPO, LLaDA2.1 report, eq. 4-5)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
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
from igpo_jax.rl.estimators.subsets import random_subset, spread
from igpo_jax.types import Array


@register_estimator("every_block")
@dataclasses.dataclass(frozen=True)
class EveryBlock(Estimator):
  """E = mean over views of the sum over masked positions of log p / (masked share of its block).

  A block with `len` positions up to the first stop token gets floor(u * len) + 1 masks. The numbers
  u of all views and blocks of a completion are spread evenly over [0,1).

  Attributes:
    draws: number of views.
    block_length: positions of a block; 0: the sampler's.
    origin: where the first block begins: "completion"; or "prompt", at the prompt's first token, as
      in the released code. A block may then hold the end of the prompt, which is never masked.
  """

  draws: Count = 3
  block_length: Natural = 0
  origin: Literal["completion", "prompt"] = "completion"

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=0, own=self.draws)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    g = group.completion.shape[0]
    subset_key, *keys = jax.random.split(key, g + 1)
    inside = self._blocks(group, sizes)  # [b,G,L]
    cells = self.draws * inside.shape[0]
    u = jnp.stack([spread(k, cells) for k in keys], axis=-1)  # [cells,G]
    u = u.reshape(self.draws, inside.shape[0], g)
    count = jnp.floor(u * jnp.sum(inside, axis=-1)).astype(jnp.int32) + 1
    allowed = jnp.broadcast_to(inside, (self.draws, *inside.shape))
    masked = jnp.any(random_subset(subset_key, allowed, count), axis=1)
    return self.of_masks(masked, group, sizes)

  def of_masks(self, masked: Array, group: Group, sizes: Sizes) -> Views:
    """The views with given masks bool[R,G,L]; their weights follow from the masks."""
    inside = self._blocks(group, sizes)
    hits = jnp.sum(masked[:, None] & inside, axis=-1)  # [R,b,G]
    share = hits / jnp.maximum(jnp.sum(inside, axis=-1), 1)
    ratio = jnp.sum(jnp.where(inside, share[..., None], 0.0), axis=1)  # [R,G,L]
    weights = jnp.where(masked, 1 / (jnp.where(masked, ratio, 1.0) * self.draws), 0.0)
    return Views(masked=masked, scored=masked, weights=weights, draws=self.draws)

  def _blocks(self, group: Group, sizes: Sizes) -> Array:
    """bool[b,G,L], the positions of each block up to the first stop token."""
    size = self.block_length or sizes.block_length
    position = jnp.arange(group.completion.shape[1])
    block = position // size
    blocks = -(-position.shape[0] // size)
    if self.origin == "prompt":
      before = jnp.sum(group.prompt_valid)
      block = (position + before) // size - before // size
      blocks += 1
    inside = block == jnp.arange(blocks)[:, None]  # [b,L]
    return inside[:, None] & (position < group.length[:, None])
