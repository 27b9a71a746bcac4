"""The notebook runs from top to bottom, with the quickstart's smoke preset."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import sys

import pytest

from igpo_jax.config import freeze, load_config_file
from igpo_jax.errors import UserError
from tests.paths import REPO

NOTEBOOK = REPO / "launch" / "colab_demo.ipynb"
QUICKSTART = REPO / "configs" / "quickstart.py"


def test_the_committed_notebook_has_no_outputs():
  """Outputs are one machine's, and bury every later change of the text."""
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert code and all(c["outputs"] == [] and c["execution_count"] is None for c in code)
  # A newcomer's guide: prose before every cell of code.
  kinds = [cell["cell_type"] for cell in cells]
  assert all(kinds[k - 1] == "markdown" for k, kind in enumerate(kinds) if kind == "code")


def test_an_unknown_preset_is_a_users_mistake():
  with pytest.raises(UserError, match="smok'; known: smoke"):
    load_config_file(QUICKSTART, "smok")


def test_smoke_is_the_quickstart_on_less():
  """The same stages, model, hints and objective: only sizes differ."""
  whole, small = (freeze(load_config_file(QUICKSTART, preset)) for preset in ("", "smoke"))
  for section in ("stages", "arms", "model", "reward", "hints", "objective", "seed"):
    assert getattr(small, section) == getattr(whole, section)
  assert small.rl.exploration == whole.rl.exploration == "inpaint"
  assert small.rl.estimator == whole.rl.estimator
  assert small.sft.steps < whole.sft.steps and small.rl.steps < whole.rl.steps


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  monkeypatch.setenv("IGPO_PRESET", "smoke")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), *filter(None, sys.path)]))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  resources = {"metadata": {"path": str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()

  workdir = tmp_path / "runs" / "smoke"
  table, summary = (workdir / "table.md").read_text(), (workdir / "summary.json").read_text()
  assert "after RL with GRPO" in table and "after RL with IGPO" in table
  assert set(json.loads(summary)["eval"]) == {"init/test", "sft/test", "rl/test"}
  samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
  assert samples and {"completion", "commit_step", "reward"} <= set(samples[0])

  data = [out.data for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out]
  (figure,) = (d["image/png"] for d in data if "image/png" in d)
  assert base64.b64decode(figure) == (workdir / "curves.png").read_bytes()
  page, viewer = (d["text/html"] for d in data if "text/html" in d)
  assert viewer.startswith("<iframe sandbox=") and samples[0]["id"] in viewer
  without, hinted = page.split("With hints")
  assert ">hint<" in hinted and ">hint<" not in without
  assert page.count("<table") == 2 and page.count("wrong") + page.count("right") >= 8
  told = "".join(out.get("text", "") for c in notebook.cells for out in c.get("outputs", ()))
  assert "Second part skipped: there is neither a TPU nor a GPU here.\n" in told
  assert "Traceback" not in told and not (tmp_path / "runs" / "a2d_gsm8k").exists()
  everything = [pathlib.Path(p).name for p in tmp_path.iterdir()]
  assert everything == ["runs"], "the notebook writes to runs/ only"
