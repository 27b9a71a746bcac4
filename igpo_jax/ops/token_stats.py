"""Log-probabilities and entropies per token, without ever holding all logits.

The logits of one row, [L,V] with L = 256 and V = 126,464, take 130 MB in float32. Both statistics
are reductions over V, so the head is applied to a few positions at a time, and the backward pass
recomputes the logits instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from igpo_jax.parallel.sharding import constrain, num_shards
from igpo_jax.types import AnyArray, Array

LOGITS_AT_ONCE = 2**26  # elements on one device: 256 MiB in float32


def token_stats(
  head: Callable[[Array], Array],
  h: Float[AnyArray, "X L D"],
  targets: Int[AnyArray, "X G L"],
  chunk: int = 0,
) -> tuple[Float[Array, "X G L"], Float[Array, "X L"]]:
  """The log-probability of every target, and the entropy of every position.

  Args:
    head: maps hidden states [...,D] to logits f32[...,V].
    h: [X,L,D], hidden states of X rows of L positions.
    targets: i32[X,G,L]. The G sequences of a row are read from the same distributions.
    chunk: how many positions the head is applied to at a time. 0 chooses a chunk whose logits are
      at most `LOGITS_AT_ONCE` elements on a device.

  Returns:
    (log-probabilities f32[X,G,L], entropies in nats f32[X,L]). Entropies carry no gradient.
  """
  x, length, _ = h.shape
  if chunk == 0:
    vocab = jax.eval_shape(head, h[:1, :1]).shape[-1]
    # Only the rows that one device holds count. If all rows did, each further device would make the
    # chunks shorter, and the head's weights are gathered once for every chunk.
    chunk = max(1, LOGITS_AT_ONCE * num_shards("act_batch", "act_vocab") // (x * vocab))
  chunk = min(chunk, length)
  chunks = -(-length // chunk)
  padding = chunks * chunk - length
  h = jnp.pad(h, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, 0), (0, padding)))

  @jax.checkpoint
  def stats(h, targets):  # [X,c,D], [X,G,c]
    logits = constrain(head(h), "act_batch", "act_length", "act_vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)  # [X,c]
    picked = jnp.take_along_axis(logits, jnp.swapaxes(targets, 1, 2), axis=-1)  # [X,c,G]
    log_p = jnp.swapaxes(picked - log_z[..., None], 1, 2)
    frozen = jax.lax.stop_gradient(logits)
    p = jax.nn.softmax(frozen, axis=-1)
    entropy = jax.lax.stop_gradient(log_z) - jnp.sum(p * frozen, axis=-1)
    return log_p, entropy

  if chunks == 1:
    return stats(h, targets)
  h = jnp.moveaxis(h.reshape(x, chunks, chunk, -1), 1, 0)
  targets = jnp.moveaxis(targets.reshape(x, -1, chunks, chunk), 2, 0)
  log_p, entropy = jax.lax.map(lambda args: stats(*args), (h, targets))
  log_p = jnp.moveaxis(log_p, 0, 2).reshape(x, -1, chunks * chunk)
  entropy = jnp.moveaxis(entropy, 0, 1).reshape(x, chunks * chunk)
  return log_p[..., :length], entropy[..., :length]
