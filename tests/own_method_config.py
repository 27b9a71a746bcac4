"""A config file with an estimator and an objective of its own, on the tiny run of `tiny_config`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from igpo_jax.config import Count, Share
from igpo_jax.rl.estimators import Estimator, Forwards, Views, register_estimator
from igpo_jax.rl.objectives import LossSums, Objective, register_objective
from tests import tiny_config


@register_estimator("halves")
@dataclasses.dataclass(frozen=True)
class Halves(Estimator):
  """The completion in `parts` stretches, each masked in a view of its own.

  Attributes:
    parts: how many stretches; divides the completion's length.
  """

  parts: Count = 2
  redrawn = False

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
  """-mean of A log pi over what is kept, the ratio to the old policy left out.

  Attributes:
    floor: advantages below -floor count as -floor.
  """

  floor: Share = 0.5
  needs_old = False
  drops_zero_advantage = True

  def totals(self, batch):
    return {"rows": jnp.float32(batch.advantages.size)}

  def sums(self, policy, old, ref, batch, totals, kept):
    assert old is None and ref is None
    advantage = jnp.maximum(batch.advantages, -self.floor)
    per_row = jnp.sum(jnp.where(kept, policy.tokens, 0.0), axis=-1)
    count = jnp.sum(kept)
    weight = jax.lax.stop_gradient(jnp.sum(jnp.abs(advantage)))
    return LossSums(
      -jnp.sum(advantage * per_row) / totals["rows"], None, {"kept": count, "weight": weight},
      {"longest": jnp.max(jnp.sum(kept, axis=-1)).astype(jnp.float32)},
    )  # fmt: skip

  def metrics(self, sums, most):
    return {"kept": sums["kept"], "longest": most["longest"]}


def get_config():
  config = tiny_config.get_config()
  config.rl.estimator = "halves"
  config.estimator.halves.parts = 4
  config.rl.objective = "weighted_nll"
  return config
