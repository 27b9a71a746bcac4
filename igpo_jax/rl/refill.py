"""Refilling: further batches of prompts until enough groups have an advantage.

This is DAPO's dynamic sampling (arXiv 2503.14476). The groups to learn from are chosen from those
of all processes, in the order of the prompts. So the choice does not depend on the number of
processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from igpo_jax.data.pipeline import PromptBatch
from igpo_jax.parallel.mesh import over_processes
from igpo_jax.rl.rows import Tries
from igpo_jax.rl.sampling import Samples


def has_advantage(advantages: np.ndarray) -> np.ndarray:
  """bool[P]: the groups in which some completion has an advantage other than 0, of f32[P,G]."""
  return np.any(advantages != 0, axis=1)


def first_live(live: np.ndarray, size: int) -> np.ndarray:
  """Indices of the first live groups; if they are too few, the first others fill them up.

  Args:
    live: bool[P].
    size: how many indices to return, at most P.

  Returns:
    i64[size], ascending.

  Example: `first_live(np.array([0, 1, 0, 1, 1], bool), 4) == [0, 1, 3, 4]`.
  """
  return np.sort(np.argsort(~live, kind="stable")[:size])


def enough(tried: Sequence[Tries]) -> bool:
  """Whether enough groups have an advantage: as many as one batch has prompts, over all processes.

  A collective: every process has to call it, and all get the same answer. So either all of them
  sample another batch, or none does.

  Args:
    tried: what this process has sampled for each batch so far.
  """
  live = sum(int(has_advantage(one.advantages).sum()) for one in tried)
  wanted = len(tried[0].batch.records)
  return bool(np.diff(over_processes(np.array([wanted, live]), np.sum))[0] >= 0)


def join_batches(batches: Sequence[PromptBatch], pad_id: int) -> PromptBatch:
  """Joins batches into one with all their prompts, padded on the left to the longest of them."""
  width = max(batch.tokens.shape[1] for batch in batches)

  def padded(x: np.ndarray, fill) -> np.ndarray:
    return np.pad(x, ((0, 0), (width - x.shape[1], 0)), constant_values=fill)

  return dataclasses.replace(
    batches[0],
    tokens=np.concatenate([padded(batch.tokens, pad_id) for batch in batches]),
    valid=np.concatenate([padded(batch.valid, False) for batch in batches]),
    records=[record for batch in batches for record in batch.records],
    traces=[trace for batch in batches for trace in batch.traces],
    answer_spans=[span for batch in batches for span in batch.answer_spans],
    row_id=np.concatenate([batch.row_id for batch in batches]),
    real=np.concatenate([batch.real for batch in batches]),
  )


def join_tries(parts: Sequence[Tries], pad_id: int) -> Tries:
  """Joins what was sampled for several batches, as if it had been sampled for one large batch."""
  if len(parts) == 1:
    return parts[0]
  firsts = np.cumsum([0, *(len(part.batch.records) for part in parts)])
  extras = [part.extra.take(np.arange(len(part.wrong))) for part in parts if part.extra is not None]
  return dataclasses.replace(
    parts[0],
    batch=join_batches([part.batch for part in parts], pad_id),
    own=Samples.join([part.own for part in parts]),
    extra=Samples.join(extras) if extras else None,
    wrong=np.concatenate([first + x.wrong for first, x in zip(firsts, parts, strict=False)]),
    source=np.concatenate([part.source for part in parts]),
    advantages=np.concatenate([part.advantages for part in parts]),
    shown=np.concatenate([part.shown for part in parts]),
    batches=len(parts),
  )


def choose(
  arrays: Mapping[str, np.ndarray], batches: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Chooses the groups to learn from, and gives this process its share of them.

  A collective if there are several batches: groups may then go from one process to another.

  Args:
    arrays: name -> [batches * P, ...], arrays of this process's groups; "advantages" is one.
    batches: number of batches of P prompts.

  Returns:
    (name -> [P, ...], the same arrays of this process's share; i64[P], the numbers of its groups,
    see `Tries.number_of`).
  """
  share, index = len(arrays["advantages"]) // batches, jax.process_index()
  if batches == 1:
    return dict(arrays), index * share + np.arange(share)

  def in_order(stacked, axis):
    """[processes, batches * P, ...] -> batch by batch, and in a batch process by process."""
    del axis
    x = stacked.reshape(len(stacked), batches, share, *stacked.shape[2:])
    return np.swapaxes(x, 0, 1).reshape(-1, *stacked.shape[2:])

  of_all = lambda x: over_processes(x, in_order)
  live = of_all(has_advantage(arrays["advantages"]))
  mine = first_live(live, share * jax.process_count())[index * share :][:share]
  return {name: of_all(x)[mine] for name, x in arrays.items()}, mine
