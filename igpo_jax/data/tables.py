"""Rows out of files: JSON Lines, JSON arrays and Parquet, on any path that etils.epath opens."""

from __future__ import annotations

import glob as globbing
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from igpo_jax.cli import UserError

Row = Mapping[str, Any]


def find_files(pattern: str, origin: str = "") -> list[epath.Path]:
  """The files of a path or glob pattern, sorted.

  Args:
    pattern: a path; *, ? and [...] stand for several.
    origin: what to get from where, for the message when there is no such file.

  Raises:
    UserError: there is none.
  """
  path = epath.Path(pattern)
  if pattern and path.exists():
    found = [] if path.is_dir() else [path]
  elif not globbing.has_magic(pattern):
    found = []
  else:
    base = next(p for p in path.parents if not globbing.has_magic(str(p)))
    found = sorted(base.glob(str(path.relative_to(base)))) if base.exists() else []
  if not found:
    what = "is a directory, not a file" if pattern and path.is_dir() else "no such file"
    hint = f"get {origin}, and put it there" if origin else "give the path of a data file"
    raise UserError(f"{pattern or '(empty path)'}: {what}; {hint}")
  return found


def read_json(paths: Iterable[epath.Path]) -> Iterator[Row]:
  """Objects of JSON Lines files, blank lines left out, or of files that are one array.

  Raises:
    UserError: something that is not a JSON object; says where.
  """
  for path in paths:
    with path.open("r", encoding="utf-8") as file:
      try:
        first = file.read(1)
        file.seek(0)
        rows = json.load(file) if first == "[" else file
        for number, row in enumerate(rows, start=1):
          if isinstance(row, str):
            if not row.strip():
              continue
            row = json.loads(row)
          if not isinstance(row, dict):
            raise UserError(
              f"{path}, row {number}: a JSON object was expected, not {type(row).__name__}"
            )
          yield row
      except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
      except json.JSONDecodeError as error:
        where = "" if first == "[" else f", line {number}"
        raise UserError(f"{path}{where}: not JSON ({error})") from error


def read_parquet(paths: Iterable[epath.Path], without: Collection[str] = ()) -> Iterator[Row]:
  """Rows of Parquet files, read batch by batch.

  Args:
    paths: files, read in this order.
    without: columns not to read, to save time and memory.

  Raises:
    UserError: a file that is not Parquet.
  """
  import pyarrow
  import pyarrow.parquet

  for path in paths:
    with path.open("rb") as file:
      try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name not in without]
        for batch in table.iter_batches(batch_size=1024, columns=columns):
          yield from batch.to_pylist()
      except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
