"""trace_sampled: a few random states of the trajectory (RLDF / Drift, AGRPO).

Where `trace` reads every state, this estimator reads `draws` of them. RLDF draws unsure steps more
often and scores all masked tokens. AGRPO draws evenly, or by entropy with weights that make up for
it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from igpo_jax.config import Count, Positive
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.rl.estimators.subsets import spread
from igpo_jax.rl.estimators.trajectory import Hints, add_hints, distinct_steps, with_hints
from igpo_jax.types import Array


@register_estimator("trace_sampled")
@dataclasses.dataclass(frozen=True)
class TraceSampled(Estimator):
  """View j masks the tokens that were committed at its step or later.

  The steps that may be drawn are those that committed a token up to the first stop token.

  Attributes:
    draws: number of views of a completion. If it has fewer steps, steps repeat.
    steps: how steps are drawn. "even" (AGRPO): spread evenly over the steps of a group's
      completions. "surprisal" (AGRPO's "entropy"): with a probability proportional to the summed
      -log p of the step's tokens when the sampler chose them, which on average is the entropy;
      weights make up for it. "unsure" (RLDF): without replacement, by the softmax of the mean
      -log p / `step_temperature`; nothing makes up for it.
    step_temperature: the temperature of "unsure".
    score: which tokens a view scores. "step" (AGRPO): those that were committed at its step.
      "later" (RLDF): all masked ones, which an objective may filter
      (`objective.trace_ppo.threshold`).
    temperature: log-probabilities are those of softmax(logits / temperature). In AGRPO it is the
      sampler's.
    hints: "scored": hint tokens are read in one more view, in which the whole completion is masked
      (one forward pass per prompt); "context": they are visible in all views and never scored.
  """

  draws: Count = 4
  steps: Literal["even", "surprisal", "unsure"] = "even"
  step_temperature: Positive = 1.0
  score: Literal["step", "later"] = "step"
  temperature: Positive = 1.0
  hints: Hints = "scored"

  def forwards(self, sizes: Sizes) -> Forwards:
    return with_hints(self.hints, self.draws)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    length = group.completion.shape[1]
    counted = jnp.arange(length) < group.length[:, None]
    present = distinct_steps(group.commit_step, sizes.steps, counted)  # [G,T]
    if self.steps == "unsure":
      chosen = self._unsure(group, key, sizes, present, counted)
      return self.of_steps(chosen, group)
    share = present / jnp.maximum(jnp.sum(present, axis=1, keepdims=True), 1)
    drawn = share
    if self.steps == "surprisal":
      drawn = step_shares(-self._logp(group), group.commit_step, present, counted)
    # Points are spread evenly over all draws of the group, and assigned to them at random.
    points = spread(key, self.draws * present.shape[0])
    points = jax.random.permutation(jax.random.fold_in(key, 1), points).reshape(self.draws, -1)
    chosen = inverse_cdf(drawn, points)
    if self.steps == "even":
      return self.of_steps(chosen, group)
    return self.of_steps(chosen, group, importance(share, drawn, chosen))

  def of_steps(self, steps: Array, group: Group, weights: Array | None = None) -> Views:
    """The views at given steps i32[R,G], with importance weights f32[R,G] if there are any."""
    step = steps[..., None]
    masked, current = group.commit_step >= step, group.commit_step == step
    scored = current if self.score == "step" else masked
    if weights is not None:
      weights = jnp.where(scored, weights[..., None], 0.0)
    aux = {"current": current} if self.score == "later" else {}
    views = Views(masked=masked, scored=scored, weights=weights, aux=aux)
    return add_hints(views, self.hints, group)

  def _logp(self, group: Group) -> Array:
    """f32[G,L]: what the sampler said of its own tokens."""
    if group.commit_logp is None:
      raise ValueError(
        f"estimator.trace_sampled.steps={self.steps!r} goes by the sampler's log-probabilities "
        "(Rollout.commit_logp), and these completions have none"
      )
    return group.commit_logp

  def _unsure(self, group, key, sizes, present, counted) -> Array:
    """i32[R,G]: steps drawn without replacement, as the largest of score plus Gumbel noise."""
    commits = (group.commit_step[:, None] == jnp.arange(sizes.steps)[:, None]) & counted[:, None]
    total = jnp.sum(jnp.where(commits, self._logp(group)[:, None], 0.0), axis=-1)
    mean = total / jnp.maximum(jnp.sum(commits, axis=-1), 1)
    score = -mean / self.step_temperature + jax.random.gumbel(key, mean.shape)
    order = jnp.argsort(jnp.where(present, -score, jnp.inf), axis=1)  # [G,T]
    turn = jnp.arange(self.draws)[:, None] % jnp.maximum(jnp.sum(present, axis=1), 1)
    return jnp.take_along_axis(order, turn.T, axis=1).T


def step_shares(value: Array, commit_step: Array, present: Array, counted: Array) -> Array:
  """Each step's share of a completion's summed `value`, from the tokens committed at the step.

  Args:
    value: f32[G,L], at least 0. If all are 0, every step gets the same share.
    commit_step: i32[G,L].
    present: bool[G,T], the steps that may be drawn.
    counted: bool[G,L], the tokens that count.

  Returns:
    f32[G,T].
  """
  commits = (commit_step[:, None] == jnp.arange(present.shape[1])[:, None]) & counted[:, None]
  # The small number lets steps of sure tokens be drawn: else their weight would be infinite.
  total = jnp.sum(jnp.where(commits, value[:, None], 0.0), axis=-1) + 1e-6
  total = jnp.where(present, total, 0.0)
  return total / jnp.maximum(jnp.sum(total, axis=1, keepdims=True), 1e-6)


def inverse_cdf(share: Array, points: Array) -> Array:
  """i32[R,G]: the first step at which the running sum of shares f32[G,T] exceeds points [R,G]."""
  edges = jnp.cumsum(share, axis=1)
  passed = jnp.sum(points[..., None] >= edges, axis=-1)
  # Rounding may leave the last edge a little below 1.
  last = share.shape[1] - 1 - jnp.argmax(share[:, ::-1] > 0, axis=1)
  return jnp.minimum(passed, last).astype(jnp.int32)


def importance(share: Array, drawn: Array, steps: Array) -> Array:
  """Importance weights f32[R,G] of drawn steps: wanted over actual probability.

  Args:
    share: f32[G,T], the probabilities with which steps should be drawn.
    drawn: f32[G,T], those with which they were drawn.
    steps: i32[R,G].
  """
  at = lambda x: jnp.take_along_axis(x, steps.T, axis=1).T
  return at(share) / jnp.maximum(at(drawn), 1e-12)
