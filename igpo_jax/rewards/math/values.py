r"""Values: decides whether two expressions are equal by evaluating both.

Constants are evaluated once. Expressions with variables are evaluated at points of both signs and
several sizes, and at whole numbers. Rational arithmetic is exact. Irrational values are computed
to 50 digits, and to 120 if they agree to 25. Two of them are equal if they then agree to 100
digits, or if their difference has shrunk. Rounded values, and limits, agree to fewer digits.

Real values are tried first: the cube root of -8 is -2, and an even root or a logarithm of a
negative number has no value. Points at which one of the two has no value do not count. So
`\sqrt{1/n}` equals `1/\sqrt{n}`, but `\sqrt{x^2}` does not equal `x`. Expressions that contain i
or have too few real values are compared by their complex principal values.
"""

from __future__ import annotations

from mpmath import mp

from igpo_jax.rewards.math import numbers
from igpo_jax.rewards.math.evaluate import (
  SIZES,
  WHOLE,
  Evaluator,
  Undefined,
  Value,
  is_exact,
  number_of,
  quotient,
)
from igpo_jax.rewards.math.tokens import Unreadable
from igpo_jax.rewards.math.tree import Facts, Node, infinite

DIGITS, MORE_DIGITS = 50, 120
# Relative tolerances: of exact values, of rounded decimals, of limits, integrals and series.
EXACT, ROUNDED, SUMMED = 1e-25, 1e-6, 1e-12
CONFIRMED = MORE_DIGITS - 20  # digits to which irrational values must agree in the end
MAX_STEPS = 100_000  # nodes that one comparison may evaluate
NEEDED = 3  # number of points at which both expressions must have values


class _Pair:
  """Two trees, evaluated at the same points."""

  def __init__(self, gold: Node, answer: Node):
    self.trees = gold, answer
    self.facts = Facts(gold), Facts(answer)
    self.free = any(facts.free for facts in self.facts)
    self.budget = [MAX_STEPS]
    self.summed = False

  def at(self, seed: int, real: bool, digits: int = DIGITS) -> tuple[Value, Value] | None:
    """Both values at one point; None if one of the two has no value there."""
    with mp.workdps(digits):
      evaluator = Evaluator(seed, real, self.budget)
      try:
        values = tuple(evaluator(tree) for tree in self.trees)
      except Undefined:
        return None
      finally:
        self.summed |= evaluator.summed
    return values

  def points(self):
    """Yields `(real, values, seed)` for each point at which both have values.

    Complex values follow if there are fewer than `NEEDED` points with real values.

    Raises:
      Unreadable: there are too few points even with complex values.
    """
    seeds = range(sum(count for count, _ in SIZES) + WHOLE) if self.free else range(1)
    for real in (True, False):
      found = 0
      for seed in seeds:
        values = self.at(seed, real)
        if values is not None:
          found += 1
          yield real, values, seed
      if found >= (NEEDED if self.free else 1):
        return
    raise Unreadable("no values to compare")

  @property
  def tolerant(self) -> bool:
    """Whether values that are not exact may differ by more than what rounding does to them."""
    return self.summed or any(facts.rounded for facts in self.facts)

  def near(self, gold: Value, answer: Value) -> bool:
    """Whether two numbers are equal within the tolerance for how they were computed."""
    g, a = self.facts
    exact = is_exact(gold) and is_exact(answer)
    if exact and (gold == answer or not (g.rounded or a.rounded) or g.decimal == a.decimal):
      return gold == answer
    if exact and not self.free:
      return numbers.close(gold, answer, g.decimal, a.decimal)
    tolerance = ROUNDED if g.rounded or a.rounded else SUMMED if self.summed else EXACT
    with mp.workdps(MORE_DIGITS):
      size = max(abs(number_of(gold)), abs(number_of(answer)))
      return bool(abs(number_of(gold) - number_of(answer)) <= tolerance * size)


def _flat(value: Value) -> tuple[tuple[int, ...], list[Value]]:
  if not isinstance(value, list):
    return (), [value]
  return (len(value), len(value[0])), [cell for row in value for cell in row]


def same(gold: Node, answer: Node) -> bool:
  """Whether two expressions are equal at all points at which both have values.

  Raises:
    Unreadable: there are too few such points.
    TooLarge: a value or the number of steps exceeds a limit.
  """
  if infinite(gold) or infinite(answer):
    return infinite(gold) == infinite(answer)
  pair = _Pair(gold, answer)
  for real, values, seed in pair.points():
    (shape, golds), (other, answers) = map(_flat, values)
    if shape != other:
      return False
    near = all(map(pair.near, golds, answers))
    if near and (pair.tolerant or all(map(is_exact, golds + answers))):
      continue
    if not _vanishes(pair, values, seed, real):
      return False
  return True


def _vanishes(pair: _Pair, values: tuple[Value, Value], seed: int, real: bool) -> bool:
  """Whether the difference of two values shrinks with more digits, so that it is rounding."""
  pairs = list(zip(*(_flat(value)[1] for value in values), strict=True))
  if all(is_exact(g) and is_exact(a) and g != a for g, a in pairs):
    return False
  more = pair.at(seed, real, MORE_DIGITS)
  if more is None:
    return False
  for (g, a), (g_more, a_more) in zip(
    pairs, zip(*(_flat(value)[1] for value in more), strict=True), strict=True
  ):
    with mp.workdps(MORE_DIGITS):
      before, after = abs(number_of(g) - number_of(a)), abs(number_of(g_more) - number_of(a_more))
      shrunk = after <= before * mp.mpf(10) ** (DIGITS - MORE_DIGITS + 20)
      small = after <= abs(number_of(g_more)) * mp.mpf(10) ** -CONFIRMED
      if not (shrunk or small or (pair.tolerant and pair.near(g, a))):
        return False
  return True


def factor(gold: Node, answer: Node) -> Value | None:
  """The constant c with `gold` = c `answer` at all points; None if there is no such constant."""
  pair = _Pair(gold, answer)
  first: Value = None
  rows = 0
  for _, (g, a), _ in pair.points():
    if isinstance(g, list) or isinstance(a, list):
      raise Unreadable("an equation of matrices")
    if not g and not a:
      continue
    if not g or not a:
      return None
    with mp.workdps(DIGITS):
      ratio = quotient(g, a)
      if first is not None and not pair.near(first, ratio):
        return None
    first, rows = (ratio if first is None else first), rows + 1
  return first if rows >= NEEDED else None


def value_of(node: Node) -> Value | None:
  """The real value of a constant expression, exact or to `DIGITS` digits.

  Returns:
    None if the expression has variables, has no real value, or is a matrix.
  """
  if Facts(node).free:
    return None
  with mp.workdps(DIGITS):
    try:
      value = Evaluator(0, True, [MAX_STEPS])(node)
    except Undefined:
      return None
  return None if isinstance(value, list) else value
