"""Hidden states of corrupted rows, in the context that decoding would give them.

The NELBO and the likelihood estimators are computed from them.
"""

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
  """The model's hidden states for rows in which some tokens are masked.

  When a block-causal model decodes a block, all earlier blocks are complete. So it is given both
  copies of each row: a noisy block sees the clean blocks before it, whatever is masked in them.

  Args:
    lm: the model.
    params: its parameters.
    noisy: i32[B,T], the rows with masks.
    clean: i32[B,T], the same rows without masks; only block-causal models read them.
    valid: bool[B,T], False on padding.
    dropout_key: PRNG key for the dropout of adapters; None turns it off.

  Returns:
    (h [B,T,D] of the noisy rows, ready for `lm.head`; for a model with experts, how evenly tokens
    are spread over them, else None).
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
