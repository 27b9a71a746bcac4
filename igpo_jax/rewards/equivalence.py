"""Whether two written answers are the same mathematical object."""

from __future__ import annotations


def quick(gold: str, answer: str) -> bool | None:
  """Decides without a parser where that is certain; None where it is not."""
  return True if gold.strip() == answer.strip() else None


def compare(gold: str, answer: str) -> tuple[bool, bool]:
  """`(parsed, equal)`. May take for ever: run it in `pool.Pool`."""
  import math_verify

  golds = math_verify.parse(f"${gold}$", parsing_timeout=None)
  answers = math_verify.parse(f"${answer}$", parsing_timeout=None)
  if not golds or not answers:
    return False, False
  return True, bool(math_verify.verify(golds, answers, timeout_seconds=None))


def warm_up() -> None:
  """Imports the parser and fills its tables, so that forked workers start ready."""
  compare(r"\frac{1}{2}", "0.5")
