"""Group baselines: how much better a completion is than its group (docs/method.md#objective)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from igpo_jax.errors import UserError
from igpo_jax.types import AnyArray, Array


def group_advantages(
  rewards: Shaped[AnyArray, " B"] | Sequence[float],
  group_size: int,
  kind: str = "mean",
  eps: float = 1e-4,
  floor: float = 0.0,
) -> Float[Array, " B"]:
  """The advantage of each completion over its group: A_i = r_i - mean of the group.

  With K of G rewards 1 and the rest 0, rho = K/G, the advantages are exactly
  1 - rho and -rho. A group whose rewards are all equal gets zeros.

  Args:
    rewards: f32[B], the completions of a group next to each other.
    group_size: G, at least 2; it divides B.
    kind: "mean"; "std" also divides by the group's standard deviation, "std_sample" by that of a
      sample (G - 1 below instead of G); "leave_one_out" subtracts the mean of the others.
    eps: added to a standard deviation.
    floor: the smallest divisor: a standard deviation plus `eps` below it counts as it.

  Returns:
    f32[B].

  Raises:
    UserError: a group size that does not divide B or is below 2, or an unknown kind.
  """
  return _advantages(jnp, jnp.asarray(rewards, jnp.float32), group_size, kind, eps, floor)


def host_advantages(rewards: np.ndarray, group_size: int, kind: str = "mean") -> np.ndarray:
  """`group_advantages` in numpy, where rewards are on the host already."""
  return _advantages(np, np.asarray(rewards, np.float32), group_size, kind)


def _advantages(
  xp: ModuleType,
  rewards: Any,
  group_size: int,
  kind: str,
  eps: float = 1e-4,
  floor: float = 0.0,
) -> Any:
  if group_size < 2:
    raise UserError(f"group_size={group_size}: a group of one has no advantage; use at least 2")
  if rewards.shape[0] % group_size:
    raise UserError(f"{rewards.shape[0]} rewards are not a multiple of group_size={group_size}")
  groups = rewards.reshape(-1, group_size)
  equal = xp.max(groups, axis=1, keepdims=True) == xp.min(groups, axis=1, keepdims=True)
  # The mean of equal numbers is not quite that number in float32.
  centered = xp.where(equal, xp.float32(0), groups - xp.mean(groups, axis=1, keepdims=True))
  if kind in ("std", "std_sample"):
    spread = xp.std(groups, axis=1, keepdims=True, ddof=int(kind == "std_sample"))
    divisor = xp.maximum(spread + xp.float32(eps), xp.float32(floor))
    # Where all are equal nothing is divided, and eps may be 0.
    centered = centered / xp.where(equal, xp.float32(1), divisor)
  elif kind == "leave_one_out":
    centered = centered * xp.float32(group_size / (group_size - 1))
  elif kind != "mean":
    raise UserError(f"advantage {kind!r} is not one of mean, std, std_sample, leave_one_out")
  return centered.reshape(-1)
