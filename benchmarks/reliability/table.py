"""What a campaign is, its rows on disk, and the table of all of them."""

from __future__ import annotations

import collections
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from etils import epath

from igpo_jax.io.jsonl import Row, row_file

SPOILT = "IGPO_RELIABILITY_REWARD"  # a variable of the environment, see `tiny_run`


def untimed(path: pathlib.Path | epath.Path) -> list[Row]:
  """The rows of a JSON-lines file without what no two runs have the same: times."""
  rows = map(json.loads, path.read_text().splitlines())
  return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


class Campaign(NamedTuple):
  """Cases that can be tried one by one, in any process, in any order.

  Attributes:
    name: on the command line and of the file of rows.
    what: what is done, for the table.
    cases: seed -> the names of all cases, "KIND/NUMBER" each.
    attempt: (name of the case, seed, an empty folder) -> what was found. `lost` is the list of
      what should not have happened, one short text each; [] is as it should be. `tried` is how
      many trials the case stands for, 1 where it is not given.
  """

  name: str
  what: str
  cases: Callable[[int], Iterable[str]]
  attempt: Callable[[str, int, epath.Path], Row]


def mixed(counts: Mapping[str, int], seed: int) -> list[str]:
  """The cases of all kinds, in an order that has some of each wherever it is cut off."""
  cases = [f"{kind}/{k}" for kind, count in counts.items() for k in range(count)]
  random.Random(seed).shuffle(cases)
  return cases


def carry_out(campaign: Campaign, seed: int, out: epath.Path, until: float) -> list[Row]:
  """Tries the cases that have no row yet, until `time.monotonic()` is `until`; returns all rows."""
  file = row_file(out / f"{campaign.name}.jsonl")
  file.cut()
  rows = [row for row in file.read() if row["seed"] == seed]
  known = {row["case"] for row in rows}
  for case in campaign.cases(seed):
    if case in known:
      continue
    if time.monotonic() >= until:
      break
    folder = out / "work" / campaign.name
    if folder.exists():
      folder.rmtree()
    folder.mkdir(parents=True)
    began = time.perf_counter()
    row = {"case": case, "seed": seed, "tried": 1} | campaign.attempt(case, seed, folder)
    row["seconds"] = round(time.perf_counter() - began, 2)
    file.add([row])
    rows.append(row)
    for text in row["lost"]:
      print(f"{campaign.name} {case}: {text}", flush=True)
  return rows


def table(rows_of: dict[str, list[Row]], totals: dict[str, int]) -> str:
  """A Markdown table with a line for each kind of case.

  Args:
    rows_of: name of the campaign -> its rows.
    totals: how many cases each campaign has in all.
  """
  lines = ["| campaign | kind | cases | trials | lost | seconds |", "|---|---|---:|---:|---:|---:|"]
  for name, rows in rows_of.items():
    kinds = collections.defaultdict(list)
    for row in rows:
      kinds[row["case"].partition("/")[0]].append(row)
    for kind, found in kinds.items():
      sums = [sum(row[key] for row in found) for key in ("tried", "seconds")]
      lost = sum(len(row["lost"]) for row in found)
      lines.append(f"| {name} | {kind} | {len(found)} | {sums[0]:,} | {lost} | {sums[1]:,.0f} |")
    lines.append(f"| **{name}** | {len(rows)} of {totals[name]} cases | | | | |")
  return "\n".join(lines)
