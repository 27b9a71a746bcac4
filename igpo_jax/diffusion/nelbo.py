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
  """The sum over rows of sum(masked cross-entropy) / (p * response length): (18) in the method.

  It is a sum and not a mean, so that the sums of micro-batches can be added up.

  Args:
    lm: the model.
    params: its parameters.
    noisy, tokens: i32[B,T], the corrupted and the clean rows.
    masked: bool[B,T], the positions that were corrupted; all are in the response.
    p: f32[B], the probability that each row's positions were masked with.
    valid: bool[B,T], False on padding.
    response: bool[B,W], the response's positions among the last W columns. The head is applied to
      these columns only.
    dropout_key: PRNG key for the dropout of adapters; None turns it off.

  Returns:
    (f32[], metrics {name: f32[]}). A model with experts adds B times its load-balancing loss times
    `lm.router_loss` to the sum, and has the metrics of `Balance.metrics`; others have none.
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
