r"""Whether two written answers are the same mathematical object.

`quick` decides what string work and exact fractions can decide, in the caller's
process. `compare` decides the rest and may take for ever, so it runs in a worker
(`pool.Pool`). It takes apart what an answer is made of - unions, sets, tuples and
intervals, matrices, equations - compares like with like, and hands expressions to
math-verify's LaTeX parser. Two expressions are equal when their values agree to 25
digits at several rational points of both signs; where they cannot be evaluated
(relations, derivatives, sets), `math_verify.verify` decides.
"""

from __future__ import annotations

import random
import re

from igpo_jax.rewards import latex, numbers

MAX_PARTS = 64  # elements of one set, tuple or matrix
MAX_DEPTH = 40  # collections within collections
MAX_SIDES = 8  # of a chain of equations
DIGITS, EXACT, ROUNDED = 40, 1e-25, 1e-6  # evaluated digits; relative tolerances
POINTS, NEEDED = 6, 3  # sample points tried, and how many must be finite

Outcome = tuple[str, bool]  # status, equal


class Unreadable(ValueError):
  """A text that is no answer, or none that can be read."""


def quick(gold: str, answer: str) -> Outcome | None:
  """Decides without a parser where that is certain; None where it is not."""
  golds, answers = latex.clean(gold), latex.clean(answer)
  if not golds or not answers:
    return "unparseable", False
  return _quick(golds, answers)


def _quick(gold: str, answer: str) -> Outcome | None:
  if latex.compact(gold) == latex.compact(answer):
    return "ok", True
  g = numbers.read(latex.without_units(gold))
  a = numbers.read(latex.without_units(answer)) or (g and numbers.only_one(answer))
  if g and a:
    return "ok", numbers.equal(g, a)
  if r"\text{" in gold and latex.letter(gold) and latex.letter(answer):
    return "ok", latex.letter(gold) == latex.letter(answer)
  words = latex.words(gold), latex.words(answer)
  if all(words):
    return "ok", words[0] == words[1]
  if (g and words[1]) or (words[0] and a):
    return "ok", False
  return None


def compare(gold: str, answer: str) -> Outcome:
  """`(status, equal)` with status "ok" or "unparseable".

  May run for ever or exhaust memory, and raises what the parser raises.
  """
  golds, answers = latex.clean(gold), latex.clean(answer)
  if not golds or not answers:
    return "unparseable", False
  try:
    return "ok", _equal(golds, answers)
  except Unreadable:
    return "unparseable", False


def warm_up() -> None:
  """Imports the parser and fills its tables, so that forked workers start ready."""
  for gold, answer in (
    (r"\frac{\sqrt{2}}{2}x", r"x/\sqrt{2}"),
    ("x+y=1", "y=1-x"),
    (r"\sin(2x)+\pi", "3"),
    (r"(x+1)^2", "x^2+2x+1"),
  ):
    compare(gold, answer)


# --- what an answer is made of ---------------------------------------------------

_MEMBER = re.compile(r"[A-Za-z](?:_[A-Za-z0-9])? ?\\in(?![A-Za-z]) ?(.+)")
_NAME = re.compile(
  r"\\?[A-Za-z]+(?:_(?:[A-Za-z0-9]|\{[^{}]*\}))?'?(?:\([A-Za-z, ]*\))?"
  r"|\\text\{[^{}]*\}"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}")
_SIGN = r"(<|>|\\le|\\ge|\\lt|\\gt)(?![A-Za-z])"
_RELATION = re.compile(_SIGN)
_BETWEEN = re.compile(rf"(.+?){_SIGN}(.+?){_SIGN}(.+)")
_BOUND = re.compile(rf"(.+?){_SIGN}(.+)")
_EQUALS = re.compile(r"(?<![<>!:])=")


