"""Records by URI: jsonl:, csv:, parquet:, hf:, tfds:, synthetic:, mix:, and what users register.

  jsonl:/data/gsm8k/train.jsonl?format=gsm8k&strip_calculator=true
  csv:/data/problems.csv?question=problem&answer=target
  parquet:/data/openr1/*.parquet?format=openr1&limit=1000
  hf:openai/gsm8k?name=main&split=train&format=gsm8k
  tfds:gsm8k/train?data_dir=/data/tfds
  synthetic:chains?split=train&n=1000
  mix:synthetic:chains?n=1000 | synthetic:countdown?n=500

Options follow after "?". `load_records` also takes them as keyword arguments, which override those
of the URI. Rows that cannot be used are left out and counted by reason, never in silence.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from igpo_jax.data import formats, tables
from igpo_jax.data.records import Message, Record
from igpo_jax.data.task_registry import Task, task_with
from igpo_jax.errors import UserError
from igpo_jax.io.text import find_files


class Loaded(NamedTuple):
  """What was read from a source.

  Attributes:
    records: the records, in the order of the source.
    dropped: reason -> the number of rows that were left out for it.
  """

  records: list[Record]
  dropped: dict[str, int]


class Stream:
  """An iterator over the records of a source, which is read as they are asked for, once.

  Attributes:
    dropped: reason -> the number of rows that were left out for it so far.
  """

  def __init__(self, records: Iterable[Record], dropped: dict[str, int]):
    self._records = iter(records)
    self.dropped = dropped

  def __iter__(self) -> Iterator[Record]:
    return self._records


Loader = Callable[..., "Loaded | Stream | list[Record]"]
_SOURCES: dict[str, Loader] = {}


def register_source(name: str) -> Callable[[Loader], Loader]:
  """Decorator: URIs `NAME:REST?option=value` call the function as `f(REST, option=value)`.

  The function returns a list of `Record`s, a `Loaded` or a `Stream`. Options of a URI arrive as
  text; keyword arguments of `load_records` arrive as they are. Registering a name again replaces
  the earlier function.

  Raises:
    UserError: the name has other characters than letters, digits and "_", or begins with a digit.
  """
  if not name.isidentifier():
    raise UserError(f"a source's name is letters, digits and _: {name!r}")

  def register(function: Loader) -> Loader:
    _SOURCES[name] = function
    return function

  return register


def load_records(uri: str, **options: Any) -> Loaded:
  """Reads every record of a source.

  Args:
    uri: NAME:REST?option=value&...; see the module's examples.
    **options: further options, which override those of the URI. All built-in sources but synthetic
      and mix take: format, limit, system, template, and the fields of `formats.Options`.

  Returns:
    Records in the order of the source, and counts of the rows that were left out.

  Raises:
    UserError: the source, an option or the format is unknown; a file is missing or broken; or no
      row can be used.
  """
  stream = stream_records(uri, **options)
  records = list(stream)
  if not records:
    what = f"no record that can be used: {describe(stream.dropped)}"
    raise UserError(f"{uri}: {what if stream.dropped else 'no record: there is nothing in it'}")
  return Loaded(records, dict(stream.dropped))


def stream_records(uri: str, **options: Any) -> Stream:
  """Reads the records of a source one at a time; arguments as `load_records`.

  Files are read as records are asked for. Held in memory are: a whole JSON array, all records of
  `synthetic:` and of sources that return lists, and in any case the ids (and the questions, for a
  format that uses each question once), to find repeats.

  Raises:
    UserError: as `load_records`, except that a source without records is no error here. What is
      wrong with a row is raised when that row is reached.
  """
  name, colon, rest = uri.partition(":")
  if colon and name == MIX:
    return _mixed(rest, options)
  if not colon or name not in _SOURCES:
    raise UserError(
      f"no data source for {uri!r}: expected one of"
      f" {', '.join(f'{known}:' for known in sorted([*_SOURCES, MIX]))}"
    )
  path, _, query = rest.partition("?")
  merged: dict[str, Any] = dict(urllib.parse.parse_qsl(query, keep_blank_values=True)) | options
  try:
    loaded = _SOURCES[name](path, **merged)
  except TypeError as error:
    if "unexpected keyword argument" not in str(error):
      raise
    raise UserError(f"{uri}: {str(error).split(') ')[-1]}") from error
  if isinstance(loaded, Stream):
    return loaded
  if not isinstance(loaded, Loaded):
    loaded = Loaded(list(loaded), {})
  return Stream(loaded.records, dict(loaded.dropped))


MIX = "mix"  # mix:URI | URI | ...: the records of several sources, one source after the other
_BAR = " | "


def _mixed(rest: str, options: dict[str, Any]) -> Stream:
  """The records of each source, one source after the other; `options` go to all of them.

  An id that an earlier record has gets the number of its source appended: "ID#2".
  """
  uris = [uri.strip() for uri in rest.split(_BAR)]
  if not all(uris):
    raise UserError(f"{MIX}:{rest}: expected {MIX}:URI{_BAR}URI, and as many more as you like")
  dropped: collections.Counter[str] = collections.Counter()
  parts = [stream_records(uri, **options) for uri in uris]  # a wrong URI is reported at once

  def records() -> Iterator[Record]:
    ids: set[str] = set()
    for number, part in enumerate(parts, start=1):
      for record in part:
        if record.id in ids:
          record = dataclasses.replace(record, id=f"{record.id}#{number}")
        ids.add(record.id)
        yield record
      dropped.update(part.dropped)

  return Stream(records(), dropped)


FILE_SOURCES = ("jsonl", "csv", "parquet")  # what follows the colon is a path or a pattern


def reads_files(uri: str) -> bool:
  """Whether a source, or a part of a mixture, reads files by their paths."""
  name, _, rest = uri.partition(":")
  if name == MIX:
    return any(reads_files(part.strip()) for part in rest.split(_BAR))
  return name in FILE_SOURCES


def check_files(uri: str) -> None:
  """Checks that the files of a source exist, without reading them.

  Raises:
    UserError: the source is unknown, or a file is missing; for a known data set, the message says
      which file to get and from where.
  """
  name, colon, rest = uri.partition(":")
  if colon and name == MIX:
    for part in rest.split(_BAR):
      check_files(part.strip())
    return
  if not colon or name not in _SOURCES:
    load_records(uri)  # says which sources there are
  path, _, query = rest.partition("?")
  if name == SYNTHETIC:
    _generator(path)
  if name in FILE_SOURCES:
    find_files(path, _origin(dict(urllib.parse.parse_qsl(query))))


def describe(counts: dict[str, int]) -> str:
  """Counts by reason in one line: "3 x no question, 1 x prompt too long"."""
  return ", ".join(f"{n} x {reason}" for reason, n in sorted(counts.items())) or "none left out"


@dataclasses.dataclass(frozen=True)
class Prompting:
  """How a question becomes a prompt of chat messages.

  Attributes:
    system: text of a system message that comes first; "" for none. A chat that already has a system
      message keeps its own.
    template: text of the user's message, with "{question}" in the question's place.

  Raises:
    UserError: "{question}" is not in the template.
  """

  system: str = ""
  template: str = "{question}"

  def __post_init__(self):
    if "{question}" not in self.template:
      raise UserError(f"template={self.template!r} has no {{question}} in it")

  def messages(self, question: str, before: tuple[Message, ...] = ()) -> tuple[Message, ...]:
    """The prompt: the earlier turns of a chat (`before`), then the question in the template."""
    user = {"role": "user", "content": self.template.replace("{question}", question)}
    if self.system and not any(message["role"] == "system" for message in before):
      before = ({"role": "system", "content": self.system}, *before)
    return (*before, user)


def read_rows(
  rows: Iterable[formats.Row],
  name: str,
  *,
  format: str = "plain",
  limit: int | str | None = None,
  system: str = "",
  template: str = "{question}",
  **options: Any,
) -> Stream:
  """Turns the rows of a table into records.

  Args:
    rows: dicts of plain values, one for each row.
    name: name of the source. Ids of records are "NAME/KEY", or "NAME/ROW NUMBER" for rows without
      a key.
    format: one of `formats.FORMATS`, or another name of its data set (`data.names`).
    limit: stop after this many records; None or "" reads all.
    system, template: see `Prompting`.
    **options: fields of `formats.Options`.

  Raises:
    UserError: an unknown format or option. When the records are read: no row can be used.
  """
  formats.format_named(format)  # before the first row is asked for
  limit = None if limit in (None, "") else _integer("limit", limit)
  dropped: collections.Counter[str] = collections.Counter()
  prompting = Prompting(system, template)
  return Stream(_records(rows, name, format, limit, prompting, _format_options(options), dropped),
                dropped)  # fmt: skip


def _records(
  rows: Iterable[formats.Row],
  name: str,
  format: str,
  limit: int | None,
  prompting: Prompting,
  settings: formats.Options,
  dropped: collections.Counter[str],
) -> Iterator[Record]:
  reader = formats.format_named(format)
  settings = reader.with_names(settings)
  questions: set[str] = set()
  ids: set[str] = set()
  first: formats.Row | None = None
  for number, row in enumerate(rows):
    if limit is not None and len(ids) >= limit:
      break
    first = row if first is None else first
    try:
      fields = formats.with_final(reader.read(row, settings), settings.final)
      gold, task = formats.gold_of(row, settings), formats.task_of(row, settings)
      if not fields.question:
        raise formats.Drop("no question")
      if not fields.answer and gold is None and reader.needs_answer:
        raise formats.Drop("no answer")
      if reader.unique_questions and fields.question in questions:
        raise formats.Drop("question seen before")
    except formats.Drop as reason:
      dropped[str(reason)] += 1
      continue
    if reader.unique_questions:
      questions.add(fields.question)
    key = f"{name}/{fields.key}" if fields.key else f"{name}/{number}"
    key = f"{key}#{number}" if key in ids else key
    ids.add(key)
    yield Record(
      id=key,
      prompt=prompting.messages(fields.question, fields.before),
      trace=fields.trace,
      answer=fields.answer,
      answer_span=fields.answer_span,
      task=task,
      gold=gold,
    )
  if not ids and first is not None:
    raise UserError(
      f"{name}: no row fits format={format} ({describe(dropped)}); the first row"
      f" has the fields {', '.join(first)}"
    )


def _format_options(options: dict[str, Any]) -> formats.Options:
  known = {field.name for field in dataclasses.fields(formats.Options)}
  unknown = sorted(set(options) - known)
  if unknown:
    raise UserError(
      f"unknown option {', '.join(unknown)} of a data source: expected one of"
      f" {', '.join(sorted(known | {'format', 'limit', 'system', 'template'}))}"
    )
  if "strip_calculator" in options:
    options = options | {
      "strip_calculator": _boolean("strip_calculator", options["strip_calculator"])
    }
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


def _name_of(pattern: str) -> str:
  """FOLDER/STEM of a path or address: "gsm8k/train" for /data/gsm8k/train.jsonl.gz."""
  path = pathlib.PurePosixPath(pattern.rpartition("://")[2])
  stem = (
    path.stem if path.suffix not in (".gz", ".bz2", ".xz", ".zst") else path.with_suffix("").stem
  )
  return f"{path.parent.name}/{stem}".lstrip("/")


def _origin(options: dict[str, Any]) -> str:
  known = formats.find_format(options.get("format", "plain"))
  return known.origin if known else ""


@register_source("jsonl")
def _load_jsonl(path: str, **options: Any) -> Stream:
  files = find_files(path, _origin(options))
  return read_rows(tables.read_json(files), _name_of(path), **options)


@register_source("csv")
def _load_csv(path: str, delimiter: str = "", **options: Any) -> Stream:
  files = find_files(path, _origin(options))
  return read_rows(tables.read_csv(files, delimiter), _name_of(path), **options)


@register_source("parquet")
def _load_parquet(path: str, **options: Any) -> Stream:
  files = find_files(path, _origin(options))
  wanted = _columns(options)
  return read_rows(tables.read_parquet(files, wanted), _name_of(path), **options)


def _columns(options: Mapping[str, Any]) -> tuple[str, ...] | None:
  """The columns that the format reads; None if the format is unknown, which `read_rows` reports."""
  format = options.get("format", "plain")
  known = {field.name for field in dataclasses.fields(formats.Options)}
  if formats.find_format(format) is None:
    return None
  return formats.columns(
    format, formats.Options(**{name: options[name] for name in known & set(options)})
  )


@register_source("hf")
def _load_hf(
  path: str, name: str | None = None, split: str = "train", revision: str | None = None, **options
) -> Stream:
  from igpo_jax.data import hub

  return read_rows(hub.read(path, name, split, revision), f"{path}/{split}", **options)


@register_source("tfds")
def _load_tfds(
  path: str, data_dir: str | None = None, manual_dir: str | None = None, **options: Any
) -> Stream:
  from igpo_jax.data import builders

  name, _, split = path.partition("/")
  if not split:
    raise UserError(f"tfds:{path}: expected tfds:NAME/SPLIT, for example tfds:gsm8k/train")
  rows = builders.read(name, split, data_dir, manual_dir)
  return read_rows(rows, path, **({"format": builders.format_of(name)} | options))


SYNTHETIC = "synthetic"


def _generator(name: str) -> Task:
  """The task of `synthetic:NAME`; a `UserError` that lists the known ones if there is no such."""
  return task_with("make_records", name or "chains", SYNTHETIC)


@register_source(SYNTHETIC)
def _load_synthetic(
  name: str,
  split: str = "train",
  n: int | str = 1000,
  seed: int | str = 0,
  system: str = "",
  template: str = "{question}",
  **options: Any,
) -> Loaded:
  task = _generator(name)
  prompting = Prompting(system, template)
  assert task.make_records is not None  # `_generator` looked
  records = task.make_records(
    split,
    _integer("n", n),
    _integer("seed", seed),
    **{key: _number_if(value) for key, value in options.items()},
  )
  if prompting != Prompting():
    records = [
      dataclasses.replace(r, prompt=prompting.messages(r.question, r.prompt[:-1])) for r in records
    ]
  return Loaded([dataclasses.replace(r, task=r.task or task.name) for r in records], {})


def _number_if(value: Any) -> Any:
  """An option's text as an int or a float if it reads as one; everything else as it is."""
  for kind in (int, float):
    try:
      return kind(value) if isinstance(value, str) else value
    except ValueError:
      continue
  return value
