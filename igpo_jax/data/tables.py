"""Reading rows from files: JSON Lines, JSON arrays, CSV and Parquet (`io.text` finds the files)."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from igpo_jax.errors import UserError
from igpo_jax.io.text import File, mend, open_file, read_lines, read_objects

Row = Mapping[str, Any]


def read_json(files: Iterable[File]) -> Iterator[Row]:
  """Yields the objects of files that are JSON Lines or one JSON array. Blank lines are skipped.

  Raises:
    UserError: a line or item is not a JSON object; the message says which.
  """
  for file in files:
    for _, row in read_objects(file):
      yield row


def read_csv(files: Iterable[File], delimiter: str = "") -> Iterator[Row]:
  """Yields the rows of CSV files whose first line names the columns. All values are text.

  Args:
    files: read in this order.
    delimiter: the character between two values, or "tab"; "" is a tab for files named *.tsv, and a
      comma for all others.

  Raises:
    UserError: no header, a column named twice, or a row with more values than columns.
  """
  if delimiter == "tab":
    delimiter = "\t"
  if len(delimiter) > 1:
    raise UserError(f"delimiter={delimiter!r} should be one character, or tab")
  csv.field_size_limit(1 << 30)  # a trace may be longer than the module's 128 KiB
  for file in files:
    tabs = ".tsv" in str(file)[-8:]  # also of X.tsv.gz
    lines = (line for _, line in read_lines(file))
    reader = csv.reader(lines, delimiter=delimiter or ("\t" if tabs else ","), strict=True)
    try:
      names = next(reader, None)
      if not names:
        raise UserError(f"{file}: no header; the first line should name the columns")
      twice = [name for name in names if names.count(name) > 1]
      if twice:
        raise UserError(f"{file}: the header has the column {twice[0]!r} twice")
      for values in reader:
        if len(values) > len(names):
          raise UserError(
            f"{file}, line {reader.line_num}: {len(values)} values for {len(names)} columns"
          )
        if values:  # a blank line has none
          yield dict(zip(names, values, strict=False))
    except csv.Error as error:
      raise UserError(f"{file}, line {reader.line_num}: not CSV ({error})") from error


def read_parquet(files: Iterable[File], wanted: Collection[str] | None = None) -> Iterator[Row]:
  """Yields the rows of Parquet files, which are read batch by batch.

  Args:
    files: read in this order.
    wanted: columns to read; None reads all. The other columns are None in the rows and are not
      read, since they may be large, damaged, or of a type that Python does not have. A name with
      dots, such as "a.b", means the column "a".

  Raises:
    UserError: a file that is not Parquet or is damaged, or a column that cannot be read as text.
  """
  import pyarrow
  import pyarrow.parquet

  for file in files:
    with open_file(file) as opened:
      column = ""
      try:
        table = pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)
        names = table.schema_arrow.names
        chosen = [
          name
          for name in names
          if wanted is None or any(want == name or want.startswith(f"{name}.") for want in wanted)
        ]
        for batch in table.iter_batches(batch_size=1024, columns=chosen):
          values = {}
          for column, array in zip(batch.schema.names, batch.columns, strict=True):
            values[column] = [plain_value(item) for item in _readable(array).to_pylist()]
          column = ""
          for k in range(batch.num_rows):
            yield dict.fromkeys(names) | {name: items[k] for name, items in values.items()}
      except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not a Parquet file, or damaged ({_first(error)})") from error
      except UnicodeDecodeError as error:
        raise UserError(f"{file}: the column {column!r} is not UTF-8 text ({error})") from error
      except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
          raise
        where = f"the column {column!r} cannot be read" if column else "damaged"
        raise UserError(f"{file}: {where} ({_first(error)}); get the file again") from error


def _readable(array: Any) -> Any:
  """An Arrow array as Python can have it: times as text, for some are finer than Python's."""
  import pyarrow

  temporal = pyarrow.types.is_temporal(array.type) and not pyarrow.types.is_interval(array.type)
  return array.cast(pyarrow.string()) if temporal else array


def _first(error: BaseException) -> str:
  return str(error).split("\n", 1)[0][:200]


def plain_value(value: Any) -> Any:
  """The value with all bytes inside it as text, arrays as lists, and lone surrogates as U+FFFD."""
  if isinstance(value, str):
    return mend(value)
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    return {key: plain_value(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain_value(item) for item in value]
  return plain_value(value.tolist()) if hasattr(value, "tolist") else value
