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
  """update(state, frozen, tokens, valid, response, key) -> (state, metrics), jitted.

  The state is donated. `frozen` is what is not trained: the base under LoRA, else {}. `tokens`
  and `valid` are [B,T], `response` bool[B,W] is of their last W columns: W = T may be, but the
  head is then applied to the prompts, too. Adapters have dropout if `lm` has; its patterns, unlike
  everything else, differ with the number of micro-batches. Metrics of routers are means over them.

  Args:
    shardings: of the state that goes in and comes out; None leaves them to the compiler.
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
