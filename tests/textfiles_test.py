"""Files that people bring: the same rows however they are packed, marked or reached."""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import http.server
import json
import lzma
import threading

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_jax import grade
from igpo_jax.data import sources
from igpo_jax.errors import UserError
from igpo_jax.inference import requests
from igpo_jax.io import jsonl, text

ROWS = [{"question": f"{k}+1 é?", "answer": str(k + 1), "trace": f"so {k + 1}"} for k in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()


def zstd(data: bytes) -> bytes:
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(data)
  return sink.getvalue().to_pybytes()


WAYS = {
  "plain": lambda data: data,
  "byte order mark": lambda data: codecs.BOM_UTF8 + data,
  "UTF-16 with its mark": lambda data: data.decode().encode("utf-16"),
  "UTF-16, big end first": lambda data: codecs.BOM_UTF16_BE + data.decode().encode("utf-16-be"),
  "UTF-32 with its mark": lambda data: data.decode().encode("utf-32"),
  "blanks before it": lambda data: b" \n\t\n" + data,
  "mark, then blanks": lambda data: codecs.BOM_UTF8 + b"\n  " + data,
  "CR LF": lambda data: data.replace(b"\n", b"\r\n"),
  "CR": lambda data: data.replace(b"\n", b"\r"),
  "no last line end": lambda data: data.rstrip(b"\n"),
  "gzip": gzip.compress,
  "bzip2": bz2.compress,
  "xz": lzma.compress,
  "zstandard": zstd,
  "gzip of a mark": lambda data: gzip.compress(codecs.BOM_UTF8 + data, mtime=0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data", [LINES, ARRAY], ids=["lines", "array"])
def test_rows_are_the_same_however_the_file_is_written(tmp_path, way, data):
  path = tmp_path / "rows"  # by its bytes, whatever its name
  path.write_bytes(WAYS[way](data))
  assert [row for _, row in text.read_objects(epath.Path(path))] == ROWS
  records = sources.load_records(f"jsonl:{path}").records
  assert [(r.question, r.answer) for r in records] == [(r["question"], r["answer"]) for r in ROWS]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=12)), max_size=5))
def test_any_text_in_a_row_comes_back(tmp_path_factory, rows):
  path = epath.Path(tmp_path_factory.mktemp("rows")) / "rows.jsonl"
  for ascii_only in (True, False):
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode())
    assert [row for _, row in text.read_objects(path)] == rows


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "\x0b"])
def test_only_line_ends_end_a_row(tmp_path, char):
  """Python's `splitlines` cuts at these, too; in a JSON string they are characters."""
  path = tmp_path / "in.jsonl"
  row = {"prompt": f"a{char}b", "question": f"a{char}b", "completion": f"\\boxed{{1}}{char}"}
  line = json.dumps({**row, "answer": "1"}, ensure_ascii=char < " ") + "\n"
  path.write_text(line * 2, encoding="utf-8")
  assert [r["question"] for _, r in text.read_objects(epath.Path(path))] == [f"a{char}b"] * 2
  assert len(list(grade.read_generations(path))) == 2
  path.write_text(json.dumps({"prompt": f"a{char}b"}, ensure_ascii=char < " ") + "\n", "utf-8")
  assert [row for _, row in requests.read_requests(path)] == [{"prompt": f"a{char}b"}]
  assert jsonl.row_file(path).read() == [{"prompt": f"a{char}b"}]
  jsonl.row_file(path).cut()
  assert jsonl.row_file(path).read() == [{"prompt": f"a{char}b"}]


@pytest.mark.parametrize(
  "written",
  [r'"\ud83d"', r'"half \uD83D and text"', r'["\udc00", {"\udfff": "\ud800\ud800"}]'],
)
def test_half_a_character_becomes_the_sign_for_a_broken_one(written):
  value = json.dumps(text.parse_json(written, "here"), ensure_ascii=False)
  assert "\ufffd" in value and value.encode()
  assert text.parse_json(r'"\ud83d\ude00"', "here") == "\U0001f600"  # a whole one stays
  assert text.parse_json(r'"\\ud83d"', "here") == r"\ud83d"


def test_numbers_of_thousands_of_digits_stay_text(tmp_path):
  digits = "7" * 5000
  path = tmp_path / "rows.jsonl"
  path.write_text(f'{{"question": "q", "answer": {digits}, "n": -{digits}, "k": 12}}\n')
  ((_, row),) = text.read_objects(epath.Path(path))
  assert (row["answer"], row["n"], row["k"]) == (digits, f"-{digits}", 12)
  assert sources.load_records(f"jsonl:{path}").records[0].answer == digits


