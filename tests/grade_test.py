"""The grade command: its contract with scripts, and its agreement with careful humans."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from igpo_jax import grade as command
from igpo_jax.errors import UserError
from tests import paths

ROWS = (
  {"question": "q", "completion": r"\boxed{x+x}<|eot_id|>", "answer": "2x", "note": 1},
  {"question": "q", "completion": "no idea", "answer": "2x", "note": 2},
  {"question": "é", "completion": r"\boxed{9^{9^{9^{9}}}}", "answer": "2x", "note": 3},
  {"question": "q", "completion": r"\boxed{70}", "answer": "so\n#### 72", "note": 4},
  {"question": "q", "completion": r"\boxed{27}", "answer": 27.0, "note": 5},
)


def grade(*options: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "igpo_jax.grade", *options],
    text=True,
    capture_output=True,
    cwd=paths.REPO,
    check=False,
  )


def write(path, rows) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  return str(path)


def read(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_output_has_the_rows_in_order_with_three_fields_added(tmp_path):
  out = tmp_path / "out.jsonl"
  done = grade(
    "--benchmark=math500",
    f"--generations={write(tmp_path / 'in.jsonl', ROWS)}",
    f"--output={out}",
    "--timeout=1",
    "--workers=1",
  )
  assert done.returncode == 0, done.stderr
  graded = read(out)
  added = ("correct", "extracted", "status")
  assert [{k: v for k, v in row.items() if k not in added} for row in graded] == list(ROWS)
  assert [row["status"] for row in graded] == ["ok", "unparseable", "timeout", "ok", "ok"]
  assert [row["correct"] for row in graded] == [True, False, False, False, True]
  assert [row["extracted"] for row in graded] == ["x+x", None, "9^{9^{9^{9}}}", "70", "27"]
  assert done.stdout.startswith("math500: accuracy 0.4000 (2 of 5); ok 3, unparseable 1, timeout 1")
  assert (
    not done.stderr
    and list(tmp_path.iterdir()) != []
    and not out.with_name("out.jsonl.partial").exists()
  )


@pytest.mark.parametrize(
  ("line", "complaint"),
  (
    ("{not json", "line 2: not JSON"),
    ('{"question": "q", "answer": "1"}', "line 2: no 'completion'"),
    ('{"question": "q", "completion": 3, "answer": "1"}', "line 2: 'completion' must be text"),
    ('{"question": "q", "completion": "c", "answer": null}', "line 2: an answer is text"),
    ('{"question": "q", "completion": "c", "answer": ""}', "line 2: 'answer' is empty"),
    ("[1]", "line 2: no 'question'"),
    ('{"question": "q", "completion": "c", "answer": NaN}', "line 2: an answer is text or a"),
  ),
)
def test_a_bad_line_is_one_message_that_says_where(tmp_path, line, complaint):
  source = tmp_path / "in.jsonl"
  source.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", "utf-8")
  done = grade("--benchmark=gsm8k", f"--generations={source}", f"--output={tmp_path / 'out'}")
  assert done.returncode == 2 and complaint in done.stderr
  assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_null_completion_has_no_answer_and_stops_nothing(tmp_path):
  rows = [{**ROWS[0], "completion": None}, ROWS[4]]
  out = tmp_path / "out.jsonl"
  source = write(tmp_path / "in.jsonl", rows)
  done = grade("--benchmark=amc", f"--generations={source}", f"--output={out}", "--workers=1")
  assert done.returncode == 0, done.stderr
  assert [(row["status"], row["correct"]) for row in read(out)] == [
    ("unparseable", False),
    ("ok", True),
  ]
  assert read(out)[0]["completion"] is None


@pytest.mark.parametrize(
  "options",
  (
    ("--benchmark=gsm8k", "--generations=nowhere.jsonl", "--output=out"),
    ("--benchmark=aime", "--generations=a", "--output=b"),
    ("--benchmark=gsm8k", "--output=b"),
    ("--benchmark=gsm8k", "--generations=a", "--output=b", "--timeout=0"),
    ("--benchmark=gsm8k", "--generations=a", "--output=b", "--workers=0"),
    ("--benchmark=gsm8k", "--generations=a", "--output=b", "--extraction=guess"),
  ),
)
def test_a_users_mistake_exits_2_with_one_line(options):
  done = grade(*options)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


@pytest.mark.parametrize(("benchmark", "rows"), (("gsm8k", 1084), ("math500", 495)))
def test_verdicts_on_real_generations_agree_with_careful_humans(tmp_path, benchmark, rows):
  source = paths.shared_path("data", "llada_generations", f"{benchmark}_256.jsonl")
  out = tmp_path / "out.jsonl"
  done = grade(f"--benchmark={benchmark}", f"--generations={source}", f"--output={out}")
  assert done.returncode == 0, done.stderr
  pairs = list(zip(read(source), read(out), strict=True))
  agree = sum(row["correct"] is verdict["correct"] for row, verdict in pairs)
  assert len(pairs) == rows and agree / rows >= 0.995
  assert f"{agree} of {rows}" in done.stdout


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_an_empty_file_is_a_mistake_not_an_accuracy_of_0(tmp_path, text):
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text(text)
  with pytest.raises(UserError, match=r"--generations: .*in\.jsonl has no rows"):
    command.main(["--benchmark=gsm8k", f"--generations={source}", f"--output={out}"])
  assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_output_that_cannot_be_written_is_told_before_grading(tmp_path):
  source = pathlib.Path(write(tmp_path / "in.jsonl", ROWS))
  for output in (tmp_path, tmp_path / "no" / "out.jsonl", source):
    with pytest.raises(UserError, match="--output: "):
      command.main(["--benchmark=gsm8k", f"--generations={source}", f"--output={output}"])
  assert read(source) == list(ROWS)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_grading_ends_with_the_signals_code(tmp_path, number, code):
  rows = [{"question": "q", "completion": r"\boxed{1}", "answer": "2"}]
  fifo = tmp_path / "in.jsonl"  # read for as long as somebody writes
  os.mkfifo(fifo)
  running = subprocess.Popen(
    [sys.executable, "-m", "igpo_jax.grade", "--benchmark=gsm8k", f"--generations={fifo}",
     f"--output={tmp_path / 'out.jsonl'}"],
    cwd=paths.REPO, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  with fifo.open("w") as writer:  # opens once the command reads
    writer.write(json.dumps(rows[0]) + "\n")
    writer.flush()
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
  assert running.returncode == code and err in ("interrupted\n", "terminated\n")
