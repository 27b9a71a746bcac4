"""The tree of an expression, and its properties that do not need its value."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple


class Node(NamedTuple):
  """A node of the tree of an expression.

  Attributes:
    op: "number", "symbol", "call" of an unknown function, "function", "add", "mul", "div",
      "inverse", "pow", "neg", "root", "abs", "factorial", "infinity", "matrix", "sum", "product",
      "integral", "limit".
    args: the nodes below it. A "number" has (value, whether it is a decimal) instead, a "symbol"
      its name, and a "call" or a "function" its name followed by its arguments.
  """

  op: str
  args: tuple[Any, ...] = ()


def number(value: int | Fraction, decimal: bool = False) -> Node:
  """The tree of a number."""
  return Node("number", (Fraction(value), decimal))


def leaves(node: Any) -> Iterator[Node]:
  """The node and all nodes below it."""
  if isinstance(node, Node):
    yield node
    for arg in node.args:
      yield from leaves(arg)
  elif isinstance(node, tuple):
    for arg in node:
      yield from leaves(arg)


def _significant(value: Fraction) -> int:
  """How many significant digits a finite decimal has."""
  while value.denominator > 1:
    value *= 10
  return len(str(abs(value.numerator)).strip("0"))


class Facts:
  """Properties of one or several trees.

  Attributes:
    decimal: whether a number is written as a decimal.
    rounded: whether a decimal has at least 6 significant digits, so that it may be a rounded value.
    free: whether there are variables or unknown functions.
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
  """1 for infinity, -1 for minus infinity, 0 for anything else."""
  if node.op == "infinity":
    return 1
  return -infinite(node.args[0]) if node.op == "neg" else 0
