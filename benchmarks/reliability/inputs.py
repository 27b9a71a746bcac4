"""Malformed input: model directories, adapters, checkpoints, data files, options of a config.

A case is some twenty files or options, each spoilt at random. Every one must be taken as it is, or
refused with a line for a user and nothing at the target. Lost are other exceptions, something left
at the target of a conversion that was refused, records with texts that cannot be written, trials
that take more than `SECONDS`, and a training checkpoint whose conversion has other numbers than
before it was spoilt.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import pathlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from benchmarks.reliability.table import Campaign, mixed
from igpo_jax import main as training
from igpo_jax.checkpoint import Checkpoints
from igpo_jax.cli import mistake
from igpo_jax.config import Config
from igpo_jax.config.tree import default_config
from igpo_jax.convert.__main__ import main as convert
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.data.sources import load_records
from igpo_jax.io.jsonl import Row
from igpo_jax.train.continued import as_json
from igpo_jax.types import TrainState

COUNTS = {"model": 20, "adapter": 20, "training": 20, "data": 40, "options": 40}
TRIALS = {"model": 10, "adapter": 10, "training": 5, "data": 50, "options": 50}
SECONDS = 30.0
REPO = pathlib.Path(__file__).resolve().parents[2]
MODEL = REPO / "tests" / "goldens" / "llada_tiny"
DEEP = "[" * 100_000
# What may stand where JSON has another value.
VALUES: tuple[Any, ...] = (
  None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
  "", " ", "x", "\0", "\ud800", "\u202e", "../../x", "/etc/passwd", "1", "nan", "x" * 100_000,
  [], {}, [[]], [None], {"x": 1}, [1, 2], ["x"], {"": ""}, [[1], "x"], "(" * 500, "{", "%s", "${x}",
)  # fmt: skip
WORDS = (
  "", " ", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 5000, "x", "None", "True",
  "[", "(1,", "()", "{}", "''", '"', "1,2", "../..", "a=b", "a;b", "\ud800", "\u0661", "1_0",
  "1.5", "--x", "sft", "x" * 9999, "(" * 300, "[" * 300, "synthetic:chains?n=x",
  "jsonl:/", "synthetic:", "mix: | ", "test=", "\n", "%00", "*" * 99, "((('a', 1.0),),)",
)  # fmt: skip


# --- files -------------------------------------------------------------------------------


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
  """Changed, cut, doubled or interrupted somewhere."""
  at = draw.randrange(len(data) + 1)
  chunk = draw.choice((b"\0", b"\xff\xfe", b"\x80", b"{", b'"', DEEP.encode(), b"\r", b"9" * 6000))
  return draw.choice(
    (
      lambda: data[:at],
      lambda: data[:at] + chunk + data[at:],
      lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
      lambda: data + data,
      lambda: data[at:],
      lambda: b"",
    )
  )()


def spoil_json(value: Any, draw: random.Random) -> Any:
  """A JSON value with one of its parts replaced, removed or named otherwise."""
  if isinstance(value, dict) and value and draw.random() < 0.9:
    key = draw.choice(list(value))
    way = draw.random()
    if way < 0.15:
      return {k: v for k, v in value.items() if k != key}
    if way < 0.25:
      return value | {str(draw.choice(VALUES)): value[key]}
    return value | {key: spoil_json(value[key], draw)}
  if isinstance(value, list) and value and draw.random() < 0.7:
    at = draw.randrange(len(value))
    return [*value[:at], spoil_json(value[at], draw), *value[at + 1 :]]
  return draw.choice(VALUES)


def spoil_json_file(file: pathlib.Path, draw: random.Random) -> None:
  if draw.random() < 0.3:
    file.write_bytes(spoil_bytes(file.read_bytes(), draw))
  else:
    file.write_text(json.dumps(spoil_json(json.loads(file.read_text()), draw)))


def spoil_tensors(file: pathlib.Path, draw: random.Random) -> None:
  """Spoils a safetensors file: mostly its header, which says what the rest is."""
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header, rest = data[8 : 8 + length], data[8 + length :]
  way = draw.random()
  if way < 0.6:
    text = json.dumps(spoil_json(json.loads(header), draw)).encode()
  else:
    text = spoil_bytes(header, draw)
  if way < 0.8:
    length = len(text)
  file.write_bytes(length.to_bytes(8, "little") + text + (rest if way < 0.9 else rest[:-9]))


def shards(folder: pathlib.Path) -> pathlib.Path:
  """Cuts a model's file in two; returns the index."""
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  file.unlink()
  names = {key: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, key in enumerate(tensors)}
  for name in set(names.values()):
    part = {key: value for key, value in tensors.items() if names[key] == name}
    safetensors.numpy.save_file(part, folder / name)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
  return index


