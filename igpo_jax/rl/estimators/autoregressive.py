"""autoregressive: the exact likelihood of writing from left to right (JustGRPO, arXiv 2601.15165).

View t shows the tokens before position t, and masks from t on. An estimate takes as many forward
passes as a completion has positions: positions attend to the masked tail, so a cache cannot replace
them. With `sampler.block_length=1` completions are sampled in this order, and their likelihood is
exact.
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
