"""Options under the names that they had before, and those that there are no more.

Whoever renames an option or a section adds a line to `RENAMED`, and nothing else. A config file or
a command line with the old name is then refused in one line that gives the new one. The config.json
of a run that was made under the old name is read under the new one, so that the run can go on.
Whoever takes an option away adds a line to `REMOVED`: it is refused with what to do, and a run that
had it goes on without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Dotted name before -> dotted name now. A section stands for all of its options.
RENAMED = {
  "sft.hand_on": "sft.select",
  "rl.region": "rl.loss_region",
  "rl.entropy": "objective.filter_entropy",
  "reward.parts": "reward.weights",
}

# Dotted name before -> what to do instead.
REMOVED = {
  "sampler.batch_sizes": "a row that is done makes room for the next by itself: take it out",
}


def new_name(name: str) -> str:
  """The name that an option or a section has now; "" if it never had another one.

  Example: with {"rl.old": "rl.new"} in `RENAMED`, new_name("rl.old.size") == "rl.new.size".
  """
  for old, new in RENAMED.items():
    if name == old or name.startswith(f"{old}."):
      return new + name[len(old) :]
  return ""


def renamed_leaves(leaf: str) -> list[str]:
  """The names now of all options whose old name ends in `leaf`, such as "hand_on"."""
  return [new for old, new in RENAMED.items() if old.rpartition(".")[2] == leaf]


def removed(name: str) -> str:
  """Why there is no such option any more and what to do; "" if there never was one."""
  why = REMOVED.get(name)
  return f"there is no option {name} any more: {why}" if why else ""


def removed_leaves(leaf: str) -> list[str]:
  """`removed` of all options whose name ended in `leaf`."""
  return [removed(name) for name in REMOVED if name.rpartition(".")[2] == leaf]


def upgraded(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options of a config.json under the names that they have now, without those removed.

  The rest is left as it is.

  Example: upgraded({"sft": {"hand_on": "best"}}) == {"sft": {"select": "best"}}.

  Args:
    options: nested by sections; it is not changed.
  """
  out = _copied(options)
  for old, new in RENAMED.items():
    *sections, name = old.split(".")
    section = _section(out, sections)
    if section is None or name not in section:
      continue
    value = section.pop(name)
    *sections, name = new.split(".")
    section = _section(out, sections, make=True)
    if section is not None:
      section.setdefault(name, value)
  for old in REMOVED:
    *sections, name = old.split(".")
    section = _section(out, sections)
    if section is not None:
      section.pop(name, None)
  return out


def _copied(value: Any) -> Any:
  return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _section(options: Any, names: list[str], make: bool = False) -> dict[str, Any] | None:
  """The section of these nested names; None if there is no such section and none is to be made."""
  for name in names:
    if not isinstance(options, dict) or (name not in options and not make):
      return None
    options = options.setdefault(name, {})
  return options if isinstance(options, dict) else None
