"""Records by URI: jsonl:, parquet:, tfds:, synthetic:, and what users register.

  jsonl:/data/gsm8k/train.jsonl?format=gsm8k&strip_calculator=true
  parquet:/data/openr1/*.parquet?format=openr1&limit=1000
  tfds:gsm8k/train?data_dir=/data/tfds
  synthetic:chains?split=train&n=1000

What follows "?" are options; `load_records` takes the same as keyword arguments, which
win. A row that cannot be used is counted by reason, never dropped in silence.
"""

from __future__ import annotations

import collections
import dataclasses
import glob as globbing
import json
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.data import formats
from igpo_jax.data.records import Record


class Loaded(NamedTuple):
  """What a source gave: the records, and how many rows were left out for which reason."""

  records: list[Record]
  dropped: dict[str, int]


Loader = Callable[..., Loaded]
_SOURCES: dict[str, Loader] = {}


def register_source(name: str) -> Callable[[Loader], Loader]:
  """Makes `name:REST?option=value` call the decorated function as f(REST, **options).

  The function returns a list of `Record`s or a `Loaded`. Options arrive as the text of
  the URI or as the caller's keyword arguments. A name may be registered again.
  """
  def register(function: Loader) -> Loader:
    if not name.isidentifier():
      raise UserError(f"a source's name is letters, digits and _: {name!r}")
    _SOURCES[name] = function
    return function

  return register


def load_records(uri: str, **options: Any) -> Loaded:
  """Reads every record of a source.

  Args:
    uri: NAME:REST?option=value&...; see the module's examples.
    **options: as in the URI, and winning over it. Common to all built-in sources but
      synthetic: format, question, answer, trace, id, system, template, limit, final,
      strip_calculator, solution (`formats.Options` explains the last three).

  Returns:
    Records in the order of the source, and counts of the rows that were left out.

  Raises:
    UserError: unknown source, option or format; a file that is missing or broken; no
      record left.
  """
  name, colon, rest = uri.partition(":")
  if not colon or name not in _SOURCES:
    raise UserError(f"no data source for {uri!r}: expected one of"
                    f" {', '.join(f'{known}:' for known in sorted(_SOURCES))}")
  path, _, query = rest.partition("?")
  merged: dict[str, Any] = dict(urllib.parse.parse_qsl(query, keep_blank_values=True)) | options
  try:
    loaded = _SOURCES[name](path, **merged)
  except TypeError as error:
    if "unexpected keyword argument" not in str(error):
      raise
    raise UserError(f"{uri}: {str(error).split(') ')[-1]}") from error
  if not isinstance(loaded, Loaded):
    loaded = Loaded(list(loaded), {})
  if not loaded.records:
    raise UserError(f"{uri}: no record that can be used ({describe(loaded.dropped)})")
  return loaded


def describe(counts: dict[str, int]) -> str:
  """Counts by reason as one line: "3 x no question, 1 x prompt too long"."""
  return ", ".join(f"{n} x {reason}" for reason, n in sorted(counts.items())) or "none left out"


@dataclasses.dataclass(frozen=True)
class Prompting:
  """How a question becomes messages: an optional system message and a template."""

  system: str = ""
  template: str = "{question}"

  def __post_init__(self):
    if "{question}" not in self.template:
      raise UserError(f"template={self.template!r} has no {{question}} in it")

  def messages(self, question: str) -> tuple[dict[str, str], ...]:
    user = {"role": "user", "content": self.template.replace("{question}", question)}
    return ({"role": "system", "content": self.system}, user) if self.system else (user,)


