r"""Plain numbers in the ways in which people write them. They are read exactly, without the parser.

| written | read as |
|---|---|
| `1,234.5`, `1{,}234.5`, `1 234.5` | a number with grouped digits |
| `-3/4`, `\frac{3}{4}`, `1\frac{3}{4}`, `1 3/4` | fractions and mixed numbers |
| `4.5e33`, `4.5 x 10^33`, `10^{-3}` | powers of ten |
| `0.1\overline{6}` | a repeating decimal |
| `60\%` | 60 with a percent sign |
| `1\,000,99 €`, `1.234,56`, `3{,}14` | decimal commas, if the comma can be nothing else |
| `101_2`, `(101)_{2}`, `1A_{16}`, "101 base 2" | digits with their base |
"""

from __future__ import annotations

import dataclasses
import string
from fractions import Fraction

from igpo_jax.rewards.math.tokens import Token, Tokens, enclosed

MAX_DIGITS = 400  # of a number, and the largest decimal exponent; the parser reads larger ones
TOLERANCE = Fraction(1, 10**6)  # relative; for values that no finite decimal can equal


@dataclasses.dataclass(frozen=True)
class Number:
  """A number and how it was written.

  Attributes:
    value: the exact value; 50 for "50%".
    decimal: whether it has a decimal point or an exponent, so that it may have been rounded.
    percent: whether a percent sign follows.
    base: the base that is written beside it, or None.
    digits: the digits as text, if there is a base; else "".
  """

  value: Fraction
  decimal: bool = False
  percent: bool = False
  base: int | None = None
  digits: str = ""


class _Reader:
  """Reads tokens from the left. Its methods return None if what they look for is not there."""

  def __init__(self, tokens: Tokens):
    self.tokens = tokens
    self.at = 0

  def text(self, ahead: int = 0) -> str:
    at = self.at + ahead
    return self.tokens[at].text if at < len(self.tokens) else ""

  def kind(self, ahead: int = 0) -> str:
    at = self.at + ahead
    return self.tokens[at].kind if at < len(self.tokens) else ""

  def sign(self) -> int:
    if self.text() in ("+", "-"):
      self.at += 1
      return -1 if self.text(-1) == "-" else 1
    return 1

  def literal(self) -> Token | None:
    if self.kind() != "number" or len(self.text()) > MAX_DIGITS:
      return None
    self.at += 1
    return self.tokens[self.at - 1]

  def power_of_ten(self) -> int | None:
    r"""The exponent of `10^{-3}`, `10^-3` and `10^3`."""
    if self.text() != "10" or self.text(1) != "^":
      return None
    self.at += 2
    close = {"{": "}", "(": ")"}.get(self.text())
    self.at += close is not None
    sign, digits = self.sign(), self.literal()
    if not digits or not digits.text.isdigit() or len(digits.text) > 6:
      return None
    if close:
      if self.text() != close:
        return None
      self.at += 1
    return sign * int(digits.text)

  def braced(self) -> tuple[Fraction, bool] | None:
    """A literal that may have a sign and braces: `(value, whether it is a decimal)`."""
    braces = self.text() == "{"
    self.at += braces
    sign, literal = self.sign(), self.literal()
    if literal is None or (braces and self.text() != "}"):
      return None
    self.at += braces
    value = _decimal(literal.text)
    return value and (sign * value[0], value[1])


def _decimal(text: str) -> tuple[Fraction, bool] | None:
  """`(value, whether it is a decimal)` of a literal; None if its exponent is too large."""
  mantissa, _, exponent = text.lower().partition("e")
  if exponent and abs(int(exponent[:9])) > MAX_DIGITS:
    return None
  whole, _, places = mantissa.partition(".")
  value = Fraction(int((whole + places) or "0"), 10 ** len(places))
  if exponent:
    value *= Fraction(10) ** int(exponent)
  return value, bool(places or exponent)


def _repeating(reader: _Reader, start: str) -> Fraction | None:
  r"""The value of `0.1\overline{6}`; `start` is the text before the bar, "0.1"."""
  if "." not in start or "e" in start.lower():
    return None
  reader.at += 1
  braces = reader.text() == "{"
  reader.at += braces
  again = reader.literal()
  if again is None or not again.text.isdigit() or (braces and reader.text() != "}"):
    return None
  reader.at += braces
  whole, _, fixed = start.partition(".")
  scale = Fraction(1, 10 ** len(fixed))
  return (
    int(whole or "0")
    + int(fixed or "0") * scale
    + Fraction(int(again.text), 10 ** len(again.text) - 1) * scale
  )


