r"""Units, currencies and multiples beside a number.

A unit is ignored if only one of the two answers has one: "15 cm" equals 15, and 15 equals
`15\text{ cm}^2`. Two units that contradict each other make the answers different: 15 cm does not
equal 15 m. A multiple, such as "million" or "dozen", is not a unit: it changes the number.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from igpo_jax.rewards.math.tokens import Token, Tokens
from igpo_jax.rewards.math.words import GREEK, MULTIPLES, TURNING, bare, looks_like_word, turns

# One line per unit: its name, then its other spellings.
_SPELLINGS = """
m: meter meters metre metres
cm: centimeter centimeters centimetre centimetres
mm: millimeter millimeters millimetre millimetres
km: kilometer kilometers kilometre kilometres
nm: nanometer nanometers nanometre nanometres
um: micrometer micrometers micron microns
inch: inches in
foot: feet ft
yard: yards yd yds
mile: miles mi
parsec: parsecs pc
kpc:
Mpc:
au: AU
lightyear: ly
g: gram grams gm
kg: kilogram kilograms kgs
mg: milligram milligrams
lb: lbs pound pounds
oz: ounce ounces
ton: tons tonne tonnes
s: second seconds sec secs
ms: millisecond milliseconds
ns: nanosecond nanoseconds
minute: minutes min mins
h: hour hours hr hrs
day: days
week: weeks wk wks
month: months
year: years yr yrs
L: liter liters litre litres l
ml: mL milliliter milliliters millilitre millilitres
gallon: gallons gal
quart: quarts
pint: pints
cup: cups
degree: degrees deg
radian: radians rad rads
celsius: Celsius C
fahrenheit: Fahrenheit F
kelvin: Kelvin K kelvins
dollar: dollars USD usd bucks
cent: cents ¢
euro: euros EUR €
pound_sterling: GBP £
yen: JPY ¥
rupee: rupees Rs INR ₹
won: KRW ₩
yuan: CNY RMB
ruble: rubles RUB ₽
peso: pesos
franc: francs CHF
N: newton newtons Newton Newtons
J: joule joules Joule Joules
kJ: kilojoule kilojoules
W: watt watts Watt Watts
kW: kilowatt kilowatts
V: volt volts Volt Volts
A: amp amps ampere amperes
Hz: hertz Hertz
kHz:
MHz:
Pa: pascal pascals
kPa:
atm: atmosphere atmospheres
mol: mole moles
erg: ergs
dyn: dyne dynes
eV:
keV:
MeV:
GeV:
T: tesla
ohm: ohms Ohm Ohms
bit: bits
byte: bytes
unit: units
"""
# Words of a unit that do not tell units apart.
_SILENT = frozenset("square sq cubic cu squared per each a an of".split())
_EXPANDED = {
  "mph": ("mile", "h"),
  "kph": ("km", "h"),
  "kmh": ("km", "h"),
  "kmph": ("km", "h"),
  "cc": ("cm",),
}
UNITS = {
  spelling: line.split(":")[0]
  for line in _SPELLINGS.split("\n")
  if line
  for spelling in [line.split(":")[0], *line.split(":")[1].split()]
}
_SHORT = frozenset(  # nouns of at most three letters that are counted rather than measured
  "box cup egg hat pen dog cat man men boy car bag can jar toy pie pig hen cow kid pea bus art "
  "gas fly ant bee job cue log map net nut oak pan pot rod row rug sit ski tin van way win mph "
  "kph kmh cc bar pts people".split()
)
CURRENCIES = {"$": "dollar", r"\$": "dollar", "US$": "dollar"} | {
  sign: UNITS[sign] for sign in "€£¥₹₩₽¢"
}


@dataclasses.dataclass(frozen=True)
class Split:
  """An answer, split into its value and its unit.

  Attributes:
    core: the tokens without unit, currency and multiple.
    names: for each part of the unit, its name in `UNITS`; None for an unknown word.
    scale: the factor that a multiple stands for: a million for "5 million".
    money: whether a currency is among the names.
  """

  core: Tokens
  names: tuple[str | None, ...] = ()
  scale: Fraction = Fraction(1)

  @property
  def money(self) -> bool:
    """Whether a currency is among the names."""
    return bool(_MONEY.intersection(self.names))


_MONEY = frozenset(CURRENCIES.values())
_PREFIXES = frozenset("US USD EUR GBP INR Rs CAD AUD HK".split())
_LONGEST = 24  # tokens of a unit
_BETWEEN = frozenset(("/", "*", ".", "-"))  # may stand between the words of a unit
_SIGNS = frozenset(("°", *CURRENCIES))
_LITERAL = frozenset(("+", "-", "/", "^", "*", "{", "}", "%", "x"))


def _is_exponent(tokens: Tokens, at: int) -> int:
  """How many tokens before `at` are the power of a unit: 2 for `^2`, 5 for `^{-1}`, 0 for none."""
  for size in (2, 4, 5):
    piece = [token.text for token in tokens[max(0, at - size) : at]]
    if len(piece) == size and piece[0] == "^":
      inner = piece[1:] if size == 2 else piece[2:-1]
      braced = size == 2 or (piece[1] == "{" and piece[-1] == "}")
      if braced and inner[-1].isdigit() and (len(inner) == 1 or inner[0] == "-"):
        return size
  return 0


def _is_unit_word(token: Token) -> bool:
  text = token.text
  if token.kind not in ("word", "letters") or text.lower() in TURNING["anywhere"]:
    return False
  if token.kind == "word":
    return len(text) > 1 or text in UNITS
  return text in UNITS or text in _SILENT or text in _EXPANDED or _is_noun(text)


def _is_noun(text: str) -> bool:
  return text.lower() in _SHORT or (len(text) > 3 and looks_like_word(text))


def split(tokens: Tokens) -> Split:
  """Splits an answer into its value and its unit, currency and multiple.

  An answer without a unit is its own core. Letters that can be variables are read as variables:
  "6 x y" and "2 g h" have no unit, and neither has `\frac{1}{2} g`.
  """
  core, names = _without_currency(bare(tokens))
  start = _start_of_unit(core)
  core, phrase = core[:start], core[start:]
  if not phrase:
    return Split(core, names)
  said = [token.text.lower() for token in phrase]
  if turns((), said) or TURNING["after"].intersection(said) - {"and", "to"}:
    return Split(tokens)
  scale, words = Fraction(1), []
  for token in phrase:
    text = token.text
    if text.lower() in MULTIPLES:
      if words:
        return Split(tokens)  # "15 cm million"
      scale *= MULTIPLES[text.lower()]
    elif text in ("percent", "percentage") or (text == "cent" and words[-1:] == ["per"]):
      core += (Token("symbol", "%"),)
      words = []
    elif token.kind in ("word", "letters") or text in CURRENCIES:
      words.append(text)
    elif text == "°":
      words.append("degree")
  return Split(core, names + _called(words), scale)


def _called(words: list[str]) -> tuple[str | None, ...]:
  names: list[str | None] = []
  for word in words:
    if word.lower() in _SILENT:
      continue
    names += _EXPANDED.get(word) or [CURRENCIES.get(word) or UNITS.get(word)]
  if "degree" in names and {"celsius", "fahrenheit", "kelvin"}.intersection(names):
    names.remove("degree")
  return tuple(names)


def _without_currency(tokens: Tokens) -> tuple[Tokens, tuple[str | None, ...]]:
  r"""`(tokens, names)` without a currency before the number; a sign may precede it: `-\$5`."""
  sign = tokens[:1] if tokens and tokens[0].text in ("-", "+") else ()
  rest, names = tokens[len(sign) :], []
  while rest and (
    rest[0].text in CURRENCIES
    or (rest[0].text in _PREFIXES and rest[1:] and rest[1].kind in ("number", "symbol"))
    or (rest[0].text == "." and names)
  ):
    text, rest = rest[0].text, rest[1:]
    if text != ".":  # as in "Rs. 500"
      names.append(CURRENCIES.get(text) or UNITS.get(text) or "dollar")
  return (sign + rest, tuple(names[-1:])) if names and rest else (tokens, ())


def _start_of_unit(tokens: Tokens) -> int:
  """The index at which the unit after an answer begins; `len(tokens)` if there is none."""
  at = len(tokens)
  while at > max(1, len(tokens) - _LONGEST):
    token = tokens[at - 1]
    power = _is_exponent(tokens, at)
    if power and at - power > 1 and _is_unit_word(tokens[at - power - 1]):
      at -= power + 1
    elif (
      _is_unit_word(token) or token.text in _SIGNS or (token.text in _BETWEEN and at < len(tokens))
    ):
      at -= 1
    elif token.text == "}" and tokens[at - 2].text == "{" and at > 2:
      at -= 2
    else:
      break
  while at < len(tokens) and not _may_begin(tokens, at):
    at += 1
  return at


def _may_begin(tokens: Tokens, at: int) -> bool:
  """Whether a unit can begin at `at`, given the tokens before it."""
  token, core = tokens[at], tokens[:at]
  if token.text in ("*", "-", ".", "}", "{") or core[-1].text in ("^", "_", "+", "*", "/", "="):
    return False
  if token.text == "/":
    return at + 1 < len(tokens) and core[-1].kind in ("number",)
  bare_letters = [
    other
    for before, other in zip(tokens[at - 1 :], tokens[at:], strict=False)
    if other.kind == "letters" and len(other.text) == 1 and before.text not in ("/", "°", "per")
    if other.text != "a" or before.kind not in ("word", "letters")
  ]
  if token.text in ("a", "an", "of"):
    return False
  literal = all(t.kind == "number" or t.text in _LITERAL or t.text == "°" for t in core)
  if bare_letters and not (len(bare_letters) == 1 and literal):
    return False
  if bare_letters == [token] and not token.gap and core[-1].text != "°":
    return False
  greek = GREEK - {"pi"}
  variables = any(
    (t.kind == "letters" and t.text != "x") or (t.kind == "command" and t.text[1:] in greek)
    for t in core
  )
  for other in tokens[at:]:
    if other.kind == "letters" and len(other.text) > 1:
      known = other.text in UNITS or other.text in _EXPANDED or other.text.lower() in MULTIPLES
      if variables and not (known and len(other.text) > 2):
        return False
  return True


def contradict(gold: Split, answer: Split) -> bool:
  """Whether both have a known unit and these are different units."""
  g, a = (sorted(map(str, split.names)) for split in (gold, answer))
  if not g or not a or "None" in g or "None" in a or "unit" in g or "unit" in a:
    return False
  if {*g, *a} & {"degree"} and {*g, *a} & {"celsius", "fahrenheit", "kelvin"}:
    return False
  return g != a
