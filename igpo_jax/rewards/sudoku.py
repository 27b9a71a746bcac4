"""Sudoku of any size up to 9x9, as rows of digits; 0 stands for an empty cell.

The gold answer is JSON, `{"puzzle": "0321...", "solution": "4321..."}`. The completion's
answer is the digits in its last `<answer>` or box, whatever stands between them.
"""

from __future__ import annotations

import json
import re

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers, registry

MAX_LENGTH = 2000  # characters of an answer


def _gold(record: Record) -> tuple[str, str]:
  try:
    gold = json.loads(record.answer)
    puzzle, solution = (re.sub(r"\s", "", gold[key]) for key in ("puzzle", "solution"))
    if len(puzzle) != len(solution) or not re.fullmatch("[0-9]+", puzzle + solution):
      raise ValueError("puzzle and solution differ in size or hold something else than digits")
    return puzzle, solution
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'sudoku: the answer of record {record.id!r} must be JSON with "puzzle" '
      f'and "solution", equally long strings of digits: {record.answer!r:.80}'
    ) from error


def _answer(completion: str) -> str | None:
  text = answers.truncate(completion)
  found = answers.extract_tag(text) or answers.extract_boxed(text)
  if not found or len(found) > MAX_LENGTH:
    return None
  return "".join(re.findall("[0-9]", found)) or None


@registry.register_verifier("sudoku", reads_golds=True)
def verify(completion: str, record: Record) -> registry.Verdict:
  """Correct: every cell is the solution's, the given ones included, and there are no others."""
  _, solution = _gold(record)
  extracted = _answer(completion)
  status = registry.OK if extracted else registry.UNPARSEABLE
  return registry.Verdict(extracted == solution, extracted, status)


@registry.register_reward("sudoku_cells")
def right_cells(completion: str, record: Record, verdict: registry.Verdict) -> float:
  """The share of the empty cells that were filled in rightly, in [0, 1]."""
  del completion
  puzzle, solution = _gold(record)
  empty = [at for at, cell in enumerate(puzzle) if cell == "0"]
  given = (verdict.extracted or "")[: len(solution)]
  right = sum(given[at : at + 1] == solution[at] for at in empty)
  return right / len(empty) if empty else float(verdict.correct)
