"""Evaluation by the whole program: any workdir, after a kill, in two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from igpo_jax import main
from igpo_jax.config import freeze, load_config_file
from igpo_jax.diffusion.completions import Counts
from igpo_jax.errors import UserError
from igpo_jax.train import run
from igpo_jax.train.setup import Model
from igpo_jax.viewer.summary import summary_of, summary_table
from tests import tiny_config
from tests.eval_rows import TASK, read, rows_file
from tests.paths import REPO
from tests.tiny_lm import tiny_model

CONFIG = REPO / "tests" / "eval_config.py"


def tiny(workdir, *flags, stages=("sft",)):
  """Runs the tiny config's program in this process; returns its summary."""
  config = load_config_file(CONFIG)
  config.stages = stages
  config.update_from_flattened_dict(dict(flags))
  return main.train(freeze(config), epath.Path(workdir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of a short run; its last evaluation, of 13 problems, is the one to repeat."""
  workdir = tmp_path_factory.mktemp("trained")
  tiny(workdir)
  return workdir


@pytest.mark.slow
def test_metric_keys_and_summary_keep_the_contract(trained):
  rows = read(trained / "metrics.jsonl")
  final = next(row for row in rows if row["stage"] == "sft" and row["step"] == 2)
  numbers = "accuracy stderr low high n samples unparseable timeout"
  texts = "cache devices dtype batch_size versions prompts"
  for name in (*numbers.split(), *texts.split()):
    assert f"eval/test/{name}" in final
  summary = json.loads((trained / "summary.json").read_text())
  assert set(summary["eval"]) == {"init/test", "sft/test"}
  assert summary["eval"]["sft/test"]["n"] == 13


@pytest.mark.slow
def test_a_workdir_is_evaluated_by_other_settings_and_can_still_be_continued(trained):
  before = (trained / "config.json").read_bytes()
  options = (
    ("data.eval", (f"test={TASK}&n=5",)), ("eval.samples", 2), ("eval.temperature", 0.5),
  )  # fmt: skip
  summary = tiny(trained, *options, stages=("eval",))
  result = summary["eval"]["eval/test"]
  assert (result["n"], result["samples"]) == (5, 2) and "pass@2" in result
  assert result["unlike"] == "temperature=0.5, samples=2, n=5"
  assert len(read(rows_file(trained / "evals", "sft-2/plain"))) == 10
  assert (trained / "config.json").read_bytes() == before
  tiny(trained)


def test_an_evaluation_without_any_weights_is_a_clear_error(tmp_path):
  with pytest.raises(UserError, match="nothing to evaluate"):
    tiny(tmp_path / "new", stages=("eval",))


def test_the_table_shows_interval_samples_and_the_published_number():
  result = {"accuracy": 0.2, "stderr": 0.05, "low": 0.1, "high": 0.3, "n": 40, "samples": 16,
            "pass@16": 0.6, "majority@16": 0.3, "protocol": "igpo", "published": 0.145,
            "published_source": "arXiv 2509.10396"}  # fmt: skip
  row = {"stage": "eval", "step": 0} | {f"eval/amc/{k}": v for k, v in result.items()}
  text = summary_table(summary_of([row]))
  assert "| amc, evaluated, protocol igpo, avg@16 | 0.200 | 0.100 to 0.300 | 0.050 | 40 |" in text
  assert "| amc, majority@16 | 0.300 |" in text
  assert "| amc, published for LLaDA-8B-Instruct (arXiv 2509.10396) | 0.145 |" in text


NAMES = ("gsm8k", "math500", "amc", "minerva", "llada_math", "gsm8k_tiny")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_on_real_data_says_which_file_is_missing_and_where_to_get_it(name, tmp_path):
  config = freeze(load_config_file(REPO / "configs" / f"{name}.py", str(tmp_path / "nowhere")))
  with pytest.raises(UserError, match=r"nowhere/.*: no such file; get .* of the .*, and put it"):
    main.check_inputs(config)


def test_missing_weights_are_told_with_where_to_get_them(tmp_path):
  data = tmp_path / "data"
  for file in ("MetaMathQA-395K.json", "gsm8k/test.jsonl"):
    (data / file).parent.mkdir(parents=True, exist_ok=True)
    (data / file).write_text("")
  config = freeze(load_config_file(REPO / "configs" / "gsm8k.py", str(data)))
  with pytest.raises(UserError, match=r"get a model, for example .*LLaDA-8B-Instruct"):
    main.check_inputs(config)


# Real processes.

KILL_AFTER = """
import os, signal, sys
from igpo_jax import main
from igpo_jax.eval import generations
add, calls = generations.Generations.add, []
def dying(self, rows):
  add(self, rows)
  calls.append(rows)
  if len(calls) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
generations.Generations.add = dying
main.main()
"""


def thirteen(trained):
  """The rows of the uninterrupted evaluation in one process."""
  files = (trained / "evals" / "sft-2" / "plain").glob("test-*.jsonl")
  (rows,) = (rows for rows in map(read, files) if len(rows) == 13)
  return rows


def command(workdir, init, *start, **environment):
  flags = [f"--config={CONFIG}", f"--workdir={workdir}", "--config.stages=('eval',)",
           f"--config.init_from={init}"]  # fmt: skip
  return subprocess.Popen(
    [sys.executable, *(start or ("-m", "igpo_jax.main")), *flags], cwd=REPO,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_killed_by_sigkill_continues_with_the_same_command(tmp_path, trained):
  step = trained / "checkpoints" / "sft" / "2"
  killed = command(tmp_path, step, "-c", KILL_AFTER)
  killed.communicate(timeout=300)
  path = rows_file(tmp_path / "evals")
  assert killed.returncode == -9 and len(read(path)) == 8
  continued = command(tmp_path, step)
  output, _ = continued.communicate(timeout=300)
  assert continued.returncode == 0, output
  assert read(path) == thirteen(trained)


@pytest.mark.slow
def test_two_processes_give_each_problem_once_and_the_rows_of_one(tmp_path, trained):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  step = trained / "checkpoints" / "sft" / "2"
  join = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  start = ("-m", "tests.kept_programs", "igpo_jax.main")
  processes = [command(tmp_path, step, *start, JAX_PROCESS_ID=str(i), **join) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
  assert "on 2 device(s)" in outputs[0]
  path = rows_file(tmp_path / "evals")
  assert read(path) == thirteen(trained)
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["eval"]["eval/test"]["n"] == 13


def test_evaluations_read_the_parameters_in_the_compute_dtype(monkeypatch, tmp_path):
  """What rollouts read, not the float32 master of full fine-tuning."""
  seen = []

  class Recorded:
    counts = Counts()

    def __init__(self, *args):
      pass

    def __call__(self, params, label):
      seen.append({x.dtype for x in jax.tree.leaves(params)})
      return {}

  monkeypatch.setattr(run, "Evaluation", Recorded)
  config = freeze(tiny_config.get_config())
  lm, params = tiny_model()
  for dtype in ("bfloat16", "float32"):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    model = Model(lm, params, None, None)
    evaluate = run.make_evaluation(
      config, model, None, None, epath.Path(tmp_path), lambda uri: [], run.StopSignal()
    )
    evaluate(params, "init")
  assert seen == [{jnp.dtype("bfloat16")}, {jnp.dtype("float32")}]
