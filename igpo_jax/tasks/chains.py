"""Chains: a number and a list of steps that change it digit by digit, with no carry.

The trace restates the number after every step, then the answer:

    prompt   352+417^250_918          trace   769 769 718 =>718
    +417     add, each digit held at 9        ^250   the larger of the two digits
    -417     subtract, held at 0              _918   the smaller of the two digits

Why this one (the study is in docs/LOG.md):
  * Three digits have 1,000 values, so no answer is right by luck and a group of
    eight whose policy cannot do the problem is all wrong.
  * Every step hangs on the one before: an error anywhere loses the answer, and the
    chance of a correct trace falls with its length. A hint in the middle repairs what
    came before it, which is what inpainting is for.
  * Steps are monotone in their digit, which small transformers learn in minutes;
    modular arithmetic they do not.
  * The last number of the trace is the answer, so a hint could show it. That is what
    `hints.hide_answer_value` is for, and here it is checked.

Train and test problems are disjoint by construction: which split a problem belongs
to is a hash of its text.

Traces can be verbose (`detours`), as those of reasoning models are: a step is written out
before its result, a wrong number is put down and taken back, a number is stated twice.

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
  """The number after one step. Example: apply_step("352", "+", "417") == "769"."""
  change = {
    "+": lambda digit, by: min(digit + by, 9),
    "-": lambda digit, by: max(digit - by, 0),
    "^": max,
    "_": min,
  }[sign]
  pairs = zip(number, operand, strict=True)
  return "".join(str(change(int(digit), int(by))) for digit, by in pairs)


def solve(problem: str, skip: Callable[[str], bool] = lambda sign: False) -> tuple[str, str]:
  """The trace and its answer. Example: "352+417" gives ("769 =>769", "769").

  `skip(sign)` says of each step whether the trace forgets it: the number stays as it is.
  """
  number, *steps = re.split(r"([-+^_])", problem)
  numbers = []
  for sign, operand in zip(steps[::2], steps[1::2], strict=True):
    if not skip(sign):
      number = apply_step(number, sign, operand)
    numbers.append(number)
  return " ".join(numbers) + f" =>{number}", number


def with_detours(problem: str, trace: str, mean: float, rng: np.random.Generator) -> str:
  """The trace with a Poisson number of detours at each step, `mean` of them on average.

  A detour is, with equal chances, the step written out before its result ("352+417="), a
  number that is wrong in one digit and taken back ("469-"), or the result once more ("=769").
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
  """The concise trace inside a verbose one: the numbers that stand, and the answer."""
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
    n: how many.
    seed: of the generator.
    min_steps, max_steps: the number of steps is uniform in this range.
    digits: digits of the number, 1 to 6.
    ops: common kinds of steps, out of add, sub, max, min.
    rare: a further kind.
    rare_share: the difficulty knob besides the number of steps: each step is of the rare
      kind with this probability. Easy problems (0.05, say) have the length of hard ones
      (0.25), so no position of a hard one is new to a model that was trained on easy ones.
    skip_share: careless traces: each step of the rare kind is forgotten with this
      probability, and the trace goes on from there to a wrong end. The record's `answer`
      is the right one all the same.
    detours: verbose traces: so many detours at each step on average (`with_detours`). The
      problems are those of a source without.

  Raises:
    UserError: an unknown split, or options out of range.
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
      # Small summands, or most digits would end at 0 or 9 and luck would count.
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