def _equal(gold: str, answer: str, depth: int = 0) -> bool:
  """Whether two cleaned texts are equal; raises `Unreadable`."""
  if depth > MAX_DEPTH:
    raise Unreadable("brackets too deep")
  decided = _quick(gold, answer)
  if decided:
    return decided[1]
  gold, answer = _unwrapped(gold), _unwrapped(answer)
  if not gold or not answer:
    raise Unreadable("nothing inside the brackets")

  if _RELATION.search(gold) or _RELATION.search(answer):
    intervals = _interval(gold), _interval(answer)
    if all(intervals) and intervals[0][0] != intervals[1][0]:
      return False
    if any(intervals):
      gold, answer = (
        found[1] if found else text for found, text in zip(intervals, (gold, answer), strict=True)
      )
  unions = latex.split_command(gold, r"\cup"), latex.split_command(answer, r"\cup")
  if max(map(len, unions)) > 1:
    return _same_set(*unions, depth)
  matrices = _matrix(gold), _matrix(answer)
  if any(matrices):
    if not all(matrices):
      return False
    shapes = [[len(row) for row in matrix] for matrix in matrices]
    return shapes[0] == shapes[1] and all(
      _equal(g, a, depth + 1)
      for rows in zip(*matrices, strict=True)
      for g, a in zip(*rows, strict=True)
    )
  g, a = _collection(gold), _collection(answer)
  if g or a:
    return _same_collection(g or ("list", [gold]), a or ("list", [answer]), depth)
  return _same_scalar(gold, answer, depth)


def _unwrapped(text: str) -> str:
  r"""Less `x \in`, the unit, and brackets that enclose one thing."""
  member = _MEMBER.fullmatch(text)
  text = latex.without_units(member[1] if member else text)
  inside = latex.enclosed(text)
  while inside and (inside[0], inside[2]) in (("(", ")"), ("{", "}")):
    if inside[0] == "(" and len(latex.split(inside[1])) > 1:
      break
    text = inside[1]
    inside = latex.enclosed(text)
  return text


def _matrix(text: str) -> list[list[str]] | None:
  match = _MATRIX.fullmatch(text)
  if not match or r"\begin" in match[2]:
    return None
  rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
  cells = [[cell.strip() for cell in row.split("&")] for row in rows]
  if sum(map(len, cells)) > MAX_PARTS:
    raise Unreadable("too large a matrix")
  return cells


def _collection(text: str) -> tuple[str, list[str]] | None:
  r"""`(kind, elements)` of a set, a list or a tuple; None for one thing alone.

  A set is `\{1, 2\}`, a list "1, 2" or `1 \pm 2`; the kind of a tuple or an interval is
  its pair of brackets.
  """
  brackets = latex.enclosed(text)
  if brackets and brackets[0] == r"\{":
    return "set", _spread(latex.split(brackets[1]) if brackets[1] else [])
  if brackets:
    parts = latex.split(brackets[1])
    return (brackets[0] + brackets[2], _checked(parts)) if len(parts) > 1 else None
  if numbers.read(text):
    return None  # its commas separate thousands
  parts = _spread(latex.split(text))
  return ("list", parts) if len(parts) > 1 else None


def _checked(parts: list[str]) -> list[str]:
  if len(parts) > MAX_PARTS or not all(parts):
    raise Unreadable("empty or too many elements")
  return parts


def _spread(parts: list[str]) -> list[str]:
  r"""Each `a \pm b` as its two values."""
  spread = []
  for part in _checked(parts):
    if re.search(r"\\pm(?![A-Za-z])", part):
      for plus, minus in (("+", "-"), ("-", "+")):
        one = re.sub(r"\\pm(?![A-Za-z])", plus, part)
        spread.append(re.sub(r"\\mp(?![A-Za-z])", minus, one))
    else:
      spread.append(part)
  return _checked(spread)


def _same_set(golds: list[str], answers: list[str], depth: int) -> bool:
  """Each element of one is in the other, and there are as many."""
  if len(golds) != len(answers):
    return False
  left = list(answers)
  for gold in golds:
    for at, answer in enumerate(left):
      if _equal(gold, answer, depth + 1):
        del left[at]
        break
    else:
      return False
  return True


