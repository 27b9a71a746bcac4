"""Objectives, one file each: the loss of a batch, from what an estimator has read.

An objective of your own is a class in a config file:

    @register_objective("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(Objective):
      ...

It is chosen with `config.rl.objective = "mine"`; its fields are options of the config,
`config.objective.mine.FIELD`.
"""

from igpo_jax.rl.objectives.base import Batch, LossSums, Objective, register_objective

__all__ = ["Batch", "LossSums", "Objective", "register_objective"]
