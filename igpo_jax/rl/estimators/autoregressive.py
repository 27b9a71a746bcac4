"""autoregressive: the exact likelihood of writing from left to right (JustGRPO, arXiv 2601.15165).

View t sees the tokens before t and masks for the rest. It takes as many forwards as a completion
has positions: the masked tail is attended to, so no cache can stand in for them. What is sampled
with `sampler.block_length=1` is sampled in this order, and its likelihood is then exact.
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


@register_estimator("autoregressive")
@dataclasses.dataclass(frozen=True)
class Autoregressive(Estimator):
  """log p(o^t | q, o^1 ... o^(t-1), m ... m). The first view serves the whole group."""

  redrawn = False

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=1, own=sizes.length - 1)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    g, length = group.completion.shape
    position = jnp.arange(length)
    each = lambda x: jnp.broadcast_to(x[:, None], (length, g, length))
    return Views(
      masked=each(position >= position[:, None]), scored=each(position == position[:, None])
    )
