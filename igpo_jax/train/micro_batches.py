"""Gradients over micro-batches, and one optimizer step.

A batch is cut into M micro-batches along its first axis and scanned. The gradient of the sum is the
sum of the gradients, because every loss is a sum of numerators over a denominator that carries no
gradient. An update whose loss or gradient is not finite changes nothing but the count of skipped
updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from igpo_jax.parallel.sharding import constrain
from igpo_jax.types import Array, Params, TrainState


class Sums(NamedTuple):
  """What is gathered beside the gradient.

  Attributes:
    added: a tree of f32[], summed over micro-batches.
    most: a tree of f32[], of each the greatest over micro-batches.
  """

  added: dict[str, Any]
  most: dict[str, Any]

  def merge(self, other: Sums) -> Sums:
    """Of both together."""
    return Sums(
      jax.tree.map(jnp.add, self.added, other.added),
      jax.tree.map(jnp.maximum, self.most, other.most),
    )


def split_micro_batches(tree: Any, count: int) -> Any:
  """[X, ...] -> [M, X/M, ...] for every array, the parts interleaved over devices.

  Taking every M-th row keeps each micro-batch spread over all devices, where
  contiguous slices would sit on a few of them.
  """

  def split(x):
    x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
    return (
      x
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else constrain(x, None, "act_batch", *(None,) * (x.ndim - 2))
    )

  return jax.tree.map(split, tree)


def map_micro_batches(fn: Callable[[Any], Any], tree: Any, count: int) -> Any:
  """`fn(tree)`, made a micro-batch at a time to bound its memory; rows come back in their order.

  Args:
    fn: maps arrays [X, ...] to arrays [X, ...], each row for itself.
    tree: of arrays [X, ...].
    count: M.
  """
  if count == 1:
    return fn(tree)
  out = jax.lax.map(fn, split_micro_batches(tree, count))
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), out)


def accumulate(
  loss_sums: Callable[[Params, Any], tuple[Array, Sums]], params: Params, slices: Any
) -> tuple[Array, Sums, Params]:
  """Sums of the loss's numerator and of its gradient over M micro-batches.

  Args:
    loss_sums: (params, micro-batch) -> (numerator f32[], what is gathered beside it).
    params: differentiated.
    slices: tree of [M, ...].

  Returns:
    (numerator, sums, gradient).
  """
  value_and_grad = jax.value_and_grad(loss_sums, has_aux=True)
  first = jax.tree.map(lambda x: x[0], slices)
  if jax.tree.leaves(slices)[0].shape[0] == 1:
    (numerator, sums), grads = value_and_grad(params, first)
    return numerator, sums, grads

  def step(total, part):
    numerator, sums, grads = total
    (more, other), other_grads = value_and_grad(params, part)
    return (numerator + more, sums.merge(other), jax.tree.map(jnp.add, grads, other_grads)), None

  (numerator, sums), grads = jax.eval_shape(value_and_grad, params, first)
  full = lambda tree, value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)
  start = Sums(full(sums.added, 0), full(sums.most, -jnp.inf))
  total, _ = jax.lax.scan(step, (full(numerator, 0), start, full(grads, 0)), slices)
  return total


def apply_gradient(
  state: TrainState, optimizer: optax.GradientTransformation, loss: Array, grads: Params
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step, or none if the loss or the gradient's norm is not finite."""
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  skipped = 1 - finite.astype(jnp.int32)
  state = TrainState(
    step=state.step + 1,
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
    skipped=state.skipped + skipped,
    skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
  )
  metrics = {
    "loss": loss,
    "grad_norm": norm,
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
  }
  return state, metrics


def shardings_of(state: TrainState) -> TrainState:
  """The sharding of every array of `state`.

  Passed as `out_shardings`, so that the returned state has equal (not merely equivalent)
  shardings and the second call does not recompile.
  """
  return jax.tree.map(lambda x: x.sharding, state)
