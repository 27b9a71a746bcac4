r"""Sudoku of 4, 6, 8 or 9 digits: fill the empty cells; no row, column or box repeats a digit.

    prompt   0321 1204 2143 3402      rows of digits, 0 stands for an empty cell
    trace    11:123>4;23:124>3...;\boxed{4321 1234 2143 3412}

A step of a trace is "cell:reason>digit". The cell is given by its row and its column, counted from
1. The reason is either the digits that its row, column and box already have ("123" leaves only 4),
or the unit in which no other empty cell can take the digit: r, c or b for its row, column or box.

The gold is what the verifier needs, `{"puzzle": "0321...", "solution": "4321..."}`: two strings of
digits, row by row. The verifier reads the digits in the completion's last `<answer>` or box,
whatever is between them. Records of a file may have the gold as a field `gold`, or as a JSON object
instead of the answer (docs/data.md).

The number of empty cells decides the difficulty. Every puzzle can be filled by such steps alone, so
it has one solution. Train and test problems are disjoint: the split is decided by a hash of the
solution, so no test problem has the grid of a training problem.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import Task, register_task
from igpo_jax.data.values import Span
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers, registry
from igpo_jax.tasks import common

NAME = "sudoku"
ALPHABET = "0123456789 :;>rc\\boxed{}"
BOXES = {4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3)}  # size: (rows, columns) of a box
MAX_LENGTH = 2000  # the longest answer that is read, in characters
LABEL = 2  # the largest number of digits of a row's label in a shown grid


# --- the verifier ------------------------------------------------------------------------


def _gold(record: Record) -> tuple[str, str]:
  """A record's puzzle and its solution, as strings of digits, row by row."""

  def read(gold):
    puzzle, solution = (re.sub(r"\s", "", gold[key]) for key in ("puzzle", "solution"))
    if len(puzzle) != len(solution) or not re.fullmatch("[0-9]+", puzzle + solution):
      raise ValueError("puzzle and solution differ in size or hold something else than digits")
    return puzzle, solution

  form = 'JSON with "puzzle" and "solution", equally long strings of digits:'
  return common.read_gold(record, NAME, form, read)


def _answer(completion: str) -> str | None:
  text = answers.truncate(completion)
  found = answers.extract_tag(text) or answers.extract_boxed(text)
  if not found or len(found) > MAX_LENGTH:
    return None
  return "".join(re.findall("[0-9]", found)) or None


def shown_solutions(text: str, record: Record) -> list[Span]:
  """Where a text shows the whole solution, row by row: characters [start, end) each time.

  Characters that are not digits may be anywhere in it, and each row may have a label of up to two
  digits before it.

  Raises:
    UserError: the record's gold is not that of a sudoku.
  """
  _, solution = _gold(record)
  side = round(len(solution) ** 0.5)
  if side * side != len(solution):
    side = len(solution)
  rows = [solution[k : k + side] for k in range(0, len(solution), side)]
  places = [match.start() for match in re.finditer("[0-9]", text)]
  digits = "".join(text[at] for at in places)
  found = []
  start = digits.find(rows[0])
  while start >= 0:
    end = start + len(rows[0])
    for row in rows[1:]:
      at = digits.find(row, end, end + LABEL + len(row))
      if at < 0:
        break
      end = at + len(row)
    else:
      found.append((places[start], places[end - 1] + 1))
    start = digits.find(rows[0], start + 1)
  return found


@registry.register_verifier(NAME, reads_golds=True, shown=shown_solutions)
def verify(completion: str, record: Record) -> registry.Verdict:
  """Grades a completion: correct if its digits are exactly those of the solution, given ones too.

  Raises:
    UserError: the record's gold is not that of a sudoku.
  """
  _, solution = _gold(record)
  extracted = _answer(completion)
  status = registry.OK if extracted else registry.UNPARSEABLE
  return registry.Verdict(extracted == solution, extracted, status)


@registry.register_reward("sudoku_cells")
def right_cells(completion: str, record: Record, verdict: registry.Verdict) -> float:
  """A reward part: the share of the empty cells that were filled correctly, in [0, 1].

  For a puzzle without empty cells it is 1.0 or 0.0, the verdict.
  """
  del completion
  puzzle, solution = _gold(record)
  empty = [at for at, cell in enumerate(puzzle) if cell == "0"]
  given = (verdict.extracted or "")[: len(solution)]
  right = sum(given[at : at + 1] == solution[at] for at in empty)
  return right / len(empty) if empty else float(verdict.correct)


# --- the solver --------------------------------------------------------------------------