NESTED = '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
  "data, line",
  [
    (LINES + NESTED.encode(), "line 4: not JSON that can be read .nested too deeply"),
    (b"[" * 100_000, "nested too deeply"),
    (LINES + b'{"question"', "line 4: not JSON"),
    (b'{\n  "question": "q"\n}\n', "line 1: not JSON .*; give one JSON object per line"),
    (b'\n\n[{"question": "q"},\n7x]', "not JSON .*line 4"),
    (LINES + b'{"question": "\xe9"}\n', "line 4: not UTF-8"),
    (LINES + b"3\n", "line 4: a JSON object was expected, not int"),
    (b'[{"question": "q"}, 3]', "row 2: a JSON object was expected, not int"),
    (gzip.compress(LINES * 2000, mtime=0)[:300], "damaged or cut off"),
    (gzip.compress(LINES, mtime=0)[:12] + b"\0" * 60, "damaged"),
    (bz2.compress(LINES)[:30], "damaged or cut off"),
    (lzma.compress(LINES)[:40], "damaged or cut off"),
    (zstd(LINES * 2000)[:30], "cannot be read|damaged"),
    (b"PK\x03\x04rest", "zip archive: unpack"),
    (b"PAR1rest", "Parquet file: read it with parquet:"),
    (b"<!doctype HTML><p>Log in", "web page, not data"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    (codecs.BOM_UTF16_LE + b"\x00\xd8\x00", "not text in utf-16"),
  ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, data, line):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(data)
  with pytest.raises(UserError, match=line):
    list(text.read_objects(epath.Path(path)))


def test_a_file_that_may_not_be_read_is_one_clear_line(tmp_path, monkeypatch):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(LINES)

  def refuse(self, *args, **kwargs):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(type(epath.Path(path)), "open", refuse)
  with pytest.raises(UserError, match=r"cannot be read .*Permission denied"):
    list(text.read_objects(epath.Path(path)))


# --- addresses ---


@pytest.fixture(scope="module")
def web(tmp_path_factory):
  """The address of a folder on a web server."""
  folder = tmp_path_factory.mktemp("web")
  (folder / "rows.jsonl").write_bytes(LINES)
  (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
  )
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()


def test_a_web_address_is_read(web):
  for uri in ("jsonl:{}/rows.jsonl", "jsonl:{}/rows.jsonl.gz", "parquet:{}/rows.parquet"):
    records = sources.load_records(uri.format(web)).records
    assert [r.answer for r in records] == ["1", "2", "3"]
    assert records[0].id.endswith("/rows/0")


def test_a_file_address_is_the_file(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(LINES)
  for uri in (f"jsonl:file://{path}", f"jsonl:file://localhost{path}", f"jsonl:{path}"):
    assert len(sources.load_records(uri).records) == 3


@pytest.mark.parametrize(
  "uri, line",
  [
    ("jsonl:{web}/nowhere.jsonl", "nowhere.jsonl: cannot be read .*404"),
    ("jsonl:http://127.0.0.1:9/x.jsonl", "cannot be read"),
    ("jsonl:file:///no/such/file.jsonl", "no such file"),
    ("csv:sftp://host/x.csv", "sftp:// is no kind of address"),
    ("jsonl:C://x.jsonl", "C:// is no kind of address"),
  ],
)
def test_an_address_that_leads_nowhere_is_one_clear_line(web, uri, line):
  with pytest.raises(UserError, match=line):
    sources.load_records(uri.replace("{web}", web))


@pytest.mark.parametrize("error", [ImportError("Install s3fs to access S3"), RuntimeError("token")])
def test_whatever_a_remote_library_raises_is_one_clear_line(monkeypatch, error):
  def fail(self):
    raise error

  monkeypatch.setattr(type(epath.Path("s3://bucket/x")), "exists", fail)
  with pytest.raises(UserError, match=f"s3://bucket/x.parquet: .*{error}"):
    sources.load_records("parquet:s3://bucket/x.parquet")


@pytest.mark.parametrize(
  ("content", "complaint"),
  [
    (None, "no such file"),
    (b"", "not JSON (Expecting value: line 1 column 1 (char 0))"),
    (b'{"a": 1', "not JSON ("),
    (b'{"a": "\xff"}', "not JSON ('utf-8' codec can't decode"),
    (b"[" * 100_000, "not JSON that can be read (nested too deeply)"),
    (b"[1]", "a JSON object was expected, not list"),
    (b"null", "a JSON object was expected, not NoneType"),
  ],
)
def test_a_file_that_holds_no_json_object_is_told_with_what_to_do(content, complaint, tmp_path):
  file = epath.Path(tmp_path) / "settings.json"
  if content is not None:
    file.write_bytes(content)
  for advice, end in (("", ""), ("put it back", "; put it back")):
    with pytest.raises(UserError) as told:
      text.read_object(file, advice)
    assert str(told.value).startswith(f"{file}: {complaint}") and str(told.value).endswith(end)
    assert "\n" not in str(told.value)


def test_a_json_object_is_read_in_every_encoding_of_json_and_may_be_missing(tmp_path):
  file = epath.Path(tmp_path) / "settings.json"
  assert text.read_object(file, missing={}) == {}
  for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
    file.write_bytes('{"a": "\u00e9"}'.encode(encoding))
    assert text.read_object(file, missing={}) == {"a": "\u00e9"}
