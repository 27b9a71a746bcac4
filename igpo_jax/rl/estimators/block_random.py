"""block_random: masks as block-wise sampling leaves them (SPG, StableDRL).

A view chooses a block of the completion, and looks as the canvas does while this block is sampled:
earlier blocks are clean except for a few random holes, the block is partly masked, and later blocks
are masked (SPG, arXiv 2510.09541, section on block-wise masking).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from igpo_jax.config import Count, Natural, Share, require
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.rl.estimators.subsets import prompt_holes, random_subset
from igpo_jax.types import Array


@register_estimator("block_random")
@dataclasses.dataclass(frozen=True)
class BlockRandom(Estimator):
  """The estimate is the mean over views of the mean log p over masked positions.

  Every masked position up to the first stop token is scored: those of the chosen block, of all
  later blocks, and the holes. Positions after the stop token are masked and not scored.

  Attributes:
    draws: number of views. They choose different blocks as long as there are enough blocks.
    block_length: positions of a block; 0: the sampler's.
    min_ratio, max_ratio: the chosen block has U{max(1, floor(len min)) .. max(1, floor(len max))}
      masks, where `len` is the number of its positions up to the first stop token.
    hole_probability: the probability that a token of the prompt or of an earlier block is masked.
  """

  draws: Count = 2
  block_length: Natural = 0
  min_ratio: Share = 0.0
  max_ratio: Share = 1.0
  hole_probability: Share = 0.15

  def __post_init__(self):
    super().__post_init__()
    require(
      self.min_ratio <= self.max_ratio,
      f"estimator.block_random.min_ratio={self.min_ratio} is above max_ratio={self.max_ratio}",
    )

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=0, own=self.draws)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    block_key, count_key, subset_key, hole_key, prompt_key = jax.random.split(key, 5)
    g, length = group.completion.shape
    size = self.block_length or sizes.block_length
    blocks = -(-length // size)
    position = jnp.arange(length)
    # A random order of the blocks up to the stop token. If draws outnumber them, blocks repeat.
    finished = jnp.maximum(-(-group.length // size), 1)  # [G]
    dice = jax.random.uniform(block_key, (g, blocks))
    order = jnp.argsort(jnp.where(jnp.arange(blocks) < finished[:, None], dice, 2.0), axis=1)
    turn = jnp.arange(self.draws)[:, None] % finished  # [R,G]
    block = jnp.take_along_axis(order, turn.T, axis=1).T[..., None]  # [R,G,1]

    within = position // size == block
    within &= position < group.length[:, None]
    width = jnp.sum(within, axis=-1)
    low = jnp.maximum(jnp.floor(width * self.min_ratio + 1e-4), 1).astype(jnp.int32)
    high = jnp.maximum(jnp.floor(width * self.max_ratio + 1e-4), low).astype(jnp.int32)
    count = jax.random.randint(count_key, width.shape, low, high + 1)
    masked = random_subset(subset_key, within, count)
    holes = jax.random.bernoulli(hole_key, self.hole_probability, masked.shape)
    masked |= holes & (position // size < block)
    masked |= position // size > block
    masked |= position >= group.length[:, None]
    rows = (self.draws, g)
    prompt_masked = prompt_holes(prompt_key, self.hole_probability, rows, group.prompt.shape[0])
    return self.of_masks(masked, prompt_masked, group)

  def of_masks(self, masked: Array, prompt_masked: Array, group: Group) -> Views:
    """The views with these masks of completions bool[R,G,L] and of prompts bool[R,G,Tp]."""
    scored = masked & (jnp.arange(masked.shape[-1]) < group.length[:, None])
    count = jnp.maximum(jnp.sum(scored, axis=-1, keepdims=True), 1)
    return Views(
      masked=masked,
      scored=scored,
      weights=scored / (count * self.draws).astype(jnp.float32),
      prompt_masked=prompt_masked & group.prompt_valid,
      draws=self.draws,
    )
