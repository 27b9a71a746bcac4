"""Names of the known data sets: one main name for each, and other names that are in use.

The main name is that of the format (`format=amc`), of the TFDS data set (`tfds:amc/test`) and of
the benchmark (`--benchmark=amc`, `data.eval`). The other names work in all these places, too.
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
  """The main name of a data set: one_name("amc23") == "amc". Unknown names stay as they are."""
  return ALIASES.get(name, name)


def names_of(known: list[str] | tuple[str, ...]) -> list[str]:
  """The main names `known`, followed by all other names of these data sets."""
  return [*known, *(other for other, name in ALIASES.items() if name in known)]
