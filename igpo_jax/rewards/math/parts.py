r"""The parts of an answer, read from its tokens.

Parts are names and values, the elements of sets, lists and tuples, the cells of matrices, and the
sides of equations. This module compares nothing (`equivalence` does) and evaluates nothing.
"""

from __future__ import annotations

import functools

from igpo_jax.rewards.math import names, numbers, sets, units, words
from igpo_jax.rewards.math.constructs import rows_of
from igpo_jax.rewards.math.parser import parse
from igpo_jax.rewards.math.tokens import MATRICES, Token, Tokens, Unreadable, enclosed, split
from igpo_jax.rewards.math.tree import Node

MAX_PARTS = 64  # elements of one set or tuple


class Side:
  """One of the two answers, with what the rules need to know about it, computed once.

  Args:
    tokens: of the answer.
  """

  def __init__(self, tokens: Tokens):
    self.tokens = tokens

  @functools.cached_property
  def unit(self) -> units.Split:
    """The answer, split into its value and its unit."""
    return units.split(self.tokens)

  @functools.cached_property
  def number(self) -> numbers.Number | None:
    """The number, if the answer without its unit is a plain number; else None."""
    unit = self.unit
    number = numbers.read(unit.core, money=unit.money)
    return number and numbers.scaled(number, unit.scale)

  @functools.cached_property
  def text(self) -> str | None:
    """The answer's words in lower case, if it is a text; None for numbers and expressions."""
    return None if self.number else words.text_of(self.tokens)

  @functools.cached_property
  def choice(self) -> tuple[str, bool, Tokens] | None:
    """`(letter, marked, option)` of a multiple choice, else None; see `words.choice`."""
    return words.choice(self.tokens)


def is_list(tokens: Tokens) -> bool:
  """Whether commas, semicolons, "and" or "or" separate several elements."""
  return len(split(tokens, (",", ";", "and", "or"))) > 1


def concluded(tokens: Tokens) -> tuple[list[str], Tokens]:
  """`(names, value)` of an equation with a name on one side.

  "x = 5" gives (["x"], 5), "(p, q) = (3, 2)" gives (["p", "q"], (3, 2)), and "x = 2 + 3 = 5" gives
  (["x"], 5). Anything else has no names and is its own value.
  """
  if is_list(tokens):
    return [], tokens
  sides = names.sides(tokens)
  if len(sides) == 1 and len(split(sides[0], (r"\approx",))) == 2:
    exact, rounded = split(sides[0], (r"\approx",))
    if not exact or not rounded:
      return [], exact or rounded
    name = names.name(exact)
    return ([name], rounded) if name else ([], exact)
  if len(sides) > 1 and all(sides):
    for left, value in ((sides[0], sides[-1]), (sides[-1], sides[0])):
      if left is sides[-1] and len(sides) > 2:
        break
      found = names.names_of(left) or list(filter(None, [names.name(left)]))
      if found:
        return found, split(value, (r"\approx",))[0] or value
  return [], tokens if len(sides) > 1 else sides[0]


def reordered(golds: list[str], answers: list[str], value: Tokens) -> Tokens | None:
  """The tuple `value`, reordered from the order of names `answers` to that of `golds`.

  Returns:
    The tokens; None if the names differ or `value` is not a tuple of as many elements.
  """
  group = enclosed(value)
  parts = split(group[1], ",") if group else []
  if sorted(golds) != sorted(answers) or len(parts) != len(golds) or len(set(golds)) < len(golds):
    return None
  comma = (Token("symbol", ","),)
  inside: Tokens = ()
  for name in golds:
    inside += (comma if inside else ()) + parts[answers.index(name)]
  return (value[0], *inside, value[-1])


def member(tokens: Tokens) -> Tokens:
  r"""The set `\{1, 2\}` of `x \in \{1, 2\}`; any other tokens unchanged."""
  parts = split(tokens, (r"\in",))
  if len(parts) == 2 and names.name(parts[0]) and parts[1] and parts[1][0].text == r"\{":
    return parts[1]
  return tokens


