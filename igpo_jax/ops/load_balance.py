"""How evenly the work of a layer is shared out over its experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from igpo_jax.types import Array, Routing


def balance(routing: Routing, valid: Array | None) -> tuple[Array, Array]:
  """The load-balancing loss f32[], and each expert's share of the work f32[N,X].

  Of every layer X * sum of (share of the work) * (mean probability), over the positions that
  are valid: 1 where all experts have the same of both, up to X where one has everything
  (Switch Transformer, arXiv 2101.03961, equation 4). The mean over the layers.
  """
  probabilities, experts = routing
  layers, _, _, count = probabilities.shape
  here = jnp.ones(experts.shape[1:3]) if valid is None else valid.astype(jnp.float32)
  positions = jnp.maximum(jnp.sum(here), 1.0)
  chosen = jax.nn.one_hot(experts, count, dtype=jnp.float32)  # [N,B,T,k,X]
  load = jnp.einsum("nbtkx,bt->nx", chosen, here) / (positions * experts.shape[-1])
  mean = jnp.einsum("nbtx,bt->nx", probabilities, here) / positions
  return count * jnp.sum(jax.lax.stop_gradient(load) * mean) / layers, load