def copied(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  shutil.copytree(source, target)
  return target


@functools.cache
def adapter() -> pathlib.Path:
  folder = pathlib.Path(tempfile.mkdtemp())
  tensors = {}
  for n in range(3):
    name = f"base_model.model.model.transformer.blocks.{n}.q_proj"
    tensors[f"{name}.lora_A.weight"] = np.full((4, 64), 0.01, np.float32)
    tensors[f"{name}.lora_B.weight"] = np.full((64, 4), 0.01, np.float32)
  safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
  config = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none",
    "target_modules": ["q_proj"], "modules_to_save": None, "base_model_name_or_path": "x",
  }  # fmt: skip
  (folder / "adapter_config.json").write_text(json.dumps(config))
  return folder


@functools.cache
def trained() -> pathlib.Path:
  """A workdir with a checkpoint."""
  folder = pathlib.Path(tempfile.mkdtemp())
  params = load_pretrained(MODEL, dtype="float32").params
  (folder / "config.json").write_text(json.dumps(as_json(Config(init_from=str(MODEL)))))
  zero = jax.numpy.zeros((), jax.numpy.int32)
  checkpoints = Checkpoints(folder / "checkpoints" / "rl")
  checkpoints.save(7, TrainState(zero, params, (), zero, zero))
  checkpoints.close()
  return folder


def model_case(draw: random.Random, folder: pathlib.Path) -> list[str]:
  source = copied(MODEL, folder / "source")
  way = draw.random()
  if way < 0.4:
    spoil_json_file(source / "config.json", draw)
  elif way < 0.8:
    spoil_tensors(source / "model.safetensors", draw)
  else:
    spoil_json_file(shards(source), draw)
  return converted(folder, "--to=hf")


def adapter_case(draw: random.Random, folder: pathlib.Path) -> list[str]:
  copied(MODEL, folder / "source")
  put_on = copied(adapter(), folder / "adapter")
  if draw.random() < 0.6:
    spoil_json_file(put_on / "adapter_config.json", draw)
  else:
    spoil_tensors(put_on / "adapter_model.safetensors", draw)
  return converted(folder, "--to=hf", "--merge-lora", f"--adapter={put_on}")


def training_case(draw: random.Random, folder: pathlib.Path) -> list[str]:
  workdir = copied(trained(), folder / "workdir")
  step = workdir / "checkpoints" / "rl" / "7"
  files = sorted(path for path in step.rglob("*") if path.is_file())
  if draw.random() < 0.7:  # one of the few bytes that are not arrays
    files = [path for path in files if path.stat().st_size < 20_000]
  file = draw.choice(files)
  data = file.read_bytes()
  if draw.random() < 0.5:
    at = draw.randrange(len(data))
    file.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
  else:
    file.write_bytes(spoil_bytes(data, draw))
  lost = converted(folder, "--to=hf", source=step)
  made = folder / "target" / "model.safetensors"
  if made.exists() and made.read_bytes() != (MODEL / "model.safetensors").read_bytes():
    one, two = (safetensors.numpy.load_file(file) for file in (made, MODEL / "model.safetensors"))
    if one.keys() != two.keys() or any(one[k].tobytes() != two[k].tobytes() for k in one):
      lost.append(f"other numbers, without a word: {file.relative_to(step)}")
  return lost


