"""Rewriting against an endpoint that fails in every way: each record decided exactly once."""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from igpo_jax import cli
from igpo_jax.data.sources import load_records
from igpo_jax.rewards.score import Scorer
from igpo_jax.rewrite import __main__ as rewrite
from tests import tiny_tokenizer
from tests.chat_server import chat_server
from tests.paths import REPO

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def server():
  with chat_server() as (address, state):
    yield address, state


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tiny_tokenizer.make_directory(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  for name in ("http_proxy", "https_proxy", "all_proxy"):
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.upper(), raising=False)


def write_source(path, n):
  rows = [
    {
      "id": f"r{k}",
      "question": f"Problem {k}: what is {k} + 2?",
      "trace": f"Hmm, let me think. {k} plus two. Wait. So \\boxed{{{k + 2}}}",
      "answer": str(k + 2),
    }
    for k in range(n)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def options(tmp_path, address, directory, n=20, **more):
  """The command line as a list; `more` adds or replaces options."""
  source = tmp_path / "source.jsonl"
  if not source.exists():
    write_source(source, n)
  named = {
    "source": f"jsonl:{source}", "output": tmp_path / "out" / "aligned.jsonl",
    "endpoint": address, "model": "writer", "tokenizer": directory, "max_tokens": 300,
    "concurrency": 16, "backoff": 0.01, "timeout": 5, "workers": 1,
  }  # fmt: skip
  return [f"--{k.replace('_', '-')}={v}" for k, v in (named | more).items()]


def run_here(monkeypatch, capsys, *argv):
  """(exit code, stdout, stderr) of the command in this process."""
  monkeypatch.setattr(sys, "argv", ["rewrite", *argv])
  with pytest.raises(SystemExit) as info:
    cli.run(rewrite.main)
  out, err = capsys.readouterr()
  return info.value.code, out, err


def start(*argv):
  return subprocess.Popen(
    [sys.executable, "-m", "igpo_jax.rewrite", *argv],
    cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ),
  )  # fmt: skip


def finish(process):
  """(exit code, stdout, stderr) of a started command."""
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def rows(tmp_path, name="aligned"):
  path = tmp_path / "out" / f"{name}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def number(row):
  """17 of the id "tmp/source/r17"."""
  return int(row["id"].rpartition("r")[2])


def check_partition(tmp_path, n):
  """Every record is in exactly one of the two files, once; returns the accepted numbers."""
  accepted = [number(row) for row in rows(tmp_path)]
  rejected = [number(row) for row in rows(tmp_path, "aligned.rejected")]
  assert sorted(accepted + rejected) == list(range(n))
  return set(accepted)


# --- whatever the endpoint does --------------------------------------------------------

RETRIED = ("500", "503", "429", "429:0", "reset", "truncated", "garbage", "408")
BAD = {
  "wrong": "wrong answer",
  "long": "too long",
  "unboxed": "no final answer",
  "cut": "cut off by the endpoint",
  "empty": "empty",
}


