"""Chains: a number and a list of steps that change it digit by digit, with no carry.

The trace restates the number after every step, then the answer:

    prompt   352+417^250_918          trace   769 769 718 =>718
    +417     add, each digit held at 9        ^250   the larger of the two digits
    -417     subtract, held at 0              _918   the smaller of the two digits

Why this task (the study is in docs/LOG.md):
  * Three digits have 1,000 values, so an answer is hardly ever right by luck. If the policy cannot
    do a problem, its whole group is wrong.
  * Every step depends on the one before. An error anywhere loses the answer, and the chance of a
    correct trace falls with its length. A hint in the middle repairs errors before it, which is
    what inpainting is for.
  * Steps are monotone in each digit. Small transformers learn such steps in minutes; they do not
    learn modular arithmetic.
  * The last number of the trace is the answer, so a hint could show it. This task therefore tests
    `hints.hide_answer_value`.

Train and test problems are disjoint by construction: the split that a problem belongs to is
decided by a hash of its text.

Traces can be verbose (`detours`), like those of reasoning models: a step is written out before its
result, a wrong number is written and taken back, or a number is stated twice.

    concise   769 769 718 =>718
    verbose   352+417= 769 =769 469- 769 718 =718 =>718
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import Task, register_task
from igpo_jax.tasks import common
from igpo_jax.tasks.common import option_number, split_of

NAME = "chains"
ALPHABET = "0123456789+-^_=> "
SUMMANDS_BELOW = 5


def apply_step(number: str, sign: str, operand: str) -> str:
  """The number after one step, digit by digit.

  Args:
    number, operand: strings of equally many digits.
    sign: "+", "-", "^" or "_".

  Example: `apply_step("352", "+", "417") == "769"`.
  """
  change = {
    "+": lambda digit, by: min(digit + by, 9),
    "-": lambda digit, by: max(digit - by, 0),
    "^": max,
    "_": min,
  }[sign]
  pairs = zip(number, operand, strict=True)
  return "".join(str(change(int(digit), int(by))) for digit, by in pairs)


def solve(problem: str, skip: Callable[[str], bool] = lambda sign: False) -> tuple[str, str]:
  """Solves a problem step by step.

  Args:
    problem: such as "352+417^250".
    skip: `skip(sign)`, called once for each step: True makes the trace forget the step, so that the
      number stays as it is.

  Returns:
    (trace, the answer that it ends with).

  Example: `solve("352+417") == ("769 =>769", "769")`.
  """
  number, *steps = re.split(r"([-+^_])", problem)
  numbers = []
  for sign, operand in zip(steps[::2], steps[1::2], strict=True):
    if not skip(sign):
      number = apply_step(number, sign, operand)
    numbers.append(number)
  return " ".join(numbers) + f" =>{number}", number


def with_detours(problem: str, trace: str, mean: float, rng: np.random.Generator) -> str:
  """Makes a concise trace verbose.

  A detour is, with equal probability, the step written out before its result ("352+417="), a number
  with one wrong digit that is taken back ("469-"), or the result once more ("=769").

  Args:
    problem: the problem.
    trace: its trace, by `solve`.
    mean: detours at each step, on average; their number has a Poisson distribution.
    rng: draws the detours.
  """
  words, steps = trace.split(), re.findall(r"[-+^_]\d+", problem)
  before, out = re.split(r"[-+^_]", problem)[0], []
  for number, step in zip(words, steps, strict=False):
    checks = []
    for _ in range(rng.poisson(mean)):
      kind = rng.integers(3)
      if kind == 0:
        out.append(f"{before}{step}=")
      elif kind == 1:
        at = rng.integers(len(number))
        digit = (int(number[at]) + rng.integers(1, 10)) % 10
        out.append(f"{number[:at]}{digit}{number[at + 1 :]}-")
      else:
        checks.append(f"={number}")
    out += [number, *checks]
    before = number
  return " ".join([*out, words[-1]])


def without_detours(trace: str) -> str:
  """The concise trace inside a verbose one: the results that are not taken back, and the answer.

  Example: "352+417= 769 =769 469- 769 =>769" gives "769 769 =>769".
  """
  return " ".join(word for word in trace.split() if re.fullmatch(r"\d+|=>\d+", word))


SIGNS = {"add": "+", "sub": "-", "max": "^", "min": "_"}


def make_records(
  split: str,
  n: int,
  seed: int = 0,
  min_steps: int | str = 2,
  max_steps: int | str = 8,
  digits: int | str = 3,
  ops: str = "max,min",
  rare: str = "add",
  rare_share: float | str = 0.25,
  skip_share: float | str = 0.0,
  detours: float | str = 0.0,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: number of problems.
    seed: seed of the generator.
    min_steps, max_steps: the number of steps is uniform in this range.
    digits: number of digits of each number, 1 to 6.
    ops: the common kinds of steps, separated by commas, out of add, sub, max, min.
    rare: the rare kinds of steps, likewise.
    rare_share: each step is of a rare kind with this probability. It decides the difficulty,
      together with the number of steps. Easy problems (0.05, say) are as long as hard ones (0.25),
      so that no position of a hard problem is new to a model trained on easy ones.
    skip_share: each step of a rare kind is forgotten in the trace with this probability. The trace
      then goes on to a wrong answer. The record's `answer` is right all the same.
    detours: number of detours at each step of a trace, on average (`with_detours`). It does not
      change the problems.

  Raises:
    UserError: an unknown split, options out of range, or too few such problems.
  """
  common.check_split(split)
  low, high = common.option_range("min_steps", min_steps, "max_steps", max_steps, 1, 1000)
  digits = option_number("digits", digits, int, 1, 6)
  share = option_number("rare_share", rare_share, float, 0, 1)
  skip_share = option_number("skip_share", skip_share, float, 0, 1)
  detours = option_number("detours", detours, float, 0, 10)
  usual = common.option_names("ops", ops, SIGNS)
  rare = common.option_names("rare", rare, SIGNS)

  winding = np.random.default_rng([seed, round(detours * 1000)])
  rng = np.random.default_rng([seed, low, high, digits, round(share * 1000)])
  records: dict[str, Record] = {}
  tries = 0
  while len(records) < n:
    tries += 1
    if tries > 100 * n + 1000:
      raise common.too_few(n)
    number = lambda below: "".join(str(digit) for digit in rng.integers(0, below, digits))
    problem = number(10)
    for _ in range(rng.integers(low, high + 1)):
      kinds = rare if rng.random() < share else usual
      sign = kinds[rng.integers(len(kinds))]
      # Summands are small: else most digits would end at 0 or 9, and could be guessed.
      problem += sign + number(SUMMANDS_BELOW if sign in "+-" else 10)
    if problem in records or split_of(problem) != split:
      continue
    _, answer = solve(problem)
    trace, _ = solve(problem, lambda sign: sign in rare and rng.random() < skip_share)
    if detours:
      trace = with_detours(problem, trace, detours, winding)
    records[problem] = Record(
      id=problem,
      prompt=({"role": "user", "content": problem},),
      trace=trace,
      answer=answer,
      answer_span=(trace.index("=>"), len(trace)),
      task=NAME,
    )
  return list(records.values())


register_task(
  Task(
    NAME,
    verifier="exact",
    make_records=make_records,
    alphabet=ALPHABET,
    trim=lambda trace, answer, count, max_tokens: without_detours(trace),
  )
)
