"""prompt_masked: the completion masked, and some of the prompt (diffu-GRPO of d1, wd1).

As `mean_field`, but each prompt token is masked with a small probability, which regularizes several
updates on one rollout (arXiv 2504.12216). Each completion has its own prompt masks, so no forward
pass serves a whole group.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from igpo_jax.config import Share
from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)
from igpo_jax.rl.estimators.subsets import prompt_holes
from igpo_jax.types import Array


@register_estimator("prompt_masked")
@dataclasses.dataclass(frozen=True)
class PromptMasked(Estimator):
  """log p(o^k | q with holes, m ... m) at every position.

  Attributes:
    probability: the probability that a prompt token is masked.
  """

  probability: Share = 0.15

  def forwards(self, sizes: Sizes) -> Forwards:
    return Forwards(shared=0, own=1)

  def views(self, group: Group, key: Array, sizes: Sizes) -> Views:
    rows = group.completion.shape[:1]
    return self.of_masks(prompt_holes(key, self.probability, rows, group.prompt.shape[0]), group)

  def of_masks(self, prompt_masked: Array, group: Group) -> Views:
    """The view of the prompts' masks bool[G,Tp]."""
    every = jnp.ones((1, *group.completion.shape), bool)
    prompt_masked = (prompt_masked & group.prompt_valid)[None]
    return Views(masked=every, scored=every, prompt_masked=prompt_masked)
