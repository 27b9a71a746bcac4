"""Orbax checkpoints of a stage: the last few, and the best by a metric."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from igpo_jax.cli import UserError


def absolute(path: epath.PathLike) -> epath.Path:
  """The path from the root; a gs:// path, which epath's own method would spoil, as it is."""
  path = epath.Path(path)
  return path if "://" in str(path) else path.absolute()


class Checkpoints:
  """The checkpoints of one stage, in `directory`/<step>.

  Saving is synchronous: when `save` returns, the checkpoint is complete under its
  final name, and what was reported as saved survives any kill.

  Args:
    directory: made if need be; local or gs://.
    keep: how many of the latest to keep.
    best_metric: name of the metric whose best checkpoint is kept besides; "" for none.
  """

  def __init__(self, directory: epath.PathLike, keep: int = 2, best_metric: str = ""):
    self.best_metric = best_metric
    rules: list[policies.PreservationPolicy] = [policies.LatestN(n=keep)]
    metric_of = (lambda metrics: metrics[best_metric]) if best_metric else None
    if metric_of:
      rules.append(
        policies.BestN(get_metric_fn=metric_of, n=1, keep_checkpoints_without_metrics=False)
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(rules),
      best_fn=metric_of,  # else metrics are not written, and a continued run forgets its best
      enable_async_checkpointing=False,
      step_prefix=None,
    )
    self._manager = ocp.CheckpointManager(absolute(directory), options=options)

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint; None where there is none."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step of the best checkpoint; None where none has the metric."""
    return self._manager.best_step() if self.best_metric else None

  def steps(self) -> list[int]:
    """Steps of all checkpoints kept, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
    """Writes a pytree of arrays; `metrics` ranks it if it has the best metric."""
    ranked = {k: v for k, v in (metrics or {}).items() if k == self.best_metric}
    self._manager.save(step, args=ocp.args.StandardSave(state), metrics=ranked or None, force=True)
    self._manager.wait_until_finished()

  def restore(self, step: int, like: Any) -> Any:
    """The pytree saved at `step`, with the shapes, dtypes and shardings of `like`.

    Raises:
      UserError: there is no such checkpoint, or its arrays do not fit `like`.
    """
    directory = self._directory(step)
    try:
      return self._manager.restore(step, args=ocp.args.StandardRestore(like))
    except (ValueError, KeyError) as error:
      raise UserError(f"the checkpoint {directory} does not fit this config: {error}") from error

  def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Some entries of the pytree saved at `step`, as `restore`; the others are not read.

    Args:
      like: name -> arrays or jax.ShapeDtypeStructs with a sharding.

    Raises:
      UserError: as `restore`.
    """
    path = self._directory(step) / "default"
    reader = ocp.PyTreeCheckpointHandler()
    missing = _leaves(like) - _leaves(reader.metadata(path).tree)
    if missing:  # Orbax would leave them as they are
      raise UserError(f"the checkpoint {path} has no {', '.join(sorted(missing)[:3])}")
    args = ocp.checkpoint_utils.construct_restore_args(like)
    try:
      return reader.restore(
        path, args=ocp.args.PyTreeRestore(item=like, restore_args=args, partial_restore=True)
      )
    except (ValueError, KeyError) as error:
      raise UserError(f"the checkpoint {path} does not fit this config: {error}") from error
    finally:
      reader.close()

  def _directory(self, step: int) -> epath.Path:
    """Where the checkpoint of `step` is.

    Raises:
      UserError: there is none.
    """
    if step not in self._manager.all_steps():
      self._manager.reload()  # another process may have written it
    if step not in self._manager.all_steps():
      raise UserError(f"no checkpoint of step {step} in {self._manager.directory}")
    return epath.Path(self._manager.directory) / str(step)

  def close(self) -> None:
    """Releases the manager's threads."""
    self._manager.close()


def _leaves(tree: Any) -> set[str]:
  """Names of a tree's arrays, such as "params/blocks/q_proj/kernel"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  }
