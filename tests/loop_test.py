"""What a stage does around its steps: rows, checkpoints, resume, signals, non-finite updates."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from igpo_jax.checkpoint import Checkpoints, DamagedCheckpoint
from igpo_jax.config import CheckpointConfig, Config, LogConfig
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import row_file
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.train import loop
from igpo_jax.train.guards import Guards
from igpo_jax.train.lock import Holder, WorkdirLock
from igpo_jax.train.loop import NonFinite, Run, Stage, due, run_stage, should_save
from igpo_jax.train.runlog import RunLog
from igpo_jax.train.sft import is_spent
from igpo_jax.train.stop import Stopped, StopSignal
from igpo_jax.types import TrainState
from igpo_jax.viewer.curves import draw_curves
from igpo_jax.viewer.summary import summary_of, summary_table
from tests.paths import REPO

# --- checkpoints ----------------------------------------------------------------------


def tree(value):
  return {"w": jnp.full(3, value, jnp.float32), "n": jnp.int32(value)}


def test_the_last_few_and_the_best_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step, score in ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, 0.9)):
    checkpoints.save(step, tree(step))
    assert checkpoints.latest() == step
    if score is not None:  # measured after it was saved
      checkpoints.scores[step] = score
      checkpoints.prune()
  assert checkpoints.steps() == [5, 6] and checkpoints.best() == 6  # the later of two equal ones
  checkpoints.close()
  again = Checkpoints(tmp_path, keep=1, scores={5: 0.8, 6: 0.1, 2: 3.0})  # of another process
  again.save(7, tree(7))
  assert again.steps() == [5, 7] and again.best() == 5
  assert again.restore(5, tree(0))["n"] == 5
  again.close()


def test_without_scores_only_the_last_few_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  assert checkpoints.latest() is None and checkpoints.best() is None
  for step in (1, 2, 3):
    checkpoints.save(step, tree(step), {"row": {"x": step}})
  assert checkpoints.steps() == [3] and checkpoints.note(3) == {"row": {"x": 3}}
  checkpoints.close()


def test_a_checkpoint_gives_back_every_bit(tmp_path):
  state = {
    "f": jax.random.normal(jax.random.key(0), (4, 5)),
    "h": jnp.arange(6, dtype=jnp.bfloat16) / 7,
    "i": jnp.int32(-3),
  }
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state)
  restored = checkpoints.restore(1, jax.tree.map(jnp.zeros_like, state))
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
  checkpoints.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
@pytest.mark.parametrize(
  ("step", "like"),
  [(9, tree(0)), (1, {"w": jnp.zeros(5), "n": jnp.int32(0)}), (1, {"other": jnp.zeros(3)})],
)
def test_a_checkpoint_that_is_not_there_or_does_not_fit_is_told(step, like, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, tree(1))
  with pytest.raises(UserError, match="checkpoint"):
    checkpoints.restore(step, like)
  checkpoints.close()


def flip(step):
  """One bit of the largest file: what Orbax restores without a word."""
  file = max(
    (p for p in (step / "default").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(bytes(data))


def cut(step):
  file = max(
    (p for p in (step / "default").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  file.write_bytes(file.read_bytes()[:100])


def emptied(step):
  shutil.rmtree(step)
  step.mkdir()


def without(name):
  return lambda step: (step / name).unlink()


def changed(name, old, new):
  """Other text of the same length in a small file."""

  def change(step):
    file = step / name
    text = file.read_text()
    assert old in text and len(old) == len(new)
    file.write_text(text.replace(old, new))

  return change


STEP_METADATA = "_CHECKPOINT_METADATA"
DAMAGES = {
  "flip": flip,
  "unknown key": changed(STEP_METADATA, "performance", "pmrformance"),
  "no JSON": changed(STEP_METADATA, "{", "["),
  "no sums": changed(STEP_METADATA, "custom_metadata", "custom_netadata"),
  "another sum": changed(STEP_METADATA, '"w"', '"v"'),
  "another note": changed(STEP_METADATA, "0.25", "0.75"),
  "without step metadata": without(STEP_METADATA),
  "cut": cut,
  "emptied": emptied,
  "without manifest": without("default/manifest.ocdbt"),
  "without metadata": without("default/_METADATA"),
  "sizes": lambda step: (step / "files.json").write_text("{"),
  "empty metadata": lambda step: (step / "default/_METADATA").write_text(""),
}


def noise(step):
  return {"w": jax.random.normal(jax.random.key(step), (64, 64)), "n": jnp.int32(step)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
@pytest.mark.parametrize("sizes", ["with sizes", "without"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_from_a_good_one(damage, sizes, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, noise(step), {"row": {"loss": 0.25}})
    if sizes == "without":  # of an older version, or the last thing before a kill
      (tmp_path / f"{step}" / "files.json").unlink()
  if sizes == "without" and damage in ("sizes", "unknown key"):  # no harm to what is read
    return
  DAMAGES[damage](tmp_path / "2")
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)  # as the next start finds it
  for restore in (checkpoints.restore, checkpoints.restore_part):
    with pytest.raises(DamagedCheckpoint, match=rf"the checkpoint {tmp_path}/2 is damaged: "):
      restore(2, noise(0))
  assert checkpoints.set_aside(2) == epath.Path(tmp_path / "damaged-2")
  checkpoints.reload()
  assert checkpoints.steps() == [1] and checkpoints.note(1) == {"row": {"loss": 0.25}}
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, noise(0)), noise(1))
  checkpoints.close()


def test_a_folder_of_checkpoints_may_hold_other_things(tmp_path):
  """Notes, copies, what a system leaves everywhere: none is a checkpoint."""
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, tree(1))
  for name in ("notes.txt", ".DS_Store"):
    (tmp_path / name).write_text("x")
  for name in ("1 (copy)", "backup", "3.orbax-checkpoint-tmp"):
    (tmp_path / name).mkdir()
  again = Checkpoints(tmp_path, keep=1)
  assert again.steps() == [1] and int(again.restore(1, tree(0))["n"]) == 1
  again.save(2, tree(2))
  assert again.steps() == [2]
  again.close()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_and_no_rubbish(
  tmp_path, monkeypatch, caplog
):
  """Orbax's own error has four hundred lines, some of them from its threads."""
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, tree(1))

  def save(step, **kwargs):
    (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
    logging.getLogger("absl").error("a traceback")
    raise ValueError("RESOURCE_EXHAUSTED: writing w/0.0: No space left on device [source ...]")

  monkeypatch.setattr(checkpoints._manager, "save", save)
  with pytest.raises(UserError, match=r"no space left .*step 2 \(16 B\) does not .*from step 1$"):
    checkpoints.save(2, tree(2))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1"] and not caplog.records
  checkpoints.close()


def test_a_disk_that_fails_is_told_with_what_to_do(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, tree(1))
  for error in (
    OSError(errno.EROFS, "Read-only file system", "x"),
    ValueError("OUT_OF_RANGE: Failed writing: [OS error 27: EFBIG File too large]"),
  ):
    monkeypatch.setattr(checkpoints._manager, "save", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=r"step 2 \(16 B\) cannot be written .*from step 1$"):
      checkpoints.save(2, tree(2))
  checkpoints.close()


# --- the record -----------------------------------------------------------------------


def run_log(tmp_path):
  return RunLog(epath.Path(tmp_path), LogConfig(tensorboard=False))


def test_rows_of_a_long_run_share_the_names_of_their_metrics(tmp_path):
  """All rows are kept for the report; half of their memory would be names."""
  log = run_log(tmp_path)
  for step in (1, 2):
    log.metrics("rl", step, {"/".join(("rl", name)): 0.5 for name in ("loss", "reward")})
  one, other = ([id(name) for name in row] for row in log.rows)
  assert one == other


def fill(log):
  for stage, step in (("init", 0), ("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2), ("rl", 3)):
    log.metrics(stage, step, {"x": step})
    log.samples(stage, step, [{"y": 1}, {"y": 2}])


def positions(path):
  return [(r["stage"], r["step"]) for r in row_file(path).read()]


@pytest.mark.parametrize("row", ['{"stage": "rm", "step": 1}', '{"stage": "rl"}', '{"step": 1}'])
def test_a_row_that_no_run_wrote_is_told(row, tmp_path):
  (tmp_path / "metrics.jsonl").write_text(f'{row}\n{{"stage": "rl", "step": 2}}\n')
  with pytest.raises(UserError, match=r"metrics\.jsonl: not a row of a run: "):
    run_log(tmp_path)


@pytest.mark.parametrize(
  ("stage", "step", "left"),
  [("rl", 2, 5), ("rl", 0, 3), ("sft", 1, 2), ("sft", 0, 1), ("rl", 9, 6)],
)
def test_rewinding_drops_the_rows_beyond_a_checkpoint_from_both_files(stage, step, left, tmp_path):
  log = run_log(tmp_path)
  fill(log)
  everything = positions(tmp_path / "metrics.jsonl")
  log.rewind(stage, step)
  assert positions(tmp_path / "metrics.jsonl") == everything[:left]
  assert positions(tmp_path / "samples.jsonl") == [p for p in everything[:left] for _ in range(2)]
  assert len(log.rows) == left


def test_a_line_that_a_kill_cut_is_dropped_and_any_other_is_told(tmp_path):
  fill(run_log(tmp_path))
  path = tmp_path / "metrics.jsonl"
  whole = path.read_text()
  path.write_text(whole + '{"stage": "rl", "st')
  log = run_log(tmp_path)
  assert len(log.rows) == 6
  log.rewind("rl", 3)
  assert path.read_text() == whole
  path.write_text("{broken\n" + whole)
  with pytest.raises(UserError, match=r"metrics.jsonl: not a JSON line: '{broken"):
    run_log(tmp_path)


def test_numbers_that_are_not_finite_are_null(tmp_path):
  log = run_log(tmp_path)
  log.metrics("rl", 1, {"a": np.float32("nan"), "b": jnp.inf, "c": jnp.float32(0.5), "d": 3})
  assert '"a": null, "b": null, "c": 0.5, "d": 3' in (tmp_path / "metrics.jsonl").read_text()


def test_tensorboard_files_are_written_where_they_are_asked_for(tmp_path):
  log = RunLog(epath.Path(tmp_path), LogConfig(tensorboard=True))
  log.metrics("rl", 1, {"a": 1.0})
  log.close()
  assert list((tmp_path / "tensorboard").iterdir())


# --- a stage --------------------------------------------------------------------------


def counting_stage(steps=6, fail_at=(), at_step=None, seen=None, eval_every=0):
  """Adds n + 1 to its parameter at step n; what a resumed run would get wrong shows in it."""

  def step(state, n):
    if seen is not None:
      seen.append(n)
    if at_step:
      at_step(n)
    bad = n in fail_at
    in_a_row = (state.skipped_in_a_row + 1) if bad else jnp.int32(0)
    state = state.replace(
      step=state.step + 1, params=state.params + n + 1, skipped_in_a_row=in_a_row
    )
    metrics = {"value": state.params, "skipped_in_a_row": in_a_row}
    return state, metrics, [{"text": f"{n}"}] * 3

  return Stage("rl", steps, eval_every, step, lambda p: p, ("value",))


def fresh():
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(zero(), jnp.float32(0), {"m": jnp.zeros(2)}, zero(), zero())


def make_run(path, keep=2, every=2, best="", minutes=0.0, log_every=1, **log):
  log = LogConfig(log_every, tensorboard=False, samples_every=3, samples_per_step=2, **log)
  config = dataclasses.replace(
    Config(), checkpoint=CheckpointConfig(every, minutes, keep, best), log=log
  )
  evaluate = lambda params, label: {"eval/t/accuracy": 1 / (1 + float(params))}
  return Run(config, epath.Path(path), RunLog(epath.Path(path), log), make_mesh(), evaluate)


def written(path):
  rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  for row in rows:
    row.pop("time/step_seconds")
  return rows, (path / "samples.jsonl").read_text()


def test_a_stage_runs_every_step_once_and_writes_what_is_due(tmp_path):
  seen = []
  state = run_stage(make_run(tmp_path), counting_stage(seen=seen, eval_every=4), fresh())
  assert seen == list(range(6)) and float(state.params) == 21
  rows, samples = written(tmp_path)
  assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
  assert [r["rl/value"] for r in rows] == [1, 3, 6, 10, 15, 21]
  assert [r["step"] for r in rows if "eval/t/accuracy" in r] == [4, 6]
  assert [json.loads(line)["step"] for line in samples.splitlines()] == [3, 3, 6, 6]
  assert make_run(tmp_path).checkpoints("rl").steps() == [4, 6]


class Killed(BaseException):
  """Ends a run as a kill would: nothing after it is done."""


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 1, 2, 3, 4, 5])
def test_a_stage_killed_anywhere_ends_as_if_it_had_not_been(when, tmp_path):
  peace, war = tmp_path / "peace", tmp_path / "war"
  run_stage(make_run(peace), counting_stage(), fresh())

  def kill(n):
    if n == when:
      raise Killed

  with pytest.raises(Killed):
    run_stage(make_run(war), counting_stage(at_step=kill), fresh())
  seen = []
  state = run_stage(make_run(war), counting_stage(seen=seen), fresh())
  assert seen == list(range(when // 2 * 2, 6))  # from its last checkpoint
  assert float(state.params) == 21 and int(state.step) == 6
  assert written(war) == written(peace)


@pytest.mark.parametrize("when", range(6))
def test_a_workdir_that_is_removed_is_not_made_again(when, tmp_path):
  """A checkpoint in a new folder, without the rows before it, would be gone on from."""
  peace, war = tmp_path / "peace", tmp_path / "war"
  run_stage(make_run(peace), counting_stage(eval_every=4), fresh())
  remove = lambda n: shutil.rmtree(war) if n == when else None
  with pytest.raises((UserError, FileNotFoundError)):
    run_stage(make_run(war, log_every=4), counting_stage(at_step=remove, eval_every=4), fresh())
  assert not war.exists()
  run_stage(make_run(war), counting_stage(eval_every=4), fresh())
  assert written(war) == written(peace)


@pytest.mark.parametrize("fails", [False, True])
def test_a_workdir_that_is_removed_during_a_save_is_not_left_with_half_a_run(
  fails, tmp_path, monkeypatch
):
  real, war = Checkpoints.save, tmp_path / "war"

  def save(checkpoints, step, *args):
    if step == 4:
      shutil.rmtree(war)
    real(checkpoints, step, *args)
    if step == 4 and fails:
      (war / "checkpoints" / "rl" / "4.orbax-checkpoint-tmp").mkdir()
      raise ValueError("NOT_FOUND: manifest.ocdbt")

  monkeypatch.setattr(Checkpoints, "save", save)
  with pytest.raises(UserError, match=r"war, .* was removed before step 4 .* start the same"):
    run_stage(make_run(war), counting_stage(), fresh())
  assert not war.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_rows_that_are_missing_where_a_run_goes_on_are_told(name, tmp_path, capsys):
  def stop(n):
    if n == 4:
      raise Killed

  with pytest.raises(Killed):
    run_stage(make_run(tmp_path), counting_stage(at_step=stop), fresh())
  whole = (tmp_path / name).read_bytes()
  for kept, told in ((whole, False), (whole[: len(whole) // 2], True), (b"", True)):
    (tmp_path / name).write_bytes(kept)
    with pytest.raises(Killed):
      run_stage(make_run(tmp_path), counting_stage(at_step=stop), fresh())
    assert (f"{name}: rows are missing" in capsys.readouterr().err) == told
  (tmp_path / name).unlink()
  run_stage(make_run(tmp_path), counting_stage(), fresh())
  assert f"{name}: rows are missing: 0 bytes of the " in capsys.readouterr().err
  run_stage(make_run(tmp_path), counting_stage(), fresh())
  assert "missing" not in capsys.readouterr().err


def test_a_finished_stage_makes_no_step_and_keeps_the_rows_after_it(tmp_path):
  run_stage(make_run(tmp_path), counting_stage(), fresh())
  run = make_run(tmp_path)
  run.log.metrics("eval", 0, {"eval/t/accuracy": 1.0, "time/step_seconds": 0})
  before = written(tmp_path)
  seen = []
  state = run_stage(make_run(tmp_path), counting_stage(seen=seen), fresh())
  assert not seen and float(state.params) == 21
  assert written(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(number, tmp_path):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  send = lambda n: os.kill(os.getpid(), number) if n == 2 else None
  seen = []
  with pytest.raises(SystemExit) as info:
    run_stage(make_run(tmp_path), counting_stage(at_step=send, seen=seen), fresh())
  assert info.value.code == 128 + number and seen == [0, 1, 2]
  assert make_run(tmp_path).checkpoints("rl").latest() == 3
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  state = run_stage(make_run(tmp_path), counting_stage(), fresh())
  assert float(state.params) == 21


def test_a_step_that_is_stopped_half_way_is_made_again(tmp_path):
  """Between two slices of a rollout nothing has been changed: what was done is saved."""
  peace, war, seen = tmp_path / "peace", tmp_path / "war", []
  run_stage(make_run(peace), counting_stage(), fresh())

  def stop(n):
    if n == 3:
      raise Stopped(signal.SIGTERM)

  with pytest.raises(SystemExit, match="143"):
    run_stage(make_run(war, every=100), counting_stage(at_step=stop), fresh())
  assert make_run(war).checkpoints("rl").steps() == [3]
  with pytest.raises(SystemExit):  # again, before anything new is done
    run_stage(make_run(war, every=100), counting_stage(at_step=stop), fresh())
  state = run_stage(make_run(war), counting_stage(seen=seen), fresh())
  assert seen == [3, 4, 5] and float(state.params) == 21
  assert written(war) == written(peace)


# What the evaluation of a run that is killed in it does: n counts evaluations.
ENDS = {"killed": lambda: Killed(), "stopped": lambda: Stopped(signal.SIGINT)}


def ending_run(path, end, at, **options):
  """`make_run` whose evaluation number `at` (from 0) ends the run."""
  run, count = make_run(path, **options), itertools.count()
  evaluate = run.evaluate

  def ending(params, label):
    if next(count) == at:
      raise ENDS[end]()
    return evaluate(params, label)

  return dataclasses.replace(run, evaluate=ending)


@pytest.mark.slow
@pytest.mark.parametrize("best", ["", "eval/t/accuracy"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("end", ENDS)
def test_an_evaluation_that_is_cut_off_costs_no_step_and_is_made_up(end, at, best, tmp_path):
  """It is made after the checkpoint, in which the row waits that it belongs to."""
  peace, war, seen = tmp_path / "peace", tmp_path / "war", []
  options = {"every": 2, "best": best, "keep": 1}
  run_stage(make_run(peace, **options), counting_stage(eval_every=2), fresh())
  with pytest.raises((Killed, SystemExit)):
    run = ending_run(war, end, at, **options)
    run_stage(run, counting_stage(eval_every=2), fresh())
  assert make_run(war, **options).checkpoints("rl").latest() == 2 * (at + 1)
  with (war / "metrics.jsonl").open("a") as file:
    file.write('{"stage": "rl", "st')  # a line that the kill cut
  state = run_stage(make_run(war, **options), counting_stage(seen=seen, eval_every=2), fresh())
  assert seen == list(range(2 * (at + 1), 6)) and float(state.params) == 21
  assert written(war) == written(peace)
  kept = [make_run(path, **options).checkpoints("rl") for path in (war, peace)]
  assert kept[0].steps() == kept[1].steps() == ([2, 6] if best else [6])
  assert kept[0].best() == kept[1].best()


def test_a_stop_in_an_evaluation_between_checkpoints_saves_first(tmp_path):
  peace, war = tmp_path / "peace", tmp_path / "war"
  run_stage(make_run(peace), counting_stage(eval_every=3), fresh())
  with pytest.raises(SystemExit, match="130"):
    run_stage(ending_run(war, "stopped", 0, every=100), counting_stage(eval_every=3), fresh())
  assert make_run(war).checkpoints("rl").steps() == [3]
  run_stage(make_run(war), counting_stage(eval_every=3), fresh())
  assert written(war) == written(peace)


def test_evaluations_come_when_they_are_due_whatever_rows_are_written(tmp_path):
  run_stage(make_run(tmp_path, log_every=4), counting_stage(eval_every=3), fresh())
  rows, _ = written(tmp_path)
  assert [r["step"] for r in rows] == [3, 4, 6]
  assert [r["step"] for r in rows if "eval/t/accuracy" in r] == [3, 6]


def test_minutes_save_between_the_steps_that_are_due_anyway(tmp_path, monkeypatch):
  """Every step takes half a minute here, by the clock that decides."""
  now = itertools.count(0, 30)
  monkeypatch.setattr(loop.time, "monotonic", lambda: next(now))
  run = make_run(tmp_path, keep=9, every=0, minutes=1.5)
  run_stage(run, counting_stage(steps=9), fresh())
  assert run.checkpoints("rl").steps() == [3, 6, 9]


@pytest.mark.parametrize("minutes", [0.0, 1e6])
def test_no_minutes_save_nothing(minutes, tmp_path):
  run = make_run(tmp_path, keep=9, every=0, minutes=minutes)
  run_stage(run, counting_stage(), fresh())
  assert run.checkpoints("rl").steps() == [6]


@pytest.mark.parametrize("damage", ["flip", "emptied"])
def test_a_run_goes_on_from_the_last_good_checkpoint(damage, tmp_path, capsys):
  peace, war, seen = tmp_path / "peace", tmp_path / "war", []
  run_stage(make_run(peace), counting_stage(), fresh())
  with pytest.raises(SystemExit):
    send = lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 4 else None
    run_stage(make_run(war), counting_stage(at_step=send), fresh())
  folder = war / "checkpoints" / "rl"
  DAMAGES[damage](folder / "5")
  (folder / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)  # of a killed save
  capsys.readouterr()
  run_stage(make_run(war), counting_stage(seen=seen), fresh())
  assert seen == [4, 5] and written(war) == written(peace)
  said = capsys.readouterr().err
  assert f"rl: the checkpoint {folder}/5 is damaged: " in said
  assert f"; it is {folder}/damaged-5 now" in said
  assert "rl: continues from its checkpoint of step 4" in said
  assert sorted(p.name for p in folder.iterdir()) == ["4", "6", "damaged-5"]


def test_where_no_checkpoint_is_good_nothing_is_thrown_away(tmp_path):
  run_stage(make_run(tmp_path), counting_stage(), fresh())
  for step in (4, 6):
    flip(tmp_path / "checkpoints" / "rl" / f"{step}")
  before = written(tmp_path)
  with pytest.raises(UserError, match=r"rl: no checkpoint can be read: .*rl/6 is .*; .*rl/4 is "):
    run_stage(make_run(tmp_path), counting_stage(), fresh())
  assert written(tmp_path) == before and make_run(tmp_path).checkpoints("rl").steps() == [4, 6]


def test_a_finished_stage_without_checkpoints_is_not_trained_again(tmp_path):
  """Somebody deleted them to free the disk: its rows, and those after it, are to stay."""
  run_stage(make_run(tmp_path), counting_stage(), fresh())
  shutil.rmtree(tmp_path / "checkpoints" / "rl")
  before, seen = written(tmp_path), []
  with pytest.raises(UserError, match=r"rl: its rows reach the last step, 6, but .* no checkpoint"):
    run_stage(make_run(tmp_path), counting_stage(seen=seen), fresh())
  assert not seen and written(tmp_path) == before


def test_sft_steps_made_again_for_rl_leave_every_row_where_it_is(tmp_path, capsys):
  """The newest checkpoint of SFT is damaged when RL has rows that a rewind would drop."""
  sft = dataclasses.replace(counting_stage(), name="sft")
  run_stage(make_run(tmp_path), sft, fresh())
  run_stage(make_run(tmp_path), counting_stage(), fresh())
  before, seen = written(tmp_path), []
  flip(tmp_path / "checkpoints" / "sft" / "6")
  again = dataclasses.replace(counting_stage(seen=seen), name="sft")
  state = run_stage(make_run(tmp_path), again, fresh())
  assert seen == [4, 5] and float(state.params) == 21 and written(tmp_path) == before
  assert "sft: makes step 5 to 6 again, for RL; rows are kept" in capsys.readouterr().err
  assert make_run(tmp_path).checkpoints("sft").latest() == 6


@pytest.mark.parametrize(
  ("rl_step", "beta", "spent"), [(None, 0.0, False), (3, 0.0, True), (3, 0.1, None), (6, 0.1, True)]
)
def test_rl_goes_on_without_sfts_checkpoints_where_it_can(rl_step, beta, spent, tmp_path):
  run = make_run(tmp_path)
  config = dataclasses.replace(
    run.config,
    rl=dataclasses.replace(run.config.rl, steps=6),
    objective=dataclasses.replace(run.config.objective, beta=beta),
  )
  run = dataclasses.replace(run, config=config)
  if rl_step:
    run.checkpoints("rl").save(rl_step, tree(1))
  if spent is None:  # the reference is lost
    with pytest.raises(UserError, match=r"at step 3 of 6, needs .* reference .*objective\.beta=0"):
      is_spent(run)
  else:
    assert is_spent(run) == spent


def test_a_run_whose_workdir_was_taken_over_writes_no_more(tmp_path):
  lock = WorkdirLock(tmp_path)
  run = dataclasses.replace(make_run(tmp_path, every=1), lock=lock)

  def take_over(n):
    if n == 3:
      lock._taken_by = Holder()

  with pytest.raises(UserError, match="was taken over by another run"):
    run_stage(run, counting_stage(at_step=take_over), fresh())
  assert run.checkpoints("rl").latest() == 3


# --- signals ----------------------------------------------------------------------------


def test_asked_twice_it_stops_at_once():
  with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 1)  # let it arrive


def test_the_first_signal_decides_the_exit_code():
  with StopSignal() as stop:
    for number in (signal.SIGTERM, signal.SIGTERM):
      os.kill(os.getpid(), number)
    assert stop.agreed(True, False) == [signal.SIGTERM, 1, 0]
    with pytest.raises(Stopped) as info:
      stop.check_soon()
  assert info.value.signal == signal.SIGTERM
  with stop:  # of the next stage
    stop.check()


# No handler of Python's runs while the main thread is in C.
COMPILING = """
import hashlib
from igpo_jax.train.sft import is_spent
from igpo_jax.train.stop import StopSignal
with StopSignal() as stop:
  stop.next_start = "the same command continues from step 3"
  print("compiling", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"x", b"x", 2**31 - 1)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_compilation_is_answered_at_once_and_ends_it_at_the_second_press():
  process = subprocess.Popen(
    [sys.executable, "-c", COMPILING], cwd=REPO, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert process.stdout.readline() == "compiling\n"
  for line in ("finishing this step; press again to stop now\n",
               "stopping now; the same command continues from step 3\n"):  # fmt: skip
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == line
  assert process.wait(20) == 128 + signal.SIGINT
  assert process.communicate() == ("", "")


def test_updates_skipped_in_a_row_stop_the_run_and_single_ones_do_not(tmp_path):
  run = make_run(tmp_path / "some", max_skipped=3)
  state = run_stage(run, counting_stage(fail_at=(0, 1, 3, 4)), fresh())
  assert int(state.step) == 6
  run = make_run(tmp_path / "many", max_skipped=3)
  line = r"3 updates had a loss.* in a row, the last at step 4 .*lower rl_optimizer\.learning_rate"
  with pytest.raises(NonFinite, match=line):
    run_stage(run, counting_stage(fail_at=(1, 2, 3)), fresh())
  assert make_run(tmp_path / "many").checkpoints("rl").latest() == 2


def test_logits_that_are_no_numbers_step_after_step_stop_the_run(tmp_path):
  """Also where no update is skipped: groups that are all wrong have no gradient."""

  def stage(*broken):
    whole = counting_stage()

    def step(state, n):
      state, metrics, rows = whole.step(state, n)
      return state, metrics | {"not_finite": 0.25 * (n in broken)}, rows

    return dataclasses.replace(whole, step=step)

  run_stage(make_run(tmp_path / "some", max_skipped=3), stage(0, 1, 3, 4), fresh())
  run = make_run(tmp_path / "many", max_skipped=3, log_every=5)
  with pytest.raises(NonFinite, match=r"3 steps sampled from logits .* row, the last at step 4"):
    run_stage(run, stage(1, 2, 3, 4, 5), fresh())
  assert make_run(tmp_path / "many").checkpoints("rl").latest() == 2
  rows, _ = written(tmp_path / "many")
  assert [(row["step"], row["rl/not_finite"]) for row in rows] == [(4, 0.25)]


def test_the_best_checkpoint_by_an_evaluation_is_kept(tmp_path):
  """The accuracy falls as the parameter grows: the first evaluation, at step 1, is best."""
  run = make_run(tmp_path, keep=1, every=0, best="eval/t/accuracy")
  run_stage(run, counting_stage(eval_every=1), fresh())
  assert make_run(tmp_path, keep=1, best="eval/t/accuracy").checkpoints("rl").steps() == [1, 6]


@pytest.mark.parametrize(
  ("every", "expected"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (6, [6]), (7, [6])]
)
def test_what_is_due_when(every, expected):
  assert [n for n in range(1, 7) if due(every, n, 6)] == expected
  cfg = CheckpointConfig(every=every, best_metric="m")
  assert [n for n in range(1, 7) if should_save(cfg, n, 6, {})] == expected
  assert should_save(cfg, 3, 6, {"m": 1.0})
  cfg = CheckpointConfig(every=every, best_metric="eval/t/accuracy")
  assert should_save(cfg, 3, 6, {}, evaluating=True)


# --- the report -----------------------------------------------------------------------


def evaluation(accuracy):
  result = {"accuracy": accuracy, "stderr": 0.01, "n": 9, "low": 0.0, "high": 0.6, "samples": 1}
  return {f"eval/t/{name}": value for name, value in result.items()}


def rl_row(step, before, after, reward):
  named = {"all_wrong_before": before, "all_wrong_after": after, "reward": reward}
  named |= {"extra_correct": 0.1, "answer_shown": 0.0}
  return {"stage": "rl", "step": step} | {f"rl/{name}": value for name, value in named.items()}


ROWS = [
  {"stage": "init", "step": 0} | evaluation(0.1),
  rl_row(1, 1.0, 0.5, 0.2) | evaluation(0.2),
  rl_row(2, 0.5, 0.0, None) | evaluation(0.3),
]


def test_the_summary_is_of_last_evaluations_and_means_over_steps():
  summary = summary_of(ROWS)
  assert summary["eval"]["init/t"]["accuracy"] == 0.1
  assert summary["eval"]["rl/t"]["accuracy"] == 0.3 and summary["eval"]["rl/t"]["n"] == 9
  assert summary["rl"]["all_wrong_before"] == 0.75
  assert summary["rl"]["all_wrong_after"] == 0.25
  assert summary["rl"]["reward"] == 0.2  # a null is left out
  assert summary["steps"] == {"init": 0, "rl": 2}
  text = summary_table(summary)
  assert "| t, after RL | 0.300 |" in text
  assert "| groups all wrong, after inpainting | 0.250 |" in text


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_curves_are_drawn_of_whatever_there_is(rows, tmp_path):
  draw_curves(rows, epath.Path(tmp_path / "curves.png"))
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# --- stop rules ---------------------------------------------------------------------------


def test_a_stop_rule_saves_first_and_ends_the_run_after_its_patience(tmp_path):
  """The value is 1, 3, 6, 10, 15, 21: above 5 from step 3 on, for the second time at step 4."""
  rules = {"stop_when": ("rl/value > 5", "sft/loss < 1"), "stop_patience": 2}
  run = make_run(tmp_path, every=100, **rules)
  with pytest.raises(UserError, match=r"rl: stopped at step 4: rl/value=10 is above 5, 2 times"):
    run_stage(run, counting_stage(), fresh())
  assert make_run(tmp_path).checkpoints("rl").latest() == 4
  assert [row["step"] for row in written(tmp_path)[0]] == [1, 2, 3, 4]
  # Without the rule, which may be changed, it goes on from there.
  state = run_stage(make_run(tmp_path), counting_stage(), fresh())
  assert float(state.params) == 21


def test_a_value_between_ends_a_rules_row_and_other_stages_rules_do_not_count():
  guards = Guards(
    LogConfig(stop_when=("rl/kl < 1", "eval/t/accuracy < 0.5"), stop_patience=2), "rl"
  )
  reasons = [guards.reason({"rl/kl": value}) for value in (0.5, 2.0, 0.5, float("nan"))]
  assert reasons[:3] == ["", "", ""] and "rl/kl=nan is below 1" in reasons[3]
  assert not Guards(LogConfig(stop_when=("rl/kl < 1",)), "sft").rules
  with pytest.raises(UserError, match="there is no metric 'rl/kl'; rl has rl/loss"):
    guards.reason({"rl/loss": 1.0})


@pytest.mark.parametrize("rule", ["rl/kl", "rl/kl >= 2", "rl/kl > many", "rl/kl > nan", "> 2"])
def test_a_rule_that_cannot_be_read_is_told(rule):
  with pytest.raises(UserError, match=r"log\.stop_when: .* should be METRIC < NUMBER"):
    LogConfig(stop_when=(rule,))
