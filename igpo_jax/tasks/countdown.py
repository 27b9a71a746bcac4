r"""Countdown: reach the target with every given number used exactly once.

    prompt   3,7,2=23
    trace    3*7=21:2,21;2+21=23;\boxed{2+3*7}

A step of a trace combines two numbers, and states after the colon which numbers are left then. The
answer is the whole expression in a box. The gold is what the verifier needs, such as
`{"numbers": [3, 7, 2], "target": 23}`. Every expression that uses each number once and equals the
target is right; the trace shows one of them.

The verifier reads the completion's last `<answer>` or box, up to an "=". It parses the expression
into a tree of the four operations over exact fractions; nothing is evaluated as code. Records of a
file may have the gold as a field `gold`, or as a JSON object instead of the answer (docs/data.md).

The number of given numbers decides the difficulty. Traces come from a search that tries every step
(`solve`). With `dead_ends` they also show steps after which the target cannot be reached any more,
taken back with an "x": `7-2=5:3,5x;`.

Train and test problems are disjoint: the split is decided by a hash of the sorted numbers and the
target. So no test problem is a training problem in another order.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import Task, register_task
from igpo_jax.data.values import Span
from igpo_jax.rewards import answers, registry
from igpo_jax.tasks import common

NAME = "countdown"
ALPHABET = "0123456789,=+-*/():;x\\boxed{}"
ALPHABET = "".join(dict.fromkeys(ALPHABET))  # "x" is in "boxed", too
MAX_LENGTH = 200  # the longest expression that is parsed, in characters
MAX_RESULT = 999  # the largest result of a step of a trace
SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_OPERATIONS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
_SPELLINGS = (
  ("\\times", "*"),
  ("\\cdot", "*"),
  ("\\div", "/"),
  ("\u00d7", "*"),
  ("\u00f7", "/"),
  ("\u2212", "-"),
  ("\\left", ""),
  ("\\right", ""),
  ("$", ""),
)


# --- the verifier ------------------------------------------------------------------------


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
  """Evaluates an expression of whole numbers, + - * / and parentheses, exactly.

  Returns:
    (value, the numbers that it uses, in order); None if it is anything else, divides by zero, or
    has more than `MAX_LENGTH` characters.
  """
  if len(expression) > MAX_LENGTH or not expression.isascii():
    return None
  used: list[int] = []

  def value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
      return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
      return -value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int:
      used.append(node.value)
      return Fraction(node.value)
    raise ValueError("not arithmetic")

  try:
    return value(ast.parse(expression.strip(), mode="eval").body), used
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
    return None


def _gold(record: Record) -> tuple[list[int], Fraction]:
  """A record's numbers, sorted, and its target."""
  form = 'JSON such as {"numbers": [3, 7, 2], "target": 23}, not'
  read = lambda gold: (sorted(map(int, gold["numbers"])), Fraction(gold["target"]))
  return common.read_gold(record, NAME, form, read)


def _answer(completion: str) -> str | None:
  text = answers.truncate(completion)
  found = answers.extract_tag(text) or answers.extract_boxed(text)
  if found and "boxed" in found:
    found = answers.extract_boxed(found) or found
  return found or None


def _tree(extracted: str | None) -> tuple[Fraction, list[int]] | None:
  if extracted is None:
    return None
  for sign, plain in _SPELLINGS:
    extracted = extracted.replace(sign, plain)
  return evaluate(extracted.split("=")[0])


# A number, a parenthesis or an operation, in every spelling that the verifier reads.
_TOKEN = re.compile(
  r"(?P<number>[0-9]+)|(?:\\left)?(?P<open>\()|(?:\\right)?(?P<close>\))"
  r"|(?P<sign>[-+*/\u00d7\u00f7\u2212]|\\times|\\cdot|\\div)|(?P<gap>[\s$]+)"
)


def _runs(text: str) -> Iterator[list[re.Match]]:
  """The tokens of each piece of a text that is all arithmetic, as long as possible."""
  run: list[re.Match] = []
  at = 0
  while at < len(text):
    token = _TOKEN.match(text, at)
    if token is None:
      yield run
      run, at = [], at + 1
      continue
    at = token.end()
    if token.lastgroup != "gap":
      run.append(token)
  yield run


def shown_solutions(text: str, record: Record) -> list[Span]:
  """Where a text shows a solution: characters [start, end) of each expression that is right.

  Raises:
    UserError: the record's gold is not that of a countdown problem.
  """
  numbers, target = _gold(record)
  found = []
  for run in _runs(text):
    places = [k for k, token in enumerate(run) if token.lastgroup == "number"]
    for first in range(len(places) - len(numbers) + 1):
      begin, end = places[first], places[first + len(numbers) - 1] + 1
      span = _closed(run, begin, end)
      tree = _tree(text[span[0] : span[1]]) if span else None
      if tree and tree[0] == target and sorted(tree[1]) == numbers:
        found.append(span)
  return found


