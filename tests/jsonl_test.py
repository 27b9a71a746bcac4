"""Rows on disks and in object stores: nothing lost, nothing twice, only tails read again."""

from __future__ import annotations

import json
import tempfile

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_jax.config import LogConfig, default_config, freeze
from igpo_jax.data.tokenizer import CharTokenizer, has_tokenizer, load_tokenizer
from igpo_jax.errors import UserError
from igpo_jax.eval.generations import Generations
from igpo_jax.io import jsonl
from igpo_jax.io.jsonl import row_file
from igpo_jax.train.loop import Run, run_stage
from igpo_jax.train.runlog import RunLog
from igpo_jax.train.workdir import open_workdir
from igpo_jax.viewer.report import write_report
from tests import fake_gcs
from tests.loop_test import ROWS, Killed, counting_stage, fresh, make_run


@pytest.fixture(params=["disk", "objects"])
def folder(request, tmp_path, monkeypatch):
  """An empty folder of either kind."""
  fake_gcs.install(monkeypatch, tmp_path)
  return epath.Path(tmp_path if request.param == "disk" else "gs://bucket")


OPERATIONS = st.lists(
  st.one_of(
    st.tuples(st.just("add"), st.integers(1, 6)),
    st.tuples(st.just("cut"), st.integers(0, 30)),
    st.tuples(st.sampled_from(["flush", "close", "open again", "read"]), st.just(0)),
  ),
  max_size=25,
)


@pytest.mark.parametrize("kind", ["disk", "objects"])
@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_rows_are_those_added_less_those_cut_whatever_the_order(kind, operations):
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    fake_gcs.install(patch, epath.Path(folder))
    patch.setattr(jsonl, "PART_BYTES", 40)
    patch.setattr(jsonl, "TAIL_BYTES", 16)
    path = epath.Path(folder if kind == "disk" else "gs://bucket") / "rows.jsonl"
    file, model = row_file(path), []
    for name, number in operations:
      if name == "add":
        rows = [{"n": len(model) + k, "text": "é\u2028" * (k % 4)} for k in range(number)]
        file.add(rows)
        model += rows
      elif name == "cut":
        file.cut(lambda row: row["n"] < number)  # noqa: B023  used at once
        model = model[:number]
      elif name == "open again":
        file.flush()
        file = row_file(path)
      elif name == "read":
        assert file.read() == model
      else:
        getattr(file, name)()
    file.close()
    assert file.read() == row_file(path).read() == model
    if path.exists():
      assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == model
    left = [p.name for p in path.parent.iterdir()] if path.parent.exists() else []
    assert set(left) <= {"rows.jsonl"}


def test_half_a_line_is_dropped_and_any_other_is_told(tmp_path):
  file = row_file(tmp_path / "rows.jsonl")
  file.add([{"n": 1}, {"n": 2}])
  whole = file.path.read_text()
  file.path.write_text(whole + '{"n": 3')
  assert file.read() == [{"n": 1}, {"n": 2}]
  file.cut()
  assert file.path.read_text() == whole
  file.path.write_text("{broken\n" + whole)
  with pytest.raises(UserError, match=r"rows\.jsonl: not a JSON line: '{broken"):
    file.read()


@pytest.mark.parametrize("line", [b'{"n": "\xff"}', b"5", b'"text"', b"[" * 100_000])
def test_a_line_that_is_no_object_is_told(line, tmp_path):
  file = row_file(tmp_path / "rows.jsonl")
  file.path.write_bytes(line + b'\n{"n": 1}\n')
  for use in (file.read, lambda: file.cut(lambda row: False)):
    with pytest.raises(UserError, match=r"rows\.jsonl: not a JSON (line|object)"):
      use()


def test_what_lies_before_the_tail_is_not_read_to_drop_the_tail(tmp_path, monkeypatch):
  monkeypatch.setattr(jsonl, "TAIL_BYTES", 64)
  file = row_file(tmp_path / "rows.jsonl")
  file.path.write_text("this would be an error\n")
  file.add([{"n": n} for n in range(100)])
  file.cut(lambda row: row["n"] < 95)
  assert file.path.read_text().endswith('{"n": 94}\n')
  with pytest.raises(UserError):
    file.cut(lambda row: False)


