"""Countdown: reach the target with every given number used exactly once.

The gold answer is JSON, `{"numbers": [3, 7, 2], "target": 23}`. The completion's answer
is an equation's left side, such as "3 * 7 + 2", in its last `<answer>` or box. It is
read as a tree of four operations over exact fractions; nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import json
import operator
from fractions import Fraction

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers, registry

MAX_LENGTH = 200  # characters of an expression
_OPERATIONS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
_SIGNS = (
  ("\\times", "*"),
  ("\\cdot", "*"),
  ("\\div", "/"),
  ("\u00d7", "*"),
  ("\u00f7", "/"),
  ("\u2212", "-"),
  ("\\left", ""),
  ("\\right", ""),
  ("$", ""),
)


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
  """`(value, numbers used)` of an expression in + - * / and whole numbers; else None."""
  if len(expression) > MAX_LENGTH or not expression.isascii():
    return None
  used: list[int] = []

  def value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
      return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
      return -value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int:
      used.append(node.value)
      return Fraction(node.value)
    raise ValueError("not arithmetic")

  try:
    return value(ast.parse(expression.strip(), mode="eval").body), used
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
    return None


def _gold(record: Record) -> tuple[list[int], Fraction]:
  try:
    gold = json.loads(record.answer)
    return sorted(map(int, gold["numbers"])), Fraction(gold["target"])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"countdown: the answer of record {record.id!r} must be JSON such as "
      f'{{"numbers": [3, 7, 2], "target": 23}}, not {record.answer!r:.80}'
    ) from error


def _answer(completion: str) -> str | None:
  text = answers.truncate(completion)
  found = answers.extract_tag(text) or answers.extract_boxed(text)
  if found and "boxed" in found:
    found = answers.extract_boxed(found) or found
  return found or None


def _tree(extracted: str | None) -> tuple[Fraction, list[int]] | None:
  if extracted is None:
    return None
  for sign, plain in _SIGNS:
    extracted = extracted.replace(sign, plain)
  return evaluate(extracted.split("=")[0])


@registry.register_verifier("countdown", reads_golds=True)
def verify(completion: str, record: Record) -> registry.Verdict:
  """Correct: uses each number once and is exactly the target."""
  numbers, target = _gold(record)
  extracted = _answer(completion)
  tree = _tree(extracted)
  if tree is None:
    return registry.Verdict(False, extracted, registry.UNPARSEABLE)
  value, used = tree
  return registry.Verdict(value == target and sorted(used) == numbers, extracted, registry.OK)


@registry.register_reward("countdown_numbers")
def uses_numbers(completion: str, record: Record, verdict: registry.Verdict) -> float:
  """1.0 for an expression that uses each number exactly once, whatever it comes to."""
  del completion
  tree = _tree(verdict.extracted)
  return float(tree is not None and sorted(tree[1]) == _gold(record)[0])
