"""What a run shows as it goes and at its end: TensorBoard, wandb, its table and its curves."""

from __future__ import annotations

import re
import sys

import jax
import matplotlib.figure
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from igpo_jax.config import LogConfig
from igpo_jax.train.runlog import RunLog
from igpo_jax.viewer.curves import draw_curves
from igpo_jax.viewer.summary import summary_of, summary_table


def scalars(folder):
  """Tag -> [(step, value), ...] in the TensorBoard files of a folder."""
  out = {}
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:  # a record: its length, 4 bytes of checksum, itself, 4 bytes of checksum
      end = 12 + int.from_bytes(data[:8], "little")
      event = Event.FromString(data[12:end])
      for value in event.summary.value:
        out.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
      data = data[end + 4 :]
  return out


def test_tensorboard_has_one_chart_of_a_run_for_what_its_stages_share(tmp_path):
  def log_of(*rows):
    log = RunLog(epath.Path(tmp_path), LogConfig(tensorboard=True))
    for stage, step, values in rows:
      log.metrics(stage, step, values)
    log.close()

  score = lambda value: {"eval/t/accuracy": value, "eval/t/cache": "none"}
  log_of(
    ("init", 0, score(0.1)),
    ("sft", 20, {"sft/loss": 2.0, "time/step_seconds": 0.5}),
    ("sft", 40, {"sft/loss": 1.0, "sft/lr": np.inf} | score(0.2)),
  )
  (first,) = (tmp_path / "tensorboard").iterdir()
  first.rename(first.with_name("a"))  # its name is the second it was begun in
  # Started again, it goes on where the steps were.
  log_of(("rl", 3, {"rl/reward": 0.25, "time/step_seconds": 4.0}), ("rl", 5, score(0.3)),
         ("eval", 0, score(0.4)))  # fmt: skip
  assert scalars(tmp_path / "tensorboard") == {
    "eval/t/accuracy": [(0, 0.1), (40, 0.2), (45, 0.3), (45, 0.4)],
    "sft/loss": [(20, 2.0), (40, 1.0)],
    "sft/time/step_seconds": [(20, 0.5)],
    "rl/reward": [(43, 0.25)],
    "rl/time/step_seconds": [(43, 4.0)],
  }


class FakeWandb:
  """What `RunLog` calls of wandb, and what it was told."""

  def __init__(self):
    self.started, self.axes, self.logged = [], [], []

  def init(self, **options):
    self.started.append(options)
    return self

  def define_metric(self, name, **options):
    self.axes.append((name, options))

  def log(self, values):
    self.logged.append(values)

  def finish(self):
    pass