def _same_collection(
  gold: tuple[str, list[str]], answer: tuple[str, list[str]], depth: int
) -> bool:
  (g_kind, golds), (a_kind, answers) = gold, answer
  if g_kind in ("set", "list") and a_kind in ("set", "list"):
    return _same_set(golds, answers, depth)
  # A tuple whose brackets were left out is still in order; a set is not a tuple.
  if g_kind != a_kind and {g_kind, a_kind} != {"()", "list"}:
    return False
  return len(golds) == len(answers) and all(
    _equal(g, a, depth + 1) for g, a in zip(golds, answers, strict=True)
  )


def _same_scalar(gold: str, answer: str, depth: int) -> bool:
  g_sides, a_sides = _EQUALS.split(gold), _EQUALS.split(answer)
  if max(len(g_sides), len(a_sides)) > MAX_SIDES:
    raise Unreadable("too long a chain of equations")
  if len(g_sides) == 1 or len(a_sides) == 1:
    g_value, a_value = _assigned(g_sides, gold), _assigned(a_sides, answer)
    if (g_value, a_value) != (gold, answer):
      return _equal(g_value, a_value, depth + 1)
    if len(g_sides) != len(a_sides):  # "2 + 3 = 5" is 5, "2x = 10" is not 10
      return all(_equal(g, a, depth + 1) for g in g_sides for a in a_sides)
  return _same_expression(gold, answer)


def _interval(text: str) -> tuple[str, str] | None:
  r"""`(name, interval)` of `2 < x \le 5` and `x \ge 2`; None for any other text."""
  between = _BETWEEN.fullmatch(text)
  if between:
    low, first, name, second, high = (part.strip() for part in between.groups())
    rising, falling = ("<", r"\le", r"\lt"), (">", r"\ge", r"\gt")
    if first in falling and second in falling:
      low, first, second, high = high, second, first, low
    elif not (first in rising and second in rising):
      return None
    if not _NAME.fullmatch(name):
      return None
    return name, f"{'[' if 'e' in first else '('}{low},{high}{']' if 'e' in second else ')'}"
  bound = _BOUND.fullmatch(text)
  if not bound:
    return None
  left, sign, right = (part.strip() for part in bound.groups())
  upper = sign in ("<", r"\le", r"\lt")
  if not _NAME.fullmatch(left):
    left, right, upper = right, left, not upper
  if not _NAME.fullmatch(left) or left == r"\infty":
    return None
  closed = sign in (r"\le", r"\ge")
  if upper:
    return left, rf"(-\infty,{right}{']' if closed else ')'}"
  return left, rf"{'[' if closed else '('}{right},\infty)"


def _assigned(sides: list[str], text: str) -> str:
  """The value in "x = 5", "f(x) = 5" and "x = 2 + 3 = 5"; any other text as it is."""
  if len(sides) > 1 and sides[-1].strip() and _NAME.fullmatch(sides[0].strip()):
    return sides[-1].strip()
  if len(sides) == 2 and _NAME.fullmatch(sides[1].strip()) and sides[0].strip():
    return sides[0].strip()
  if len(sides) == 1 and r"\approx" in text:
    exact, _, rounded = text.partition(r"\approx")
    exact, rounded = exact.strip(), rounded.strip()
    return rounded if rounded and (not exact or _NAME.fullmatch(exact)) else exact
  return text


# --- expressions ----------------------------------------------------------------


def _parse(text: str, imaginary: bool):
  """A sympy object; raises `Unreadable`. Nothing is evaluated beyond what parsing does."""
  import sympy
  from latex2sympy2_extended import latex2sympy
  from latex2sympy2_extended.latex2sympy2 import ConversionConfig
  from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

  if re.search(r"[^\x20-\x7e]", text):
    raise Unreadable("characters that are no mathematics")
  source = normalize_latex(latex.for_parser(text), NormalizationConfig(boxed="none"))
  try:
    parsed = latex2sympy(
      source,
      is_real=not imaginary,
      convert_degrees=False,
      normalization_config=None,
      conversion_config=ConversionConfig(lowercase_symbols=False),
    )
  except (MemoryError, RecursionError):
    raise
  except Exception as error:
    # The parser raises bare `Exception` for a syntax error.
    raise Unreadable(str(error)[:200]) from error
  if imaginary and isinstance(parsed, sympy.Basic) and not parsed.has(sympy.Sum, sympy.Product):
    # To the parser a small i is a letter like any other.
    parsed = parsed.xreplace({s: sympy.I for s in parsed.free_symbols if s.name == "i"})
  return parsed