def test_parts_are_bounded_and_not_written_for_every_row(tmp_path, monkeypatch):
  store = fake_gcs.install(monkeypatch, tmp_path)
  now = [0.0]
  monkeypatch.setattr(jsonl.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(jsonl, "PART_BYTES", 3000)
  file = row_file("gs://bucket/rows.jsonl")
  for n in range(1000):  # rows of 12 bytes, one a second
    file.add([{"n": 1000 + n}])
    now[0] += 1
  assert len(store.writes) <= 1000 / jsonl.FLUSH_SECONDS + 6
  sizes = [p.stat().st_size for p in sorted((tmp_path / "bucket").iterdir())]
  assert sizes == [3000] * 4
  assert len(row_file("gs://bucket/rows.jsonl").read()) >= 1000 - jsonl.FLUSH_SECONDS
  store.writes.clear()
  file.cut(lambda row: row["n"] < 1990)
  assert store.writes == ["gs://bucket/rows-00003.jsonl"]


def test_a_kill_while_parts_are_put_together_leaves_no_row_twice(tmp_path, monkeypatch):
  fake_gcs.install(monkeypatch, tmp_path)
  monkeypatch.setattr(jsonl, "PART_BYTES", 40)
  for survivors in (4, 2, 1):
    path = epath.Path(f"gs://bucket/{survivors}/rows.jsonl")
    file = row_file(path)
    rows = [{"n": n} for n in range(20)]
    for row in rows:
      file.add([row])
    removed = []

    def remove(self, parts, left=survivors, removed=removed):
      for part in list(reversed(parts))[: len(parts) - left]:
        part.unlink()
        removed.append(part)
      raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(jsonl.PartRows, "_remove", remove)
      file.close()
    assert row_file(path).read() == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


# --- what a run writes, where nothing can be appended to -----------------------------------


@pytest.mark.parametrize("when", [1, 3, 5])
def test_a_stage_killed_and_continued_writes_the_rows_of_one_in_peace(
  when, folder, tmp_path, monkeypatch
):
  checkpoints = Run.checkpoints(make_run(tmp_path / "kept"), "rl")
  monkeypatch.setattr(Run, "checkpoints", lambda run, name: checkpoints)
  monkeypatch.setattr(checkpoints, "close", lambda: None)

  def kill(n):
    if n == when:
      raise Killed

  with pytest.raises(Killed):
    run_stage(make_run(folder / "war"), counting_stage(at_step=kill), fresh())
  state = run_stage(make_run(folder / "war"), counting_stage(), fresh())
  assert float(state.params) == 21
  log = RunLog(folder / "war", LogConfig(tensorboard=False))
  log.close()
  assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5, 6]
  lines = (folder / "war" / "samples.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [3, 3, 6, 6]


def test_every_row_is_written_before_its_checkpoint_is(folder, tmp_path):
  log = RunLog(folder / "run", LogConfig(tensorboard=False))
  for step in range(5):
    log.metrics("rl", step, {"x": step})
    log.samples("rl", step, [{"y": step}] * 4, limit=3)
  log.flush()
  seen = RunLog(folder / "run", LogConfig(tensorboard=False))
  assert [row["step"] for row in seen.rows] == list(range(5))
  assert len(row_file(folder / "run" / "samples.jsonl").read()) == 15


def test_an_evaluation_goes_on_with_what_is_there(folder):
  rows = [{"id": f"{n}", "sample": 0} for n in range(6)]
  first = Generations(folder / "evals", "test", {"seed": 1})
  first.add(rows[:4])
  first.close(list(first.rows))
  again = Generations(folder / "evals", "test", {"seed": 1})
  assert list(again.rows.values()) == rows[:4]
  again.add(rows[2:])
  again.close(list(again.rows))
  assert [json.loads(line) for line in again.path.read_text().splitlines()] == rows
  assert not Generations(folder / "evals", "test", {"seed": 2}).rows


def test_the_rest_of_a_workdir_can_be_an_object_store(tmp_path, monkeypatch, capsys):
  fake_gcs.install(monkeypatch, tmp_path)
  workdir = epath.Path("gs://bucket/run")
  config = default_config()
  config.stages = ()
  open_workdir(workdir, freeze(config))
  CharTokenizer("abc").save(workdir / "tokenizer")
  assert has_tokenizer(workdir / "tokenizer")
  assert load_tokenizer(workdir / "tokenizer").encode("cab") == CharTokenizer("abc").encode("cab")
  open_workdir(workdir, freeze(config))
  row_file(workdir / "metrics.jsonl").add([{"stage": "init", "step": 0}])
  config.log.every = 2
  open_workdir(workdir, freeze(config))
  assert '"log.every": [1, 2]' in (workdir / "changes.jsonl").read_text()
  config.seed = 3
  with pytest.raises(UserError, match=r"another config\.seed: 0 there, 3 now"):
    open_workdir(workdir, freeze(config))
  log = RunLog(workdir, LogConfig(tensorboard=True))
  assert "no TensorBoard files: gs://bucket/run cannot be appended to" in capsys.readouterr().err
  log.metrics("rl", 1, {"a": np.float32(0.5)})
  log.close()
  write_report(ROWS, workdir)
  made = {p.name for p in (tmp_path / "bucket" / "run").iterdir()}
  files = {
    "config.json",
    "changes.jsonl",
    "metrics.jsonl",
    "summary.json",
    "table.md",
    "curves.png",
    "tokenizer",
  }
  assert made == files
  assert (tmp_path / "bucket/run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_removed_between_two_rows_is_told_and_not_begun_anew(tmp_path):
  rows = row_file(tmp_path / "run" / "metrics.jsonl")
  rows.path.parent.mkdir()
  rows.add([{"step": 1}])
  rows.path.unlink()  # its folder is there, as a checkpoint may have made it again
  with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
    rows.add([{"step": 2}])
  assert not rows.path.exists()
