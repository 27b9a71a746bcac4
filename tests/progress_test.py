"""What is seen while a run goes on: rates by hand, lines in a log, one bar in 80 columns."""

from __future__ import annotations

import dataclasses
import io
import re
import sys

import jax
import numpy as np
import pytest
from etils import epath

from igpo_jax.config import Config, ModelConfig, SamplerConfig
from igpo_jax.models.flops import forward_flops
from igpo_jax.train import progress
from igpo_jax.train.progress import (
  Display,
  Profiler,
  Progress,
  denoising_flops,
  device_memory,
  pace,
  track,
)

MODEL = ModelConfig(d_model=8, n_layers=2, n_heads=2, mlp_hidden=16, vocab_size=12)
SAMPLER = SamplerConfig(gen_length=8, block_length=4, steps=8)
CONFIG = dataclasses.replace(Config(stages=()), model=MODEL, sampler=SAMPLER)


class Stream(io.StringIO):
  def __init__(self, terminal):
    super().__init__()
    self.terminal = terminal

  def isatty(self):
    return self.terminal


@pytest.fixture
def stderr(monkeypatch):
  def use(terminal):
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream

  return use


def test_the_first_step_which_compiles_does_not_spoil_the_rate():
  assert pace([60.0, 2.0, 2.0], 5, "step") == "2 s/step, 10 s left"
  assert pace([60.0], 5, "step") == "60 s/step (with compiling), 5.0 min left"
  assert pace([], 5, "step") == ""
  assert pace([4.0, 2.0], 1, "batch", compiles=False) == "3 s/batch, 3 s left"


def test_work_is_counted_from_the_steps_that_committed_something():
  # 0 1 2 | 4 5 of one row and 0 1 | 4 of the other: each has its own calls.
  commit = np.array([[0, 0, 1, 2, 4, 4, 4, 5], [-1, 0, 1, 1, 4, 4, 4, 4]])
  whole = forward_flops(MODEL, 1, 14, 14, 4, read=4)
  window = forward_flops(MODEL, 1, 4, 14, 4, read=4)
  assert denoising_flops(MODEL, SAMPLER, 2, 6, commit) == 8 * whole
  assert denoising_flops(MODEL, SAMPLER, 4, 6, commit) == 16 * whole
  assert denoising_flops(MODEL, SAMPLER, 0, 6, commit[:0]) == 0
  dual = dataclasses.replace(SAMPLER, cache="dual")
  assert denoising_flops(MODEL, dual, 2, 6, commit) == 4 * whole + 4 * window
  guided = dataclasses.replace(SAMPLER, cfg_scale=1.0)
  assert denoising_flops(MODEL, guided, 2, 6, commit) == 16 * whole


def test_a_rollout_says_rows_tokens_time_left_and_the_share_of_the_peak(tmp_path, monkeypatch):
  run = Progress(CONFIG, epath.Path(tmp_path))
  run.sampling(8)
  commit = np.tile(np.arange(8), (2, 1))
  commit[:, 0] = -1  # a hint is no token of the model's
  run.sampled(commit, 6)
  flops = denoising_flops(MODEL, SAMPLER, 2, 6, commit)
  text = run.slice_text(7.0)
  assert text.startswith("rollout 2/8 rows, 2 tokens/s, 21 s left, ") and "peak" not in text
  assert float(re.search(r"([\d.e-]+) TFLOP", text)[1]) == pytest.approx(flops / 7e12, rel=1e-2)
  chip = dataclasses.replace(
    next(iter(progress.CHIPS.values())), flops=flops / 7.0 / jax.device_count() * 4
  )
  monkeypatch.setitem(progress.CHIPS, jax.devices()[0].device_kind, chip)
  assert run.slice_text(7.0).endswith("(25% of peak)")


