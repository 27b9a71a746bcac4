"""The NELBO of masked diffusion, as LLaDA trains it (docs/method.md#sft)."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.ops.masked import masked_sum
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.types import LM, Array, Params


def nelbo_sum(
  lm: LM, params: Params, noisy, masked, p, tokens, valid, response, dropout_key=None
) -> Array:
  """Sum over rows of sum(masked cross-entropy / p) / response length.

  Args:
    noisy, tokens: i32[B,T], the corrupted and the clean rows.
    masked, valid: bool[B,T].
    p: f32[B], the probability each row was masked with.
    response: bool[B,W], of the last W columns; the head is applied to these only.
    dropout_key: of the adapters' dropout; None turns it off.

  Returns:
    f32[].
  """
  dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
  h, _ = lm.hidden(params, noisy, valid, **dropout)
  read = lambda x: x[:, -response.shape[1] :]
  logp, _ = token_stats(lambda x: lm.head(params, x), read(h), read(tokens)[:, None])
  per_row = masked_sum(-logp[:, 0], read(masked), axis=1) / p
  return jnp.sum(per_row / jnp.maximum(jnp.sum(response, axis=1), 1))
