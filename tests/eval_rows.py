"""Where tests of evaluations find the rows that they wrote."""

from __future__ import annotations

import json

TASK = "synthetic:chains?min_steps=1&max_steps=2&split=test&seed=3"


def rows_file(evals, folder="init/plain", name="test"):
  """The newest file of rows of a benchmark."""
  files = (evals / folder).glob(f"{name}-*.jsonl")
  return max(files, key=lambda file: file.stat().st_mtime_ns)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]
