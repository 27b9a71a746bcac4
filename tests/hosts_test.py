"""Several processes: one run over two of them, killed and continued; what all agree on."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.reliability.table import untimed
from igpo_jax.checkpoint import Checkpoints
from igpo_jax.parallel.mesh import make_mesh
from tests import hosts_program
from tests.paths import REPO, with_devices
from tests.tiny_config import FIRST_SLICE, TRIPWIRE


def start(module, *options, processes=1, extra=()):
  """Starts the processes of one program over 8 devices; `extra`: variables of the last."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = with_devices(8 // processes)
  out = []
  for index in range(processes):
    own = {} if processes == 1 else {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": f"{processes}",
      "JAX_PROCESS_ID": f"{index}",
    }  # fmt: skip
    if index == processes - 1:
      own |= dict(extra)
    out.append(subprocess.Popen(
      [sys.executable, "-m", "tests.kept_programs", module, *options], cwd=REPO,
      env=environment | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ))  # fmt: skip
  return out


def finish(processes):
  """[(exit code, stdout, stderr, when it ended)] of processes that may wait for one another."""
  ended = {}
  try:
    until = time.monotonic() + 300
    while len(ended) < len(processes) and time.monotonic() < until:
      for index, process in enumerate(processes):
        if index not in ended and process.poll() is not None:
          ended[index] = time.monotonic()
      time.sleep(0.02)
  finally:
    for process in processes:
      process.kill()
  texts = [process.communicate() for process in processes]
  return [(p.returncode, *t, ended.get(i)) for i, (p, t) in enumerate(zip(processes, texts))]  # noqa: B905


# --- checkpoints, decisions, signals ----------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  """What hosts_program says: by one process with 8 devices, then by two with 4 each."""
  folder = tmp_path_factory.mktemp("hosts")
  for index in range(2):
    folder.joinpath(f"home{index}").mkdir()
  said = {}
  for name, count in (("write", 1), ("read", 2)):
    done = finish(start("tests.hosts_program", str(folder), name, processes=count))
    assert [d[0] for d in done] == [0] * count, "\n".join(d[2] for d in done)
    said[name] = [json.loads(d[1].splitlines()[-1]) for d in done]
  return folder, said["write"][0], said["read"]


@pytest.mark.slow
def test_a_checkpoint_of_8_devices_restores_bit_by_bit_on_other_meshes(programs):
  _, written, _ = programs
  assert written == {"1": True, "1x2x4": True, "1x8x1": True}


@pytest.mark.slow
def test_a_checkpoint_of_one_process_restores_bit_by_bit_on_two(programs):
  _, _, said = programs
  for process in said:
    assert process["spread"] and process["restored"] and process["part"]


