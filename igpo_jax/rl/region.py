"""Where a completion ends, and which positions are in the loss (docs/method.md#objective)."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.types import Array


def completion_length(completion: Array, stop_ids: tuple[int, ...]) -> Array:
  """|o_i|: the number of tokens up to and including the first stop token; L if there is none.

  Args:
    completion: i32[...,L].
    stop_ids: tokens that end a completion.

  Returns:
    i32[...].

  Example: with the stop token 0, `completion_length([[5, 0, 0], [5, 5, 5]], (0,)) == [2, 3]`.
  """
  return jnp.sum(_through_stop(completion, stop_ids), axis=-1, dtype=jnp.int32)


def loss_region(completion: Array, stop_ids: tuple[int, ...], kind: str) -> Array:
  """Which completion positions are in the loss, before the entropy filter.

  Args:
    completion: i32[...,L].
    stop_ids: tokens that end a completion.
    kind: "through_eos": positions up to and including the first stop token; "all": all L positions
      (official code).

  Returns:
    bool[...,L].
  """
  if kind == "all":
    return jnp.ones(completion.shape, bool)
  return _through_stop(completion, stop_ids)


def _through_stop(completion: Array, stop_ids: tuple[int, ...]) -> Array:
  stops = jnp.isin(completion, jnp.asarray(stop_ids)).astype(jnp.int32)
  return jnp.cumsum(stops, axis=-1) - stops == 0
