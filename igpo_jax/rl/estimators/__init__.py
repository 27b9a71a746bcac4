"""Likelihood estimators, one file each: which corrupted views of a completion are read.

A diffusion model gives no left-to-right likelihood, so log pi(o | q) is read off forward passes
over corrupted completions. An estimator says which (docs/method.md#likelihood).

An estimator of your own is a class in a config file:

    @register_estimator("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(Estimator):
      ...

It is chosen with `config.rl.estimator = "mine"`; its fields are options of the config,
`config.estimator.mine.FIELD`.
"""

from igpo_jax.rl.estimators.base import (
  Estimator,
  Forwards,
  Group,
  Sizes,
  Views,
  register_estimator,
)

__all__ = ["Estimator", "Forwards", "Group", "Sizes", "Views", "register_estimator"]
