"""How many positions a row commits at each denoising step (docs/method.md#sampling)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from igpo_jax.types import Array

LAST_TIME = 1e-3  # where Dream's linear schedule ends; it begins at 1


def commits_at(masked: Array, steps: int, i: Array, schedule: str = "even", most: int = 0) -> Array:
  """How many positions a row commits at step i of a block (docs/method.md#sampling, (4)).

  "even" gives the remainder to the first steps. So a row with fewer masks than steps commits one
  at each step until none is left.

  Args:
    masked: i32[B], the masks in each row's block when its first step began.
    steps: denoising steps of a block.
    i: i32[] or i32[B], in 0 .. steps - 1.
    schedule: see `SamplerConfig`.
    most: the largest value of `masked`. Schedules other than "even" need it.

  Returns:
    i32[B].

  Example: 5 masks in 3 steps are committed 2, 2, 1.
  """
  if schedule == "even":
    return masked // steps + (i < masked % steps).astype(jnp.int32)
  return jnp.asarray(commit_table(schedule, most, steps))[masked, i]


def commits_until(masked: Array, steps: int, i: Array, schedule: str = "even", most: int = 0):
  """How many positions a row commits in the steps 0 .. i together: i32[B].

  Arguments as `commits_at`.

  Example: 5 masks in 3 steps: 2, 4 and 5 of them are committed by the end of steps 0, 1 and 2.
  """
  if schedule == "even":
    return (i + 1) * (masked // steps) + jnp.minimum(i + 1, masked % steps)
  return jnp.asarray(np.cumsum(commit_table(schedule, most, steps), axis=1))[masked, i]


def forwards_needed(masked: Array, steps: int, schedule: str = "even", most: int = 0) -> Array:
  """How many steps a row needs until no mask is left: i32[B]. Arguments as `commits_at`."""
  if schedule == "even":
    return jnp.minimum(masked, steps)
  needed = np.sum(commit_table(schedule, most, steps) > 0, axis=1, dtype=np.int32)
  return jnp.asarray(needed)[masked]


@functools.lru_cache(maxsize=32)
def commit_table(schedule: str, most: int, steps: int) -> np.ndarray:
  """How many positions are committed at each step, for every number of masks.

  Steps that would commit nothing are left out: the counts of a row come first, then zeros.

  Args:
    schedule: "linear", "rounded" or "full_block", see `SamplerConfig`.
    most: the largest number of masks of a block.
    steps: denoising steps of a block.

  Returns:
    i32[most + 1, steps]; row m is for a block that began with m masks.

  Example: with "linear", 24 masks in 24 steps are committed 1, 1, ..., 1, 2 in 23 steps. Dream's
  time ends at 0.001 rather than 0, so the first step's share is 0.999, which is cut off to 0.
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
  """f32[steps]: the probability that a mask is filled at each step of Dream's linear schedule.

  A step goes from time t to s < t, and fills a mask with probability 1 - s / t. The times are
  evenly spaced from 1 to 0.001. At the last step the probability is 1.
  """
  times = np.linspace(1, LAST_TIME, steps + 1, dtype=np.float32)
  return np.append(1 - times[1:-1] / times[:-2], np.float32(1)).astype(np.float32)
