"""examples/: each is short, and does what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from igpo_jax import main as program
from igpo_jax.config import freeze, load_config_file
from igpo_jax.config.file import load_python_file
from tests import tiny_config  # noqa: F401  registers the verifier `lenient`
from tests.convert_helpers import copy_tiny
from tests.paths import REPO
from tests.tiny_tokenizer import make_directory

EXAMPLES = sorted((REPO / "examples").glob("*.py"))
SIZES = {"gen_length": 16, "block_length": 8, "steps": 8}
# One program of each kind serves all configs here: they differ in what is on the host.
TINY = {
  "stages": ("rl",), "arms": (), "data.eval": (), "model.d_model": 16, "model.n_layers": 1,
  "model.n_heads": 2, "model.mlp_hidden": 32, "rl.steps": 2, "rl.prompts_per_step": 2,
  "rl.group_size": 2, "rl.inner_updates": 1, "rl.eval_every": 0, "log.tensorboard": False,
}  # fmt: skip


def test_every_example_is_shorter_than_sixty_lines():
  names = {path.stem for path in EXAMPLES}
  assert names == {"sample", "inpaint", "own_reward", "own_data", "own_estimator", "own_task",
                   "train_loop"}  # fmt: skip
  for path in EXAMPLES:
    assert len(path.read_text().splitlines()) < 60, path.name


def example(name):
  return load_python_file(REPO / "examples" / f"{name}.py", "example")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_directory(copy_tiny(tmp_path_factory.mktemp("model") / "hf"))


def test_sample_answers_and_tells_the_order(model):
  text, order = example("sample").sample(model, "How many eggs?", **SIZES)
  assert text and sorted(set(order.tolist())) == list(range(8)), "8 steps, two tokens each"


@pytest.mark.slow
def test_inpaint_keeps_the_piece_where_it_was_put(model):
  plain, inpainted = example("inpaint").inpaint(model, "How many eggs?", "duck", 2, **SIZES)
  assert "duck" in inpainted and plain != inpainted


def train(name, workdir, *argument, **more):
  """The rows of metrics.jsonl and of samples.jsonl of a run of an example's config, made tiny."""
  config = load_config_file(REPO / "examples" / f"{name}.py", *argument)
  for option, value in (TINY | more).items():
    section, _, field = option.rpartition(".")
    setattr(config[section] if section else config, field, value)
  program.train(freeze(config), workdir)
  rows = lambda file: [json.loads(line) for line in (workdir / file).read_text().splitlines()]
  return freeze(config), rows("metrics.jsonl"), rows("samples.jsonl")


@pytest.mark.slow
def test_own_reward_and_the_loop_written_out_give_the_same_numbers(tmp_path):
  """A partly right completion has a part of the reward; the loop computes what the program does."""
  more = {"stages": ("sft", "rl"), "sft.steps": 3}
  config, rows, samples = train("own_reward", tmp_path, **more)
  assert {0 < row["reward"] < 1 for row in samples} == {True, False}
  written = list(example("train_loop").train(config))
  assert [stage for stage, _ in written] == ["sft"] * 3 + ["rl"] * 2
  logged = [row for row in rows if "rl/loss" in row or "sft/loss" in row]
  for row in logged:
    stage, number = row["stage"], row["step"] - 1
    metrics = [metrics for of, metrics in written if of == stage][number]
    for name in ("loss", "grad_norm", *(("reward", "entropy") if stage == "rl" else ())):
      np.testing.assert_allclose(metrics[name], row[f"{stage}/{name}"], rtol=1e-4, atol=1e-7)
  assert {row["stage"] for row in logged} == {"sft", "rl"}


@pytest.mark.slow
def test_own_estimator_trains_by_the_objective_beside_it(tmp_path):
  _, rows, _ = train("own_estimator", tmp_path, **{"reward.verifier": "lenient"})
  learnt = [row for row in rows if row["stage"] == "rl"]
  assert len(learnt) == 2 and all(row["rl/kept"] > 0 for row in learnt)
  assert all(np.isfinite(row["rl/loss"]) and row["rl/grad_norm"] > 0 for row in learnt)
  options = json.loads((tmp_path / "config.json").read_text())
  assert options["estimator"]["halves"] == {"parts": 7}
  assert options["objective"]["weighted_nll"] == {"floor": 0.5}


@pytest.mark.slow
def test_own_task_makes_and_hints_its_records(tmp_path):
  _, rows, samples = train("own_task", tmp_path, **{"rl.steps": 1})
  assert all(np.isfinite(row["rl/loss"]) for row in rows if row["stage"] == "rl")
  hinted = [row for row in samples if row["phase"] == "hinted"]
  assert len(hinted) == 4, "an untrained policy is all wrong, so that hints are tried"
  assert any(row["hints"] for row in hinted)


def test_own_data_is_read_and_graded(tmp_path, capsys):
  """tests/own_data_test.py trains on such a file."""
  data, workdir = tmp_path / "data", tmp_path / "run"
  example("own_data").write(data)
  config = EXAMPLES[0].parent / "own_data.py"
  program.main([f"--config={config}:{data}", f"--workdir={workdir}", "--dry-run"])
  told = capsys.readouterr()
  told = told.out + told.err
  assert "gold traces that pass: 330 of 330" in told and "eval test: 30 problems" in told
  assert "the answer is found in 330 of 330 traces" in told and not workdir.exists()