def _same_expression(gold: str, answer: str) -> bool:
  import math_verify
  import sympy

  if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", answer) or re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", gold):
    return False  # times of day that are not the same text; to the parser they are ratios
  imaginary = any(re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text) for text in (gold, answer))
  parsed = [_parse(text, imaginary) for text in (gold, answer)]
  if sum(isinstance(e, (sympy.Rel, sympy.And)) for e in parsed) == 1:
    return False
  rounded = any(expression.has(sympy.Float) for expression in parsed)
  if all(isinstance(expression, sympy.Expr) for expression in parsed):
    agree = _agree(*parsed, tolerance=ROUNDED if rounded else EXACT)
    if agree is not None:
      return agree
  if all(isinstance(expression, sympy.Eq) for expression in parsed):
    agree = _proportional(*(e.lhs - e.rhs for e in parsed))
    if agree is not None:
      return agree
  return bool(
    math_verify.verify([parsed[0]], [parsed[1]], allow_set_relation_comp=True, timeout_seconds=None)
  )


def _values(expressions: list, point: int) -> list[complex] | None:
  """Values at one rational point; None where they are not finite numbers."""
  import sympy

  symbols = sorted(set().union(*(e.free_symbols for e in expressions)), key=str)
  draw = random.Random(point)
  where = {s: sympy.Rational(draw.randint(-300, 300) * 2 + 1, 211) for s in symbols}
  values = [sympy.sympify(e).xreplace(where).evalf(DIGITS) for e in expressions]
  if not all(v.is_number and v.is_finite and not v.free_symbols for v in values):
    return None
  return (
    values
    if all(
      v.is_Number or (v.as_real_imag()[0].is_Number and v.as_real_imag()[1].is_Number)
      for v in values
    )
    else None
  )


def _sampled(expressions: list) -> list[list] | None:
  """Values at up to `POINTS` points; None where the expressions have no values at points."""
  import sympy
  from sympy.core.function import AppliedUndef

  expressions = [e.doit() for e in expressions]
  if any(
    e.has(sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product)
    for e in expressions
    if e.free_symbols
  ):
    return None
  calls = set().union(*(e.atoms(AppliedUndef) for e in expressions))
  names = {call: sympy.Symbol(f"call {call}") for call in calls}
  expressions = [e.xreplace(names) for e in expressions]
  constant = not any(e.free_symbols for e in expressions)
  rows = [_values(expressions, point) for point in range(1 if constant else POINTS)]
  rows = [row for row in rows if row is not None]
  return rows if len(rows) >= (1 if constant else NEEDED) else None


def _near(one, other, tolerance: float) -> bool:
  import sympy

  size = max(abs(one), abs(other))
  return bool(size < sympy.Float("1e-60") or abs(one - other) <= tolerance * size)


def _agree(gold, answer, tolerance: float) -> bool | None:
  """Whether two expressions have the same values; None where that cannot be told so."""
  rows = _sampled([gold, answer])
  return None if rows is None else all(_near(g, a, tolerance) for g, a in rows)


def _proportional(gold, answer) -> bool | None:
  """Whether two left sides of "... = 0" differ by a constant factor."""
  rows = _sampled([gold, answer])
  if rows is None or any(not a for _, a in rows):
    return None
  ratios = [g / a for g, a in rows]
  return bool(ratios[0]) and all(_near(ratio, ratios[0], 1e-12) for ratio in ratios)
