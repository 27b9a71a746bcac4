"""docs/own_data.md, followed to the letter: its files are written and its commands are run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.paths import REPO, for_long_runs
from tests.tiny_tokenizer import make_directory

pytestmark = pytest.mark.slow
PAGE = (REPO / "docs" / "own_data.md").read_text()


def block(name):
  """The code block of the page under `<!-- name -->`."""
  (found,) = re.findall(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
  return found


def follow(name, folder, *more):
  """Runs the one command of a block in `folder`, with `more` flags; its two outputs together."""
  (line,) = block(name).splitlines()
  python, *arguments = shlex.split(line)
  assert python == "python"
  done = subprocess.run(
    [sys.executable, *arguments, *more], cwd=folder, text=True, check=False,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    env=for_long_runs() | {"PYTHONPATH": str(REPO)},
  )  # fmt: skip
  assert done.returncode == 0, done.stdout
  return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the page's files, its data made as the page says."""
  folder = tmp_path_factory.mktemp("own")
  for name in ("make_data.py", "own.py"):
    (folder / name).write_text(block(name))
  follow("data", folder)
  return folder


def test_a_dry_run_prints_what_the_page_shows_and_writes_nothing(folder):
  before = set(folder.rglob("*"))
  printed = follow("look", folder).splitlines()
  looked = block("looked").splitlines()
  assert printed[1 : 1 + len(looked)] == looked  # the first says that jax is loading
  text = "\n".join(looked)
  for count in ("records, left out", "prompts in tokens", "gold traces that pass", "problems"):
    assert count in text
  written = {path for path in set(folder.rglob("*")) - before if "__pycache__" not in path.parts}
  assert not written


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_the_other_tokenizers_of_the_page_fit_the_same_files(folder, tmp_path, kind):
  (spec,) = re.findall(r"allow at most `(sentencepiece:\d+)`", PAGE)
  if kind == "hugging face":
    spec = make_directory(tmp_path / "hf")
  flags = (f"--config.data.tokenizer={spec}", "--config.data.prompt_buckets=(64,)")
  printed = follow("look", folder, *flags)
  assert "sft: 1400 records, left out: none left out" in printed
  assert "rl: 70 golds graded; gold traces that pass: 70 of 70 (100.0%)" in printed


def test_reward_rises_in_the_run_of_the_page(folder):
  follow("train", folder)
  (workdir,) = re.findall(r"--workdir=(\S+)", block("train"))
  rows = [json.loads(row) for row in (folder / workdir / "metrics.jsonl").read_text().splitlines()]
  rewards = [row["rl/reward"] for row in rows if row["stage"] == "rl"]
  third = len(rewards) // 3
  assert np.mean(rewards[-third:]) > np.mean(rewards[:third]) + 0.25  # of 1.5
  accuracy = {row["stage"]: row.get("eval/test/accuracy") for row in rows}  # the stage's last row
  assert accuracy["rl"] > accuracy["sft"]