def cells(tokens: Tokens) -> list[list[Tokens]] | None:
  """The cells of one written-out matrix, row by row; None for anything else."""
  tokens = unwrapped(tokens)
  group = enclosed(tokens)
  while group and len(split(group[1], ",;")) == 1 and "matrix" in (t.kind for t in group[1]):
    tokens = group[1]
    group = enclosed(tokens)
  inner = [token.text for token in tokens if token.kind == "matrix"]
  if len(inner) != 2 or tokens[0].kind != "matrix" or tokens[-1].kind != "matrix":
    return None
  kind = inner[0].split()[1]
  if kind not in MATRICES or kind.startswith(("v", "V")):
    return None
  return rows_of(tokens[1:-1])


def unwrapped(tokens: Tokens) -> Tokens:
  """The tokens without a unit and without brackets around a single element.

  Raises:
    Unreadable: a multiple ("million") of something that is not a plain number.
  """
  split_off = units.split(tokens)
  if split_off.scale != 1:
    raise Unreadable("a multiple of what is no plain number")
  tokens = split_off.core
  group = enclosed(tokens)
  while group and (group[0], group[2]) in (("(", ")"), ("{", "}"), ("[", "]")):
    if len(split(group[1], ",;")) > 1 or not group[1]:
      break
    tokens = group[1]
    group = enclosed(tokens)
  return tokens


def collection(side: Side) -> tuple[str, list[Tokens]] | None:
  r"""`(kind, elements)` of a set, a list, a tuple or an interval; None for a single element.

  The kind is "set" for `\{1, 2\}`, "list" for "1, 2", "1 or 2" and `1 \pm 2`, and for a tuple
  or an interval its two brackets, such as "()" or "[)".
  """
  tokens = words.bare(side.tokens)
  group = enclosed(tokens)
  if group and group[0] == r"\{":
    return "set", _spread(listed(group[1]) if group[1] else [])
  if group:
    parts = split(group[1], ",;")
    if len(parts) > 1:
      return group[0] + group[2], _checked(parts)
    tokens = unwrapped(tokens)
  if side.number:
    return None
  parts = _spread(listed(tokens))
  return ("list", parts) if len(parts) > 1 else None


def listed(tokens: Tokens) -> list[Tokens]:
  """The elements that commas, semicolons, "and" and "or" separate."""
  parts = split(tokens, (",", ";", "and", "or"))
  if any(token.text in ("and", "or") for token in tokens):
    parts = [part for part in parts if part]  # ", and" separates once
  return parts


def _checked(parts: list[Tokens]) -> list[Tokens]:
  if len(parts) > MAX_PARTS or not all(parts):
    raise Unreadable("empty or too many elements")
  return parts


def _spread(parts: list[Tokens]) -> list[Tokens]:
  r"""Replaces each `a \pm b` by its two values."""
  spread: list[Tokens] = []
  for part in _checked(parts):
    if any(token.text == r"\pm" for token in part):
      for plus, minus in (("+", "-"), ("-", "+")):
        signs = {r"\pm": plus, r"\mp": minus}
        one = tuple(Token("symbol", signs[t.text], t.gap) if t.text in signs else t for t in part)
        spread.append(one)
    else:
      spread.append(part)
  return _checked(spread)


def is_time(tokens: Tokens) -> bool:
  """Whether this is a time of day such as 10:30 rather than a ratio: two digits after the colon."""
  texts = [token.text for token in tokens]
  return len(texts) == 3 and texts[1] == ":" and len(texts[2]) == 2 and texts[2].isdigit()


def relation(tokens: Tokens) -> tuple[Node, str] | None:
  """`(tree of left - right, sign)` of an equation or inequality; None for anything else.

  Raises:
    Unreadable: a chain of more than two sides, or an empty side.
  """
  sides, signs = sets.relation(tokens) or (names.sides(tokens), ["="])
  if len(sides) == 1:
    return None
  if len(sides) != 2 or not all(sides):
    raise Unreadable("a chain of relations")
  left, right = (parse(side) for side in sides)
  return Node("add", (left, Node("neg", (right,)))), signs[0]
