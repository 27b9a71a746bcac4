"""How evenly the tokens of a batch are spread over the experts of each layer."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpo_jax.types import Array, Routing


class Balance(NamedTuple):
  """How evenly the experts worked.

  Attributes:
    loss: f32[], the load-balancing loss, see `balance`.
    load: f32[N,X], the share of a layer's work that each expert did. Without gradient.
  """

  loss: Array
  load: Array

  def metrics(self) -> dict[str, Array]:
    """Metrics, f32[] each.

    router_loss: the load-balancing loss.
    router_busiest: the work of a layer's busiest expert as a multiple of an equal share, from 1 to
      X; mean over layers.
    router_idle: the share of experts that did no work.
    """
    load = self.load
    return {
      "router_loss": self.loss,
      "router_busiest": jnp.mean(jnp.max(load, axis=-1)) * load.shape[-1],
      "router_idle": jnp.mean(load == 0),
    }


def balance(routing: Routing, valid: Array | None) -> Balance:
  """Measures how evenly positions were spread over experts.

  The loss of a layer is X * sum over experts of (share of the work) * (mean probability). It is 1
  if all experts have equal shares and probabilities, and up to X if one has everything. The result
  is the mean over layers (Switch Transformer, arXiv 2101.03961, equation 4).

  Args:
    routing: which experts worked on which position.
    valid: bool[B,T], the positions that count; None: all.
  """
  probabilities, experts = routing
  layers, _, _, count = probabilities.shape
  here = jnp.ones(experts.shape[1:3]) if valid is None else valid.astype(jnp.float32)
  positions = jnp.maximum(jnp.sum(here), 1.0)
  # Counted, not summed over [N,B,T,k,X], which can be a gigabyte.
  counts = jnp.zeros((layers, count)).at[jnp.arange(layers)[:, None, None, None], experts]
  load = counts.add(here[None, :, :, None]) / (positions * experts.shape[-1])
  mean = jnp.einsum("nbtx,bt->nx", probabilities, here) / positions
  load = jax.lax.stop_gradient(load)
  return Balance(count * jnp.sum(load * mean) / layers, load)
