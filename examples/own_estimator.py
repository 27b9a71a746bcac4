"""An estimator and an objective of one's own: --config=examples/own_estimator.py"""

import dataclasses

import jax.numpy as jnp

from igpo_jax.config import Count, Share
from igpo_jax.flags import load
from igpo_jax.rl.estimators import Estimator, Forwards, Views, register_estimator
from igpo_jax.rl.objectives import LossSums, Objective, register_objective


@register_estimator("halves")
@dataclasses.dataclass(frozen=True)
class Halves(Estimator):
  """The completion in `parts` stretches, each masked in a view of its own.

  Attributes:
    parts: how many stretches; divides the completion's length.
  """

  parts: Count = 2
  redrawn = False  # the same masks at every inner update

  def forwards(self, sizes):
    return Forwards(shared=0, own=self.parts)

  def views(self, group, key, sizes):
    stretch = jnp.arange(sizes.length) * self.parts // sizes.length
    masked = stretch == jnp.arange(self.parts)[:, None]
    masked = jnp.broadcast_to(masked[:, None], (self.parts, *group.completion.shape))
    return Views(masked=masked, scored=masked)


@register_objective("weighted_nll")
@dataclasses.dataclass(frozen=True)
class WeightedLikelihood(Objective):
  """-mean of A log pi over what is kept: no ratio to the policy that sampled."""

  floor: Share = 0.5  # advantages below -floor count as -floor
  needs_old = False

  def totals(self, batch):
    return {"rows": jnp.float32(batch.advantages.size)}

  def sums(self, policy, old, ref, batch, totals, kept):
    per_row = jnp.sum(jnp.where(kept, policy.tokens, 0.0), axis=-1)
    loss = -jnp.sum(jnp.maximum(batch.advantages, -self.floor) * per_row) / totals["rows"]
    return LossSums(loss, None, {"kept": jnp.sum(kept)})  # and what is logged


def get_config():
  config, _ = load("configs/quickstart.py:smoke")
  config.rl.estimator = "halves"
  config.estimator.halves.parts = 7
  config.rl.objective = "weighted_nll"
  return config
