"""The tree of an expression, and what can be told from it without a value."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple


class Node(NamedTuple):
  """A part of an expression.

  Attributes:
    op: "number", "symbol", "call" of an unknown function, "function", "add", "mul", "div",
      "inverse", "pow", "neg", "root", "abs", "factorial", "infinity", "matrix", "sum", "product",
      "integral", "limit".
    args: the parts under it; of a "number" `(value, decimal)`, of a "symbol" its name,
      of a "call" or a "function" its name and then the arguments.
  """

  op: str
  args: tuple[Any, ...] = ()


def number(value: int | Fraction, decimal: bool = False) -> Node:
  """A number as a tree."""
  return Node("number", (Fraction(value), decimal))


def leaves(node: Any) -> Iterator[Node]:
  """The node and all nodes under it."""
  if isinstance(node, Node):
    yield node
    for arg in node.args:
      yield from leaves(arg)
  elif isinstance(node, tuple):
    for arg in node:
      yield from leaves(arg)


def _significant(value: Fraction) -> int:
  """The significant digits of a finite decimal."""
  while value.denominator > 1:
    value *= 10
  return len(str(abs(value.numerator)).strip("0"))


class Facts:
  """What a tree is made of.

  Attributes:
    decimal: it has decimals, of which `rounded` tells whether one may round something.
    free: it has symbols that are no constants.
  """

  def __init__(self, *nodes: Node):
    parts = [leaf for node in nodes for leaf in leaves(node)]
    decimals = [leaf.args[0] for leaf in parts if leaf.op == "number" and leaf.args[1]]
    self.decimal = bool(decimals)
    self.rounded = any(_significant(value) >= 6 for value in decimals)
    self.free = any(
      leaf.op == "call" or (leaf.op == "symbol" and leaf.args[0] not in ("pi", "e", "i"))
      for leaf in parts
    )


def infinite(node: Node) -> int:
  """1 and -1 for the two infinities, 0 for anything else."""
  if node.op == "infinity":
    return 1
  return -infinite(node.args[0]) if node.op == "neg" else 0