def read_rows(rows: Iterable[formats.Row], name: str, *, format: str = "plain",
              limit: int | str | None = None, system: str = "", template: str = "{question}",
              **options: Any) -> Loaded:
  """Rows of any table to records, by a named format.

  Args:
    rows: dicts of plain values.
    name: of the source; ids are "name/key" or "name/row number".
    format: one of `formats.FORMATS`.
    limit: stop after so many usable records.
    system, template: see `Prompting`.
    **options: `formats.Options`.
  """
  if format not in formats.FORMATS:
    raise UserError(f"unknown format {format!r}: expected one of {', '.join(formats.FORMATS)}")
  limit = None if limit in (None, "") else _integer("limit", limit)
  settings = _format_options(options)
  prompting = Prompting(system, template)
  reader = formats.FORMATS[format]
  records: list[Record] = []
  dropped: collections.Counter[str] = collections.Counter()
  questions: set[str] = set()
  ids: set[str] = set()
  first: formats.Row | None = None
  for number, row in enumerate(rows):
    if limit is not None and len(records) >= limit:
      break
    first = row if first is None else first
    try:
      fields = formats.with_final(reader.read(row, settings), settings.final)
      if not fields.question:
        raise formats.Drop("no question")
      if not fields.answer:
        raise formats.Drop("no answer")
      if reader.unique_questions and fields.question in questions:
        raise formats.Drop("question seen before")
    except formats.Drop as reason:
      dropped[str(reason)] += 1
      continue
    questions.add(fields.question)
    key = f"{name}/{fields.key}" if fields.key else f"{name}/{number}"
    key = f"{key}#{number}" if key in ids else key
    ids.add(key)
    records.append(Record(id=key, prompt=prompting.messages(fields.question), trace=fields.trace,
                          answer=fields.answer, answer_span=fields.answer_span))
  if not records and first is not None:
    raise UserError(f"{name}: no row fits format={format} ({describe(dropped)}); the first row"
                    f" has the fields {', '.join(first)}")
  return Loaded(records, dict(dropped))


def _format_options(options: dict[str, Any]) -> formats.Options:
  known = {field.name for field in dataclasses.fields(formats.Options)}
  unknown = sorted(set(options) - known)
  if unknown:
    raise UserError(f"unknown option {', '.join(unknown)} of a data source: expected one of"
                    f" {', '.join(sorted(known | {'format', 'limit', 'system', 'template'}))}")
  if "strip_calculator" in options:
    options = options | {"strip_calculator": _boolean("strip_calculator",
                                                      options["strip_calculator"])}
  return formats.Options(**options)


def _integer(name: str, value: int | str) -> int:
  try:
    number = int(value)
  except ValueError:
    number = -1
  if number < 0:
    raise UserError(f"{name}={value!r} should be a number, 0 or more")
  return number


def _boolean(name: str, value: bool | str) -> bool:
  text = str(value).lower()
  if text not in ("true", "false", "1", "0"):
    raise UserError(f"{name}={value!r} should be true or false")
  return text in ("true", "1")


def find_files(pattern: str) -> list[epath.Path]:
  """The files of a path or glob pattern, sorted.

  Raises:
    UserError: there is none.
  """
  path = epath.Path(pattern)
  if not globbing.has_magic(pattern):
    found = [path] if path.exists() and not path.is_dir() else []
  else:
    base = next(p for p in path.parents if not globbing.has_magic(str(p)))
    found = sorted(base.glob(str(path.relative_to(base)))) if base.exists() else []
  if not found:
    what = "is a directory, not a file" if path.is_dir() else "no such file"
    raise UserError(f"{pattern or '(empty path)'}: {what}; give the path of a data file"
                    f" (* may stand for several)")
  return found


def read_jsonl(paths: Iterable[epath.Path]) -> Iterator[formats.Row]:
  """Objects of JSON Lines files, blank lines left out.

  Raises:
    UserError: a line that is not a JSON object; says which.
  """
  for path in paths:
    with path.open("r", encoding="utf-8") as file:
      for number, line in enumerate(file, start=1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
        except ValueError as error:
          raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
          raise UserError(f"{path}, line {number}: a JSON object was expected, not"
                          f" {type(row).__name__}")
        yield row


def read_parquet(paths: Iterable[epath.Path]) -> Iterator[formats.Row]:
  """Rows of Parquet files, read batch by batch.

  Raises:
    UserError: a file that is not Parquet.
  """
  import pyarrow
  import pyarrow.parquet

  for path in paths:
    with path.open("rb") as file:
      try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
          yield from batch.to_pylist()
      except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error


def _name_of(pattern: str) -> str:
  path = epath.Path(pattern)
  return f"{path.parent.name}/{path.stem}".lstrip("/")


@register_source("jsonl")
def _load_jsonl(path: str, **options: Any) -> Loaded:
  return read_rows(read_jsonl(find_files(path)), _name_of(path), **options)


@register_source("parquet")
def _load_parquet(path: str, **options: Any) -> Loaded:
  return read_rows(read_parquet(find_files(path)), _name_of(path), **options)


@register_source("synthetic")
def _load_synthetic(name: str, split: str = "train", n: int | str = 1000, seed: int | str = 0,
                    **options: Any) -> Loaded:
  from igpo_jax.data import synthetic

  records = synthetic.make_records(split, _integer("n", n), _integer("seed", seed), **options)
  return Loaded(list(records), {})
