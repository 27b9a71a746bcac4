"""The states of corrupted rows, as the model sees them when it decodes: for likelihoods."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.ops.load_balance import Balance, balance
from igpo_jax.types import LM, Array, Params


def noisy_hidden(
  lm: LM,
  params: Params,
  noisy: Array,
  clean: Array,
  valid: Array,
  dropout_key: Array | None = None,
) -> tuple[Array, Balance | None]:
  """(h [B,T,D] of the noisy rows; of a model with experts, how evenly they share the work).

  A block-causal model sees clean blocks before a noisy one, whatever is masked there: it is given
  both copies of the rows.

  Args:
    noisy, clean: i32[B,T], rows with masks, and what they stand for.
    valid: bool[B,T].
    dropout_key: of the adapters' dropout; None turns it off.
  """
  dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
  if lm.routed is not None:
    copies = {"clean": clean} if lm.block_length else {}
    h, routing = lm.routed(params, noisy, valid, **copies, **dropout)
    both = jnp.concatenate([valid, valid], axis=1) if lm.block_length else valid
    return h, balance(routing, both)
  if lm.block_length:
    assert lm.hidden_of_two is not None
    return lm.hidden_of_two(params, noisy, clean, valid, **dropout), None
  return lm.hidden(params, noisy, valid, **dropout)[0], None
