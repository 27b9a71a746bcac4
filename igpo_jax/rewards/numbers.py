"""Plain numbers, as people write answers, read exactly and without a parser."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

MAX_DIGITS = 400  # and decimal exponent: what is larger is left to the worker processes
TOLERANCE = Fraction(1, 10**6)  # relative; only where no finite decimal can be exact


@dataclasses.dataclass(frozen=True)
class Number:
  """A number and how it was written.

  Attributes:
    value: exact; of "50%" it is 50.
    decimal: written with a decimal point or an exponent, so possibly rounded.
    percent: followed by a percent sign.
    base: the base written as a subscript, or None.
  """

  value: Fraction
  decimal: bool = False
  percent: bool = False
  base: int | None = None


_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r"(?:(?:\\times|\\cdot|\*|x) ?)?10 ?\^ ?(?:\{ ?(?P<e1>[-+]?[0-9]+) ?\}|(?P<e2>[0-9]))"
_PLAIN = re.compile(
  rf"(?P<sign>[-+]?) ?(?P<mantissa>{_UNSIGNED})(?:[eE](?P<e0>[-+]?[0-9]+)| ?(?=[\\*x]){_POWER})?"
)
_TEN = re.compile(rf"(?P<sign>[-+]?) ?{_POWER}")
_FRACTION = re.compile(
  rf"(?P<sign>[-+]?) ?(?:(?P<whole>[0-9]+) ?)?\\frac ?\{{ ?(?P<top>[-+]? ?{_UNSIGNED}) ?\}}"
  rf" ?\{{ ?(?P<bottom>[-+]? ?{_UNSIGNED}) ?\}}"
)
_SLASH = re.compile(
  rf"(?P<sign>[-+]?) ?(?:(?P<whole>[0-9]+) )?(?P<top>{_UNSIGNED}) ?/ ?(?P<bottom>{_UNSIGNED})"
)
_REPEATING = re.compile(
  r"(?P<sign>[-+]?)(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)\\overline ?\{ ?(?P<again>[0-9]+) ?\}"
)
_BASE = re.compile(r"(?P<digits>[0-9]+)_(?:\{(?P<b1>[0-9]{1,2})\}|(?P<b2>[0-9]))")
# "12 cm", "5 changes/day": words, or one letter that is a unit of measurement.
_UNIT = re.compile(r" ?(?P<unit>[A-Za-z][A-Za-z.'/ -]*?)(?:\^[23])?$")
_ONE_LETTER_UNITS = frozenset("mgshLJNVWKCAF")
_MULTIPLES = {
  "hundred": 100,
  "thousand": 1000,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
}


def _decimal(text: str) -> Fraction:
  text = text.replace(",", "").replace(" ", "")
  return Fraction(text if not text.startswith(".") else "0" + text)


def _unit_follows(text: str, start: int) -> str | None:
  """The unit that the text from `start` on consists of; None where it is something else."""
  match = _UNIT.fullmatch(text, start)
  if not match:
    return None
  unit = match["unit"].strip()
  spaced = text[start] == " "
  if len(unit) == 1:
    return unit if spaced and unit in _ONE_LETTER_UNITS else None
  return unit if spaced or len(unit) > 2 or unit in ("cm", "mm", "km", "kg", "ft") else None


def _read(text: str) -> Number | None:
  for pattern in (_PLAIN, _TEN):
    match = pattern.fullmatch(text)
    if match:
      groups = match.groupdict()
      exponent = int(next((groups[e] for e in ("e0", "e1", "e2") if groups.get(e)), "0"))
      if abs(exponent) > MAX_DIGITS:
        return None
      mantissa = groups.get("mantissa") or "1"
      value = _decimal(mantissa) * Fraction(10) ** exponent
      return Number(
        -value if match["sign"] == "-" else value, decimal="." in mantissa or exponent != 0
      )
  for pattern in (_FRACTION, _SLASH):
    match = pattern.fullmatch(text)
    if match:
      top, bottom = _decimal(match["top"]), _decimal(match["bottom"])
      if not bottom:
        return None
      value = top / bottom
      if match["whole"]:
        if top < 0 or bottom < 0 or "." in match["top"]:
          return None
        value += int(match["whole"])
      return Number(-value if match["sign"] == "-" else value)
  match = _REPEATING.fullmatch(text)
  if match:
    fixed, again = match["fixed"], match["again"]
    scale = Fraction(1, 10 ** len(fixed))
    value = int(match["whole"] or "0") + int(fixed or "0") * scale
    value += Fraction(int(again), 10 ** len(again) - 1) * scale
    return Number(-value if match["sign"] == "-" else value)
  match = _BASE.fullmatch(text)
  if match:
    return Number(Fraction(int(match["digits"])), base=int(match["b1"] or match["b2"]))
  return None


_LEADING = re.compile(r"[-+]? ?[0-9.][0-9.,]*(?:[ /][0-9.]+)*%?")


def read(text: str) -> Number | None:
  """Reads a cleaned text (`latex.clean`) that is one number, its unit aside; else None.

  Integers, thousands separators, decimals, scientific notation, fractions, mixed numbers,
  repeating decimals, a base as subscript; then a percent sign or a unit in words.
  """
  if len(text) > MAX_DIGITS:
    return None
  scale, percent = 1, False
  if text.endswith("%"):
    text, percent = text[:-1].rstrip(), True
  number = _read(text)
  if number is None:
    head = _LEADING.match(text)
    unit = head and _unit_follows(text, head.end())
    if not unit:
      return None
    percent = percent or head.group().endswith("%")
    scale = _MULTIPLES.get(unit.split()[0].lower(), 1)
    number = _read(head.group().rstrip("%").strip())
    if number is None:
      return None
  return dataclasses.replace(number, value=number.value * scale, percent=percent)


_SENTENCE = re.compile(
  rf"(?P<before>(?:[A-Za-z][A-Za-z'-]*[,:]? )*)(?P<number>-?{_UNSIGNED}%?)"
  r"(?P<after>[A-Za-z ,'-]*)"
)
_TURNED = frozenset(("minus", "negative", "not", "no", "except"))


def only_one(text: str) -> Number | None:
  """The number of a sentence that holds exactly one: 2 of "C costs 2 dollars more than B".

  None for fewer than three words, and where a word turns the number round.
  """
  match = _SENTENCE.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", text))
  if not match:
    return None
  said = f"{match['before']} {match['after']}".lower().replace(",", " ").split()
  if len(said) < 3 or _TURNED.intersection(said) or match["after"][:1].isalpha():
    return None
  return read(match["number"])


def _terminates(value: Fraction) -> bool:
  bottom = value.denominator
  for prime in (2, 5):
    while bottom % prime == 0:
      bottom //= prime
  return bottom == 1


def close(one: Number, other: Number) -> bool:
  """Equal values, or a decimal that rounds what no finite decimal can be equal to."""
  if one.value == other.value:
    return True
  if one.decimal == other.decimal:
    return False
  exact = other if one.decimal else one
  if _terminates(exact.value):
    return False
  return abs(one.value - other.value) <= TOLERANCE * abs(exact.value)


def equal(gold: Number, answer: Number) -> bool:
  """Whether the answer is the gold number: percent signs and a missing base are forgiven."""
  if gold.base and answer.base and gold.base != answer.base:
    return False
  if close(gold, answer):
    return True
  if gold.percent == answer.percent:
    return False
  return close(
    *(dataclasses.replace(n, value=n.value / 100) if n.percent else n for n in (gold, answer))
  )
