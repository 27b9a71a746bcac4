"""Reading the files of users: text, JSON Lines and JSON, local or remote, plain or compressed.

Every command reads its rows here, so all commands accept the same files: with or without a byte
order mark, JSON Lines or one JSON array. A file that cannot be read raises a UserError that says
where the fault is.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob as globbing
import gzip
import io
import json
import lzma
import pathlib
import re
import shutil
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from igpo_jax.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_WEB = ("http", "https")
_WEB_SECONDS = 60.0  # without a byte
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
# What is often saved under the name of a data file, by its first bytes.
_NOT_TEXT = {
  b"PK\x03\x04": "a zip archive: unpack it first",
  b"PAR1": "a Parquet file: read it with parquet:PATH",
  b"version https://git-lfs": "a Git LFS pointer, not the file itself: get the file (git lfs pull)",
  b"<!DOCTYPE html": "a web page, not data: download the raw file",
  b"<html": "a web page, not data: download the raw file",
}
_MARKS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
  (codecs.BOM_UTF8, "utf-8-sig"),
)


class WebFile(NamedTuple):
  """A file at an http or https address."""

  address: str

  def __str__(self) -> str:
    return self.address

  def open(self, mode: str = "rb") -> BinaryIO:
    """Downloads into a temporary file, since readers of compressed files and Parquet seek in it."""
    del mode  # it is only ever read
    copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    with urllib.request.urlopen(self.address, timeout=_WEB_SECONDS) as reply:
      shutil.copyfileobj(reply, copy)
    copy.seek(0)
    return copy


File = epath.Path | WebFile


def find_files(pattern: str, origin: str = "") -> list[File]:
  """The files of a path, address or glob pattern, sorted.

  Args:
    pattern: a path; an address with file://, http:// or https://; or one that `etils.epath` opens,
      such as gs:// and s3://. *, ? and [...] match several files, but not at http addresses.
    origin: where the file can be had, for the message if there is none; "" if that is not known.

  Raises:
    UserError: no file matches, or the address cannot be read.
  """
  scheme = (match := _SCHEME.match(pattern)) and match.group(1).lower()
  if scheme in _WEB:
    return [WebFile(pattern)]
  if scheme == "file":
    pattern = "/" + pattern[match.end() :].partition("/")[2]  # file://HOST/PATH, HOST mostly ""
  with _explained(pattern, remote=bool(scheme) and scheme != "file"):
    try:
      path = epath.Path(pattern)
    except KeyError:
      raise UserError(
        f"{pattern}: {pattern.partition('://')[0]}:// is no kind of address that can be read;"
        " known: paths, file://, http(s)://, gs://, s3://"
      ) from None
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


@contextlib.contextmanager
def _explained(where: File | str, remote: bool) -> Iterator[None]:
  """Turns what libraries raise about a file into one line."""
  try:
    yield
  except UserError:
    raise
  except ImportError as error:
    raise UserError(f"{where}: {error} (pip install what is missing, or fetch the file)") from error
  except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
    raise UserError(f"{where}: damaged or cut off ({error}); get the file again") from error
  except OSError as error:
    raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error
  except Exception as error:
    if not remote:
      raise
    # Each library of remote files has exceptions of its own, without a common base.
    raise UserError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def open_file(file: File) -> Iterator[BinaryIO]:
  """Opens a file for reading its bytes as they are stored; errors in the body become UserErrors."""
  with _explained(file, remote="://" in str(file)), file.open("rb") as opened:
    yield opened


@contextlib.contextmanager
def open_text(file: File) -> Iterator[BinaryIO]:
  """Opens a text file for reading its bytes: decompressed, in UTF-8, without byte order mark.

  Raises:
    UserError: it cannot be read, or its first bytes are those of another kind of file.
  """
  with open_file(file) as opened, contextlib.ExitStack() as stack:
    stream, head = _peeked(opened)
    unpack = next((how for magic, how in _PACKED.items() if head.startswith(magic)), None)
    if unpack:
      stream, head = _peeked(stack.enter_context(unpack(stream, "rb")))
    elif head.startswith(_ZSTANDARD):
      import pyarrow

      unpacked = stack.enter_context(pyarrow.CompressedInputStream(stream, "zstd"))
      stream, head = _peeked(unpacked)
    for start, what in _NOT_TEXT.items():
      if head.lower().startswith(start.lower()):
        raise UserError(f"{file}: this is {what}")
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding:
      try:
        text = stream.read().decode(encoding)
      except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in {encoding} ({error})") from error
      stream = io.BytesIO(text.encode())
    yield stream


def _peeked(stream: Any) -> tuple[BinaryIO, bytes]:
  """The stream with a buffer, and its first bytes, which stay in it."""
  head = b""
  while len(head) < 64 and (more := stream.read(64 - len(head))):
    head += more
  return io.BufferedReader(_Joined(head, stream), 1 << 20), head


class _Joined(io.RawIOBase):
  """Bytes that were read already, then the stream they came from."""

  def __init__(self, head: bytes, stream: Any):
    self._head, self._stream = head, stream

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._head[: len(buffer)] or self._stream.read(len(buffer))
    self._head = self._head[len(buffer) :]
    buffer[: len(data)] = data
    return len(data)


def read_lines(file: File) -> Iterator[tuple[int, str]]:
  """(line number from 1, line with its line end) of each line.

  Lines end at LF, CR LF or CR only. U+2028, U+2029 and U+0085 do not end a line, since they may
  stand in a JSON string.

  Raises:
    UserError: as `open_text`, or a line that is not UTF-8.
  """
  number = 0
  with open_text(file) as stream:
    for block in stream:  # up to LF
      for line in _LINE.findall(block):
        number += 1
        try:
          yield number, line.decode()
        except UnicodeDecodeError as error:
          raise UserError(f"{file}, line {number}: not UTF-8 text ({error})") from error


def read_values(file: File) -> Iterator[tuple[str, Any]]:
  """(position for messages, value) of each line of JSON Lines, or of each item of a JSON array.

  Raises:
    UserError: as `read_lines`, or something that is not JSON.
  """
  hint = "give one JSON object per line, or one JSON array"
  lines = read_lines(file)
  blank, begun = "", False
  for number, line in lines:
    if not begun and line.lstrip().startswith("["):
      text = "".join([blank, line, *(rest for _, rest in lines)])
      for row, value in enumerate(parse_json(text, str(file), hint), start=1):
        yield f"{file}, row {row}", value
    elif not line.isspace():
      begun = True
      where = f"{file}, line {number}"
      yield where, parse_json(line, where, hint)
    else:
      blank += line  # so that the errors of an array name its lines


def read_objects(file: File) -> Iterator[tuple[str, dict[str, Any]]]:
  """(position for messages, object) of each line or item, as `read_values`.

  Raises:
    UserError: as `read_values`, or a value is not a JSON object.
  """
  for where, value in read_values(file):
    if not isinstance(value, dict):
      raise UserError(f"{where}: a JSON object was expected, not {type(value).__name__}")
    yield where, value


def parse_json(text: str, where: str, hint: str = "") -> Any:
  """The value of a JSON text. Lone surrogates become U+FFFD; very long numbers stay text.

  Args:
    text: JSON.
    where: where `text` stands, for messages.
    hint: what to do, for the end of messages.

  Raises:
    UserError: `text` is not JSON, or nested too deeply to be read.
  """
  try:
    try:
      value = json.loads(text)
    except json.JSONDecodeError:
      raise
    except ValueError:  # Python turns no number of more than 4300 digits into an int
      value = json.loads(text, parse_int=_integer)
  except RecursionError:
    raise UserError(
      f"{where}: not JSON that can be read (nested too deeply){'; ' if hint else ''}{hint}"
    ) from None
  except ValueError as error:
    raise UserError(f"{where}: not JSON ({error}){'; ' if hint else ''}{hint}") from error
  # A surrogate gets into a Python string by its escape only.
  return _mended(value) if "\\ud" in text or "\\uD" in text else value


def _integer(digits: str) -> int | str:
  try:
    return int(digits)
  except ValueError:
    return digits


def read_object(
  path: epath.Path | pathlib.Path, advice: str = "", missing: dict[str, Any] | None = None
) -> dict[str, Any]:
  """The JSON object that a small file holds.

  Args:
    path: of the file.
    advice: what to do, for the end of every message; "" for none.
    missing: what is returned if there is no such file; None makes that an error.

  Raises:
    UserError: there is no such file, it cannot be read, or it holds something else.
  """
  end = f"; {advice}" if advice else ""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    if missing is not None:
      return missing
    raise UserError(f"{path}: no such file{end}") from None
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error}){end}") from error
  try:
    text = data.decode(json.detect_encoding(data))
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not JSON ({error}){end}") from error
  value = parse_json(text, str(path), advice)
  if not isinstance(value, dict):
    raise UserError(f"{path}: a JSON object was expected, not {type(value).__name__}{end}")
  return value


def mend(text: str) -> str:
  """`text` with each lone surrogate replaced by U+FFFD, so that it can be written as UTF-8."""
  return _SURROGATE.sub("\ufffd", text)


def _mended(value: Any) -> Any:
  if isinstance(value, str):
    return mend(value)
  if isinstance(value, list):
    return [_mended(item) for item in value]
  if isinstance(value, dict):
    return {mend(key): _mended(item) for key, item in value.items()}
  return value
