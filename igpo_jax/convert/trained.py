"""The parameters of a training checkpoint, compared with the checksums that it has of them."""

from __future__ import annotations

import math

import numpy as np
from etils import epath

from igpo_jax.checkpoint import ARRAYS, BITS, check_files, damaged, digests_of, kept_sums, mix
from igpo_jax.convert.arrays import Index, OrbaxArrays

PART_BYTES = 64 * 2**20  # what is read at a time


class TrainedArrays(OrbaxArrays):
  """The parameters of a step of a run.

  Args:
    step: WORKDIR/checkpoints/STAGE/STEP.

  Raises:
    UserError: no such checkpoint, or a damaged one.
  """

  def __init__(self, step: epath.Path):
    check_files(step)
    super().__init__(step / ARRAYS, ("params",))
    self.step = step

  def check(self) -> None:
    """Reads every array once.

    Raises:
      DamagedCheckpoint: they are not what was saved.
    """
    sums = {f"params/{name}": self._sums(name) for name in self.shapes}
    if kept_sums(self.step).get("params") != digests_of(sums).get("params"):
      raise damaged(self.step, "params is not what was saved")

  def _sums(self, name: str) -> tuple[int, int]:
    """As `checkpoint.bit_sums`."""
    dtype, total, mixed = self.dtypes[name], 0, 0
    for index in _parts(self.shapes[name], dtype.itemsize):
      bits = self.read(name, index).view(BITS[dtype.itemsize]).astype(np.uint32)
      total += int(np.sum(bits, dtype=np.uint32))
      mixed += int(np.sum(mix(bits), dtype=np.uint32))
    return total % 2**32, mixed % 2**32


def _parts(shape: tuple[int, ...], itemsize: int) -> list[Index]:
  """An array cut along its first axis."""
  if not shape:
    return [()]
  step = max(PART_BYTES // max(math.prod(shape[1:]) * itemsize, 1), 1)
  whole = tuple(slice(0, n) for n in shape[1:])
  return [(slice(at, min(at + step, shape[0])), *whole) for at in range(0, shape[0], step)]
