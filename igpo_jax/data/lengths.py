"""Statistics of the lengths of many texts, and proposals for a length that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

STEP = 64  # proposed lengths are multiples of this, or of 8 up to this length


@dataclasses.dataclass(frozen=True)
class Lengths:
  """The lengths of n texts, in tokens.

  Attributes:
    values: i64[n], ascending.
  """

  values: np.ndarray

  @classmethod
  def of(cls, lengths: Sequence[int]) -> Lengths:
    """The statistics of these lengths, in any order."""
    return cls(np.sort(np.asarray(lengths, np.int64)))

  @property
  def longest(self) -> int:
    """The largest length; 0 without any text."""
    return int(self.values[-1]) if len(self.values) else 0

  def beyond(self, limit: int) -> int:
    """The number of texts that are longer than `limit` tokens."""
    return int((self.values > limit).sum())

  def __str__(self) -> str:
    """ "median 45, 90% up to 80, 99% up to 119, longest 130", or "16 each"."""
    if not len(self.values):
      return "no"
    if self.values[0] == self.longest:
      return f"{self.longest} each"
    median, ninety, most = np.percentile(self.values, (50, 90, 99), method="inverted_cdf")
    return f"median {median}, 90% up to {ninety}, 99% up to {most}, longest {self.longest}"


def rounded(length: int) -> int:
  """The next round length that is at least `length`: rounded(119) == 128, rounded(13) == 16."""
  step = STEP if length > STEP else 8
  return -(-length // step) * step
