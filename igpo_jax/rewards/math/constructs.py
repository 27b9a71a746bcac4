r"""Parsing of commands that have arguments: fractions, roots, sums, integrals, limits, matrices.

Each function is called with the parser behind the command's own token. It reads the arguments
and returns the tree. All of them raise `Unreadable` if the arguments are incomplete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpo_jax.rewards.math import names
from igpo_jax.rewards.math.tokens import (
  CLOSING,
  MATRICES,
  OPENING,
  Tokens,
  Unreadable,
  split,
  written,
)
from igpo_jax.rewards.math.tree import Node, number
from igpo_jax.rewards.math.words import FUNCTIONS

if TYPE_CHECKING:
  from igpo_jax.rewards.math.parser import Parser

MAX_CELLS = 64  # of one matrix


def fraction(parser: Parser) -> Node:
  r"""`\frac{a}{b}` is a quotient; `\frac{dy}{dx}` is one symbol."""
  start = parser.at
  if parser.text() == "{":
    top = parser.inside(parser.at + 1)
    bottom = parser.inside(parser.at + 1) if parser.text() == "{" else ()
    if bottom and names.is_derivative(top, bottom):
      return Node("symbol", (f"d {written(top)}/{written(bottom)}".replace(" ", ""),))
    parser.at = start
  return Node("div", (parser.argument(), parser.argument()))


def root(parser: Parser) -> Node:
  r"""`\sqrt{x}`, `\sqrt[3]{x}` and `\sqrt 10`, which is the root of ten, unlike in TeX."""
  degree = number(2)
  if parser.text() == "[":
    degree = parser.tree(parser.inside(parser.at + 1))
  if parser.text() in ("(", "{"):
    return Node("root", (degree, parser.tree(parser.inside(parser.at + 1))))
  if parser.kind() == "letters":
    parser.first_letter()
  return Node("root", (degree, parser.primary()))


def _scripts(parser: Parser) -> tuple[Tokens, Node | None]:
  """The tokens of a subscript and the tree of a superscript, which may come in either order."""
  lower: Tokens = ()
  upper = None
  while parser.text() in ("_", "^"):
    if parser.text() == "^":
      parser.at += 1
      upper = parser.exponent()
    else:
      parser.at += 1
      if parser.text() == "{":
        lower = parser.inside(parser.at + 1)
      else:
        sign = parser.text() in ("+", "-")
        lower = tuple(parser.tokens[parser.at : parser.at + 1 + sign])
        parser.at += 1 + sign
  return lower, upper


def repeated(parser: Parser, op: str) -> Node:
  r"""`\sum_{k=1}^{n} ...` and `\prod_{k=1}^{n} ...`; `op` is "sum" or "product"."""
  lower, upper = _scripts(parser)
  halves = split(lower, "=")
  if len(halves) != 2 or len(halves[0]) != 1 or upper is None:
    raise Unreadable("a sum or product without bounds")
  return Node(op, (halves[0][0].text, parser.tree(halves[1]), upper, parser.product()))


def integral(parser: Parser) -> Node:
  r"""`\int_a^b ... dx`: the first "d" with a letter after it ends the integrand."""
  lower, upper = _scripts(parser)
  if not lower or upper is None:
    raise Unreadable("an integral without bounds")
  depth = 0
  for end in range(parser.at, len(parser.tokens)):
    token = parser.tokens[end]
    depth += (token.text in OPENING) - (token.text in CLOSING)
    if depth or token.kind not in ("letters", "word"):
      continue
    body = tuple(parser.tokens[parser.at : end])
    if token.text == "d" and end + 1 < len(parser.tokens):
      variable, parser.at = parser.tokens[end + 1].text, end + 2
      break
    if len(token.text) > 1 and token.text[-2] == "d" and token.text not in FUNCTIONS:
      variable, parser.at = token.text[-1], end + 1
      body += (token._replace(text=token.text[:-2]),) if len(token.text) > 2 else ()
      break
  else:
    raise Unreadable("an integral without a variable")
  inner = parser.tree(body) if body else number(1)
  return Node("integral", (variable, parser.tree(lower), upper, inner))


def limit(parser: Parser) -> Node:
  r"""`\lim_{x \to a} ...`."""
  lower, upper = _scripts(parser)
  halves = split(lower, (r"\to",))
  if len(halves) != 2 or len(halves[0]) != 1 or upper is not None:
    raise Unreadable("a limit of nothing")
  return Node("limit", (halves[0][0].text, parser.tree(halves[1]), parser.product()))


def matrix(parser: Parser) -> Node:
  """A matrix, or the determinant that vertical bars stand for; begins at its "begin" token."""
  kind = parser.text().split()[1]
  end = parser.at + 1
  while end < len(parser.tokens) and parser.tokens[end].kind != "matrix":
    end += 1
  if end == len(parser.tokens) or parser.tokens[end].text != f"end {kind}" or kind not in MATRICES:
    raise Unreadable("a matrix that never ends, or in a matrix")
  rows = rows_of(tuple(parser.tokens[parser.at + 1 : end]))
  parser.at = end + 1
  node = Node("matrix", tuple(tuple(parser.tree(cell) for cell in row) for row in rows))
  return Node("abs", (node,)) if kind in ("vmatrix", "Vmatrix") else node


def rows_of(tokens: Tokens) -> list[list[Tokens]]:
  """The cells of a matrix, row by row.

  Args:
    tokens: what stands between its begin and its end.

  Raises:
    Unreadable: no cells, more than `MAX_CELLS`, or rows of different lengths.
  """
  rows = [split(row, "&") for row in split(tokens, (r"\\",)) if row]
  if not rows or sum(map(len, rows)) > MAX_CELLS or len({len(row) for row in rows}) != 1:
    raise Unreadable("no matrix, or too large a one")
  return rows
