"""The lock of a workdir: one run at a time, and a dead one is in nobody's way."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.io import disk
from igpo_jax.train import lock as module
from igpo_jax.train import workdir as workdir_module
from igpo_jax.train.lock import FILE, WorkdirLock
from tests import fake_gcs
from tests.paths import REPO

HOLD = """
import sys, time
from igpo_jax.train.lock import WorkdirLock
WorkdirLock(sys.argv[1]).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
  monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
  monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
  monkeypatch.setattr(module, "SETTLE_SECONDS", 0.05)


@pytest.fixture(params=["disk", "gs"])
def folder(request, tmp_path, monkeypatch):
  """A workdir on a disk, or in a bucket."""
  if request.param == "disk":
    return tmp_path / "run"
  fake_gcs.install(monkeypatch, tmp_path)
  return "gs://bucket/run"


@pytest.fixture
def locks():
  """Makes locks, and releases them at the end."""
  made = []

  def make(folder, **holder):
    lock = WorkdirLock(folder, made_say.append)
    lock._holder = dataclasses.replace(lock._holder, **holder)
    made.append(lock)
    return lock

  made_say = make.said = []
  yield make
  for lock in made:
    lock.release()


def stale(folder, **holder):
  """A lock that its holder left behind: one that nobody keeps up."""
  lock = WorkdirLock(folder)
  lock.workdir.mkdir(parents=True, exist_ok=True)
  holder = dataclasses.replace(lock._holder, **{"beat": time.time(), **holder})
  lock.file.write_text(json.dumps(dataclasses.asdict(holder)))
  return lock.file


def test_who_comes_second_is_told_who_is_there_and_may_come_later(folder, locks):
  first, second = locks(folder), locks(folder)
  first.take()
  host = first._holder.host
  with pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on {host}: wait"):
    second.take()
  first.release()
  assert not first.file.exists()
  second.take()
  second.release()
  assert not second.file.exists()


def test_a_run_that_was_killed_is_in_nobodys_way_and_a_living_or_stopped_one_is(tmp_path, locks):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout.readline() == "held\n"
    lock = locks(tmp_path)
    for number in (0, signal.SIGSTOP):
      process.send_signal(number)
      with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
        lock.take()
    process.kill()
    until = time.monotonic() + 20
    while module._started(process.pid) is not None and time.monotonic() < until:
      time.sleep(0.01)  # dying takes a moment; then it is a zombie, since nobody waits for it
    lock.take()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  assert not locks.said


def test_another_process_with_the_id_of_a_dead_one_is_not_taken_for_it(folder, locks):
  stale(folder, started="long ago")
  locks(folder).take()
  assert not locks.said


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"host": "x"}', '{"pid": null}', "\udcff", "[" * 100_000]
)
def test_a_lock_that_makes_no_sense_is_dead_once_it_stays_as_it_is(text, folder, locks):
  stale(folder).write_bytes(text.encode(errors="surrogateescape"))
  locks(folder).take()
  assert "in use by process 0 on an unknown host: waiting up to " in locks.said[0]


def test_what_a_kill_left_of_a_lock_is_removed(tmp_path, locks):
  (tmp_path / f".{FILE}-0123456789abcdef").write_text("{")
  lock = locks(tmp_path)
  lock.take()
  lock.release()
  assert not list(tmp_path.iterdir())


def test_on_another_machine_silence_is_death(folder, locks):
  stale(folder, machine="other", host="other")
  began = time.monotonic()
  locks(folder).take()
  assert time.monotonic() - began >= module.SILENT_SECONDS
  assert "on other: waiting up to " in locks.said[0]


@pytest.mark.parametrize("hours", [0, 1, -1])
def test_on_another_machine_a_beat_is_life_whatever_its_clock(hours, folder, locks):
  there, here = locks(folder, machine="other", host="other"), locks(folder)
  write, now = there._write, time.time

  def late():
    with mock.patch.object(module.time, "time", lambda: now() + 3600 * hours):
      write()

  there._write = late
  there.take()
  with pytest.raises(UserError, match=r"in use by process .* on other"):
    here.take()
  assert there.taken_by is None


def test_a_holder_learns_that_its_workdir_was_taken_over(folder, locks):
  lock = locks(folder)
  lock.take()
  stale(folder, host="other", token="t")
  until = time.monotonic() + 10
  while not lock.taken_by and time.monotonic() < until:
    time.sleep(0.01)
  assert lock.taken_by.host == "other"
  lock.release()
  assert lock.file.exists()  # it is the other's


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("dead", [True, False])
def test_of_many_that_begin_at_once_one_gets_it(flock, dead, tmp_path, monkeypatch, locks):
  if not flock:  # as on some network disks
    monkeypatch.setattr(module.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError))
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.5)
  if dead:
    stale(tmp_path, pid=2**22 + 1)
  begin, got = threading.Barrier(8), []

  def compete(lock):
    begin.wait()
    try:
      lock.take()
    except UserError:
      return
    got.append(lock)

  threads = [threading.Thread(target=compete, args=(locks(tmp_path),)) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(got) == 1 and got[0]._is_ours()
  got[0].release()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["peace", "error", "leave"])
def test_however_a_run_ends_its_workdir_is_free(how, tmp_path, monkeypatch):
  monkeypatch.setattr(os, "_exit", lambda code: None)

  def run():
    with workdir_module.hold(tmp_path):
      assert (tmp_path / FILE).exists()
      if how == "error":
        raise KeyboardInterrupt
      if how == "leave":
        cli.leave(1)
        assert not (tmp_path / FILE).exists()

  if how == "error":
    with pytest.raises(KeyboardInterrupt):
      run()
  else:
    run()
  assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("number", disk.FAILURES)
def test_a_disk_that_fails_in_a_run_is_one_line_and_a_bug_is_not(number, tmp_path):
  advice = rf"workdir {tmp_path}: .*start the same command again"
  with pytest.raises(UserError, match=advice), workdir_module.disk_told(tmp_path):
    raise OSError(number, os.strerror(number))
  with pytest.raises(UserError, match=advice), workdir_module.disk_told(tmp_path):
    (tmp_path / "gone" / "metrics.jsonl").write_text("")
  with pytest.raises(FileNotFoundError), workdir_module.disk_told(tmp_path / "run"):
    (tmp_path / "elsewhere" / "x").write_text("")


def test_a_workdir_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(UserError, match=r"workdir .*file/run: "),
    workdir_module.hold(tmp_path / "file" / "run"),
  ):
    pass
