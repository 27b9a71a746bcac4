"""The rows of an evaluation on disk. They are written batch by batch and survive a kill.

    DIR/NAME-XXXXXXXX.jsonl           one row per problem and sample, as igpo_jax.grade reads them
    DIR/NAME-XXXXXXXX.settings.json   what the rows depend on: weights, problems, protocol, seed
    DIR/NAME-XXXXXXXX.made.json       on what they were made: devices, versions, ...; a list

XXXXXXXX is a digest of the settings. An evaluation with other settings has another file, so no file
mixes two evaluations and none is overwritten. Rows are written in the order of the batches. A
finished file is in the order of the problems.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from etils import epath

from igpo_jax.checkpoint import bit_sums
from igpo_jax.data.records import Record
from igpo_jax.io.jsonl import Row, row_file, write_whole
from igpo_jax.parallel.distributed import share
from igpo_jax.types import Params

Key = tuple[str, int]  # (id of the problem, number of the sample)


class Generations:
  """The rows of one benchmark. All processes hold them in memory; process 0 writes the files.

  The constructor reads the rows of an earlier evaluation with equal settings. A collective.

  Args:
    directory: of the files. It is made if it does not exist.
    name: of the benchmark.
    settings: a JSON object with everything that the rows depend on.
    made_on: name -> text of what rows are made on now. They should not depend on it.

  Attributes:
    path: the file with the rows.
    made: the different `made_on` of all rows, in the order in which they came.
    rows: (id of the problem, number of the sample) -> row, in the order of the file.
  """

  def __init__(
    self,
    directory: epath.Path,
    name: str,
    settings: dict[str, Any],
    made_on: dict[str, str] | None = None,
  ):
    text = json.dumps(settings, indent=2, sort_keys=True)
    stem = f"{name}-{hashlib.blake2s(text.encode(), digest_size=4).hexdigest()}"
    self.path = directory / f"{stem}.jsonl"
    self._file, self._made_on = None, made_on or {}
    self._made_file = directory / f"{stem}.made.json"
    rows: list[Row] = []
    made: list[dict[str, str]] = []
    if jax.process_index() == 0:
      directory.mkdir(parents=True, exist_ok=True)
      write_whole(directory / f"{stem}.settings.json", text + "\n")
      self._file = row_file(self.path)
      self._file.cut()  # drops half a row at the end, onto which the next would be written
      rows = self._file.read()
      made = _read_made(self._made_file)
    self.rows: dict[Key, Row] = {(row["id"], row["sample"]): row for row in share(rows)}
    self.made: list[dict[str, str]] = share(made)

  def add(self, rows: Sequence[Row]) -> None:
    """Adds the rows of all processes, in the order of the processes. A collective.

    Args:
      rows: this process's rows of one batch. Rows whose key is known already are dropped.
    """
    new = [row for row in share(rows) if (row["id"], row["sample"]) not in self.rows]
    self.rows |= {(row["id"], row["sample"]): row for row in new}
    if new and self._made_on and self._made_on not in self.made:
      self.made.append(self._made_on)
      if self._file:
        write_whole(self._made_file, json.dumps(self.made, indent=2) + "\n")
    if self._file and new:
      self._file.add(new)

  def close(self, order: Sequence[Key]) -> None:
    """Finishes the file. Call it when all rows have been added.

    Args:
      order: the keys of all rows. The file and `rows` are sorted in this order.

    Raises:
      KeyError: a row of `order` is missing.
    """
    ordered = {key: self.rows[key] for key in order}
    in_order, self.rows = list(self.rows) == list(ordered), ordered
    if self._file:
      self._file.close()
      if not in_order:
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in ordered.values()))


def _read_made(file: epath.Path) -> list[dict[str, str]]:
  """The list in a file; an empty one if there is no file, or it has something else."""
  try:
    made = json.loads(file.read_text())
  except (OSError, ValueError):
    return []
  good = isinstance(made, list) and all(isinstance(one, dict) for one in made)
  return made if good else []


def records_digest(records: Iterable[Record]) -> str:
  """A hexadecimal digest of the records' ids, prompts, answers and golds, in their order."""
  digest = hashlib.blake2s(digest_size=8)
  for record in records:
    gold = [] if record.gold is None else [record.gold]
    digest.update(json.dumps([record.id, record.prompt, record.answer, *gold]).encode())
  return digest.hexdigest()


def params_digest(params: Params) -> str:
  """A hexadecimal digest of the weights, computed from sums of integers modulo 2^32.

  It does not depend on the mesh. It is part of the settings of the rows, because equal step numbers
  do not mean equal weights.
  """
  digest = hashlib.blake2s(digest_size=8)
  sums = jax.device_get(bit_sums(params))
  for path, (total, mixed) in jax.tree_util.tree_leaves_with_path(
    sums, is_leaf=lambda x: isinstance(x, tuple)
  ):
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {int(total)} {int(mixed)}\n".encode())
  return digest.hexdigest()
