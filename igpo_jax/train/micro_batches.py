"""Gradients over micro-batches, and one optimizer step.

A batch is cut into M micro-batches along its first axis, and they are scanned. Every loss is a sum
of numerators over a denominator without gradient, so the gradients of the micro-batches add up to
that of the batch. An update whose loss or gradient is not finite only counts as skipped.
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
  """Numbers for metrics that are gathered over micro-batches.

  Attributes:
    added: a tree of f32[], which are summed over micro-batches.
    most: a tree of f32[], of which the largest over micro-batches is kept.
  """

  added: dict[str, Any]
  most: dict[str, Any]

  def merge(self, other: Sums) -> Sums:
    """The numbers of two groups of micro-batches together."""
    return Sums(
      jax.tree.map(jnp.add, self.added, other.added),
      jax.tree.map(jnp.maximum, self.most, other.most),
    )


def split_micro_batches(tree: Any, count: int) -> Any:
  """Splits every array of a tree into M micro-batches: [X, ...] -> [M, X/M, ...].

  Micro-batch m has the rows m, m + M, m + 2 M, ... So each of them is spread over all devices;
  contiguous slices would be on a few of them.

  Args:
    tree: arrays [X, ...].
    count: M; divides X.
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
  """Computes `fn(tree)` one micro-batch at a time, to bound its memory.

  Args:
    fn: maps arrays [X, ...] to arrays [X, ...]; each row of the result depends on its own row only.
    tree: arrays [X, ...].
    count: M, the number of micro-batches; divides X.

  Returns:
    Arrays [X, ...], with rows in their order.
  """
  if count == 1:
    return fn(tree)
  out = jax.lax.map(fn, split_micro_batches(tree, count))
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), out)


def accumulate(
  loss_sums: Callable[[Params, Any], tuple[Array, Sums]], params: Params, slices: Any
) -> tuple[Array, Sums, Params]:
  """Sums a loss's numerator and its gradient over M micro-batches.

  Args:
    loss_sums: `loss_sums(params, micro_batch) -> (numerator f32[], Sums)`.
    params: the parameters that are differentiated.
    slices: arrays [M, ...], of `split_micro_batches`.

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

  numerator, sums = jax.eval_shape(loss_sums, params, first)
  full = lambda tree, value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)
  start = Sums(full(sums.added, 0), full(sums.most, -jnp.inf))
  total, _ = jax.lax.scan(step, (full(numerator, 0), start, full(params, 0)), slices)
  return total


def apply_gradient(
  state: TrainState, optimizer: optax.GradientTransformation, loss: Array, grads: Params
) -> tuple[TrainState, dict[str, Array]]:
  """Makes one optimizer step, or skips it if the loss or the gradient's norm is not finite.

  Args:
    state: the state before the step.
    optimizer: the one that made `state.opt_state`.
    loss: f32[].
    grads: the loss's gradient, with the structure of `state.params`.

  Returns:
    (the state after the step; metrics loss, grad_norm, skipped and skipped_in_a_row).
  """
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
