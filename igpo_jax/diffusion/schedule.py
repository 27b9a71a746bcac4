"""How many positions a row commits at each denoising step (docs/method.md#sampling)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from igpo_jax.types import Array

LAST_TIME = 1e-3  # of Dream's linear schedule, which begins at 1


def commits_at(masked: Array, steps: int, i: Array, schedule: str = "even", most: int = 0) -> Array:
  """The row's share of its masks at step i of a block's `steps`: i32[B].

  `masked` i32[B] is what the block held when it began. "even" gives the remainder to the
  first steps, so a row with fewer masks than steps commits one at a time and is
  then left alone. Example: 5 masks in 3 steps are committed 2, 2, 1.

  Args:
    i: i32[] or i32[B].
    schedule: see `SamplerConfig`.
    most: how many masks a block may hold, for the others than "even".
  """
  if schedule == "even":
    return masked // steps + (i < masked % steps).astype(jnp.int32)
  return jnp.asarray(commit_table(schedule, most, steps))[masked, i]


def commits_until(masked: Array, steps: int, i: Array, schedule: str = "even", most: int = 0):
  """The row's shares of the steps 0 .. i together: i32[B]. See `commits_at`.

  Example: of 5 masks in 3 steps, 2, 4 and 5 are committed until the steps 0, 1 and 2.
  """
  if schedule == "even":
    return (i + 1) * (masked // steps) + jnp.minimum(i + 1, masked % steps)
  return jnp.asarray(np.cumsum(commit_table(schedule, most, steps), axis=1))[masked, i]


def forwards_needed(masked: Array, steps: int, schedule: str = "even", most: int = 0) -> Array:
  """Steps in which a row with so many masks commits anything: i32[B]."""
  if schedule == "even":
    return jnp.minimum(masked, steps)
  needed = np.sum(commit_table(schedule, most, steps) > 0, axis=1, dtype=np.int32)
  return jnp.asarray(needed)[masked]


@functools.lru_cache(maxsize=32)
def commit_table(schedule: str, most: int, steps: int) -> np.ndarray:
  """i32[most + 1, steps]: what a block that began with 0 .. `most` masks commits at each step.

  Steps that would commit nothing are left out, so the numbers of a row are followed by zeros.

  Example: 24 masks in 24 steps of "linear" are committed 1, 1, ..., 1, 2 in 23 steps: Dream's
  time ends at 0.001, and what is left of its first step, 0.999, is cut off.
  """
  out = np.zeros((most + 1, steps), np.int32)
  for masked in range(most + 1):
    counts = [n for n in _counts(schedule, masked, most, steps) if n]
    out[masked, : len(counts)] = counts
  assert (out.sum(axis=1) == np.arange(most + 1)).all()
  return out


def _counts(schedule: str, masked: int, most: int, steps: int) -> list[int]:
  """One row of `commit_table`, before the zeros go."""
  counts, left = [], masked
  for i in range(steps):
    if schedule == "full_block":
      count = most // steps + (i < most % steps)
    elif schedule == "linear":
      count = left if i == steps - 1 else int(np.float32(left) * unmasking_chances(steps)[i])
    else:  # "rounded": the same line down to 0, to the nearest even number
      one, t, s = (np.float32(x / steps) for x in (steps, steps - i, steps - i - 1))
      gone = one - (one - (one - s)) / (one - (one - t))
      count = int(np.rint(np.float32(left) * gone))
    counts.append(min(count, left))
    left -= counts[-1]
  return counts


@functools.lru_cache(maxsize=32)
def unmasking_chances(steps: int) -> np.ndarray:
  """f32[steps]: the chance of a mask to be filled at each step of Dream's linear schedule.

  1 - s / t between two times t > s that lie evenly from 1 to 0.001; 1 at the last step.
  """
  times = np.linspace(1, LAST_TIME, steps + 1, dtype=np.float32)
  return np.append(1 - times[1:-1] / times[:-2], np.float32(1)).astype(np.float32)