def _unsigned(reader: _Reader) -> tuple[Fraction, bool] | None:
  """A number without its sign: `(value, whether it is a decimal)`."""
  if reader.text() == "10" and reader.text(1) == "^":
    exponent = reader.power_of_ten()
    return _shifted((Fraction(1), True), exponent)
  if reader.text() == r"\frac":
    return _fraction(reader)
  literal = reader.literal()
  if literal is None:
    return None
  if reader.text() in (r"\overline", r"\bar", r"\dot"):
    value = _repeating(reader, literal.text)
    return value if value is None else (value, False)
  value = _decimal(literal.text)
  if value is None:
    return None
  following = reader.text()
  if following == r"\frac" and literal.text.isdigit():
    return _mixed(value[0], _fraction(reader))
  if following == "/":
    reader.at += 1
    return _divided(value, reader.braced())
  if reader.kind() == "number" and literal.text.isdigit() and reader.text(1) == "/":
    top = reader.braced()
    reader.at += 1
    return _mixed(value[0], _divided(top, reader.braced()))
  times = following in ("*", "x", "X")
  if reader.text(times) == "10" and reader.text(times + 1) == "^":
    reader.at += times
    return _shifted(value, reader.power_of_ten())
  return value


def _shifted(mantissa: tuple[Fraction, bool], exponent: int | None) -> tuple[Fraction, bool] | None:
  if exponent is None or abs(exponent) > MAX_DIGITS:
    return None
  return mantissa[0] * Fraction(10) ** exponent, mantissa[1] or exponent != 0


def _fraction(reader: _Reader) -> tuple[Fraction, bool] | None:
  r"""`\frac{3}{4}` and `\frac34`."""
  reader.at += 1
  if reader.kind() == "number" and len(reader.text()) > 1:
    both = reader.literal()
    if both is None or not both.text.isdigit() or len(both.text) > 2:
      return None
    top, bottom = ((Fraction(int(digit)), False) for digit in both.text)
    return _divided(top, bottom)
  top = reader.braced()
  if reader.kind() == "number" and len(reader.text()) > 1:
    return None  # \frac{1}23 is a half times three
  return _divided(top, reader.braced())


def _divided(
  top: tuple[Fraction, bool] | None, bottom: tuple[Fraction, bool] | None
) -> tuple[Fraction, bool] | None:
  if top is None or bottom is None or not bottom[0]:
    return None
  return top[0] / bottom[0], False


def _mixed(whole: Fraction, part: tuple[Fraction, bool] | None) -> tuple[Fraction, bool] | None:
  return part and (whole + part[0], False) if part and part[0] >= 0 else None


def _grouped_by_blanks(tokens: Tokens) -> Tokens:
  """ "10 080" as one token; other tokens unchanged."""
  first, rest = tokens[0], tokens[1:]
  if (
    len(rest)
    and len(first.text) <= 3
    and first.text.isdigit()
    and all(t.kind == "number" and len(t.text.split(".")[0]) == 3 for t in rest)
    and all(t.text.isdigit() for t in rest[:-1])
  ):
    return (first._replace(text="".join(t.text for t in tokens)),)
  return tokens


def _decimal_comma(tokens: Tokens, money: bool) -> Tokens:
  """ "1.234,56", and "3,50" beside a currency, as one token with a decimal point."""
  if len(tokens) != 3 or tokens[1].text != "," or not tokens[2].text.isdigit() or tokens[2].gap:
    return tokens
  whole, places = tokens[0].text, tokens[2].text
  grouped = whole.split(".")
  if len(grouped) == 2 and len(grouped[1]) == 3 and 0 < len(grouped[0]) <= 3 and len(places) != 3:
    whole = "".join(grouped)
  elif not (money and whole.isdigit() and len(places) in (1, 2)):
    return tokens
  return (tokens[0]._replace(text=f"{whole}.{places}"),)