@pytest.mark.slow
def test_a_checkpoint_that_two_processes_wrote_restores_bit_by_bit_on_one_device(programs):
  folder, _, _ = programs
  whole = dict(np.load(folder / "whole.npz"))
  restored = Checkpoints(folder / "two").restore(1, hosts_program.fresh(make_mesh()))
  assert hosts_program.is_equal(restored, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_is_one_checkpoint_of_all(programs):
  folder, _, said = programs
  for process in said:  # the step was 1 at first; SIGTERM came in the third
    assert process["stopped"] == [[128 + signal.SIGTERM, 3], ["finished", 1 + hosts_program.STEPS]]
  rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
  assert [row["step"] for row in rows] == list(range(1, 1 + hosts_program.STEPS))


@pytest.mark.slow
def test_samples_are_of_all_processes_in_the_order_of_the_batch(programs):
  rows = [json.loads(line) for line in (programs[0] / "run" / "samples.jsonl").open()]
  first = [(row["process"], row["row"]) for row in rows if row["step"] == 1]
  assert first == [(0, 0), (0, 1), (1, 0)]  # three of the four are wanted
  assert len(rows) == 3 * hosts_program.STEPS


@pytest.mark.slow
def test_process_0_decides_and_a_refusal_reaches_all(programs):
  _, _, said = programs
  assert [process["decided"] for process in said] == [{"by": 0}] * 2
  assert [process["asked"] for process in said] == [[0], []]
  assert [process["shared"] for process in said] == [[0, 1, 1]] * 2
  assert [process["refused"] for process in said] == ["no"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mistake", "line"),
  [
    ("disagreed", "the number of process 1 is not that of process 0: 1, 0"),
    ("configs", "process 1 was started with another config.seed than process 0: 1, 0"),
    ("mesh", "tensor=8 spreads the same rows over processes 0, 1"),
    ("not shared", "workdir same-name: process 1 does not see what process 0 writes there"),
  ],
)
def test_what_processes_differ_in_is_told_by_all(mistake, line, programs):
  for process in programs[2]:
    assert line in process[mistake]


# --- a whole run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The tiny run by one process; by two, one of which is stopped, then one killed; continued."""
  root = tmp_path_factory.mktemp("runs")
  options = ("--config=tests/tiny_config.py", "--config.rl.prompts_per_step=8",
             "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.data.eval=()",
             "--config.rl.steps=4",
             # prompts of 8 and 12 tokens, in slices that are padded apart
             "--config.data.rl=synthetic:chains?min_steps=1&max_steps=2&split=train&n=32&seed=2",
             "--config.data.prompt_buckets=(8, 12)", "--config.rl.sample_slices=4",
             # groups without advantage make place for those of one further batch
             "--config.rl.refill=1")  # fmt: skip
  launch = lambda name, **more: finish(
    start("igpo_jax.main", *options, f"--workdir={root / name}", **more)
  )
  one = launch("one")
  ended, rows = {}, {}
  for wire, step, number in ((FIRST_SLICE, 1, signal.SIGTERM), (TRIPWIRE, 3, signal.SIGKILL)):
    when = f"{root / 'two' / 'metrics.jsonl'} rl {step} {int(number)}"
    ended[number] = launch("two", processes=2, extra={wire: when})
    rows[number] = len(read(root / "two", "metrics"))
  return root, one, ended, rows, launch("two", processes=2)


def read(workdir, name):
  return untimed(workdir / f"{name}.jsonl")


@pytest.mark.slow
def test_killing_one_process_ends_all_at_once_with_one_clear_line(runs):
  _, one, ended, rows, _ = runs
  assert one[0][0] == 0, one[0][2]
  (code, _, said, ended), (victim, _, _, died) = ended[signal.SIGKILL]
  assert (code, victim) == (1, -signal.SIGKILL)
  lines = [line for line in said.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and "was killed or its machine is lost" in lines[0], said
  assert lines[0].startswith("error: process 1 on ") and "Traceback" not in said
  assert ended - died < 20  # a minute is allowed
  assert rows[signal.SIGKILL] == 1 + 4 + 3  # of init, SFT and RL: it died in the fourth step


@pytest.mark.slow
def test_a_signal_to_one_process_in_a_rollout_ends_both_between_two_slices_and_loses_nothing(runs):
  _, _, ended, rows, _ = runs
  stopped, following = ended[signal.SIGTERM], ended[signal.SIGKILL]
  assert [done[0] for done in stopped] == [128 + signal.SIGTERM] * 2, stopped[0][2]
  line = "rl: stopped by SIGTERM; the same command continues from step 1"
  assert line in stopped[0][2] and "Traceback" not in stopped[0][2] + stopped[1][2]
  # It came while the first slice of the second step was graded; that step was not finished.
  assert rows[signal.SIGTERM] == 1 + 4 + 1
  assert "rl: continues from its checkpoint of step 1" in following[0][2]


def figures(row):
  """Takes the log-probabilities out of a row of samples: sums in another order round otherwise."""
  stats = row.get("token_stats", {})
  lists = [row.pop("commit_logp"), *(stats.pop(n) for n in ("logp", "entropy", "ratio") if stats)]
  return [math.nan if value is None else value for values in lists for value in values]


@pytest.mark.slow
def test_two_processes_killed_and_continued_end_with_the_numbers_of_one(runs):
  root, _, _, _, continued = runs
  assert [done[0] for done in continued] == [0, 0], continued[0][2]
  assert "rl: continues from its checkpoint of step 2" in continued[0][2]
  assert "on 8 device(s)" in continued[0][2]
  expected, found = read(root / "one", "metrics"), read(root / "two", "metrics")
  refills = [row["rl/refills"] for row in expected if row["stage"] == "rl"]
  assert 1 in refills  # and both see the same groups: numbers below
  assert len(found) == len(expected) == 1 + 4 + 4
  for row, other in zip(expected, found, strict=True):
    assert other.pop("stage") == row.pop("stage")
    assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
  samples = read(root / "one", "samples")
  assert any("token_stats" in row for row in samples)
  for row, other in zip(samples, read(root / "two", "samples"), strict=True):
    assert figures(other) == pytest.approx(figures(row), abs=2e-3, nan_ok=True)
    assert other == row  # all else to the last bit: tokens, commit steps, verdicts, places
  summaries = [json.loads((root / n / "summary.json").read_text()) for n in ("one", "two")]
  assert summaries[1]["rl"] == pytest.approx(summaries[0]["rl"], rel=1e-4)
