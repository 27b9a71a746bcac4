r"""Evaluation: the value of an expression at one point.

Rational arithmetic is exact. Everything else is computed by mpmath with as many digits as
`mp.workdps` sets. Values are either real, where the cube root of -8 is -2, or complex principal
values. Every loop and every number has a limit; to exceed it raises `TooLarge`.
"""

from __future__ import annotations

import functools
import math
import random
from fractions import Fraction
from typing import Any

from mpmath import mp
from mpmath.libmp import NoConvergence

from igpo_jax.rewards.math.tokens import Unreadable
from igpo_jax.rewards.math.tree import Node

MAX_BITS = 500_000  # of the numerator or the denominator of an exact number
MAX_TERMS = 10_000  # of a sum; also the largest number whose factorial is computed
SIZES = ((6, 3), (4, 40))  # (number of rational points of both signs, their largest size)
LOST = 1e-20  # a term of this size that does not change a sum has been rounded away
WHOLE = 6  # number of points that are positive whole numbers


class Undefined(ArithmeticError):
  """The expression has no value at this point."""


class TooLarge(ArithmeticError):
  """The value would take too long or too much memory."""


Value = Any  # a Fraction, mpf or mpc; or a matrix, a list of rows of these


def number_of(value: Value) -> Any:
  """The value as a number of mpmath, rounded to the digits that are set."""
  return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def is_exact(value: Value) -> bool:
  """Whether the value is a rational number, which is exact."""
  return isinstance(value, Fraction)


def _bits(value: Fraction) -> int:
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _checked(value: Value) -> Value:
  """The value, if it is finite and within the limits.

  Raises:
    TooLarge: an exact number with more than `MAX_BITS` bits.
    Undefined: not a finite number.
  """
  if isinstance(value, Fraction):
    if _bits(value) > MAX_BITS:
      raise TooLarge("too many digits")
  elif not isinstance(value, list) and not mp.isfinite(value):
    raise Undefined("no finite value")
  return value


