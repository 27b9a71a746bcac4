"""The one name of each known data set, and the other names under which it is found.

The name is that of its format (`format=amc`), of its TFDS data set (`tfds:amc/test`), and of its
benchmark (`--benchmark=amc`, `data.eval`). Other names in use are taken for it everywhere.
"""

from __future__ import annotations

ALIASES = {
  "amc23": "amc",
  "math": "math500",
  "metamathqa": "metamath",
  "minerva_math": "minerva",
  "openr1_math": "openr1",
}


def one_name(name: str) -> str:
  """The name of a data set, from that or another name in use; unknown ones stay as they are."""
  return ALIASES.get(name, name)


def names_of(known: list[str] | tuple[str, ...]) -> list[str]:
  """These names, then the others that are taken for one of them."""
  return [*known, *(other for other, name in ALIASES.items() if name in known)]
