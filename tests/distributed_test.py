"""How processes find each other, and how all end when one does."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time

import pytest

from igpo_jax.errors import UserError
from igpo_jax.io.versions import versions
from igpo_jax.parallel import distributed, liveness, rendezvous
from igpo_jax.parallel.liveness import Watch
from tests.paths import REPO

# --- the line between processes -----------------------------------------------------------


class Left(BaseException):
  """Stands for the end of a process."""


class Team:
  """Three ends of the line in one process; `left` says who ended with which code."""

  def __init__(self, monkeypatch, count=3):
    self.left, self.said, self._values = queue.Queue(), queue.Queue(), [[], []]
    self._calls, self._barrier = threading.local(), threading.Barrier(count)
    monkeypatch.setattr(liveness, "PARTING_SECONDS", 0.3)
    monkeypatch.setattr(liveness, "PING_SECONDS", 0.05)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(liveness, "_print", self.said.put)
    self.ends: list[Watch | None] = [None] * count
    threads = [threading.Thread(target=self._make, args=(i, count)) for i in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(20)
    until = time.monotonic() + 10
    while len(self.ends[0]._lines) < count - 1 and time.monotonic() < until:
      time.sleep(0.01)

  def _make(self, index, count):
    def leave(code):
      self.left.put((index, code))
      for line in list(self.ends[index]._lines.values()):
        with contextlib.suppress(OSError):  # the other end may have gone before
          line.shutdown(socket.SHUT_RDWR)  # as the kernel does
      raise Left

    self.ends[index] = Watch(index, count, self._share, "127.0.0.1", leave)

  def _share(self, rows):
    """A collective of threads: every one gets the values of all, call by call."""
    number = self._calls.number = getattr(self._calls, "number", -1) + 1
    self._values[number] += rows
    self._barrier.wait(20)
    return self._values[number]

  def kill(self, index):
    self.ends[index]._ending = True  # the dead say nothing
    for line in self.ends[index]._lines.values():
      line.shutdown(socket.SHUT_RDWR)

  def stop(self, index):
    """As SIGSTOP does: it says nothing more, and its connections stay."""
    self.ends[index]._ending = True
    self.ends[index]._tell = lambda *args, **kw: None

  def codes(self, count):
    return dict(self.left.get(timeout=10) for _ in range(count))

  def lines(self, count):
    return [self.said.get(timeout=10) for _ in range(count)]


@pytest.fixture
def team(monkeypatch):
  monkeypatch.setattr(threading, "excepthook", lambda args: None)  # `Left` ends threads
  made = Team(monkeypatch)
  yield made
  for end in made.ends:
    end._ending = True  # else they find each other silent, in the tests that follow


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_one_is_killed_all_others_leave_and_say_who_it_was(victim, team):
  team.kill(victim)
  others = {0, 1, 2} - {victim}
  assert team.codes(2) == dict.fromkeys(others, 1)
  for line in team.lines(2):
    assert line.startswith(f"error: process {victim} on ") and "was killed" in line


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_stopped_and_keeps_its_connection_is_given_up_by_all(victim, team):
  if victim == 0:
    time.sleep(2.5)  # longer than silence may last: who speaks is not given up
    assert team.left.empty()
  team.stop(victim)
  others = {0, 1, 2} - {victim}
  assert team.codes(2) == dict.fromkeys(others, 1)
  for line in team.lines(2):
    assert line.startswith(f"error: process {victim} on ") and "has said nothing for 2 s" in line


def test_the_watch_gives_up_a_silent_process_before_jax_aborts_all():
  """jax sends a heartbeat every half of its time, so that much may be over already."""
  assert liveness.PING_SECONDS < liveness.SILENT_SECONDS < distributed.HEARTBEAT_SECONDS / 2 - 5


@pytest.mark.parametrize("index", [0, 1, 2])
def test_when_one_fails_all_others_take_over_its_code_and_its_reason(index, team):
  with pytest.raises(Left):
    team.ends[index].fail(lambda: 2, "x.jsonl: no such file")
  assert team.codes(3) == {0: 2, 1: 2, 2: 2}
  for line in team.lines(2):  # the one that failed has said it itself
    assert line.startswith(f"error: process {index} on ")
    assert line.endswith("failed, and with it this one: x.jsonl: no such file")


def test_when_all_fail_at_once_each_says_one_thing(team):
  def fail(index):
    def explain():  # the others' reasons come in while this one prints its own
      time.sleep(0.1 * index)
      said.put(index)
      return 2

    with contextlib.suppress(Left):
      team.ends[index].fail(explain, "no")

  said = team.said
  for index in range(3):
    threading.Thread(target=fail, args=(index,), daemon=True).start()
  assert team.codes(3) == {0: 2, 1: 2, 2: 2}
  time.sleep(0.3)
  lines = [said.get_nowait() for _ in range(said.qsize())]
  assert len(lines) == 3, lines


def test_leaving_in_peace_ends_nobody(team):
  for end in team.ends:
    end.done()
  time.sleep(0.1)
  for index in (1, 2, 0):
    for line in team.ends[index]._lines.values():
      line.shutdown(socket.SHUT_RDWR)
  time.sleep(0.3)
  assert team.left.empty() and team.said.empty()


def test_strangers_on_the_port_are_ignored(team):
  (address,) = {line.getsockname()[1] for line in team.ends[0]._lines.values()}
  for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "x", "index": 1, "host": "h"}\n', b"\xff\n"):
    with socket.create_connection(("127.0.0.1", address), 5) as stranger:
      stranger.sendall(text)
      assert stranger.recv(1) == b""  # hung up
  assert team.left.empty() and set(team.ends[0]._lines) == {1, 2}


# --- start-up ---------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
  for name in (distributed.ADDRESS, distributed.COUNT, distributed.INDEX, "SLURM_STEP_NUM_TASKS"):
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


@pytest.mark.parametrize(
  ("address", "count", "index", "complaint"),
  [
    ("127.0.0.1:1", "two", "0", r"JAX_NUM_PROCESSES \(how many processes\)"),
    ("127.0.0.1:1", "2", None, r"JAX_PROCESS_ID \(which one this is"),
    ("127.0.0.1:1", "2", "2", "JAX_PROCESS_ID=2 is not one of JAX_NUM_PROCESSES=2"),
    ("127.0.0.1", "2", "1", "'127.0.0.1' should be HOST:PORT"),
    (":123", "2", "1", "':123' should be HOST:PORT"),
  ],
)
def test_variables_that_make_no_sense_are_told(address, count, index, complaint, alone):
  values = {distributed.ADDRESS: address, distributed.COUNT: count, distributed.INDEX: index}
  for name, value in values.items():
    if value is not None:
      alone.setenv(name, value)
  with pytest.raises(UserError, match=complaint):
    distributed.start()


def free_port():
  with socket.create_server(("", 0)) as probe:
    return probe.getsockname()[1]


def met(port, *processes, count=3):
  """What `rendezvous.meet` says to each of these processes of a run: "" if it goes on."""
  said, all_met = queue.Queue(), []

  def come(place, index, count):
    names = ("ADDRESS", "COUNT", "INDEX")
    try:
      all_met.append(rendezvous.meet("127.0.0.1", port, count, index, names, leave=said.put))
      said.put((place, ""))
    except (UserError, SystemExit) as error:
      said.put((place, str(error)))

  for place, process in enumerate(processes):
    index, own = process if isinstance(process, tuple) else (process, count)
    threading.Thread(target=come, args=(place, index, own), daemon=True).start()
  found = dict(said.get(timeout=20) for _ in processes)
  for each in all_met:
    each.close()
  return [found[place] for place in range(len(processes))]


def test_processes_that_meet_go_on_together_and_leave_the_port_free():
  port = free_port()

  def scan():
    while not done.is_set():
      for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": "igpo_jax"}\n'):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as line:
          line.sendall(text)

  done = threading.Event()
  scanner = threading.Thread(target=scan)
  scanner.start()
  try:
    for _ in range(2):  # the second run of the same command
      assert met(port, 2, 0, 1) == ["", "", ""]
  finally:
    done.set()
    scanner.join()
  rendezvous.listen(port).close()


@pytest.mark.parametrize(
  ("processes", "line"),
  [
    ((0, 1, 1), "two processes have INDEX=1: give each one a number"),
    ((0, 1, (2, 4)), "COUNT is 3 for process 0 and 4 for process 2: set one number for all"),
  ],
)
def test_processes_that_do_not_belong_together_all_say_so(processes, line):
  assert met(free_port(), *processes) == [line] * 3


def hello_of(port, hello):
  """A connection to process 0 that has said `hello`, once it is answered."""
  until = time.monotonic() + 10
  while time.monotonic() < until:
    with contextlib.suppress(OSError):
      line = socket.create_connection(("127.0.0.1", port), 5)
      line.sendall(hello)
      answer = b""
      while not answer.endswith(b"\n"):  # and no more: what comes after it is for the test
        answer += (piece := line.recv(1))
        assert piece
      assert b"hello" in answer
      return line
  raise AssertionError("nobody listens")


def test_when_process_0_goes_before_all_are_there_the_others_end(capfd):
  said = queue.Queue()
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    threading.Thread(target=lambda: said.put(met(port, 2)), daemon=True).start()
    line, _ = server.accept()
    line.sendall(b'{"hello": "igpo_jax"}\n')
  line.close()
  assert said.get(timeout=10) == ["1"]
  assert "error: process 0 was killed or its machine is lost before" in capfd.readouterr().err


def test_when_another_one_goes_before_all_are_there_process_0_tells_the_others(capfd):
  port, said = free_port(), queue.Queue()
  threading.Thread(target=lambda: said.put(met(port, 0, count=4)), daemon=True).start()
  hello = b'{"hello": "igpo_jax", "count": 4, "index": %d}\n'
  other = hello_of(port, hello % 2)
  hello_of(port, hello % 1).close()
  assert said.get(timeout=10) == ["1"]
  assert json.loads(other.makefile().readline()) == {"lost": 1}
  other.close()
  assert "error: process 1 was killed or its machine is lost before" in capfd.readouterr().err


def test_who_was_answered_is_told_what_happens_at_once(monkeypatch, capfd):
  """Also if the thread that answered gets no time before another one goes."""
  port, said, slow, tell = free_port(), queue.Queue(), [0.5], rendezvous._tell

  def late(line, message):
    tell(line, message)
    time.sleep(slow.pop() if slow else 0)

  monkeypatch.setattr(rendezvous, "_tell", late)
  threading.Thread(target=lambda: said.put(met(port, 0, count=4)), daemon=True).start()
  hello = b'{"hello": "igpo_jax", "count": 4, "index": %d}\n'
  other = hello_of(port, hello % 2)
  hello_of(port, hello % 1).close()
  assert said.get(timeout=10) == ["1"]
  other.settimeout(5)
  assert json.loads(other.makefile().readline()) == {"lost": 1}
  other.close()
  capfd.readouterr()


def test_when_one_goes_before_they_watch_each_other_the_others_end(capfd):
  port, left, all_met = free_port(), queue.Queue(), []
  names = ("ADDRESS", "COUNT", "INDEX")
  first = lambda: all_met.append(rendezvous.meet("", port, 2, 0, names, leave=left.put))
  thread = threading.Thread(target=first)
  thread.start()
  line = hello_of(port, b'{"hello": "igpo_jax", "count": 2, "index": 1}\n')
  thread.join(10)
  assert b"go" in line.recv(100) and left.empty()
  line.close()
  assert left.get(timeout=10) == 1
  assert "error: process 1 was killed or its machine is lost" in capfd.readouterr().err


def test_a_port_that_is_taken_is_told_by_all(alone, monkeypatch):
  monkeypatch.setattr(rendezvous, "STRANGE_SECONDS", 0.5)
  monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.5)
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    alone.setenv(distributed.ADDRESS, f"127.0.0.1:{port}")
    alone.setenv(distributed.COUNT, "2")
    for index, line in enumerate(
      (f"process 0 cannot listen on port {port}", f"127.0.0.1:{port}: something else answers there")
    ):
      alone.setenv(distributed.INDEX, str(index))
      with pytest.raises(UserError, match=line):
        distributed.start()


def test_processes_with_other_versions_all_say_so(monkeypatch):
  monkeypatch.setattr(distributed, "share", lambda rows: [*rows, {**rows[0], "jax": "0.0.1"}])
  line = f"process 1 runs jax 0.0.1, process 0 jax {versions()['jax']}: install the same"
  with pytest.raises(UserError, match=line):
    distributed.check_versions()
  monkeypatch.setattr(
    distributed, "share", lambda rows: [*rows, {**rows[0], "igpo_jax's source": "x"}]
  )
  with pytest.raises(UserError, match="process 1 runs igpo_jax's source x, process 0 igpo_jax's s"):
    distributed.check_versions()
  monkeypatch.setattr(distributed, "share", lambda rows: rows * 2)
  distributed.check_versions()


def test_alone_nothing_happens_but_a_word_on_forgotten_slurm_tasks(alone, capsys):
  distributed.start()
  assert capsys.readouterr().err == ""
  alone.setenv("SLURM_STEP_NUM_TASKS", "4")
  distributed.start()
  assert "one of several Slurm tasks; without --distributed" in capsys.readouterr().err


def start_in_a_process(*arguments, **environment):
  code = (
    "from igpo_jax import cli\nfrom igpo_jax.parallel import distributed\n"
    f"cli.run(lambda: distributed.start({', '.join(map(str, arguments))}))"
  )
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, timeout=120,
  )  # fmt: skip
  return done, time.monotonic() - began


@pytest.mark.slow
def test_processes_that_do_not_come_are_told_in_one_line():
  port = free_port()
  done, seconds = start_in_a_process(
    False, 1, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1"
  )
  (line,) = [line for line in done.stderr.splitlines() if line]
  assert done.returncode == 1 and seconds < 60
  assert line.startswith(
    f"error: the processes of this run did not come together at 127.0.0.1:{port} within 1 s; "
    "this one (process 1 of 2) waited."
  )


@pytest.mark.slow
def test_nothing_to_detect_is_told_in_one_line():
  done, _ = start_in_a_process(True)
  (line,) = [line for line in done.stderr.splitlines() if line]
  assert done.returncode == 2
  assert line.startswith("error: --distributed: jax finds no TPU pod, Slurm step or other cluster")


def test_one_process_shares_with_itself():
  rows = [{"a": 1}, "é", None]
  assert distributed.share(rows) == json.loads(json.dumps(rows))
  assert distributed.from_first(lambda: 3) == 3
  distributed.agree("anything", {"x": 1})