@pytest.mark.slow
def test_every_record_is_decided_once_whatever_the_endpoint_does(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  state.patience = 6  # of a slow answer: longer than the timeout, which a busy machine keeps to
  n, rng, expected = 150, random.Random(0), {}
  for k in range(n):
    texts = rng.choice([["ok"], ["ok"], [rng.choice(list(BAD)), "ok"], rng.choices(list(BAD), k=2)])
    plan = []
    for text in texts:
      plan += [*rng.choices(RETRIED, k=rng.choice((0, 0, 1, 3))), text]
    state.plan[k] = plan
    expected[k] = [BAD[text] for text in texts if text != "ok"]
  state.plan[3] = ["slow", "ok"]  # given up and tried again
  state.plan[4] = ["413"]  # refused: it concerns this record
  expected |= {3: [], 4: ["refused by the endpoint"]}
  code, out, err = run_here(
    monkeypatch, capsys,
    *options(tmp_path, address, tokenizer, n, concurrency=32, timeout=5),
    "--price_in=2", "--price_out=10",
  )  # fmt: skip
  assert code == 0, err

  accepted = check_partition(tmp_path, n)
  refused = {k for k, reasons in expected.items() if len(reasons) == 2 or k == 4}
  assert accepted == set(range(n)) - refused
  reasons = {number(row): row["reasons"] for row in rows(tmp_path, "aligned.rejected")}
  assert reasons == {k: expected[k] for k in refused}
  # No request more than the plan has: bounded, and nothing is asked twice without need.
  assert {k: len(bodies) for k, bodies in state.seen.items()} == {
    k: len(plan) for k, plan in state.plan.items()
  }
  # The second text is asked for with the first and what is wrong with it.
  for k, bodies in state.seen.items():
    roles = [message["role"] for message in bodies[-1]["messages"]]
    again = k != 4 and bool(expected[k])
    assert roles == ["system", "user", *(["assistant", "user"] if again else [])]
    if expected[k][:1] == ["wrong answer"]:
      said = bodies[-1]["messages"][-1]["content"]
      assert f"ends in -17, but the final answer is {k + 2}" in said
  assert state.paths == {"/v1/chat/completions"} and state.keys == {f"Bearer {KEY}"}
  body = state.seen[0][0]
  assert body["model"] == "writer" and body["stream"] is False and body["max_tokens"] == 856

  # Counted, and the cost of what was charged.
  counted = collections.Counter(row[-1] for row in reasons.values())
  report = json.loads((tmp_path / "out" / "aligned.report.json").read_text())
  assert report["accepted"] == len(accepted) and report["rejected"] == counted
  assert all(f"{m} x {reason}" in out for reason, m in counted.items())
  charged = sum(len(reasons) + (k in accepted) for k, reasons in expected.items()) - 1
  assert f"{100 * charged:,} tokens in, {10 * charged:,} out, cost" in out
  assert f"cost {charged * (100 * 2 + 10 * 10) / 1e6:.2f}" in out

  # Usable as it is, right by the grader, labelled; the key is nowhere.
  records = load_records(f"jsonl:{tmp_path}/out/aligned.jsonl").records
  with Scorer("math", workers=1) as scorer:
    assert scorer([r.trace for r in records], records).correct.all()
  assert all(
    r.answer_span and r.trace[slice(*r.answer_span)].startswith("\\boxed") for r in records
  )
  assert {row["made_by"] for row in rows(tmp_path)} == {"rewritten by writer"}
  for path in (tmp_path / "out").iterdir():
    assert KEY.encode() not in path.read_bytes(), path
  assert KEY not in out + err


def test_sixty_four_requests_are_in_flight_with_the_fields_that_were_asked_for(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  state.gather = 64
  extra = json.dumps({"max_tokens": None, "max_completion_tokens": 99, "top_p": 0.5})
  more = {"concurrency": 64, "timeout": 20, "extra": extra, "temperature": 0}
  argv = options(tmp_path, address, tokenizer, 100, **more)
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 0, err
  assert state.most_in_flight == 64  # and never more than asked for
  assert len(check_partition(tmp_path, 100)) == 100
  body = state.seen[0][0]
  assert "max_tokens" not in body and body["max_completion_tokens"] == 99
  assert body["top_p"] == 0.5 and body["temperature"] == 0


@pytest.mark.slow
def test_a_rate_limit_is_everyones_and_is_honoured(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  state.delay = 0.01
  state.plan = {7: ["429:1.2"]}
  argv = options(tmp_path, address, tokenizer, 40, concurrency=4)
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 0, err
  assert len(check_partition(tmp_path, 40)) == 40
  arrivals = [at for at, _ in state.times]
  limited = next(at for at, record in state.times if record == 7)
  gap = max(b - a for a, b in itertools.pairwise(arrivals))
  assert gap >= 1
  # Only what was under way then arrives before the pause is over.
  assert sum(limited + 0.1 < at < limited + 1 for at in arrivals) == 0


# --- kills -----------------------------------------------------------------------------


def wait_for_rows(tmp_path, count, process):
  path = tmp_path / "out" / "aligned.jsonl"
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline and process.poll() is None:
    if path.exists() and path.read_bytes().count(b"\n") >= count:
      return
    time.sleep(0.005)
  raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing_that_was_accepted(server, tokenizer, tmp_path):
  address, state = server
  state.delay = 0.05
  n = 150
  state.plan = {k: ["wrong"] * 20 for k in range(0, n, 10)}
  argv = options(tmp_path, address, tokenizer, n, concurrency=8)
  decided = {}
  for count in (20, 60):
    process = start(*argv)
    wait_for_rows(tmp_path, count, process)
    process.kill()
    process.communicate()
    before = rows(tmp_path) + rows(tmp_path, "aligned.rejected")
    decided |= {number(row): len(state.seen[number(row)]) for row in before}
    assert len(decided) == len(before) < n
    for name in ("aligned", "aligned.rejected"):  # lines that the kill cut
      with open(tmp_path / "out" / f"{name}.jsonl", "a") as file:
        file.write('{"id": "source/r99", "reas')
  kept = {row["id"]: row for row in rows_but_last(tmp_path)}
  code, out, err = finish(start(*argv))
  assert code == 0, err
  assert len(check_partition(tmp_path, n)) == n - len(state.plan)
  assert all(len(state.seen[k]) == requests for k, requests in decided.items())
  after = {row["id"]: row for row in rows(tmp_path)}
  assert kept.items() <= after.items()
  # What was in flight at a kill was asked for again, and no more than that.
  assert state.requests <= n + len(state.plan) + 2 * 8 * 2
  assert f"accepted {n - len(state.plan)} of {n}" in out


def rows_but_last(tmp_path):
  lines = (tmp_path / "out" / "aligned.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines[:-1]]


@pytest.mark.slow
def test_asked_to_stop_it_finishes_what_is_under_way_and_says_how_to_go_on(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  state.delay = 0.1
  argv = options(tmp_path, address, tokenizer, 60, concurrency=4)
  process = start(*argv)
  wait_for_rows(tmp_path, 8, process)
  process.send_signal(signal.SIGINT)
  code, out, err = finish(process)
  assert code == 130, err
  assert "the same command goes on from here" in out and "Traceback" not in err
  done = len(rows(tmp_path))
  assert done == state.requests < 60  # every answer that was asked for is kept
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 0, err
  assert len(check_partition(tmp_path, 60)) == state.requests == 60


# --- what only the user can mend --------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_key_is_one_line_and_nothing_is_lost(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  state.plan = {k: ["401"] for k in range(1, 30)}
  argv = options(tmp_path, address, tokenizer, 30, concurrency=1)
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 2
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and f"HTTP 401 from {address}/chat/completions" in lines[0]
  assert "put a valid key into the environment variable" in lines[0]
  assert KEY not in err and "Traceback" not in err
  assert state.requests == 2 and len(rows(tmp_path)) == 1
  assert not rows(tmp_path, "aligned.rejected")
  state.plan = {}  # mended
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 0, err
  assert len(check_partition(tmp_path, 30)) == 30 and len(state.seen[0]) == 1


@pytest.mark.slow
def test_an_endpoint_that_is_down_ends_the_run_and_costs_no_record(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  state.plan = {k: ["500"] * 100 for k in range(5, 30)}
  argv = options(tmp_path, address, tokenizer, 30, concurrency=2, retries=2, max_failures=3)
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 2 and "records in a row failed at the endpoint (last: HTTP 500: no luck" in err
  assert len(rows(tmp_path)) == 5 and not rows(tmp_path, "aligned.rejected")
  assert state.requests <= 5 + 4 * 3
  # One that fails alone is rejected when others succeed.
  state.plan = {9: ["500"] * 100}
  code, out, err = run_here(monkeypatch, capsys, *argv)
  assert code == 0, err
  assert check_partition(tmp_path, 30) == set(range(30)) - {9}
  assert "1 x endpoint failed" in out
  last = rows(tmp_path, "aligned.rejected")[0]["attempts"][-1]
  assert last["complaint"] == "HTTP 500: no luck today, [key]"


def test_other_settings_need_another_output(server, tokenizer, tmp_path, monkeypatch, capsys):
  address, state = server
  code, _, err = run_here(monkeypatch, capsys, *options(tmp_path, address, tokenizer, 4))
  assert code == 0, err
  char = {"mode": "trim", "tokenizer": tokenizer}
  other = write_source(tmp_path / "other.jsonl", 3)
  for change, told in (
    ({"max_tokens": 299}, "made with max_tokens=300, not 299"),
    ({"model": "reader"}, "made with model='writer', not 'reader'"),
    ({"source": f"jsonl:{other}"}, "made with source="),
    ({"temperature": 0.7}, "made with options="),
    (char, "made with mode='rewrite', not 'trim'"),
  ):
    code, _, err = run_here(monkeypatch, capsys, *options(tmp_path, address, tokenizer, **change))
    assert code == 2 and told in err, err
  assert state.requests == 4
  # What decides no row may change.
  free = {"endpoint": address + "/", "concurrency": 3, "timeout": 9, "limit": 2}
  code, _, err = run_here(monkeypatch, capsys, *options(tmp_path, address, tokenizer, **free))
  assert code == 0 and state.requests == 4, err


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"endpoint": "localhost"}, "--endpoint=localhost: expected an address such as http://"),
    ({"endpoint": "http://me:secret@127.0.0.1:1/v1"}, "keys do not belong into an address"),
    ({"key_env": "NO_SUCH_KEY"}, "--key_env=NO_SUCH_KEY: there is no such environment variable"),
    ({"extra": "{"}, "--extra: not JSON"),
    ({"extra": "[1]"}, "--extra: expected a JSON object"),
    ({"max_tokens": 1}, "--max_tokens=1 must be at least 2"),
    ({"source": "jsonl:/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
    ({"source": "nowhere:x"}, "no data source for 'nowhere:x'"),
    ({"tokenizer": "/nowhere"}, "no tokenizer at /nowhere"),
    ({"output": "."}, "is a directory; give a file"),
    ({"mode": "trim", "rules": "latin"}, "--rules: 'latin' is not one of chains, english"),
  ],
)
def test_an_option_that_cannot_be_is_told(change, told, tokenizer, tmp_path, monkeypatch, capsys):
  argv = options(tmp_path, "http://127.0.0.1:9/v1", tokenizer, **change)
  code, _, err = run_here(monkeypatch, capsys, *argv)
  assert code == 2 and told in err and "secret" not in err, err
  assert [line for line in err.splitlines() if line] == [f"error: {err[7:].strip()}"]


def test_a_dry_run_shows_the_prompts_and_asks_nothing(
  server, tokenizer, tmp_path, monkeypatch, capsys
):
  address, state = server
  argv = options(tmp_path, address, tokenizer, 20, limit=2)
  code, out, _ = run_here(monkeypatch, capsys, *argv, "--dry-run")
  assert code == 0 and state.requests == 0 and not (tmp_path / "out").exists()
  assert out.count("--- system") == out.count("--- user") == 2
  assert "Problem 1: what is 1 + 2?" in out and "Final answer: 3" in out and "\\boxed{}" in out
  assert "at most 300 tokens" in out and "{" not in out.replace("\\boxed{", "")