def converted(folder: pathlib.Path, *options: str, source: pathlib.Path | None = None) -> list[str]:
  """What is wrong with how a conversion went."""
  target = folder / "target"
  there = {path.name for path in folder.iterdir()}
  try:
    convert([f"--source={source or folder / 'source'}", f"--target={target}", *options])
  except (Exception, SystemExit) as error:
    lost = refused(error)
    left = {path.name for path in folder.iterdir()} - there
    return lost + [f"left behind: {name}" for name in sorted(left)]
  return []


def refused(error: BaseException) -> list[str]:
  """What is wrong with an error: nothing, if it is a line for a user."""
  return [] if mistake(error) else [f"{type(error).__name__}: {error!s:.200}"]


# --- data --------------------------------------------------------------------------------

ROWS = [
  {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}", "id": f"q{n}"}
  for n in range(3)
]
CHAT = [
  {"messages": [{"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "So \\boxed{4}"}], "answer": "4"}
]  # fmt: skip


def data_case(draw: random.Random, folder: pathlib.Path) -> list[str]:
  rows = draw.choice((ROWS, CHAT))
  if draw.random() < 0.6:
    rows = spoil_json(rows, draw)
  rows = rows if isinstance(rows, list) else [rows]
  kind = draw.choice(("jsonl", "array", "csv", "parquet", "gz"))
  format = draw.choice(("plain", "gsm8k", "openr1", "math", "metamath", "amc", "nowhere"))
  file = folder / "rows"
  if kind == "csv":
    text = "question,answer\n" + "".join(f'"{row}","{n}"\n' for n, row in enumerate(rows))
    data = text.encode(errors="surrogatepass")
  elif kind == "parquet":
    data = parquet(ROWS)
  elif kind == "array":
    data = json.dumps(rows).encode()
  else:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    data = gzip.compress(data, mtime=0) if kind == "gz" else data
  file.write_bytes(spoil_bytes(data, draw) if kind == "parquet" or draw.random() < 0.5 else data)
  source = kind if kind in ("csv", "parquet") else "jsonl"
  try:
    for record in load_records(f"{source}:{file}?format={format}").records:
      texts = [record.id, record.trace, record.answer, *(m["content"] for m in record.prompt)]
      "".join(texts).encode()
      start, end = record.answer_span or (0, 0)
      assert 0 <= start <= end <= len(record.trace), record.answer_span
  except Exception as error:
    return refused(error)
  return []


def parquet(rows: list[Row]) -> bytes:
  import pyarrow
  import pyarrow.parquet

  out = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
  return out.getvalue()


# --- options -----------------------------------------------------------------------------


@functools.cache
def option_names() -> tuple[str, ...]:
  def below(section: Any, prefix: str) -> list[str]:
    names = []
    for name, value in section.items():
      path = f"{prefix}.{name}"
      names += below(value, path) if hasattr(value, "items") else [path]
    return names

  return tuple(below(default_config(), "config"))


def options_case(draw: random.Random, folder: pathlib.Path) -> list[str]:
  words = [f"--{name}={draw.choice(WORDS)}" for name in draw.sample(option_names(), k=1)]
  if draw.random() < 0.1:
    words.append(draw.choice(("--x", "x", "--workdir", "--config.x=1", "--config.rl", "--", "-")))
  try:
    training.parse_flags(["main", "--config=configs/quickstart.py", *words])
  except (Exception, SystemExit) as error:
    return [f"{words}: {text}" for text in refused(error)]
  return []


TRIES: dict[str, Callable[[random.Random, pathlib.Path], list[str]]] = {
  "model": model_case,
  "adapter": adapter_case,
  "training": training_case,
  "data": data_case,
  "options": options_case,
}


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  kind, lost = case.partition("/")[0], []
  for number in range(TRIALS[kind]):
    place = pathlib.Path(folder, f"{number}")
    place.mkdir()
    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
      found = TRIES[kind](random.Random(f"{case} {number} {seed}"), place)
    if time.monotonic() - began > SECONDS:
      found.append(f"{time.monotonic() - began:.0f} s")
    lost += [f"trial {number}: {text}" for text in found]
    shutil.rmtree(place)
  return {"tried": TRIALS[kind], "lost": lost}


CAMPAIGN = Campaign(
  "inputs",
  "malformed models, adapters, checkpoints, data and options",
  functools.partial(mixed, COUNTS),
  attempt,
)
