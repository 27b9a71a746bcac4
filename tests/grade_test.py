"""The grade command: its contract with scripts, and its agreement with careful humans."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from igpo_jax import grade as command
from igpo_jax.errors import UserError
from tests import paths
from tests.registered import only_built_in

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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- other verifiers ----------------------------------------------------------------------

PLUGIN = """
from igpo_jax.rewards.score import Verdict, register_verifier


@register_verifier("parity")
def parity(completion, record):
  digit = completion.strip()[-1:]
  if not digit.isdecimal():
    return Verdict(False, None, "unparseable")
  return Verdict(int(digit) % 2 == int(record.answer) % 2, digit, "ok")
"""
ODD = ({"question": "q", "completion": "7", "answer": "3"},
       {"question": "q", "completion": "8", "answer": 3},
       {"question": "q", "completion": "no", "answer": "3"})  # fmt: skip
SUM = {"numbers": [3, 7, 2], "target": 23}
MIXED = (
  {"question": "q", "completion": "=> 769", "answer": "769", "task": "chains"},
  {"question": "q", "completion": "\\boxed{2+3*7}", "answer": SUM, "task": "countdown"},
  {"question": "q", "completion": "\\boxed{2+7*3}", "answer": "3*7+2", "gold": SUM,
   "task": "countdown"},
  {"question": "q", "completion": "\\boxed{2+3+7}", "answer": SUM, "task": "countdown"},
  {"question": "q", "completion": "\\boxed{0.5}", "answer": "1/2", "task": "math"},
)  # fmt: skip


def graded(tmp_path, rows, *options):
  out = tmp_path / "out.jsonl"
  rows = write(tmp_path / "in.jsonl", rows)
  done = grade(f"--generations={rows}", f"--output={out}", *options)
  return done, [(r["correct"], r["status"]) for r in read(out)] if done.returncode == 0 else None


def test_a_verifier_of_a_users_own_grades_from_the_command_line(tmp_path):
  plugin = tmp_path / "own.py"
  plugin.write_text(PLUGIN)
  done, verdicts = graded(tmp_path, ODD, f"--plugins={plugin}", "--verifier=parity")
  assert done.returncode == 0, done.stderr
  assert verdicts == [(True, "ok"), (False, "ok"), (False, "unparseable")]
  assert done.stdout.startswith("parity: accuracy 0.3333 (1 of 3)")


def test_rows_of_several_tasks_are_each_graded_by_their_own_verifier(tmp_path):
  done, verdicts = graded(tmp_path, MIXED, "--verifier=task", "--workers=1")
  assert done.returncode == 0, done.stderr
  assert verdicts == [(True, "ok")] * 3 + [(False, "ok"), (True, "ok")]


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ((), "give --benchmark or --verifier"),
    (("--verifier=chess",), "no verifier 'chess'; known: countdown, exact, math, sudoku"),
    (("--verifier=task",), "record 'in.jsonl, line 1' has no task"),
    (("--verifier=exact", "--plugins=nowhere.py"), "--plugins=nowhere.py: no such file"),
    (("--verifier=exact", "--plugins=broken.py"), "broken.py, line 2: NameError"),
    (("--verifier=exact", "--plugins=taken.py"), "ValueError: verifier 'exact' is already"),
    (("--verifier=countdown",), "countdown: the gold of record 'in.jsonl, line 1' must be JSON"),
  ],
)
def test_a_verifier_that_cannot_grade_is_told_in_one_line(
  options, complaint, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "in.jsonl", ODD)
  (tmp_path / "broken.py").write_text("\nnothing\n")
  (tmp_path / "taken.py").write_text(PLUGIN.replace("parity", "exact"))
  with only_built_in(), pytest.raises(UserError, match=re.escape(complaint)):
    command.main(["--generations=in.jsonl", "--output=out.jsonl", *options])


def test_another_name_of_a_benchmark_is_taken_for_it(tmp_path):
  rows = [{"question": "q", "completion": "\\boxed{27}", "answer": 27.0}]
  done, verdicts = graded(tmp_path, rows, "--benchmark=amc23", "--workers=1")
  assert verdicts == [(True, "ok")] and done.stdout.startswith("amc: accuracy 1.0000")
