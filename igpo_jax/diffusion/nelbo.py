"""The NELBO of masked diffusion, as LLaDA trains it (docs/method.md#sft)."""

from __future__ import annotations

import jax.numpy as jnp

from igpo_jax.diffusion.noisy import noisy_hidden
from igpo_jax.ops.masked import masked_sum
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.types import LM, Array, Params


def nelbo_sum(
  lm: LM, params: Params, noisy, masked, p, tokens, valid, response, dropout_key=None
) -> tuple[Array, dict[str, Array]]:
  """Sum over rows of sum(masked cross-entropy / p) / response length.

  Args:
    noisy, tokens: i32[B,T], the corrupted and the clean rows.
    masked, valid: bool[B,T].
    p: f32[B], the probability each row was masked with.
    response: bool[B,W], of the last W columns; the head is applied to these only.
    dropout_key: of the adapters' dropout; None turns it off.

  Returns:
    (f32[], metrics f32[]). Of a model with experts the sum has the load-balancing loss times
    `lm.router_loss`, once for each row, and the metrics are `Balance.metrics`; else there are none.
  """
  h, routers = noisy_hidden(lm, params, noisy, tokens, valid, dropout_key)
  read = lambda x: x[:, -response.shape[1] :]
  logp, _ = token_stats(lambda x: lm.head(params, x), read(h), read(tokens)[:, None])
  per_row = masked_sum(-logp[:, 0], read(masked), axis=1) / p
  nelbo = jnp.sum(per_row / jnp.maximum(jnp.sum(response, axis=1), 1))
  if routers is None:
    return nelbo, {}
  if lm.router_loss:
    nelbo += len(noisy) * lm.router_loss * routers.loss
  return nelbo, routers.metrics()
