"""How an update changed each token's probability, for samples.jsonl (`log.token_stats`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from igpo_jax.config import Config
from igpo_jax.parallel.mesh import local_rows, over_processes
from igpo_jax.parallel.sharding import constrain
from igpo_jax.rl.estimate import Estimate, estimate, groups_of, sizes_of
from igpo_jax.rl.hint_filter import entropy_filter
from igpo_jax.rl.methods import estimator_of
from igpo_jax.train.micro_batches import map_micro_batches
from igpo_jax.types import LM, Array, Params, Rollout

Stats = dict[str, Array]


def make_token_stats(lm: LM, config: Config) -> Callable[[Params, Rollout, Array], Stats]:
  """Makes a jitted function (params, rollout, keys) -> name -> [P,G,L].

  They are read in the views of the first inner update:
    logp, entropy: f32, means over the views that score a position, in nats; 0 where none does.
    scored: bool, whether a view scores the position.
    kept: bool, whether it is in the loss and not dropped by the entropy filter, by these entropies.
  """
  rl, estimator, sizes = config.rl, estimator_of(config), sizes_of(config, lm)

  @jax.jit
  def stats(params: Params, rollout: Rollout, keys: Array) -> Stats:
    groups = groups_of(rollout, lm.stop_ids, rl.loss_region)

    def read(part):
      out: Estimate = estimate(lm, params, estimator, *part, 0, sizes, rl.views_at_once)
      return out.token_logp, out.token_entropy, out.scored

    logp, entropy, scored = map_micro_batches(read, (groups, keys), rl.micro_batches)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    kept = entropy_filter(
      flat(entropy), flat(groups.region & scored), flat(groups.hinted),
      config.objective.entropy_keep,
    )  # fmt: skip
    out = {"logp": logp, "entropy": entropy, "scored": scored, "kept": kept.reshape(scored.shape)}
    # Each process takes its own groups from the result (`local_rows`), as it gave them.
    return {name: constrain(x, "act_batch", None, None) for name, x in out.items()}

  return stats


def by_group(
  numbers: np.ndarray, before: Stats, after: Stats, of_all: bool = False
) -> Mapping[int, dict]:
  """The statistics of each group, as docs/samples.md describes them.

  Args:
    numbers: i64[X], numbers of the groups that this process learned from (`Exploration.numbers`).
    before: statistics under the policy that sampled, [X,G,L] each.
    after: those under the policy after the last inner update.
    of_all: include the groups of all processes. It is then a collective.

  Returns:
    number of a group -> name -> [G,L].
  """
  old, new = local_rows(before), local_rows(after)
  scored = old["scored"]
  only = lambda x: np.where(scored, x, np.nan)
  arrays = {
    "logp": only(old["logp"]),
    "entropy": only(old["entropy"]),
    "ratio": only(np.exp(new["logp"] - old["logp"])),
    "kept": old["kept"],
  }
  if of_all:
    joined = lambda x, axis: x.reshape(-1, *x.shape[2:])
    numbers = over_processes(numbers, joined)
    arrays = {name: over_processes(x, joined) for name, x in arrays.items()}
  return {
    int(number): {name: values[row] for name, values in arrays.items()}
    for row, number in enumerate(numbers)
  }