def _closed(run: list[re.Match], begin: int, end: int) -> Span | None:
  """The characters of run[begin:end] and of the parentheses around it that it needs to balance.

  None if these parentheses are not there.
  """
  depth = lowest = 0
  for token in run[begin:end]:
    depth += (token.lastgroup == "open") - (token.lastgroup == "close")
    lowest = min(lowest, depth)
  before, after = -lowest, depth - lowest
  if begin < before or end + after > len(run):
    return None
  around = [*run[begin - before : begin], *run[end : end + after]]
  wanted = ["open"] * before + ["close"] * after
  if [token.lastgroup for token in around] != wanted:
    return None
  return run[begin - before].start(), run[end + after - 1].end()


@registry.register_verifier(NAME, reads_golds=True, shown=shown_solutions)
def verify(completion: str, record: Record) -> registry.Verdict:
  """Grades a completion: correct if its expression uses each number once and equals the target.

  Raises:
    UserError: the record's gold is not that of a countdown problem.
  """
  numbers, target = _gold(record)
  extracted = _answer(completion)
  tree = _tree(extracted)
  if tree is None:
    return registry.Verdict(False, extracted, registry.UNPARSEABLE)
  value, used = tree
  return registry.Verdict(value == target and sorted(used) == numbers, extracted, registry.OK)


@registry.register_reward("countdown_numbers")
def uses_numbers(completion: str, record: Record, verdict: registry.Verdict) -> float:
  """A reward part: 1.0 for an expression that uses each number once, whatever its value; else 0."""
  del completion
  tree = _tree(verdict.extracted)
  return float(tree is not None and sorted(tree[1]) == _gold(record)[0])


# --- the generator -----------------------------------------------------------------------


class Step(NamedTuple):
  """A step `left sign right = result`, which replaces two of the numbers by its result."""

  left: int
  sign: str
  right: int
  result: int


