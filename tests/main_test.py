"""The command: killed and continued, finished and started again, and used wrongly."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
from etils import epath

from benchmarks.reliability.table import untimed
from igpo_jax import main as program
from igpo_jax import replay
from igpo_jax.config import default_config, freeze, registry
from igpo_jax.errors import UserError
from igpo_jax.train import again
from igpo_jax.train.workdir import hold, open_workdir
from tests import metrics_page
from tests.paths import REPO, run_on_devices
from tests.registered import only_built_in

CONFIG = "tests/tiny_config.py"
ARMS, ARM = "('GRPO: rl.exploration=none',)", "arms/GRPO"


def command(*options, tripwire=""):
  """Runs the program in a process of its own, which finds in the cache what another compiled."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "IGPO_TEST_TRIPWIRE": tripwire}
  return subprocess.run(
    [sys.executable, "-m", "igpo_jax.main", *options],
    text=True, capture_output=True, cwd=REPO, env=environment, check=False,
  )  # fmt: skip


def at(rows):
  return [(row["stage"], row["step"]) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """One run in peace, and the same run killed four times on its way, the last time in its arm.

  It is asked for the arm only after its SFT stage: an arm may be added to a run.
  """
  root = tmp_path_factory.mktemp("runs")
  peace, war = root / "peace", root / "war"
  options = lambda workdir: (f"--config={CONFIG}", f"--workdir={workdir}", f"--config.arms={ARMS}")
  steps = {"peace": command(*options(peace))}
  for name, folder, stage, step, number in (
    ("killed in sft", war, "sft", 3, signal.SIGKILL),
    ("killed in rl", war, "rl", 3, signal.SIGKILL),
    ("asked to stop", war, "rl", 4, signal.SIGTERM),
    ("killed in the arm", war / ARM, "rl", 3, signal.SIGKILL),
  ):
    wire = f"{folder}/metrics.jsonl {stage} {step} {int(number)}"
    asked = options(war)[:2] if name.startswith("killed in sft") else options(war)
    done = command(*asked, tripwire=wire)
    files = {n: folder / f"{n}.jsonl" for n in ("metrics", "samples")}
    steps[name] = done, {n: untimed(file) if file.exists() else [] for n, file in files.items()}
    if number == signal.SIGKILL:
      with files["metrics"].open("a") as file:
        file.write('{"stage": "rl", "st')  # a line that the kill cut
  steps["continued"] = command(*options(war))
  return steps, peace, war


@pytest.mark.slow
def test_a_run_in_peace_writes_what_it_says(runs):
  steps, peace, _ = runs
  assert steps["peace"].returncode == 0, steps["peace"].stderr
  for name in ("config.json", "summary.json", "table.md", "curves.png", "checkpoints"):
    assert (peace / name).exists(), name
  rows = untimed(peace / "metrics.jsonl")
  expected = [("init", 0), *(("sft", k) for k in range(1, 5)), *(("rl", k) for k in range(1, 7))]
  assert at(rows) == expected
  rl = rows[5:]
  share = lambda name: sum(row[f"rl/{name}"] for row in rl) / len(rl)
  assert 0 < share("reward") < 1 and 0 < share("all_wrong_after") < share("all_wrong_before")
  assert all(row["rl/grad_norm"] > 0 for row in rl)
  assert [k for k, row in enumerate(rows) if "eval/test/accuracy" in row] == [0, 4, 7, 10]
  samples = untimed(peace / "samples.jsonl")
  assert list(dict.fromkeys(at(samples))) == [("rl", 1 + k) for k in range(6)]
  own = [(row["step"], row["group"], row["number"]) for row in samples if row["phase"] == "own"]
  assert sorted(own) == [(1 + k // 4, k // 2 % 2, k % 2) for k in range(24)]
  hinted = [row for row in samples if row["phase"] == "hinted"]
  assert len(hinted) == 2 * round(2 * sum(row["rl/all_wrong_before"] for row in rl))
  assert any(row["used"] == "inserted" for row in hinted) and any(row["hints"] for row in hinted)
  learned = [row for row in samples if row["used"] in ("kept", "inserted")]
  assert all((row["advantage"] is None) == (row not in learned) for row in samples)
  stats = [row for row in learned if "token_stats" in row]
  # KL needs every group; a ratio says how far the step's updates moved a token.
  assert len(stats) == len(learned) and {len(s["tokens"]) for s in samples} == {16}
  for row in stats:
    told = row["token_stats"]
    assert set(told) == {"logp", "entropy", "ratio", "kept"} and len(told["kept"]) == 16
    hint = [any(a <= k < b for a, b in row["hints"]) for k in range(16)]
    end = row["pieces"].index("<eos>") if "<eos>" in row["pieces"] else 15
    assert all(told["kept"][k] == (k <= end) for k in range(16) if not hint[k])
    assert all(told["logp"][k] < 0 <= told["entropy"][k] for k in range(16))
    # Of the hints in the loss a fifth is kept, at least one, where the policy is least sure.
    hints = sorted((k for k in range(end + 1) if hint[k]), key=lambda k: told["kept"][k])
    kept = sum(told["kept"][k] for k in hints)
    assert kept == (max(1, len(hints) // 5) if hints else 0)
    entropies = [told["entropy"][k] for k in hints]
    assert max(entropies[:-kept], default=0) <= min(entropies[-kept:], default=0)
  moved = [abs(x - 1) for row in stats for x in row["token_stats"]["ratio"] if row["advantage"]]
  assert max(moved) > 0
  summary = json.loads((peace / "summary.json").read_text())
  assert set(summary["eval"]) == {"init/test", "sft/test", "rl/test"}
  assert summary["eval"]["rl/test"]["n"] == 8
  for name in ("all_wrong_before", "all_wrong_after", "reward"):
    assert summary["rl"][name] == pytest.approx(share(name))


@pytest.mark.slow
def test_every_metric_that_a_run_writes_is_described_and_no_other(runs):
  rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
  names = {name for row in rows for name in row}
  assert not metrics_page.undescribed(names), "docs/metrics.md lacks them"
  assert not set(metrics_page.always()) - names, "docs/metrics.md has names that nobody writes"


def test_the_metrics_of_every_objective_are_described():
  for name, objective in registry.classes("objective").items():
    if not objective.__module__.startswith("igpo_jax."):  # another test's own
      continue
    one = collections.defaultdict(lambda: jnp.float32(1))
    names = [f"rl/{metric}" for metric in objective().metrics(one, one)]
    assert not metrics_page.undescribed(names), f"docs/metrics.md lacks them, of {name}"


@pytest.mark.slow
def test_a_run_leaves_its_page_and_can_be_made_again(runs, capsys):
  """Step 2 from SFT's checkpoint; step 5 from RL's of step 4, on two devices."""
  _, peace, _ = runs
  page = (peace / "report.html").read_text()
  assert '"command":"python -m igpo_jax.main --config=tests/tiny_config.py' in page
  before = {path: path.stat().st_mtime_ns for path in peace.rglob("*")}
  plugins = f"--plugins={REPO / CONFIG}"
  with only_built_in():  # the plug-in registers its verifier, as it does in a user's process
    assert replay.main([f"--workdir={peace}", "--step=2", plugins, "--alternatives=0"]) == 0
  logged = [row for row in untimed(peace / "samples.jsonl") if row["step"] == 2]
  told = capsys.readouterr().err
  assert f"all {len(logged)} logged completions were made again, token for token" in told
  edits = ("--edit=temperature=0", "--edit=hint=9@3")
  done = run_on_devices(
    2, "-m", "igpo_jax.replay", f"--workdir={peace}", "--step=5", plugins, *edits
  )
  assert "made again, token for token" in done.stderr
  before_edit, _, after_edit = done.stdout.partition("with the edit")
  assert "likeliest" in before_edit and "⟦9⟧" in after_edit, "the hint that was asked for stays"
  assert before == {path: path.stat().st_mtime_ns for path in peace.rglob("*")}, "nothing written"
  sft, elsewhere = peace / "checkpoints" / "sft", peace / "sft"
  sft.rename(elsewhere)
  try:  # not from the weights before SFT
    with pytest.raises(UserError, match="sft holds no checkpoint, with which the run's RL began"):
      replay.main([f"--workdir={peace}", "--step=1"])  # the verifier is registered already
  finally:
    elsewhere.rename(sft)


@pytest.mark.slow
def test_a_replay_says_what_differs(runs, tmp_path):
  (row, *others) = [row for row in untimed(runs[1] / "samples.jsonl") if row["step"] == 2]
  assert replay.compare([row, *others], [*others, row], again.where_differs) == []
  changed = row | {"tokens": [*row["tokens"][:3], 99, *row["tokens"][4:]]}
  (line,) = replay.compare([row], [changed], again.where_differs)
  assert f"tokens differ from position 3 on: {row['tokens'][3]} logged, 99 now" in line
  old = {name: value for name, value in row.items() if name not in ("tokens", "version")}
  assert not again.where_differs(old, changed)
  assert again.where_differs(old, changed | {"completion": "else"}) == "the text differs"
  (line,) = replay.compare([row], others, again.where_differs)
  assert line.endswith("it was not made again")


@pytest.mark.slow
def test_the_kills_hit_where_they_were_meant_to(runs):
  steps, _, _ = runs
  for name, code, last in (
    ("killed in sft", -signal.SIGKILL, ("sft", 3)),
    ("killed in rl", -signal.SIGKILL, ("rl", 3)),
    ("asked to stop", 128 + signal.SIGTERM, ("rl", 4)),  # step 5 was stopped in its rollout
    ("killed in the arm", -signal.SIGKILL, ("rl", 3)),
  ):
    done, rows = steps[name]
    assert done.returncode == code, done.stderr
    assert at(rows["metrics"])[-1] == last
  assert "the run is continued with arms=" in steps["killed in rl"][0].stderr
  # It was killed in the evaluation of step 4, whose checkpoint comes first.
  assert "sft: continues from its checkpoint of step 4" in steps["killed in rl"][0].stderr
  assert "rl: continues from its checkpoint of step 2" in steps["asked to stop"][0].stderr
  stopped = "rl: stopped by SIGTERM; the same command continues from step 4"
  assert stopped in steps["asked to stop"][0].stderr
  assert "rl: continues from its checkpoint of step 4" in steps["killed in the arm"][0].stderr
  assert "rl: continues from its checkpoint of step 2" in steps["continued"].stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics", "samples", f"{ARM}/metrics", f"{ARM}/samples"])
def test_a_run_killed_and_continued_writes_the_rows_of_one_in_peace(runs, name):
  steps, peace, war = runs
  assert steps["continued"].returncode == 0, steps["continued"].stderr
  assert untimed(war / f"{name}.jsonl") == untimed(peace / f"{name}.jsonl")
  assert json.loads((war / "summary.json").read_text()) == json.loads(
    (peace / "summary.json").read_text()
  )


@pytest.mark.slow
def test_an_arm_is_what_a_run_of_its_own_with_its_options_is(runs, tmp_path):
  """Same start, same prompts, same noise: no row of it knows of the run that it is an arm of."""
  _, peace, _ = runs
  options = (f"--config={CONFIG}", f"--workdir={tmp_path}", "--config.rl.exploration=none")
  alone = command(*options)
  assert alone.returncode == 0, alone.stderr
  for name in ("metrics", "samples"):
    assert untimed(peace / ARM / f"{name}.jsonl") == untimed(tmp_path / f"{name}.jsonl")
  summaries = [json.loads((at / "summary.json").read_text()) for at in (peace / ARM, tmp_path)]
  assert summaries[0] == summaries[1]
  arm = json.loads((peace / "summary.json").read_text())["arms"]["GRPO"]
  assert arm["rl"] == summaries[0]["rl"] and arm["rl"]["extra_correct"] == 0
  # The arm's folder is that run's workdir.
  configs = [json.loads((at / "config.json").read_text()) for at in (peace / ARM, tmp_path)]
  told = [config.pop("resolved") for config in configs]
  assert configs[0] == configs[1] and told[0] | {"command": told[1]["command"]} == told[1]


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(runs):
  _, peace, _ = runs
  names = ("metrics.jsonl", "samples.jsonl", "summary.json", "config.json", f"{ARM}/metrics.jsonl",
           f"{ARM}/config.json")  # fmt: skip
  contents = lambda: {name: (peace / name).read_bytes() for name in names}
  before, checkpoints = contents(), sorted(p.name for p in (peace / "checkpoints").rglob("*"))
  again = command(f"--config={CONFIG}", f"--workdir={peace}", f"--config.arms={ARMS}")
  assert again.returncode == 0, again.stderr
  assert "arm GRPO: finished before" in again.stderr
  assert contents() == before
  assert sorted(p.name for p in (peace / "checkpoints").rglob("*")) == checkpoints


# --- mistakes -------------------------------------------------------------------------


def one_line(done):
  """The one line of a user's mistake."""
  assert done.returncode == 2, done.stderr
  lines = [line for line in done.stderr.splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
  return lines[0]


@pytest.mark.slow
def test_a_command_line_with_a_mistake_is_one_line_and_code_2():
  done = command("--config=configs/nowhere.py", "--config.rl.steps=3")
  told = "no such file; python -m igpo_jax configs lists the package's own"
  assert one_line(done) == f"error: --config=configs/nowhere.py: {told}"


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "simple.py"
  path.write_text(
    "from igpo_jax.config import default_config\n\n\n"
    "def get_config():\n  config = default_config()\n"
    '  config.data.sft = config.data.rl = "synthetic:chains"\n  return config\n'
  )
  return path


def parse(argv):
  return program.parse_flags(["main", *argv])


def test_options_reach_the_config(simple):
  config, workdir = parse(
    [f"--config={simple}", "--config.rl.steps=7", "--config.sampler.threshold=0.9"]
  )
  assert config.rl.steps == 7 and config.sampler.threshold == 0.9
  assert str(workdir) == "runs/simple"
  _, workdir = parse([f"--config={simple}", "--workdir=/tmp/x"])
  assert str(workdir) == "/tmp/x"


WORKDIRS = [
  ("", "simple"),
  (":", "simple"),
  (":smoke", "simple_smoke"),
  (":data,h100-8", "simple_data_h100-8"),
  (":/scratch/my data/v1.0,gpu", "simple_scratch_my_data_v1.0_gpu"),
  (":../..", "simple_.._.."),
  (":gs://bucket/Ä b", "simple_gs_bucket_b"),
  (":,/", "simple"),
]


@pytest.mark.parametrize(("argument", "name"), WORKDIRS)
def test_a_config_has_a_default_workdir_for_each_argument(argument, name, simple):
  simple.write_text(simple.read_text().replace("get_config()", 'get_config(argument="")'))
  _, workdir = parse([f"--config={simple}{argument}"])
  assert str(workdir) == f"runs/{name}"


def test_long_arguments_have_workdirs_of_their_own_that_a_disk_can_name(simple):
  simple.write_text(simple.read_text().replace("get_config()", "get_config(argument)"))
  first, second = (parse([f"--config={simple}:/{'d' * 300}/{c}/x"])[1] for c in "ab")
  assert first != second and len(first.name) < 120


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    (["--config.rl.group_sise=4"], "no option 'rl.group_sise'; did you mean rl.group_size"),
    (["--config.rl.steps=many"], "--config.rl.steps=many: should be a whole number"),
    (["--config.nothing.at.all=1"], "no option 'nothing.at.all'"),
    (["--werkdir=x"], "werkdir"),
    (["sft"], "unexpected argument 'sft'"),
    (["--config.rl.group_size=1"], "a group of one has no advantage"),
    (["--config.sampler.block_length=48"], "gen_length=256 is not a multiple of"),
    (["--config.sampler.steps=130"], "sampler.steps=130 is not a multiple of the 8 blocks"),
    (["--config.rl.micro_batches=3"], "not a multiple of rl.micro_batches=3"),
    (["--config.rl.exploration=hint"], "'hint' is not one of inpaint, resample, none"),
    (["--config.data.rl="], "data.rl names no source"),
  ],
)
def test_a_wrong_option_is_told(options, complaint, simple):
  with pytest.raises(UserError, match=complaint):
    parse([f"--config={simple}", *options])


@pytest.mark.parametrize("argument", ["configs/nowhere.py", "configs", "configs/nowhere.py:big"])
def test_a_config_file_that_is_not_there_is_told(argument):
  with pytest.raises(UserError, match=f"--config={argument.partition(':')[0]}: no such file"):
    parse([f"--config={argument}"])
  with pytest.raises(UserError, match=r"--config=a\.py: no such file"):
    parse(["--config", "a.py"])


def test_a_missing_config_flag_is_told():
  with pytest.raises(UserError, match=r"--config=configs/X\.py is missing"):
    parse([])


@pytest.mark.parametrize(
  ("uri", "complaint"),
  [
    ("jsonl:/no/such/file.jsonl", "/no/such/file.jsonl"),
    ("nowhere:chains", "no data source for 'nowhere:chains'"),
  ],
)
def test_a_source_that_is_not_there_is_told_before_any_work(uri, complaint, tmp_path):
  config = default_config()
  config.stages = ("sft",)
  config.data.sft = uri
  with pytest.raises(UserError, match=complaint):
    program.train(freeze(config), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mistake_mended_before_the_run_began_does_not_cost_the_workdir(tmp_path):
  config = default_config()
  config.stages = ("sft",)
  config.data.sft = "synthetic:chains?n=8"
  config.reward.verifier = "mth"
  workdir = epath.Path(tmp_path / "run")
  with pytest.raises(UserError, match="no verifier 'mth'"):
    program.train(freeze(config), workdir)
  assert not (workdir / "lock.json").exists()
  config.reward.verifier = "exact"
  open_workdir(workdir, freeze(config))
  assert json.loads((workdir / "config.json").read_text())["reward"]["verifier"] == "exact"


def test_two_runs_in_one_workdir_are_one_too_many(tmp_path):
  config = default_config()
  config.stages = ("sft",)
  config.data.sft = "synthetic:chains?n=8"
  with hold(epath.Path(tmp_path)), pytest.raises(UserError, match="is in use by process"):
    program.train(freeze(config), epath.Path(tmp_path))
  assert not list(tmp_path.iterdir())  # the second one has written nothing
