"""The claims study: arms that differ in one thing, runs that are done once, honest intervals."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest
from etils import epath
from PIL import Image

from benchmarks import cheap_rollouts as cheap
from benchmarks import estimators as study
from benchmarks import shared_runs
from benchmarks.claims import __main__ as program
from benchmarks.claims import arms, claims, long_traces, plots, regimes, runs
from benchmarks.claims.theorem import _shared_size
from benchmarks.study import finished, interval, largest_fall, run_all
from igpo_jax import cli
from igpo_jax.config import registry
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import open_tokenizer
from igpo_jax.errors import UserError
from igpo_jax.eval.protocols import plan
from igpo_jax.train.continued import as_json
from igpo_jax.train.setup import make_optimizer

ROOT = pathlib.Path(__file__).resolve().parent.parent


def flat(config) -> dict:
  """Options by dotted name."""
  out = {}

  def walk(section, path):
    for name, value in section.items():
      if isinstance(value, dict):
        walk(value, f"{path}{name}.")
      else:
        out[path + name] = value

  walk(dataclasses.asdict(config), "")
  return out


@pytest.mark.slow
@pytest.mark.parametrize("task", (arms, long_traces))
def test_an_arm_differs_from_igpo_in_what_it_says_and_nothing_else(task):
  for arm, spec in task.ARMS.items():
    base, config = flat(task.make_config("igpo", 1)), flat(task.make_config(arm, 1))
    changed = {name for name in base if base[name] != config[name]}
    sources = {"data.rl"} if spec.rl else set()
    if spec.sft != "aligned":
      sources |= {"data.sft"} | ({"sft.response_lengths"} if task is arms else set())
    assert changed == set(spec.changes) | sources, arm


def test_all_arms_of_a_seed_start_from_one_sft_run():
  for name, spec in arms.ARMS.items():
    sft, arm = arms.sft_config(spec.sft, 2), arms.make_config(name, 2)
    assert sft.stages == ("sft",)
    for section in ("seed", "model", "sft", "sft_optimizer", "eval"):
      assert getattr(sft, section) == getattr(arm, section), (name, section)
    assert sft.data.sft == arm.data.sft


def test_seeds_have_tables_problems_and_weights_of_their_own():
  first, second = (arms.make_config("igpo", seed) for seed in (0, 1))
  assert first.seed != second.seed
  for field in ("sft", "rl", "eval"):
    assert getattr(first.data, field) != getattr(second.data, field)
  assert "table=1&" in second.data.rl and "table=1&" in second.data.sft


def test_seeds_on_long_traces_have_networks_problems_and_sft_runs_of_their_own(tmp_path):
  first, second = (long_traces.make_config("igpo", seed, True) for seed in (0, 1))
  assert first.seed != second.seed
  for field in ("sft", "rl", "eval"):
    assert getattr(first.data, field) != getattr(second.data, field)
  assert "table=1&" in second.data.rl and "table=1&" in second.data.sft
  runs = [long_traces.sft_run(config, epath.Path(tmp_path)) for config in (first, second)]
  assert [path.name for _, path in runs] == ["sft0_aligned", "sft1_aligned"]
  assert [config.seed for config, _ in runs] == [0, 1] and runs[0][0].stages == ("sft",)


@pytest.mark.slow
def test_each_seed_of_the_claims_on_long_traces_has_problems_enough():
  for seed in range(max(claim.seeds for claim in long_traces.CLAIMS.values())):
    config = long_traces.make_config("igpo", seed)
    assert len(load_records(config.data.rl).records) == 2000, seed


def test_a_regime_changes_all_arms_in_what_it_says_and_nothing_else():
  for name, regime in regimes.REGIMES.items():
    for arm in regimes.ARMS:
      plain = flat(long_traces.make_config(arm, 100))
      task = regimes.Task(regimes.run_of(name, arm), 100, epath.Path("x"), smoke=False)
      config = flat(task.config)
      changed = {option for option in plain if plain[option] != config[option]}
      if arm == "grpo" and regime.of_hints:  # it has no hints: the run with most steps serves
        assert changed == {"rl.steps"}
      else:
        assert changed == set(regime.changes) | ({"data.rl"} if regime.rl else set()), (name, arm)


def test_a_run_of_another_length_is_read_where_those_end_that_it_is_compared_with():
  def curve(*accuracies):
    flat = [0.5] * (8 * (len(accuracies) - 1))
    return {"accuracy": [[8 * k, a] for k, a in enumerate(accuracies)],
            "curves": {"all_wrong_after": flat, "extra_correct": flat}}  # fmt: skip

  results = {(f"tau_1-{arm}", 100): curve(0.1, 0.2, 0.2, 0.2, last)
             for arm, last in (("igpo", 0.6), ("full_hints", 0.4))}  # fmt: skip
  results["longer-grpo", 100] = curve(0.1, 0.1, 0.1, 0.1, 0.3, 0.9, 0.0)
  table, rows = regimes.compare(results, ["mu_4", "tau_1"], [100])  # of mu 4 nothing is there
  assert {row["arm"]: row["end"] for row in rows} == {
    "igpo": [0.6], "full_hints": [0.4], "grpo": [0.3]
  }  # fmt: skip
  assert [row["IGPO ahead"] for row in rows] == [[0.0], pytest.approx([0.2]), pytest.approx([0.3])]
  (line,) = (line for line in table.splitlines() if "GRPO" in line)
  assert [cell.strip() for cell in line.split("|")][3:7] == ["0.100", "0.300", "-", "0.000"]


def test_traces_fit_their_canvas_and_most_verbose_ones_do_not_fit_the_window():
  tokenizer = open_tokenizer("char:letter_maps")
  lengths = {}
  for sft in arms.SFT:
    config = arms.sft_config(sft, 0)
    records = load_records(config.data.sft.replace("n=20000", "n=2000")).records
    lengths[sft] = [len(tokenizer.encode(r.trace)) + 1 for r in records]  # and its end
  assert max(lengths["aligned"]) <= arms.WINDOW
  assert sum(n <= arms.WINDOW for n in lengths["verbose"]) < 0.25 * 2000
  assert sum(n <= arms.LONG for n in lengths["verbose"]) > 0.95 * 2000


def test_the_numbers_of_an_interval_by_hand():
  mean, width = interval([1.0, 2.0, 3.0])
  assert mean == 2.0
  assert width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # t(0.975, 2) = 4.303, s = 1
  mean, width = interval([0.5])
  assert mean == 0.5 and math.isnan(width)


def result(before: float, after: float) -> dict:
  metrics = ("all_wrong_after", "all_wrong_before", "extra_correct", "reward", "kl")
  return {
    "curves": {metric: [0.5, after] for metric in metrics},
    "accuracy": [[0, before], [10, 0.8], [20, after]],
  }


def test_differences_are_paired_by_seed_and_the_policy_before_rl_is_an_arm_of_its_own():
  results = {("igpo", 0): result(0.1, 0.7), ("igpo", 1): result(0.3, 0.9),
             ("grpo", 0): result(0.1, 0.2), ("grpo", 1): result(0.3, 0.5)}  # fmt: skip
  table, rows = claims.compare(claims.LETTER_MAPS, results, 2, range(2))
  assert rows[0]["by_seed"] == pytest.approx([0.5, 0.4]) and rows[0]["mean"] == pytest.approx(0.45)
  assert rows[1]["by_seed"] == pytest.approx([0.1, 0.2])
  assert rows[0]["low"] == pytest.approx(0.45 - 12.706 * 0.05, rel=1e-3)  # t(0.975, 1)
  assert "IGPO - GRPO" in table and "GRPO - the same before RL" in table
  assert claims.FALL.of(result(0.1, 0.7)) == pytest.approx(0.1)


def test_what_two_halves_share_is_the_size_without_their_noise():
  a, b = {"w": jnp.array([3.0, 4.0, 1.0])}, {"w": jnp.array([3.0, 4.0, -1.0])}
  assert _shared_size(a, b) == pytest.approx(math.sqrt(24))
  assert _shared_size(a, {"w": -a["w"]}) == 0.0


def test_every_claim_is_there_and_every_arm_is_in_one():
  assert sorted(claims.CLAIMS) == list(range(1, 12))
  assert sorted(long_traces.CLAIMS) == [4, 5, 6, 7, 10]
  assert all(claim.seeds >= (3 if n in (9, 10) else 5) for n, claim in claims.CLAIMS.items())
  for of_task in program.STUDIES.values():
    assert {arm for claim in of_task.claims.values() for arm in claim.arms} == set(of_task.arms)
    for claim in of_task.claims.values():
      assert all({arm, other} <= {*claim.arms, ""} for arm, other, _ in claim.pairs)


def test_a_picture_asks_and_does_not_answer(tmp_path):
  for claim in (*claims.CLAIMS.values(), *long_traces.CLAIMS.values()):
    assert claim.question.endswith("?") and not set(claim.question) & set("<>")
  results = {(arm, 0): result(0.1, value) for arm, value in
             (("igpo", 0.5), ("full_hints", 0.9), ("grpo", 0.2))}  # fmt: skip
  plots.draw(
    claims.LETTER_MAPS, results, 4, range(1), [], epath.Path(tmp_path / "claim4.png")
  )  # refuted
  assert picture_title(tmp_path / "claim4.png") == claims.CLAIMS[4].question


def picture_title(path: pathlib.Path) -> str:
  with Image.open(path) as image:
    return image.text["Title"]


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_the_pictures_in_the_documents_have_the_titles_of_today(number):
  picture = ROOT / "docs" / "claims" / f"claim{number}.png"
  assert picture_title(picture) == claims.CLAIMS[number].question


def test_a_finished_run_is_not_run_again_and_one_of_other_settings_is_told(tmp_path):
  task = runs.Task("igpo", 0, epath.Path(tmp_path), smoke=True)
  assert finished(task) is None
  task.root.mkdir()
  kept = {"eval": {}, "config": as_json(task.config)}
  task.result.write_text(json.dumps(kept))
  assert finished(task) == kept
  assert run_all([task], jobs=1) == {("igpo", 0): kept}
  with pytest.raises(UserError, match="other settings"):
    finished(dataclasses.replace(task, smoke=False))


def command(*options: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "benchmarks.claims", *options],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


@pytest.mark.parametrize(
  "options",
  [
    (),
    ("--claim=1", "--all"),
    ("--all", "--jobs=0"),
    ("--claim=1,12",),
    ("--claim=",),
    ("--task=stories", "--claim=1"),
  ],
)
def test_options_that_make_no_sense_are_told(tmp_path, options, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["claims", *options, f"--workdir={tmp_path}"])
  with pytest.raises(SystemExit) as end:
    cli.run(program.main)
  said = capsys.readouterr().err
  assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said


@pytest.mark.slow
def test_claims_run_end_to_end_and_again_give_the_same_tables(tmp_path):
  """One on SFT and RL, and the theorem. The arms of the others differ in their config alone."""
  options = ("--claim=6,11", "--smoke", f"--workdir={tmp_path}")
  out = command(*options, "--jobs=1")  # one process compiles for both arms
  assert out.returncode == 0, out.stderr[-2000:]
  report = json.loads((tmp_path / "results.json").read_text())
  tables = {}
  for number in (6, 11):
    claim = claims.CLAIMS[number]
    tables[number] = (tmp_path / f"claim{number}.md").read_text()
    assert claim.title in tables[number] and "nan" not in tables[number]
    assert (tmp_path / f"claim{number}.png").read_bytes()[:4] == b"\x89PNG"
    assert len(report[str(number)]["rows"]) == (len(claim.pairs) if claim.arms else 3)
  igpo = json.loads((tmp_path / "seed0" / "igpo.json").read_text())
  assert max(igpo["curves"]["answer_shown"]) == 0.0
  # Runs whose results were not written yet go on from their checkpoints, two at a time.
  for arm in ("igpo", "verbose"):
    (tmp_path / "seed0" / f"{arm}.json").unlink()
  assert command(*options).returncode == 0
  assert {n: (tmp_path / f"claim{n}.md").read_text() for n in tables} == tables


@pytest.mark.slow
def test_claims_about_long_traces_run_in_one_process_and_go_on_where_they_were(
  tmp_path, monkeypatch, capsys
):
  """The leak and the concise traces: two arms that change the hints, and two SFT runs."""
  options = ["--task=stories", "--claim=6,7", "--smoke", f"--workdir={tmp_path}"]
  monkeypatch.setattr(sys, "argv", ["claims", *options])
  made = []
  make = shared_runs.make_policy_programs
  monkeypatch.setattr(shared_runs, "make_policy_programs", lambda *a: made.append(1) or make(*a))
  program.main()
  printed = capsys.readouterr().out
  assert len(made) == 1  # for all arms
  tables = [(tmp_path / f"claim{number}.md").read_text() for number in (6, 7)]
  assert all(table in printed and "nan" not in table for table in tables)
  kept = {arm: json.loads((tmp_path / "seed0" / f"{arm}.json").read_text())
          for arm in ("igpo", "leak", "grpo", "concise")}  # fmt: skip
  assert max(kept["leak"]["curves"]["answer_shown"]) == 1.0
  assert max(kept["igpo"]["curves"]["answer_shown"]) == 0.0
  assert sorted(path.name for path in tmp_path.glob("sft*")) == ["sft0_aligned", "sft0_concise"]
  # Started again, only what is not there is run.
  (tmp_path / "seed0" / "grpo.json").unlink()
  again = []
  monkeypatch.setattr(shared_runs, "perform",
                      lambda task, _: again.append(task.name) or kept[task.name])  # fmt: skip
  program.main()
  assert again == ["grpo"]
  assert [(tmp_path / f"claim{number}.md").read_text() for number in (6, 7)] == tables


# --- the study of estimators ----------------------------------------------------------


@pytest.mark.parametrize("method", study.METHODS)
def test_a_method_of_the_study_differs_in_what_it_says_and_nothing_else(method):
  base = study.config_of("inpaint", "coupled", 1e-3, 1)
  config = flat(study.config_of("inpaint", method, 1e-3, 1))
  changes = study.METHODS[method][1]
  assert {name: config[name] for name in changes} == changes
  changed = {name for name, value in flat(base).items() if value != config[name]}
  assert changed <= set(changes)
  plain = flat(study.config_of("none", method, 1e-3, 1))
  assert {k for k in config if config[k] != plain[k]} == {"rl.exploration"}
  assert flat(study.Run("sft:aligned", 1, epath.Path("x"), False).config)["sft.steps"] == 1200


def test_every_method_of_the_page_is_in_the_study():
  """Each estimator and each objective of the package is in some method, and on the page."""
  page = (ROOT / "docs" / "methods.md").read_text()
  for kind in ("estimator", "objective"):
    known = {n for n, c in registry.classes(kind).items() if c.__module__.startswith("igpo_jax.")}
    assert {changes[f"rl.{kind}"] for _, changes in study.METHODS.values()} == known
    assert all(f"`{name}`" in page for name in known)


def test_forward_passes_of_a_step_by_hand():
  """14 to sample; mean-field reads 1/8, for old and reference once and for two updates thrice."""
  plain = study.config_of("none", "mean_field", 1e-3, 0)
  assert study.forwards_per_step(plain, 0.5) == 14 + (2 + 2 * 3) / 8
  hinted = study.config_of("inpaint", "mean_field", 1e-3, 0)
  assert study.forwards_per_step(hinted, 0.5) == 14 * 1.5 + 1
  # Four views, two at a time: read once more; drawn anew for both updates.
  espo = study.config_of("none", "espo", 1e-3, 0)
  assert study.forwards_per_step(espo) == 14 + 4 * (2 * 2 + 2 * 4)


def run_of(*accuracies, steps=None):
  """A result with an evaluation every four steps; `steps` of them were made."""
  made = 4 * (len(accuracies) - 1) if steps is None else steps
  return {"accuracy": [[4 * k, a] for k, a in enumerate(accuracies)], "failed": "",
          "step_cpu_seconds": 1.0, "curves": {"all_wrong_before": [0.0] * made}}  # fmt: skip


def test_runs_are_compared_where_they_have_cost_as_much():
  config = study.config_of("none", "mean_field", 1e-3, 0)
  result = run_of(0.0, 0.4, 0.6)
  assert study.accuracy_at(result, config, 6 * 15.0) == pytest.approx(0.5)  # 15 a step
  assert study.accuracy_at(result, config, 1e9) == pytest.approx(0.6)
  assert study.area(result) == pytest.approx((0.2 + 0.5) / 2)
  assert largest_fall(run_of(0.1, 0.5, 0.2, 0.4)) == pytest.approx(0.3)


def test_the_rate_with_the_largest_area_on_the_pilot_seeds_is_taken():
  pair = ("none", "spg")
  ends = {1e-4: 0.2, 1e-3: 0.6, 1e-2: 0.1}
  results = {
    (study.name_of(*pair, rate), seed): run_of(0.0, end)
    for rate, end in ends.items()
    for seed in (7, 8)
  }
  assert study.choose_rates(results, [pair], tuple(ends), (7, 8)) == {pair: 1e-3}


def test_a_run_that_failed_is_in_the_table_with_its_last_accuracy():
  results = {}
  for exploration in study.EXPLORATIONS:
    name = study.name_of(exploration, "mean_field", 1e-3)
    results |= {(name, seed): run_of(0.0, 0.5) for seed in (0, 1)}
  chosen = {(exploration, "mean_field"): 1e-3 for exploration in study.EXPLORATIONS}
  results[name, 1] |= {"failed": "5 updates in a row"}
  at_once = run_of(0.2, steps=0) | {"failed": "at the first step", "step_cpu_seconds": None}
  results["none.mean_field.0.001", 0] = at_once
  rows = study.measure(results, chosen, (0, 1), smoke=False)
  by = {row["exploration"]: row for row in rows}
  assert by["inpaint"]["values"]["equal samples"] == [0.5, 0.5]
  assert by["none"]["values"]["equal samples"] == [0.2, 0.5]
  lines = study.table(rows, (0, 1)).splitlines()
  assert lines[2].endswith("| 1 of 2 |") and lines[3].endswith("| 1 of 2 |") and len(lines) == 4
  assert "nan" not in "".join(lines)


@pytest.mark.slow
def test_a_rate_in_the_state_gives_the_update_of_a_rate_in_the_program():
  config = study.config_of("none", "mean_field", 3e-3, 0)
  decay = dataclasses.replace(config.rl_optimizer, weight_decay=0.1)
  config = dataclasses.replace(config, rl_optimizer=decay)
  params = {"w": jnp.linspace(-1.0, 2.0, 7)}
  plain, ours = make_optimizer(decay, 48), shared_runs.at_rate(config)
  states = [plain.init(params), ours.init(params)]
  for step in range(8):  # through the warm-up
    gradient = {"w": jnp.cos(params["w"] * (step + 1))}
    expected, states[0] = plain.update(gradient, states[0], params)
    update, states[1] = ours.update(gradient, states[1], params)
    assert jnp.allclose(update["w"], expected["w"], rtol=1e-6, atol=0)
    params = optax.apply_updates(params, expected)
  other = study.config_of("inpaint", "mean_field", 1e-3, 3)
  of = shared_runs.compiled_from
  assert of(other) == of(study.config_of("none", "mean_field", 3e-3, 0))
  assert of(other) != of(study.config_of("inpaint", "coupled", 1e-3, 3))


@pytest.mark.slow
def test_the_study_of_estimators_runs_end_to_end_and_goes_on_where_it_was(
  tmp_path, monkeypatch, capsys
):
  def run(methods):
    options = ["--smoke", f"--methods={methods}", f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["estimators", *options])
    study.main()

  with pytest.raises(UserError, match="trace_drawn"):
    run("rldf,trace_drawn")
  made = []
  make = shared_runs.make_policy_programs
  monkeypatch.setattr(shared_runs, "make_policy_programs", lambda *a: made.append(1) or make(*a))
  run("rldf")
  assert len(made) == 1  # for two explorations, on two seeds each
  table = (tmp_path / "table.md").read_text()
  assert table.count("RLDF") == 2 and "nan" not in table and table in capsys.readouterr().out
  assert (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG"
  assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2

  # Started again, only what is not there is run.
  cut = tmp_path / "seed0" / "none.rldf.0.0003.json"
  kept = json.loads(cut.read_text())
  cut.unlink()
  again = []
  monkeypatch.setattr(study, "shared_runs", lambda *_: None)
  monkeypatch.setattr(study, "perform", lambda task, _: again.append(task.name) or kept)
  run("rldf")
  assert again == ["none.rldf.0.0003"] and (tmp_path / "table.md").read_text() == table


@pytest.mark.slow
def test_a_run_of_the_study_goes_on_from_its_checkpoint_and_says_why_it_ended(tmp_path):
  root = epath.Path(tmp_path)
  shared = study.shared_runs(root, True)
  config = study.config_of("inpaint", "mean_field", 1e-3, 0, True)
  log = dataclasses.replace(config.log, stop_when=("rl/reward < 2",), stop_patience=1)
  stopped = shared.perform(dataclasses.replace(config, log=log), root / "run")
  assert "stopped at step 1: rl/reward" in stopped["failed"]
  assert [step for step, _ in stopped["accuracy"]] == [0, 1]
  rest, whole = (shared.perform(config, root / name) for name in ("run", "other"))
  assert not rest["failed"] and [step for step, _ in rest["accuracy"]] == [0, 1, 2]
  assert rest["accuracy"] == whole["accuracy"] and rest["curves"] == whole["curves"]


# --- the study of cheap rollouts -----------------------------------------------------------


@pytest.mark.slow
def test_only_the_rollouts_of_the_study_are_cheap_and_all_runs_are_judged_alike():
  plain = cheap.config_of("inpaint", "exact", 1)
  (task,) = plan(plain)
  assert task.setting.sampler == dataclasses.replace(plain.sampler, temperature=0.0)
  for name, (_, changes) in cheap.ROLLOUTS.items():
    config = cheap.config_of("inpaint", name, 1)
    different = {k for k, value in flat(config).items() if value != flat(plain)[k]}
    assert different == {f"sampler.{option}" for option in changes}
    assert plan(config)[0].setting == task.setting


def cheap_run(positions, accuracies, steps=24):
  """A result in which each RL step computed so many positions for a completion."""
  curves = {name: [0.5] * steps for name in shared_runs.CURVES} | {"positions": [positions] * steps}
  at = range(0, 25, 24 // (len(accuracies) - 1))
  return {"accuracy": list(map(list, zip(at, accuracies, strict=True))), "curves": curves,
          "failed": "", "cpu_seconds": 60.0}  # fmt: skip


def test_cheap_rollouts_are_compared_where_they_have_cost_as_much():
  """By hand: a canvas has 26 positions; likelihoods and updates cost 20 forward passes a step."""
  exact, half = cheap_run(26 * 14, (0.0, 0.4, 0.6)), cheap_run(26 * 7, (0.0, 0.2, 0.5))
  config = cheap.config_of("none", "exact", 0)
  assert cheap.sampling_cost(exact, config)[[1, 24]].tolist() == [14, 14 * 24]
  assert cheap.whole_cost(exact, config)[24] == 34 * 24
  results = {("none.exact", 0): exact, ("none.half", 0): half, ("none.exact", 1): exact}
  rows = cheap.measure(results, ("exact", "half"), smoke=False)
  assert [(row["rollouts"], row["seeds"]) for row in rows] == [("exact", [0]), ("half", [0])]
  for column, values in {
    "steps": (0.6, 0.5),
    "sampling": (0.4, 0.5),  # after half of its steps, exact has cost as much
    "whole": (0.4 + 0.2 * (27 * 24 / 34 - 12) / 12, 0.5),
    "sampling a step": (14, 7),
  }.items():
    assert [row["values"][column][0] for row in rows] == pytest.approx(list(values))
  lines = cheap.table(rows).splitlines()
  assert len(lines) == 4 + 1 + 3 and lines[-1].startswith("| GRPO | 8 of 14 steps | -0.100 |")


@pytest.mark.slow
def test_the_study_of_cheap_rollouts_makes_what_is_not_there(tmp_path, monkeypatch, capsys):
  made = []

  def perform(task, _):
    made.append(f"{task.name} {task.seed}")
    result = cheap_run(26 * 4, (0.0, 0.5), task.config.rl.steps)
    task.root.mkdir(parents=True, exist_ok=True)
    task.result.write_text(json.dumps(result | {"config": as_json(task.config)}))
    return result

  monkeypatch.setattr(study, "perform", perform)
  monkeypatch.setattr(study, "shared_runs", lambda *_: None)
  options = ["--smoke", "--rollouts=exact,dual", f"--workdir={tmp_path}", "--seeds=2"]
  monkeypatch.setattr(sys, "argv", ["cheap_rollouts", *options])
  monkeypatch.setattr(cheap, "area", lambda result: 0.5)
  monkeypatch.setattr(cheap, "accuracy_at", lambda *_: 0.5)
  cheap.main()
  assert made[:4] == ["inpaint.exact 0", "inpaint.dual 0", "inpaint.exact 1", "inpaint.dual 1"]
  assert len(made) == 8 and (tmp_path / "table.md").read_text() in capsys.readouterr().out
  (tmp_path / "seed1" / "none.dual.json").unlink()
  cheap.main()
  assert made[8:] == ["none.dual 1"]