def possible_steps(numbers: tuple[int, ...], signs: str = "+-*/") -> list[Step]:
  """Every step from these numbers whose result is a whole number from 1 to `MAX_RESULT`.

  Sums and products have the smaller number first, and no number is divided by 1.

  Args:
    numbers: the numbers that are left.
    signs: the operations that are allowed, out of "+-*/".
  """
  steps = []
  for i, a in enumerate(numbers):
    for b in numbers[i + 1 :]:
      small, large = min(a, b), max(a, b)
      steps += [
        Step(small, "+", large, small + large),
        Step(small, "*", large, small * large),
        Step(large, "-", small, large - small),
      ]
      if small > 1 and large % small == 0:
        steps.append(Step(large, "/", small, large // small))
  fits = lambda step: step.sign in signs and 0 < step.result <= MAX_RESULT
  return list(dict.fromkeys(filter(fits, steps)))


def after(numbers: tuple[int, ...], step: Step) -> tuple[int, ...]:
  """The numbers that are left after a step, sorted."""
  left = list(numbers)
  left.remove(step.left)
  left.remove(step.right)
  return tuple(sorted([*left, step.result]))


@functools.lru_cache(maxsize=1 << 16)
def solve(numbers: tuple[int, ...], target: int, signs: str = "+-*/") -> tuple[Step, ...] | None:
  """The first solution that a search in the order of `possible_steps` finds.

  Args:
    numbers: the given numbers, sorted.
    target: the number to reach.
    signs: the operations that are allowed, out of "+-*/".

  Returns:
    The steps that lead to the target; None if no steps do.
  """
  if len(numbers) == 1:
    return () if numbers[0] == target else None
  for step in possible_steps(numbers, signs):
    rest = solve(after(numbers, step), target, signs)
    if rest is not None:
      return (step, *rest)
  return None


def expression_of(steps: tuple[Step, ...]) -> str:
  """Writes steps as one expression, without needless parentheses.

  Example: the steps 3 * 7 = 21 and 2 + 21 = 23 give "2+3*7".
  """
  made: list[tuple[int, str, str]] = []  # value, text, its outermost sign

  def take(value: int) -> tuple[str, str]:
    at = next((k for k, (known, _, _) in enumerate(made) if known == value), None)
    return made.pop(at)[1:] if at is not None else (str(value), "")

  for left, sign, right, result in steps:
    texts = []
    for value, is_right in ((left, False), (right, True)):
      text, outer = take(value)
      weak = outer and outer in "+-" and (sign in "*/" or (sign == "-" and is_right))
      texts.append(f"({text})" if weak or (sign == "/" and is_right and outer) else text)
    made.append((result, f"{texts[0]}{sign}{texts[1]}", sign))
  return made[-1][1] if made else ""


def write_trace(
  numbers: tuple[int, ...],
  target: int,
  signs: str = "+-*/",
  dead_ends: float = 0.0,
  rng: np.random.Generator | None = None,
) -> tuple[str, str]:
  """Writes the trace of a problem.

  Args:
    numbers: the given numbers, sorted.
    target: the number to reach.
    signs: the operations that are allowed, out of "+-*/".
    dead_ends: before each step of the solution, this many steps that lead nowhere, on average.
    rng: chooses these steps; needed if `dead_ends` is above 0.

  Returns:
    (trace, answer): the answer is the expression in the trace's box.

  Raises:
    ValueError: the problem has no solution by such steps.
  """
  steps = solve(numbers, target, signs)
  if steps is None:
    raise ValueError(f"{numbers} cannot make {target}")
  pieces, left = [], numbers
  for step in steps:
    dead = []
    if dead_ends and rng is not None:
      dead = _dead_ends(left, target, signs)
      dead = [dead[k] for k in rng.permutation(len(dead))[: rng.poisson(dead_ends)]]
    pieces += [_written(s, after(left, s)) + "x" for s in dead]
    left = after(left, step)
    pieces.append(_written(step, left))
  answer = expression_of(steps)
  return ";".join([*pieces, f"\\boxed{{{answer}}}"]), answer


def _dead_ends(numbers: tuple[int, ...], target: int, signs: str) -> list[Step]:
  """The steps after which the target cannot be reached any more."""
  steps = possible_steps(numbers, signs)
  return [step for step in steps if solve(after(numbers, step), target, signs) is None]


def _written(step: Step, left: tuple[int, ...]) -> str:
  text = f"{step.left}{step.sign}{step.right}={step.result}"
  return text if len(left) == 1 else f"{text}:{','.join(map(str, left))}"


def make_records(
  split: str,
  n: int,
  seed: int = 0,
  min_numbers: int | str = 3,
  max_numbers: int | str = 3,
  largest: int | str = 9,
  ops: str = "add,sub,mul,div",
  dead_ends: float | str = 0.0,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: number of problems.
    seed: seed of the generator.
    min_numbers, max_numbers: how many numbers a problem has is uniform in this range, which is
      within 2 to 5. It decides the difficulty.
    largest: numbers are uniform in 1 to this, which is at most 99.
    ops: the operations of the traces, separated by commas, out of add, sub, mul and div.
    dead_ends: how many steps that lead nowhere, and are taken back, come before each step of a
      trace, on average. It does not change the problems.

  Raises:
    UserError: an unknown split, options out of range, or too few such problems.
  """
  common.check_split(split)
  low, high = common.option_range("min_numbers", min_numbers, "max_numbers", max_numbers, 2, 5)
  largest = common.option_number("largest", largest, int, 2, 99)
  dead_ends = common.option_number("dead_ends", dead_ends, float, 0, 10)
  signs = common.option_names("ops", ops, SIGNS)

  rng = np.random.default_rng([seed, low, high, largest])
  wandering = np.random.default_rng([seed, round(dead_ends * 1000)])
  records: dict[str, Record] = {}
  for _ in range(100 * n + 1000):
    if len(records) == n:
      break
    given = [int(x) for x in rng.integers(1, largest + 1, size=rng.integers(low, high + 1))]
    numbers: tuple[int, ...] = tuple(sorted(given))
    left = numbers
    while len(left) > 1 and (steps := possible_steps(left, signs)):
      left = after(left, steps[rng.integers(len(steps))])
    target = max(left)  # the only number that is left, if every step was possible
    key = f"{','.join(map(str, numbers))}={target}"
    if len(left) > 1 or key in records or common.split_of(key) != split:
      continue
    trace, answer = write_trace(numbers, target, signs, dead_ends, wandering)
    records[key] = Record(
      id=key,
      prompt=({"role": "user", "content": f"{','.join(map(str, given))}={target}"},),
      trace=trace,
      answer=answer,
      answer_span=(trace.index("\\boxed"), len(trace)),
      task=NAME,
      gold={"numbers": given, "target": target},
    )
  if len(records) < n:
    raise common.too_few(n)
  return list(records.values())


register_task(Task(NAME, verifier=NAME, make_records=make_records, alphabet=ALPHABET))