@functools.lru_cache
def units(size: int) -> dict[str, list[list[int]]]:
  """All rows "r", columns "c" and boxes "b" of a grid, each a list of cells.

  Cells are numbered row * size + column.
  """
  high, wide = BOXES[size]
  cells = [divmod(cell, size) for cell in range(size * size)]
  kinds = {
    "r": lambda row, column: row,
    "c": lambda row, column: column,
    "b": lambda row, column: (row // high) * (size // wide) + column // wide,
  }
  return {
    name: [
      [cell for cell, place in enumerate(cells) if unit(*place) == number] for number in range(size)
    ]
    for name, unit in kinds.items()
  }


@functools.lru_cache
def unit_of(size: int) -> dict[str, list[list[int]]]:
  """For each kind of unit ("r", "c", "b") and each cell, the cells of the unit that it is in."""
  return {
    kind: [next(u for u in made if cell in u) for cell in range(size * size)]
    for kind, made in units(size).items()
  }


def seen_by(grid: list[int], cell: int, size: int) -> set[int]:
  """The digits that are in the row, column and box of a cell. `grid` has 0 for an empty cell."""
  return {grid[c] for of in unit_of(size).values() for c in of[cell]} - {0}


def fill(puzzle: str, size: int) -> list[tuple[int, str, int]] | None:
  """Fills a grid by the steps that traces show.

  A step fills the first cell, row by row, that has only one digit left. If there is none, it fills
  a cell that is the only place for a digit in a row, column or box.

  Args:
    puzzle: the cells as digits, row by row, 0 for an empty one.
    size: cells of a row.

  Returns:
    (cell, reason, digit) of each step, in order; None if such steps do not fill the grid.
  """
  grid, steps = [int(digit) for digit in puzzle], []
  while 0 in grid:
    step = _single(grid, size) or _only_place(grid, size)
    if step is None:
      return None
    steps.append(step)
    grid[step[0]] = step[2]
  return steps


def _single(grid: list[int], size: int) -> tuple[int, str, int] | None:
  for cell, digit in enumerate(grid):
    seen = set() if digit else seen_by(grid, cell, size)
    if not digit and len(seen) == size - 1:
      (left,) = set(range(1, size + 1)) - seen
      return cell, "".join(map(str, sorted(seen))), left
  return None


def _only_place(grid: list[int], size: int) -> tuple[int, str, int] | None:
  open_to = {
    cell: set(range(1, size + 1)) - seen_by(grid, cell, size)
    for cell, digit in enumerate(grid)
    if not digit
  }
  for cell, digits in open_to.items():
    for kind, of in unit_of(size).items():
      others = set().union(*(open_to.get(c, set()) for c in of[cell] if c != cell))
      alone = digits - others
      if alone:
        return cell, kind, min(alone)
  return None


def random_solution(size: int, rng: np.random.Generator) -> str:
  """A random full grid as a string of digits: a search that tries digits in random order."""
  grid = [0] * (size * size)

  def place(cell: int) -> bool:
    if cell == len(grid):
      return True
    seen = seen_by(grid, cell, size)
    for digit in rng.permutation(size) + 1:
      if int(digit) not in seen:
        grid[cell] = int(digit)
        if place(cell + 1):
          return True
    grid[cell] = 0
    return False

  place(0)
  return "".join(map(str, grid))


# --- the generator -----------------------------------------------------------------------


def make_records(
  split: str,
  n: int,
  seed: int = 0,
  size: int | str = 4,
  min_empty: int | str = 4,
  max_empty: int | str = 6,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: number of problems.
    seed: seed of the generator.
    size: cells of a row: 4, 6, 8 or 9.
    min_empty, max_empty: the number of empty cells is uniform in this range, which may go up to
      half of all cells. It decides the difficulty: a trace has a step for each empty cell.

  Raises:
    UserError: an unknown split, options out of range, or too few such problems.
  """
  common.check_split(split)
  size = common.option_number("size", size, int, 4, 9)
  if size not in BOXES:
    raise UserError(f"synthetic: size={size} is not one of {', '.join(map(str, BOXES))}")
  low, high = common.option_range(
    "min_empty", min_empty, "max_empty", max_empty, 1, size * size // 2
  )

  rng = np.random.default_rng([seed, size, low, high])
  records: dict[str, Record] = {}
  for _ in range(100 * n + 1000):
    if len(records) == n:
      break
    solution = random_solution(size, rng)
    if common.split_of(solution) != split:
      continue
    key, wanted, followed = solution, rng.integers(low, high + 1), []
    for cell in rng.permutation(size * size):
      if key.count("0") == wanted:
        break
      emptier = key[:cell] + "0" + key[cell + 1 :]
      steps = fill(emptier, size)
      if steps is not None:
        key, followed = emptier, steps
    if key.count("0") != wanted or key in records:
      continue
    steps = [f"{c // size + 1}{c % size + 1}:{why}>{digit}" for c, why, digit in followed]
    answer = _in_rows(solution, size)
    trace = ";".join([*steps, f"\\boxed{{{answer}}}"])
    records[key] = Record(
      id=key,
      prompt=({"role": "user", "content": _in_rows(key, size)},),
      trace=trace,
      answer=answer,
      answer_span=(trace.index("\\boxed"), len(trace)),
      task=NAME,
      gold={"puzzle": key, "solution": solution},
    )
  if len(records) < n:
    raise common.too_few(n)
  return list(records.values())


def _in_rows(cells: str, size: int) -> str:
  return " ".join(cells[k : k + size] for k in range(0, len(cells), size))


register_task(Task(NAME, verifier=NAME, make_records=make_records, alphabet=ALPHABET))
