"""elbo: a Monte Carlo estimate of the likelihood bound (ESPO, GDPO, BGPO, GDSD).

The bound is an integral over the masking ratio t of 1/t times the masked log-probabilities. The
published methods differ in how they choose t, which is here the number of positions that a view
masks (`counts`), and in whether each view comes with its complement.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.config import Count, require
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.rl.estimators.subsets import random_subset, spread, table
from igpo_jax.types import Array


@register_estimator("elbo")
@dataclasses.dataclass(frozen=True)
class Elbo(Estimator):
  """E = sum over views and positions of weight times log p: nats for the whole completion.

  Attributes:
    counts: how many positions a view masks; p is the ratio that the weights divide by.
      "canvas" (ESPO): n of L positions, n in 0..L, spread evenly over a group's completions from
      one random offset; p = n/(L+1).
      "response" (BGPO): n of the first |o| positions, n in 1..|o|, spread evenly over a
      completion's draws; p = n/|o|.
      "gauss_legendre" (GDPO): max(1, floor(t |o|)) of the first |o|, at each node t of the
      Gauss-Legendre rule on [0,1]. The rule's weights replace the average over draws.
    draws: number of independent draws, or of nodes of the rule.
    complement: each draw also reads the complementary view, which masks what the draw left clean
      (ESPO). Needs counts="canvas".
    weights: "inverse" divides a log-probability by the masking ratio of its view; "none" does not
      (the file `gdsd_trainer_batchll.py` of GDSD).
  """

  counts: Literal["canvas", "response", "gauss_legendre"] = "canvas"
  draws: Count = 2
  complement: bool = True
  weights: Literal["inverse", "none"] = "inverse"

  def __post_init__(self):
    super().__post_init__()
    require(
      not self.complement or self.counts == "canvas",
      f"estimator.elbo.complement needs counts='canvas', not {self.counts!r}: only there has a "
      "complement a masking ratio; set estimator.elbo.complement=False",
    )
    require(
      self.counts != "gauss_legendre" or self.draws <= 64,
      f"estimator.elbo.draws={self.draws}: counts='gauss_legendre' has at most 64 nodes",
    )

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=0, own=self.draws * (2 if self.complement else 1))

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    count_key, subset_key = jax.random.split(key)
    allowed = jnp.ones(group.completion.shape, bool)
    if self.counts != "canvas":
      allowed = jnp.arange(sizes.length) < group.length[:, None]
    allowed = jnp.broadcast_to(allowed, (self.draws, *allowed.shape))
    masked = random_subset(subset_key, allowed, self.count(group, count_key))
    if self.complement:
      masked = jnp.stack([masked, ~masked], axis=1).reshape(-1, *group.completion.shape)
    return self.of_masks(masked, group)

  def count(self, group: Group, key: Array) -> Array:
    """i32[draws,G], how many positions each draw masks in each completion."""
    g, length = group.completion.shape
    if self.counts == "canvas":
      offset = jax.random.randint(key, (self.draws, 1), 0, length + 1)
      return stratified_counts(offset, g, length)
    if self.counts == "response":
      points = jax.vmap(lambda k: spread(k, self.draws))(jax.random.split(key, g)).T
      return jnp.floor(points * group.length).astype(jnp.int32) + 1
    return node_counts(self.draws, length)[:, group.length]

  def of_masks(self, masked: Array, group: Group) -> Views:
    """The views with given masks bool[R,G,L]; their weights follow from the masks."""
    length = masked.shape[-1]
    draws, views = self.draws, 2 if self.complement else 1
    count = jnp.sum(masked, axis=-1)[..., None]  # [R,G,1]
    if self.counts == "gauss_legendre":
      nodes, rule = gauss_legendre(self.draws)
      factor = jnp.asarray(rule / nodes if self.weights == "inverse" else rule, jnp.float32)
      weights = jnp.where(masked, factor[:, None, None], 0.0)
      return Views(masked=masked, scored=masked, weights=weights)
    if self.weights == "none":
      factor = jnp.ones(count.shape, jnp.float32)
    elif self.counts == "response":
      factor = group.length[:, None] / jnp.maximum(count, 1)
    else:
      # The complement of n positions has L - n, and its ratio is (L - n)/(L + 1) alike.
      factor = (length + 1) / jnp.maximum(count, 1)
    weights = jnp.where(masked, factor / (draws * views), 0.0)
    return Views(masked=masked, scored=masked, weights=weights, draws=draws)


def stratified_counts(offset: Array, rows: int, length: int) -> Array:
  """Counts in 0 .. L, spread evenly: equal steps around the circle 0 .. L, starting from `offset`.

  Args:
    offset: i32[...,1], the first count.
    rows: how many counts.
    length: L.

  Returns:
    i32[...,rows].

  Example: `stratified_counts(3, 4, 7) == [3, 5, 7, 1]`: steps of 8/4, modulo 8.
  """
  steps = offset + jnp.arange(rows) * (length + 1) / rows
  return jnp.round(steps).astype(jnp.int32) % (length + 1)


def gauss_legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """Gauss-Legendre quadrature on [0,1]: (nodes t f64[N], weights w f64[N]), of which N is `nodes`.

  Example: for N = 3, t = .1127, .5, .8873 and w = 5/18, 8/18, 5/18.
  """
  t, w = np.polynomial.legendre.leggauss(nodes)
  return (t + 1) / 2, w / 2


def node_counts(nodes: int, length: int) -> Array:
  """i32[N,L+1]: max(1, floor(t |o|)) for each node t and each |o| in 0 .. L; 0 for |o| = 0."""
  t, _ = gauss_legendre(nodes)
  count = lambda x: table(length, lambda n: min(n, max(1, int(x * n + 1e-9))))
  return jnp.asarray([count(x) for x in t], jnp.int32)
