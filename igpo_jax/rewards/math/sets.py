r"""Sets of real numbers in all their notations.

These are intervals, their unions, intersections and differences, inequalities (`x \le 2`,
`0<x<1`, "x < -2 or x > 2"), set builders (`\{x \mid x > 2\}`) and sets that have a name. Each
is read as a region: disjoint pieces of the real line in ascending order. The ends of two pieces
are compared as two answers are. Ends that contain variables have no order, so pieces with such
ends stay in the order in which they are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from mpmath import mp

from igpo_jax.rewards.math import names, values
from igpo_jax.rewards.math.evaluate import number_of
from igpo_jax.rewards.math.parser import parse
from igpo_jax.rewards.math.tokens import Token, Tokens, Unreadable, enclosed, split, written
from igpo_jax.rewards.math.tree import Node
from igpo_jax.rewards.math.words import GREEK, bare

MAX_PIECES = 64

SIGNS = frozenset(("<", ">", "<=", ">=", "!="))
MARKS = SIGNS | {r"\cup", r"\cap", r"\setminus", r"\in", r"\emptyset", r"\R", r"\Z", r"\N", r"\Q"}
_PHRASES = {
  **dict.fromkeys(
    (
      "all real numbers",
      "all reals",
      "all real values",
      "real numbers",
      "any real number",
      "every real number",
      "the real numbers",
      "the reals",
      "the set of real numbers",
      "the set of all real numbers",
      "all real",
    ),
    r"\R",
  ),
  **dict.fromkeys(
    (
      "empty set",
      "the empty set",
      "no solution",
      "no solutions",
      "no real solution",
      "no real solutions",
      "there is no solution",
      "there are no solutions",
    ),
    r"\emptyset",
  ),
  **dict.fromkeys(("all integers", "integers", "the integers", "the set of integers"), r"\Z"),
  **dict.fromkeys(("all natural numbers", "natural numbers", "the natural numbers"), r"\N"),
  **dict.fromkeys(("all rational numbers", "rational numbers", "the rational numbers"), r"\Q"),
}


class End(NamedTuple):
  """An end of an interval: its tokens, and its value if it is constant (it may be infinite)."""

  tokens: Tokens
  value: object | None


class Piece(NamedTuple):
  """An interval or a single point; `low_in` and `high_in` say whether the ends belong to it."""

  low: End
  low_in: bool
  high: End
  high_in: bool


_INFINITY = (Token("command", r"\infty"),)
LEFT = End((Token("symbol", "-"), *_INFINITY), mp.ninf)
RIGHT = End(_INFINITY, mp.inf)
_ALL = (Piece(LEFT, False, RIGHT, False),)


@dataclasses.dataclass(frozen=True)
class Region:
  """A set, and the variable of the inequality that describes it.

  Attributes:
    pieces: disjoint intervals and points, in ascending order.
    variable: "x" for `x > 2`; None if no variable is named.
    name: the name of a set that does not consist of intervals, such as `\\Z`. Then there are no
      pieces.
  """

  pieces: tuple[Piece, ...]
  variable: str | None = None
  name: str | None = None


def _end(tokens: Tokens) -> End:
  """Reads an end of an interval; raises `Unreadable` if it is not an expression."""
  tokens = bare(tokens)
  node = parse(tokens)
  if node.op == "infinity":
    return RIGHT
  if node == Node("neg", (Node("infinity"),)):
    return LEFT
  value = values.value_of(node)
  if value is None:
    return End(tokens, None)
  with mp.workdps(values.DIGITS):
    return End(tokens, number_of(value) + 0)


def _ordered(pieces: tuple[Piece, ...]) -> bool:
  return all(piece.low.value is not None and piece.high.value is not None for piece in pieces)


def _same_place(one: End, other: End) -> bool:
  a, b = _value(one), _value(other)
  if mp.isinf(a) or mp.isinf(b):
    return a == b
  return abs(a - b) <= max(abs(a), abs(b)) * values.EXACT


def _before(one: End, other: End) -> bool:
  return not _same_place(one, other) and _value(one) < _value(other)


def _value(end: End) -> Any:
  """The value of an end that is known to have one (`_ordered`)."""
  assert end.value is not None
  return end.value


def _united(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
  """The pieces, disjoint and in ascending order; unchanged if their ends have no order."""
  if len(pieces) > MAX_PIECES:
    raise Unreadable("too many intervals")
  if not _ordered(pieces):
    return pieces
  some = [
    piece
    for piece in pieces
    if _before(piece.low, piece.high)
    or (_same_place(piece.low, piece.high) and piece.low_in and piece.high_in)
  ]
  some.sort(key=lambda piece: (piece.low.value, not piece.low_in))
  out: list[Piece] = []
  for piece in some:
    last = out[-1] if out else None
    touches = last and (
      _before(piece.low, last.high)
      or (_same_place(piece.low, last.high) and (piece.low_in or last.high_in))
    )
    if not last or not touches:
      out.append(piece)
    elif _before(last.high, piece.high):
      out[-1] = last._replace(high=piece.high, high_in=piece.high_in)
    elif _same_place(last.high, piece.high):
      out[-1] = last._replace(high_in=last.high_in or piece.high_in)
    if touches and _same_place(out[-1].low, piece.low) and piece.low_in:
      out[-1] = out[-1]._replace(low_in=True)
  return tuple(out)


def _complement(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
  if not _ordered(pieces):
    raise Unreadable("intervals without an order")
  out, low, low_in = [], LEFT, False
  for piece in _united(pieces):
    out.append(Piece(low, low_in, piece.low, not piece.low_in))
    low, low_in = piece.high, not piece.high_in
  out.append(Piece(low, low_in, RIGHT, False))
  return _united(tuple(p for p in out if not mp.isinf(p.low.value) or p.low != p.high))


def _intersection(one: tuple[Piece, ...], other: tuple[Piece, ...]) -> tuple[Piece, ...]:
  return _complement(_complement(one) + _complement(other))


def _joined(
  regions: list[Region | None], combine: Callable[[tuple, tuple], tuple]
) -> Region | None:
  """Combines regions by `combine`; None if one is missing or has a name, or variables differ."""
  plain = [region for region in regions if region is not None and not region.name]
  if not regions or len(plain) < len(regions):
    return None
  variables = {region.variable for region in plain} - {None}
  if len(variables) > 1:
    return None
  pieces = plain[0].pieces
  for region in plain[1:]:
    pieces = combine(pieces, region.pieces)
  return Region(_united(pieces), next(iter(variables), None))


def _union(one: tuple, other: tuple) -> tuple:
  return one + other


def _difference(one: tuple, other: tuple) -> tuple:
  return _intersection(one, _complement(other))


def read(tokens: Tokens) -> Region | None:
  """The set that the tokens describe; None if they describe something else."""
  tokens = _trimmed(bare(tokens))
  if not tokens:
    return None
  try:
    return _read(tokens)
  except Unreadable:
    return None


def _trimmed(tokens: Tokens) -> Tokens:
  while tokens and tokens[-1].text in (",", ";", "."):
    tokens = tokens[:-1]
  while tokens and tokens[0].text in (",", ";"):
    tokens = tokens[1:]
  return tokens


def _read(tokens: Tokens) -> Region | None:
  named = _phrase(tokens)
  if named:
    return named
  for word, combine in (("or", _union), ("and", _intersection)):
    parts = split(tokens, (word,))
    if len(parts) > 1:
      return _joined([_one(_trimmed(part)) for part in parts], combine)
  parts = split(tokens, ",")
  if len(parts) > 1 and any(part[-1:] and part[-1].text == r"\R" for part in parts):
    return _joined([_one(part) for part in parts], _intersection)  # x \in \R, x \ne 3
  return _one(tokens)


def phrase(tokens: Tokens) -> str | None:
  """The set that words name: `\\R` for "all real numbers"; None for other tokens."""
  if not tokens or any(token.kind not in ("word", "letters") for token in tokens):
    return None
  return _PHRASES.get(" ".join(token.text.lower() for token in tokens))


def _phrase(tokens: Tokens) -> Region | None:
  """A set that words name, which may exclude points: "all real numbers except 2"."""
  at = next((i for i, token in enumerate(tokens) if token.text.lower() == "except"), len(tokens))
  head, rest = tokens[:at], tokens[at + 1 :]
  if head and head[-1].text == ",":
    head = head[:-1]
  name = phrase(head)
  if name is None:
    return None
  region = _named(name)
  if at == len(tokens):
    return region
  if not rest or region is None or region.name:
    return None
  return _joined([region, _points(_listed(_value_after_name(rest)))], _difference)


def _value_after_name(tokens: Tokens) -> Tokens:
  sides = names.sides(tokens)
  return sides[1] if len(sides) == 2 and names.name(sides[0]) else tokens


def _listed(tokens: Tokens) -> list[Tokens]:
  return [part for part in split(tokens, (",", "and", "or")) if part]


def _points(parts: list[Tokens]) -> Region:
  ends = [_end(part) for part in parts]
  return Region(_united(tuple(Piece(end, True, end, True) for end in ends)))


def _named(name: str) -> Region | None:
  if name == r"\R":
    return Region(_ALL)
  if name == r"\emptyset":
    return Region(())
  return Region((), None, name) if name in (r"\Z", r"\N", r"\Q", r"\C") else None


def _one(tokens: Tokens) -> Region | None:
  """Reads a set whose description contains neither "or" nor "and"."""
  if not tokens:
    return None
  parts = split(tokens, (r"\in",))
  if len(parts) == 2:
    variable = _variable(parts[0])
    region = _read(bare(parts[1])) if variable and parts[1] else None
    return region and dataclasses.replace(region, variable=variable)
  for sign, combine in ((r"\cup", _union), (r"\cap", _intersection)):
    parts = split(tokens, (sign,))
    if len(parts) > 1:
      return _joined([_one(bare(part)) for part in parts], combine)
  parts = split(tokens, (r"\setminus",))
  if len(parts) == 1 and tokens[0].text == r"\R":
    parts = split(tokens, ("-",))
  if len(parts) > 1:
    return _joined([_one(bare(part)) for part in parts], _difference)
  return _atom(tokens) or _relation(tokens)


def _atom(tokens: Tokens) -> Region | None:
  if len(tokens) == 1:
    return _named(tokens[0].text) or _phrase(tokens)
  if tokens[0].text == r"\R" and len(tokens) <= 5:
    return _half_line("".join(token.text for token in tokens[1:] if token.text not in "{}"))
  group = enclosed(tokens)
  if not group:
    return None
  left, inside, right = group
  if left == r"\{":
    if not inside:
      return Region(())
    halves = split(inside, ("|", ":"))
    return _builder(*halves) if len(halves) == 2 else _points(_listed(inside))
  parts = split(inside, ",;")
  if len(parts) != 2 or not all(parts):
    return _one(inside) if (left, right) == ("(", ")") and len(parts) == 1 else None
  return _interval(Piece(_end(parts[0]), left == "[", _end(parts[1]), right == "]"))


def _interval(piece: Piece, variable: str | None = None) -> Region | None:
  """One interval; None if its ends are in the wrong order: then it is a pair of numbers."""
  if _ordered((piece,)) and not _united((piece,)):
    return None
  return Region((piece,), variable)


def _half_line(script: str) -> Region | None:
  r"""The half line that a script on `\R` means: the positive numbers for `\R^+` and `\R_{>0}`."""
  zero = End((Token("number", "0"),), mp.mpf(0))
  if script in ("^+", "_>0", "_+"):
    return Region((Piece(zero, False, RIGHT, False),))
  if script in ("^-", "_<0", "_-"):
    return Region((Piece(LEFT, False, zero, False),))
  if script == "_>=0":
    return Region((Piece(zero, True, RIGHT, False),))
  if script == "_<=0":
    return Region((Piece(LEFT, False, zero, True),))
  return None


def _builder(head: Tokens, condition: Tokens) -> Region | None:
  r"""The set `\{x \in \R \mid x > 2\}`. A comma in the condition means "and"."""
  halves = split(head, (r"\in",))
  variable = _variable(halves[0])
  if not variable or len(halves) > 2:
    return None
  regions = [_read(part) for part in split(condition, ",") if part]
  if len(halves) == 2:
    regions.append(_one(bare(halves[1])))
  region = _joined(regions, _intersection)
  if region is None or region.variable not in (None, variable):
    return None
  return dataclasses.replace(region, variable=None)  # it is bound: its name does not matter


def _variable(tokens: Tokens) -> str | None:
  r"""The name of the variable that the tokens are: `x`, `\theta`, `x_1` or `f(x)`; else None."""
  tokens = bare(tokens)
  if not tokens:
    return None
  first = tokens[0]
  symbol = first.kind in ("letters", "word") and len(first.text) == 1
  if not symbol and not (first.kind == "command" and first.text[1:] in GREEK - {"pi"}):
    return None
  return names.name(tokens)


def relation(tokens: Tokens) -> tuple[list[Tokens], list[str]] | None:
  """`(sides, signs)` of a chain of inequalities; None if no sign of inequality is there."""
  sides, signs, start, depth = [], [], 0, 0
  for at, token in enumerate(tokens):
    depth += (token.text in "([{" or token.text == r"\{") - (token.text in (")", "]", "}", r"\}"))
    if not depth and token.text in SIGNS and token.kind == "symbol":
      sides.append(tuple(tokens[start:at]))
      signs.append(token.text)
      start = at + 1
  return ([*sides, tuple(tokens[start:])], signs) if signs else None


_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def _relation(tokens: Tokens) -> Region | None:
  r"""The solutions of `x > 2`, `2 < x \le 5`, `x \ne 3`, or of the equation `x = 3`."""
  found = relation(tokens)
  if not found:
    sides = names.sides(tokens)
    variable = _variable(sides[0]) if len(sides) == 2 else None
    points = _points([sides[1]]) if variable and sides[1] else None
    return points and dataclasses.replace(points, variable=variable)
  sides, signs = found
  if not all(sides) or len(sides) > 3:
    return None
  if len(sides) == 3:
    low, middle, high = sides
    variable = _variable(middle)
    if signs[0] in (">", ">=") and signs[1] in (">", ">="):
      low, high, signs = high, low, [_TURNED[signs[1]], _TURNED[signs[0]]]
    if not variable or not set(signs) <= {"<", "<="}:
      return None
    return _interval(Piece(_end(low), signs[0] == "<=", _end(high), signs[1] == "<="), variable)
  (left, right), (sign,) = sides, signs
  variable = _variable(left)
  if not variable:
    variable, right, sign = _variable(right), left, _TURNED[sign]
  if not variable:
    return None
  end, closed = _end(right), "=" in sign
  if sign == "!=":
    return Region(_complement((Piece(end, True, end, True),)), variable)
  if "<" in sign:
    return Region((Piece(LEFT, False, end, closed),), variable)
  return Region((Piece(end, closed, RIGHT, False),), variable)


def equal(gold: Region, answer: Region, same_end: Callable[[Tokens, Tokens], bool]) -> bool:
  """Whether two sets are equal. Their variables are not compared.

  Args:
    gold, answer: the two sets.
    same_end: whether two ends of intervals, given as tokens, are equal.
  """
  if gold.name or answer.name:
    return gold.name == answer.name
  if len(gold.pieces) != len(answer.pieces):
    return False
  left = list(answer.pieces)
  for piece in gold.pieces:
    for at, other in enumerate(left):
      if (
        (piece.low_in, piece.high_in) == (other.low_in, other.high_in)
        and _same_end(piece.low, other.low, same_end)
        and _same_end(piece.high, other.high, same_end)
      ):
        del left[at]
        break
    else:
      return False
  return True


def _same_end(one: End, other: End, same_end: Callable[[Tokens, Tokens], bool]) -> bool:
  infinite = [end.value is not None and mp.isinf(end.value) for end in (one, other)]
  if any(infinite):
    return all(infinite) and one.value == other.value
  return written(one.tokens) == written(other.tokens) or same_end(one.tokens, other.tokens)