@pytest.mark.parametrize("given", ["", "mine"])
def test_wandb_goes_on_in_the_run_it_began(given, tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  monkeypatch.setenv("WANDB_RUN_ID", given)
  cfg = LogConfig(tensorboard=False, wandb=True)

  def start(folder, *rows):
    log = RunLog(epath.Path(tmp_path / folder), cfg)
    for row in rows:
      log.metrics(*row)
    log.close()
    return fake.started[-1]

  first = start("a", ("sft", 4, {"sft/loss": 1.0}))
  monkeypatch.delenv("WANDB_RUN_ID")
  again = start("a", ("rl", 2, {"rl/reward": 0.5, "time/x": 1, "eval/t/accuracy": 0.25}))
  assert first["id"] == again["id"] == (tmp_path / "a" / "wandb_id").read_text().strip()
  assert first["resume"] == again["resume"] == "allow" and first["project"] == cfg.wandb_project
  assert re.fullmatch("mine" if given else "[0-9a-z]{8,}", first["id"])
  assert start("b")["id"] != first["id"]
  assert fake.logged == [
    {"global_step": 4, "sft/loss": 1.0},
    {"global_step": 6, "rl/reward": 0.5, "rl/time/x": 1, "eval/t/accuracy": 0.25},
  ]
  assert fake.axes[0] == ("*", {"step_metric": "global_step"})


def test_only_the_first_process_makes_the_id_of_wandb(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  RunLog(epath.Path(tmp_path), LogConfig(tensorboard=False, wandb=True)).close()
  assert not fake.started and not list(tmp_path.iterdir())


# --- evaluations with other settings ---------------------------------------------------


def evaluated(stage, step, accuracy, bench="t", **more):
  result = {"accuracy": accuracy, "stderr": 0.01, "low": 0.0, "high": 1.0, "n": 9, "samples": 1}
  result |= {"cache": "none", "settings": "gen_length=32, steps=16, temperature=0.0"} | more
  return {"stage": stage, "step": step} | {f"eval/{bench}/{k}": v for k, v in result.items()}


TRAINED = [evaluated("init", 0, 0.1), evaluated("sft", 40, 0.2), evaluated("rl", 5, 0.3)]
FASTER = "gen_length=32, steps=8, temperature=0.0, threshold=0.9"

KINDS = [
  ({"cache": "dual"}, "cache=dual"),
  ({"settings": FASTER}, "steps=8, threshold=0.9"),
  ({"settings": "gen_length=32, steps=16"}, "temperature=none"),
  ({"protocol": "igpo"}, "protocol=igpo"),
  ({"n": 4}, "n=4"),
  ({"samples": 2, "pass@2": 0.5}, "samples=2"),
]


def drawn(rows, tmp_path, monkeypatch):
  """Label -> (steps, joined or not, marker) of the chart of accuracies."""
  figures, make = [], matplotlib.figure.Figure

  def keep(*args, **options):
    figures.append(make(*args, **options))
    return figures[-1]

  monkeypatch.setattr(matplotlib.figure, "Figure", keep)
  draw_curves(rows, epath.Path(tmp_path / "curves.png"))
  lines = {}
  for bars in figures[0].axes[3].containers:
    line = bars.lines[0]
    joined = line.get_linestyle() not in ("none", "None")
    lines[bars.get_label()] = ([int(x) for x in line.get_xdata()], joined, line.get_marker())
  return lines


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "words"), KINDS)
def test_an_evaluation_with_other_settings_is_not_joined_to_the_line(
  changed, words, tmp_path, monkeypatch
):
  rows = [*TRAINED, evaluated("eval", 0, 0.9, **changed)]
  lines = drawn(rows, tmp_path, monkeypatch)
  assert lines["t"] == ([0, 40, 45], True, "o")
  assert lines[f"t: {words}"] == ([45], False, "s") and len(lines) == 2
  others = [line for line in summary_table(summary_of(rows)).splitlines() if "unlike" in line]
  (line,) = others
  assert f"unlike the others: {words}" in line and "| 0.900 |" in line


def test_two_kinds_of_other_settings_have_two_markers_and_benchmarks_are_apart(
  tmp_path, monkeypatch
):
  rows = [*TRAINED, evaluated("rl", 6, 0.4, cache="dual"), evaluated("eval", 0, 0.9, n=4),
          evaluated("eval", 0, 0.5, bench="u", n=4)]  # fmt: skip
  lines = drawn(rows, tmp_path, monkeypatch)
  assert lines["t"][0] == [0, 40, 45] and lines["u"] == ([46], True, "o")
  assert lines["t: cache=dual"][0] == [46] and lines["t: n=4"][0] == [46]
  assert lines["t: cache=dual"][2] != lines["t: n=4"][2]


def test_evaluations_of_the_same_settings_are_one_line_of_all_stages(tmp_path, monkeypatch):
  rows = [*TRAINED, evaluated("eval", 0, 0.9)]
  assert drawn(rows, tmp_path, monkeypatch) == {"t": ([0, 40, 45, 45], True, "o")}
  assert "unlike" not in summary_table(summary_of(rows))


@pytest.mark.slow
def test_rows_of_an_earlier_version_are_compared_by_what_they_name(tmp_path, monkeypatch):
  old = [{k: v for k, v in row.items() if k != "eval/t/settings"} for row in TRAINED]
  assert list(drawn([*old, evaluated("eval", 0, 0.9)], tmp_path, monkeypatch)) == ["t"]
  rows = [*old, evaluated("eval", 0, 0.9, cache="dual")]
  assert "t: cache=dual" in drawn(rows, tmp_path, monkeypatch)


def test_the_summary_has_nothing_of_an_evaluation_before_the_last():
  rows = [evaluated("rl", 1, 0.1, samples=2, **{"pass@2": 0.5}), evaluated("rl", 2, 0.2)]
  assert "pass@2" not in summary_of(rows)["eval"]["rl/t"]