class Evaluator:
  """Evaluates trees at one point: `Evaluator(...)(node)` is the value of a tree.

  Args:
    seed: number of the point. The value of a symbol there depends on the seed and its name only.
    real: whether values must be real numbers.
    budget: a list of one number: how many nodes may still be evaluated. It is counted down, and
      evaluators may share it.

  Raises (from a call):
    Undefined: the expression has no value at this point.
    TooLarge: a limit is exceeded, or the budget is spent.
    Unreadable: a function is not known, or has the wrong number of arguments.
  """

  def __init__(self, seed: int, real: bool, budget: list[int]):
    self.seed = seed
    self.real = real
    self.budget = budget
    self.bound: dict[str, Value] = {}
    self.summed = False  # whether a limit, an integral or an infinite sum was computed

  def __call__(self, node: Node) -> Value:
    self.budget[0] -= 1
    if self.budget[0] < 0:
      raise TooLarge("too many steps")
    return _checked(getattr(self, f"_{node.op}")(*node.args))

  def _number(self, value: Fraction, decimal: bool) -> Value:
    return value

  def _symbol(self, name: str) -> Value:
    if name in self.bound:
      return self.bound[name]
    if name == "pi":
      return +mp.pi
    if name == "e":
      return +mp.e
    if name == "i":
      if self.real:
        raise Undefined("i is not real")
      return mp.mpc(0, 1)
    return _drawn(self.seed, name)

  def _call(self, name: str, *args: Node) -> Value:
    values = [self(arg) for arg in args]
    key = ",".join(str(mp.nstr(number_of(value), 15)) for value in values)
    return _drawn(self.seed, f"{name}({key})")

  def _infinity(self) -> Value:
    raise Undefined("infinity is no number")

  def _add(self, *terms: Node) -> Value:
    return functools.reduce(self.plus, map(self, terms))

  def plus(self, one: Value, other: Value) -> Value:
    """`one + other`; outside limits and series neither may vanish in rounding."""
    total = _checked(_plus(one, other))
    if not self.summed and _is_lost(one, other, total):
      raise Undefined("a term is lost to rounding")
    return total

  def _neg(self, node: Node) -> Value:
    value = self(node)
    return [[-x for x in row] for row in value] if isinstance(value, list) else -value

  def _mul(self, *factors: Node) -> Value:
    return functools.reduce(lambda one, other: _checked(_times(one, other)), map(self, factors))

  def _inverse(self, node: Node) -> Value:
    return quotient(Fraction(1), self(node))

  def _div(self, top: Node, bottom: Node) -> Value:
    return quotient(self(top), self(bottom))

  def _pow(self, base: Node, exponent: Node) -> Value:
    value = self(base)
    if isinstance(value, list):
      return self.matrix_power(value, exponent)
    if exponent.op == "symbol" and exponent.args[0] in ("*", "+", "-", "\\top", "\\dagger"):
      raise Unreadable("a starred symbol")
    power = self(exponent)
    if isinstance(power, list):
      raise Undefined("a matrix as a power")
    if is_exact(power):
      if power.denominator == 1 and is_exact(value):
        return _whole_power(value, power.numerator)
      return self.root_of(value, power.denominator, power.numerator)
    if self.real and number_of(value) <= 0:
      raise Undefined("an irrational power of a negative number")
    return _general_power(number_of(value), power)

  def root_of(self, value: Value, degree: int, power: int) -> Value:
    """value ** (power / degree): the real root if real values are asked for, else the principal."""
    if is_exact(value) and not value:
      if power <= 0:
        raise Undefined("zero to no positive power")
      return value
    negative = self.real and number_of(value) < 0
    if negative and degree % 2 == 0:
      raise Undefined("an even root of a negative number")
    size = -value if negative else value
    if is_exact(size) and (size > 0 or degree == 1):
      exact = _exact_root(size, degree)
      if exact is not None:
        return _whole_power(-exact if negative else exact, power)
    result = _general_power(number_of(size), mp.mpf(power) / degree)
    return -result if negative and power % 2 else result

  def _root(self, degree: Node, node: Node) -> Value:
    value, n = self(node), self(degree)
    if isinstance(value, list) or not is_exact(n) or not n or abs(n.numerator) > 1000:
      raise Undefined("a root of an odd degree")
    return self.root_of(value, n.numerator, n.denominator)

  def _abs(self, node: Node) -> Value:
    value = self(node)
    return _determinant(value) if isinstance(value, list) else abs(value)

  def _factorial(self, node: Node) -> Value:
    value = self(node)
    if not is_exact(value) or value.denominator != 1 or value < 0:
      raise Undefined("a factorial of no whole number")
    if value > MAX_TERMS:
      raise TooLarge("too large a factorial")
    return Fraction(math.factorial(value.numerator))

  def _function(self, name: str, *args: Node) -> Value:
    values = [self(arg) for arg in args]
    if any(isinstance(value, list) for value in values):
      if name == "det" and len(values) == 1:
        return _determinant(values[0])
      raise Undefined(f"{name} of a matrix")
    if name in _OF_WHOLE:
      if not values or (name in _OF_TWO and len(values) != 2):
        raise Unreadable(f"{name} of {len(values)}")
      if not all(is_exact(value) for value in values):
        raise Undefined(f"{name} of what is not rational")
      return _OF_WHOLE[name](*values)
    if name not in _FUNCTIONS or len(values) != 1:
      raise Unreadable(f"{name} of {len(values)}")
    return self.real_function(name, values[0])

  def real_function(self, name: str, value: Value) -> Value:
    """A function of one number: exactly if that is possible, else by mpmath."""
    if is_exact(value):
      if (name, value) in _KNOWN:
        return Fraction(_KNOWN[name, value])
      if name in _EXACTLY:
        return Fraction(_EXACTLY[name](value))
    x = number_of(value)
    if abs(x) > 1e30 or (name in _GROWING and abs(x) > 1e7):
      raise TooLarge(f"{name} of so large a number")
    if not self.real and name in ("floor", "ceil"):
      raise Undefined(f"{name} of a complex number")
    low, high = _DOMAINS.get(name, (None, None))
    if self.real and ((low is not None and x < low) or (high is not None and x > high)):
      raise Undefined(f"{name} there")
    try:
      result = _FUNCTIONS[name](x)
    except (ValueError, ZeroDivisionError) as error:
      raise Undefined(f"{name} there") from error
    if self.real and isinstance(result, mp.mpc):
      raise Undefined(f"{name} is not real there")
    return result

  def _matrix(self, *rows: tuple[Node, ...]) -> Value:
    return [[self(cell) for cell in row] for row in rows]

  def matrix_power(self, value: list, exponent: Node) -> Value:
    """A whole power of a matrix, or its transpose for the exponent T."""
    if exponent.op == "symbol" and exponent.args[0] in ("T", "\\top", "t"):
      return [list(column) for column in zip(*value, strict=True)]
    power = self(exponent)
    if not is_exact(power) or power.denominator != 1 or abs(power) > 64:
      raise Undefined("a matrix to such a power")
    if len(value) != len(value[0]):
      raise Undefined("a power of a matrix that is not square")
    if power < 0:
      value, power = _inverse(value), -power
    result = [[Fraction(int(a == b)) for b in range(len(value))] for a in range(len(value))]
    for _ in range(power.numerator):
      result = _times(result, value)
    return result

  def _sum(self, variable: str, low: Node, high: Node, body: Node) -> Value:
    return self.fold(variable, low, high, body, _plus, Fraction(0), mp.nsum)

  def _product(self, variable: str, low: Node, high: Node, body: Node) -> Value:
    return self.fold(variable, low, high, body, _times, Fraction(1), mp.nprod)

  def fold(self, variable, low, high, body, combine, start, endless) -> Value:
    """A sum or product over `variable`; `endless` computes one whose upper bound is infinite."""
    first = self(low)
    if not is_exact(first) or first.denominator != 1:
      raise Undefined("a bound that is no whole number")
    if high.op == "infinity":
      self.summed = True
      return _numerically(endless, self.along(variable, body), [int(first), mp.inf])
    last = self(high)
    if not is_exact(last) or last.denominator != 1:
      raise Undefined("a bound that is no whole number")
    if last - first > MAX_TERMS:
      raise TooLarge("too many terms")
    total = start
    outer = dict(self.bound)
    for index in range(int(first), int(last) + 1):
      self.bound[variable] = Fraction(index)
      total = _checked(combine(total, self(body)))
    self.bound = outer
    return total

  def along(self, variable: str, body: Node):
    """The body as a Python function of its variable, for mpmath's numerical methods."""

    def value(x):
      outer = dict(self.bound)
      whole = mp.isint(x)
      self.bound[variable] = Fraction(int(x)) if whole else mp.mpf(x)
      try:
        return number_of(self(body))
      finally:
        self.bound = outer

    return value

  def _integral(self, variable: str, low: Node, high: Node, body: Node) -> Value:
    self.summed = True
    ends = [self.end(low), self.end(high)]
    return _numerically(mp.quad, self.along(variable, body), ends)

  def end(self, node: Node) -> Any:
    """An end of an integral or the point of a limit: a number of mpmath, which may be infinite."""
    if node.op == "infinity":
      return mp.inf
    if node.op == "neg" and node.args[0].op == "infinity":
      return -mp.inf
    return number_of(self(node))

  def _limit(self, variable: str, to: Node, body: Node) -> Value:
    self.summed = True
    return _numerically(mp.limit, self.along(variable, body), self.end(to))


