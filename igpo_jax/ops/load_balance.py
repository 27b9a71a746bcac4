"""How evenly the work of a layer is shared out over its experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpo_jax.types import Array, Routing


class Balance(NamedTuple):
  """How evenly the experts of a batch worked.

  Attributes:
    loss: f32[], the load-balancing loss.
    load: f32[N,X], each expert's share of its layer's work; without gradient.
  """

  loss: Array
  load: Array

  def metrics(self) -> dict[str, Array]:
    """`router_loss`; `router_busiest`, the work of a layer's busiest expert as a multiple of an
    equal share, 1 to X, mean over layers; `router_idle`, the share of experts without any."""
    load = self.load
    return {
      "router_loss": self.loss,
      "router_busiest": jnp.mean(jnp.max(load, axis=-1)) * load.shape[-1],
      "router_idle": jnp.mean(load == 0),
    }


def balance(routing: Routing, valid: Array | None) -> Balance:
  """Of the positions of a batch that are valid, bool[B,T]; None: of all.

  The loss is of every layer X * sum of (share of the work) * (mean probability), and then the mean
  over layers: 1 where all experts have the same of both, up to X where one has everything (Switch
  Transformer, arXiv 2101.03961, equation 4).
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
