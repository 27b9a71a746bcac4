"""Sizes and lengths of time in words, for messages."""

from __future__ import annotations


def in_bytes(size: float) -> str:
  """A size in words: in_bytes(1.5e9) == "1.5 GB". A unit is 1000 times the one before it."""
  units = ["TB", "GB", "MB", "kB", "B"]
  while size >= 999.5 and len(units) > 1:
    size /= 1000
    units.pop()
  return f"{size:.3g} {units[-1]}"


def in_time(seconds: float) -> str:
  """A length of time in words: in_time(450) == "7.5 min". Below two of a unit, in the next one."""
  for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.3g} s"