def _numerically(method, function, *where) -> Value:
  try:
    return method(function, *where)
  except (ValueError, ZeroDivisionError, NoConvergence) as error:
    raise Undefined("it does not converge") from error


def _drawn(seed: int, name: str) -> Fraction:
  """The value of a symbol at a point: equal for both expressions, and random otherwise."""
  draw = random.Random(f"{seed} {name}")
  for count, size in SIZES:
    if seed < count:
      return Fraction(draw.randint(-size * 105, size * 105) * 2 + 1, 211)
    seed -= count
  return Fraction(draw.randint(1, 12))


def _plus(one: Value, other: Value) -> Value:
  if isinstance(one, list) != isinstance(other, list):
    raise Undefined("a matrix and a number")
  if isinstance(one, list):
    if len(one) != len(other) or len(one[0]) != len(other[0]):
      raise Undefined("matrices of different shapes")
    return [
      [_plus(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(one, other, strict=True)
    ]
  return one + other if is_exact(one) == is_exact(other) else number_of(one) + number_of(other)


def _is_lost(one: Value, other: Value, total: Value) -> bool:
  """Whether a sum is as large as one of its terms although the other is no mere rounding."""
  if isinstance(total, list) or is_exact(total):
    return False
  one, other = number_of(one), number_of(other)
  return (total == one and abs(other) > LOST) or (total == other and abs(one) > LOST)


def _times(one: Value, other: Value) -> Value:
  if isinstance(one, list) and isinstance(other, list):
    if len(one[0]) != len(other):
      raise Undefined("matrices that do not fit")
    columns = list(zip(*other, strict=True))
    return [
      [
        functools.reduce(_plus, (_times(a, b) for a, b in zip(row, column, strict=True)))
        for column in columns
      ]
      for row in one
    ]
  if isinstance(one, list):
    return [[_times(cell, other) for cell in row] for row in one]
  if isinstance(other, list):
    return _times(other, one)
  return one * other if is_exact(one) == is_exact(other) else number_of(one) * number_of(other)


def quotient(one: Value, other: Value) -> Value:
  """`one / other`, exact if both are; raises `Undefined` for a zero or a matrix as the divisor."""
  if isinstance(other, list) or not other:
    raise Undefined("division by zero")
  if isinstance(one, list):
    return _times(one, quotient(Fraction(1), other))
  return one / other if is_exact(one) == is_exact(other) else number_of(one) / number_of(other)


def _whole_power(value: Fraction, power: int) -> Fraction:
  if not value and power <= 0:
    raise Undefined("zero to no positive power")
  if abs(value) != 1 and value and _bits(value) * abs(power) > MAX_BITS:
    raise TooLarge("too large a power")
  return value**power


def _general_power(value: Any, power: Any) -> Any:
  if not value:
    raise Undefined("a power of zero")
  if abs(number_of(power)) * (abs(mp.log(abs(value))) + 1) > 1e7:
    raise TooLarge("too large a power")
  return mp.power(value, number_of(power))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
  """The rational root of a positive number; None if it is irrational or too long to look for."""
  if degree == 1:
    return value
  parts = []
  for part in (value.numerator, value.denominator):
    if degree == 2:
      root = math.isqrt(part)
    elif part.bit_length() < 150:
      root = round(part ** (1 / degree))
    else:
      return None
    if root**degree != part:
      return None
    parts.append(root)
  return Fraction(*parts)


def _determinant(value: list) -> Value:
  if len(value) != len(value[0]):
    raise Undefined("a determinant of a matrix that is not square")
  rows, result = [list(row) for row in value], Fraction(1)
  for at in range(len(rows)):
    pivot = next((r for r in range(at, len(rows)) if rows[r][at]), None)
    if pivot is None:
      return Fraction(0)
    if pivot != at:
      rows[at], rows[pivot] = rows[pivot], rows[at]
      result = -result
    result = _times(result, rows[at][at])
    for r in range(at + 1, len(rows)):
      factor = quotient(rows[r][at], rows[at][at])
      rows[r] = [_plus(x, -_times(factor, y)) for x, y in zip(rows[r], rows[at], strict=True)]
  return result


def _inverse(value: list) -> list:
  size, whole = len(value), _determinant(value)
  if not whole:
    raise Undefined("the inverse of a matrix without one")

  def minor(row: int, column: int) -> Value:
    rest = [
      [x for c, x in enumerate(line) if c != column] for r, line in enumerate(value) if r != row
    ]
    return _determinant(rest) if rest else Fraction(1)

  return [
    [quotient(minor(c, r) * (-1) ** (r + c), whole) for c in range(size)] for r in range(size)
  ]


def _integers(values: tuple[Fraction, ...]) -> list[int]:
  if any(value.denominator != 1 for value in values):
    raise Undefined("no whole number")
  return [value.numerator for value in values]


def _binomial(n: Fraction, k: Fraction) -> Fraction:
  (count,) = _integers((k,))
  if count < 0:
    return Fraction(0)
  if count > 2000 or _bits(n) > 1000:
    raise TooLarge("too large a binomial")
  return functools.reduce(lambda total, at: total * (n - at) / (at + 1), range(count), Fraction(1))


def _modulo(value: Fraction, by: Fraction) -> Fraction:
  if not by:
    raise Undefined("modulo zero")
  return value % by


_OF_WHOLE = {
  "gcd": lambda *v: Fraction(math.gcd(*_integers(v))),
  "lcm": lambda *v: Fraction(math.lcm(*_integers(v))),
  "min": lambda *v: min(v),
  "max": lambda *v: max(v),
  "binom": _binomial,
  "mod": _modulo,
}
_OF_TWO = frozenset(("binom", "mod"))
_FUNCTIONS = {
  **{name: getattr(mp, name) for name in "sin cos tan cot sec csc sinh cosh tanh coth".split()},
  **{name: getattr(mp, name) for name in "ln exp floor ceil".split()},
  "arcsin": mp.asin,
  "arccos": mp.acos,
  "arctan": mp.atan,
  "arccot": mp.acot,
  "log": mp.log10,
  "sgn": mp.sign,
  "abs": abs,
  "Re": mp.re,
  "Im": mp.im,
}
_EXACTLY = {
  "floor": math.floor,
  "ceil": math.ceil,
  "abs": abs,
  "sgn": lambda x: (x > 0) - (x < 0),
  "Re": lambda x: x,
  "Im": lambda _: 0,
}
_DOMAINS = {"arcsin": (-1, 1), "arccos": (-1, 1), "ln": (0, None), "log": (0, None)}
_GROWING = frozenset("exp sinh cosh".split())
_KNOWN = {("exp", 0): 1, ("sin", 0): 0, ("cos", 0): 1, ("tan", 0): 0, ("ln", 1): 0, ("log", 1): 0}
