"""A check before training that the disk has room for a run's checkpoints."""

from __future__ import annotations

import os
import shutil

import jax
from etils import epath

from igpo_jax.config import Config
from igpo_jax.errors import UserError
from igpo_jax.io.amounts import in_bytes
from igpo_jax.io.jsonl import can_append
from igpo_jax.models import lora
from igpo_jax.parallel.distributed import from_first
from igpo_jax.types import Params

STATE_COPIES = 3  # the trained parameters and AdamW's two moments


def check_room(config: Config, workdir: epath.Path, params: Params, arms: int = 0) -> None:
  """Checks that the disk has room for the checkpoints of all stages. A collective.

  A stage keeps the latest `checkpoint.keep` checkpoints and perhaps the best one, and a new one is
  written before an old one is removed. Compression may make them smaller than is assumed here. The
  room on gs://, and quotas that the disk does not report, are not checked.

  Args:
    config: the run's config.
    workdir: the run's workdir.
    params: the model's parameters. Those that LoRA does not train are not in checkpoints.
    arms: number of RL stages besides the run's own (train/arms.py).

  Raises:
    UserError: on every process, if they do not fit.
  """
  stages = [stage for stage in config.stages if stage != "eval"]
  if not stages or not can_append(workdir):
    return
  size = STATE_COPIES * sum(x.nbytes for x in jax.tree.leaves(lora.split(params)[0]))
  count = (len(stages) + arms) * (config.checkpoint.keep + bool(config.checkpoint.best_metric)) + 1

  def look() -> None:
    there = _bytes_below(workdir / "checkpoints") + _bytes_below(workdir / "arms")
    free = shutil.disk_usage(workdir).free
    if free + there < count * size:
      raise UserError(
        f"workdir {workdir}: {in_bytes(free)} are free, and this run's checkpoints need up to "
        f"{in_bytes(count * size - there)} more ({count} of {in_bytes(size)}, one of them while it "
        f"is written): free some, lower checkpoint.keep={config.checkpoint.keep}, or choose "
        "another --workdir"
      )

  from_first(look)


def _bytes_below(folder: epath.Path) -> int:
  """Bytes of all files in a folder and below it; 0 if there is no such folder."""
  files = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
  return sum(os.path.getsize(file) for file in files if os.path.isfile(file))