def _with_base(tokens: Tokens) -> Number | None:
  r"""A number with its base, such as `101_2`, `(101)_{2}`, `\text{1A}_{16}` or "101 base 2"."""
  texts = [token.text for token in tokens]
  at = next((i for i, text in enumerate(texts) if text in ("_", "base")), 0)
  if not at:
    return None
  inside = tokens[at + 1 :]
  before = tokens[:at]
  if before[-1].text == "in":
    before = before[:-1]
  if before and before[-1].text == "(" and inside and inside[-1].text == ")":  # 101 (base 2)
    before, inside = before[:-1], inside[:-1]
  group = enclosed(inside)
  while group and group[0] in "({":
    inside = group[1]
    group = enclosed(inside)
  if inside and inside[0].text == "base":
    inside = inside[1:]
  if len(inside) != 1:
    return None
  base = _BASES.get(inside[0].text.lower())
  if base is None and inside[0].text.isdigit() and len(inside[0].text) <= 2:
    base = int(inside[0].text)
  if before[0].text in (r"\overline", r"\underline"):
    before = before[1:]
  group = enclosed(before)
  while group and group[0] in "({":
    before = group[1]
    group = enclosed(before)
  digits = "".join(token.text for token in before).lower()
  whole, _, places = digits.partition(".")
  allowed = (string.digits + string.ascii_lowercase)[:base]
  if (
    base is None
    or not 2 <= base <= 36
    or not whole
    or len(digits) > MAX_DIGITS
    or not set(whole + places) <= set(allowed)
    or any(token.kind == "word" and not token.text.isalnum() for token in before)
  ):
    return None
  value = Fraction(int(whole + places, base), base ** len(places))
  return Number(value, base=base, digits=digits)


_BASES = {
  name: value
  for name, value in zip(
    "two three four five six seven eight nine ten eleven twelve sixteen".split(),
    (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16),
    strict=True,
  )
}


def read(tokens: Tokens, *, money: bool = False) -> Number | None:
  """Reads one plain number.

  Args:
    tokens: the whole answer, without its unit.
    money: whether a currency stood beside it. Then the comma of "3,50" is a decimal comma.

  Returns:
    The number; None if the tokens are not exactly one plain number.
  """
  if not tokens or len(tokens) > 40:
    return None
  based = _with_base(tokens)
  if based:
    return based
  reader = _Reader(tokens)
  sign = reader.sign()
  percent = tokens[-1].text == "%"
  rest = tokens[reader.at : len(tokens) - percent]
  if not rest:
    return None
  reader = _Reader(_decimal_comma(_grouped_by_blanks(rest), money))
  value = _unsigned(reader)
  if value is None or reader.at != len(reader.tokens):
    return None
  return Number(sign * value[0], value[1], percent)


def scaled(number: Number, scale: Fraction) -> Number:
  """The number, multiplied by `scale`: a million for "5 million"."""
  return number if scale == 1 else dataclasses.replace(number, value=number.value * scale)


def terminates(value: Fraction) -> bool:
  """Whether a finite decimal equals the value: 1/4 has one, 1/3 has none."""
  bottom = value.denominator
  for prime in (2, 5):
    while bottom % prime == 0:
      bottom //= prime
  return bottom == 1


def close(one: Fraction, other: Fraction, decimal_one: bool, decimal_other: bool) -> bool:
  """Whether two values are equal, or one is a decimal that rounds the other.

  A decimal rounds only what no finite decimal equals: 0.333333 is 1/3, but 0.124999 is not 1/8.

  Args:
    one, other: exact values.
    decimal_one, decimal_other: whether each was written as a decimal.
  """
  if one == other:
    return True
  if decimal_one == decimal_other:
    return False
  exact = other if decimal_one else one
  if terminates(exact):
    return False
  return abs(one - other) <= TOLERANCE * abs(exact)


def equal(gold: Number, answer: Number) -> bool:
  """Whether the answer equals the gold number.

  60% equals 60 and 0.6. A number without a base is compared with the digits of one that has a base.
  """
  if gold.base or answer.base:
    if gold.base and answer.base:
      return (gold.base, gold.value) == (answer.base, answer.value)
    based, other = (gold, answer) if gold.base else (answer, gold)
    return based.digits.isdigit() and other.value == int(based.digits) and not other.percent
  if close(gold.value, answer.value, gold.decimal, answer.decimal):
    return True
  if gold.percent == answer.percent:
    return False
  g, a = (n.value / 100 if n.percent else n.value for n in (gold, answer))
  return close(g, a, gold.decimal, answer.decimal)
