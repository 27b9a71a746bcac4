"""The jitted update of supervised fine-tuning; the state is donated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from igpo_jax.config import SFTConfig
from igpo_jax.diffusion.corrupt import mask_rows
from igpo_jax.diffusion.nelbo import nelbo_sum
from igpo_jax.models import lora
from igpo_jax.train.micro_batches import Sums, accumulate, apply_gradient, split_micro_batches
from igpo_jax.types import LM, Params, TrainState


def make_sft_update(
  lm: LM,
  optimizer: optax.GradientTransformation,
  cfg: SFTConfig,
  shardings: TrainState | None = None,
):
  """Makes the jitted update of fine-tuning.

  Args:
    lm: the model.
    optimizer: makes an update of the trained parameters from a gradient.
    cfg: see `SFTConfig`.
    shardings: shardings of the state that goes in and comes out; None leaves them to the compiler.

  Returns:
    `update(state, frozen, tokens, valid, response, key) -> (state, metrics)`. `state` is donated.
    `frozen` are the parameters that are not trained: the base under LoRA, else {}. `tokens` i32 and
    `valid` bool are [B,T]. `response` bool[B,W] is for their last W columns, to which the head is
    applied. `key` draws the masks and the adapters' dropout. Only the dropout's patterns depend on
    the number of micro-batches. Metrics of routers are means over micro-batches.
  """

  def update(state: TrainState, frozen: Params, tokens, valid, response, key):
    rows, length = tokens.shape
    # Drawn for the whole batch, so that the masks do not depend on the micro-batches.
    of_row = jnp.pad(response, ((0, 0), (length - response.shape[1], 0)))
    noisy, masked, p = mask_rows(key, tokens, of_row, lm.mask_id, cfg.eps)
    dropout_keys = jax.random.split(jax.random.fold_in(key, 1), rows)
    batch = (noisy, masked, p, tokens, valid, response, dropout_keys)

    def loss_sums(trainable, part):
      *part, keys = part
      loss, routers = nelbo_sum(lm, lora.combine(frozen, trainable), *part, keys[0])
      return loss / rows, Sums({k: v / cfg.micro_batches for k, v in routers.items()}, {})

    slices = split_micro_batches(batch, cfg.micro_batches)
    loss, routers, grads = accumulate(loss_sums, state.params, slices)
    state, metrics = apply_gradient(state, optimizer, loss, grads)
    return state, metrics | routers.added | {"masked": jnp.sum(masked) / jnp.sum(response)}

  return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
