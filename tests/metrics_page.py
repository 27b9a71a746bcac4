"""The names of metrics that docs/metrics.md describes."""

from __future__ import annotations

import re

from tests.paths import REPO

PAGE = REPO / "docs" / "metrics.md"
OTHER = "Other objectives"  # what follows is written by some methods only


def described(text: str | None = None) -> list[str]:
  """The names in back quotes, such as "rl/kl" or "eval/NAME/accuracy"."""
  text = PAGE.read_text() if text is None else text
  stages = ("STAGE", "sft", "rl", "eval", "time", "memory")
  return list(dict.fromkeys(re.findall(rf"`((?:{'|'.join(stages)})/[\w/@]+)`", text)))


def pattern(name: str) -> re.Pattern[str]:
  """What a described name stands for: NAME, TASK, STAGE and K are any benchmark, task, ..."""
  for word, kind in (
    ("STAGE", "(sft|rl)"),
    ("NAME", r"[^/]+"),
    ("TASK", r"[^/]+"),
    ("@K", r"@\d+"),
  ):
    name = name.replace(word, kind)
  return re.compile(name)


def undescribed(names) -> list[str]:
  """Those of `names` that the page does not have; "stage" and "step" aside."""
  known = [pattern(name) for name in described()]
  return sorted(n for n in {*names} - {"stage", "step"} if not any(p.fullmatch(n) for p in known))


def always() -> list[str]:
  """Names of RL that every run with the default objective writes."""
  text = PAGE.read_text().partition(OTHER)[0]
  return [name for name in described(text) if name.startswith("rl/") and "TASK" not in name]