def test_a_new_shape_is_told_before_it_compiles_and_how_long_it_took_last_time(tmp_path, stderr):
  def start():
    stream = stderr(False)
    run = Progress(CONFIG, epath.Path(tmp_path))
    run.begin("rl", 5, 0, programs=2)
    for name, shape in (("rollout", (4, 8)), ("rollout", (4, 8)), ("update", (4, 8)),
                        ("rollout", (2, 8))):  # fmt: skip
      with run.program(name, shape):
        pass
    run.close()
    return stream.getvalue().splitlines()

  first, again = start(), start()
  assert [line for line in first if "compiling" in line] == [
    "rl: compiling rollout 4x8 (program 1 of 2 or more)",
    "rl: compiling update 4x8 (program 2 of 2 or more)",
    "rl: compiling rollout 2x8 (program 3)",
  ]
  assert all(re.search(r", took .* s last time$", line) for line in again if "compiling" in line)


def test_a_damaged_file_of_compile_times_is_nothing_to_stop_for(tmp_path, stderr):
  stderr(False)
  (tmp_path / "compile_seconds.json").write_text("{")
  run = Progress(CONFIG, epath.Path(tmp_path))
  run.begin("sft", 1, 0, programs=1)
  with run.program("update", (1,)):
    pass
  run.close()
  assert "update 1" in (tmp_path / "compile_seconds.json").read_text()


def test_a_log_gets_plain_lines_now_and_then_and_the_last(stderr, monkeypatch):
  stream = stderr(False)
  now = [0.0]
  monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
  display = Display("rl", 100)
  for done in range(1, 101):
    now[0] += 1.0
    display.show("text", done)
  display.close()
  lines = stream.getvalue().splitlines()
  assert lines == ["rl 30/100: text", "rl 60/100: text", "rl 90/100: text", "rl 100/100: text"]
  assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_terminal_gets_a_bar_of_eight_that_fits_80_columns(stderr, monkeypatch):
  stream = stderr(True)
  monkeypatch.setenv("COLUMNS", "80")
  display = Display("rl", 40)
  long = "12.1 s/step, 7.5 min left, reward=0.512, all_wrong_before=0.25, kl={0.01}"
  display.show(long, 10)
  display.close()
  shown = [part for part in re.split(r"[\r\n]", stream.getvalue()) if "10/40" in part]
  assert shown and all(len(part) <= 80 for part in shown)
  assert shown[-1].startswith("rl 10/40 |##      | 12.1 s/step, 7.5 min left, reward=0.512, all")


def test_an_evaluation_says_that_its_first_batch_compiles(stderr):
  stream = stderr(False)
  assert list(track(range(3), "test", "test: the first batch compiles its program")) == [0, 1, 2]
  lines = stream.getvalue().splitlines()
  assert lines[0] == "test: the first batch compiles its program"
  assert lines[-1].startswith("test 3/3: ")


def test_memory_is_told_where_the_device_tells_it(monkeypatch):
  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  full, half = ({"bytes_in_use": n << 30, "peak_bytes_in_use": 2 * n << 30} for n in (4, 2))
  monkeypatch.setattr(jax, "local_devices", lambda: [Device(half), Device(full)])
  assert device_memory() == {"memory/in_use_gib": 4.0, "memory/peak_gib": 8.0}
  monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
  assert device_memory() == {}


def test_a_profile_begins_after_the_steps_that_compile_and_ends(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  profiler = Profiler(epath.Path(tmp_path), 2)
  for n in range(6):
    profiler.step()
    calls.append(n)
  profiler.close()
  assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
  short = Profiler(epath.Path(tmp_path), 5)
  calls.clear()
  for _ in range(4):
    short.step()
  short.close()
  assert calls == ["start", "stop"]


@pytest.mark.slow
def test_a_trace_is_written_by_jax(tmp_path):
  profiler = Profiler(epath.Path(tmp_path / "profile"), 1)
  for _ in range(4):
    profiler.step()
    jax.block_until_ready(jax.numpy.ones(3) + 1)
  profiler.close()
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
