r"""Writing of answers: one spelling for what LaTeX and plain text spell in many ways.

Nothing here computes: it is linear work on short strings, safe on hostile input.
"""

from __future__ import annotations

import re
import unicodedata

MAX_NESTING = 40  # brackets within brackets
MAX_LENGTH = 2000  # characters; a longer "answer" is not an answer

_UNICODE = str.maketrans(
  {
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
    "°": "",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "\N{UNION}": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "θ": r"\theta ",
    "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "β": r"\beta ",
    "ω": r"\omega ",
    "λ": r"\lambda ",
    "“": "",
    "”": "",
    "\u2019": "'",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
  }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

# Order matters: a rule may rely on the ones before it.
_REWRITES = tuple(
  (re.compile(pattern), to)
  for pattern, to in (
    ("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", lambda m: f"^{{{m[1].translate(_RAISED)}}}"),
    (r"\\\$|\$", ""),
    (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
    (r",\\!\s*|\{,\}\s*", ","),
    (r"\\!", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?|middle)\s*(?![A-Za-z])\.?", ""),
    (r"\\hspace\*?\{[^{}]*\}|\\q?quad(?![A-Za-z])|(?<!\\)\\[,;:> ]|~", " "),
    (r"\\(?:display|text|script)style(?![A-Za-z])|\\limits(?![A-Za-z])", ""),
    (r"\\(?:math(?:bf|it|sf|tt|cal)|boldsymbol|bm|emph|underline)(?![A-Za-z])", ""),
    (
      r"\\(?:text(?:rm|bf|it|sf|tt|normal)|mathrm|mathop|mbox|hbox|operatorname\*?)(?![A-Za-z])",
      r"\\text",
    ),
    (r"\\text\s+\{", r"\\text{"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (
      r"\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*(\\prime)(?![A-Za-z])",
      lambda m: "'" * m[0].count("prime"),
    ),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])", ""),
    (r"\\(?:lbrace|lcub)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace|rcub)(?![A-Za-z])", r"\\}"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\leq(?:slant)?(?![A-Za-z])", r"\\le"),
    (r"\\geq(?:slant)?(?![A-Za-z])", r"\\ge"),
    (r"\\neq(?![A-Za-z])", r"\\ne"),
    (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset"),
    (r"\\%|\\text\{\s*(?:%|percent)\s*\}|(?<=[0-9}])\s*percent\b", "%"),
    (r",?\s*\\text\{\s*,?\s*(?:and|or)\s*\}|(?:,\s*|\s+)(?:and|or)\s+", ", "),
    # \frac34, \frac 34, \frac9{19}, \frac{270}7, \sqrt2
    (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([0-9A-Za-z])\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),
    (r"\\frac\s+\{", r"\\frac{"),
    (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
    (r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2"),
    (r"\s+", " "),
  )
)
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"))
_TRAILING = re.compile(r"(?:[\s.,;:]|\\\\)+$")
_INNER_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")

# A number's unit, after it: \text groups with powers, slashes and dots between them.
_TEXT_UNITS = re.compile(
  r"(?<=[^_^{\s])\s*[/\\]?\s*(?:\\text\{[^{}0-9,]*[23]?[^{}0-9,]*\}"
  r"(?:\s*\^(?:[0-9]|\{-?[0-9]\}))?\s*(?:(?:/|\\cdot|\\times|\{\})\s*)*)+$"
)
_UNIT_WORDS = frozenset(
  (
    "cm mm km meter meters metre metres inch inches foot feet ft yard yards mile miles degree "
    "degrees radian radians dollar dollars cent cents unit units square sq cubic hour hours hr "
    "minute minutes min second seconds sec day days week weeks year years kg gram grams gallon "
    "gallons liter liters litre litres mph kph percent per cm^2 cm^3 m^2 m^3 km^2 ft^2 in^2 "
  ).split()
)


def _nesting(text: str) -> int:
  depth = deepest = 0
  for char in text:
    depth += (char in "([{") - (char in ")]}")
    deepest = max(deepest, depth)
  return deepest


def clean(text: str) -> str | None:
  """One spelling of an answer; None where it cannot be an answer.

  No answer is: one longer than `MAX_LENGTH`, one nested deeper than `MAX_NESTING`, and
  one with control, zero-width or unassigned characters.
  """
  if len(text) > MAX_LENGTH or _nesting(text) > MAX_NESTING:
    return None
  text = text.strip()
  for char in text:
    if char not in "\t\n\r" and not " " <= char <= "~" and unicodedata.category(char)[0] == "C":
      return None
  text = text.translate(_UNICODE)
  for left, right in _WRAPPERS:
    if text.startswith(left) and text.endswith(right):
      text = text[2:-2]
  for pattern, to in _REWRITES:
    text = pattern.sub(to, text)
  return _TRAILING.sub("", text).strip()


def compact(text: str) -> str:
  """A cleaned text without the spaces that separate nothing."""
  return _INNER_SPACE.sub("", text)


def without_units(text: str) -> str:
  r"""A cleaned expression less the unit after it; "15" of `15\text{ cm}^2` and of "15 cm"."""
  bare = _TEXT_UNITS.sub("", text).strip()
  words = bare.split(" ")
  while len(words) > 1 and words[-1].rstrip(".").lower() in _UNIT_WORDS:
    words.pop()
  return " ".join(words)


def split(text: str, separators: str = ",;") -> list[str]:
  """The parts of a text between separators that no bracket encloses, stripped."""
  parts, depth, start = [], 0, 0
  for at, char in enumerate(text):
    if char in "([{":
      depth += 1
    elif char in ")]}":
      depth -= 1
    elif depth == 0 and char in separators:
      parts.append(text[start:at].strip())
      start = at + 1
  return [*parts, text[start:].strip()]


def split_command(text: str, command: str) -> list[str]:
  r"""As `split`, at a command such as `\cup`."""
  return split(re.sub(re.escape(command) + r"(?![A-Za-z])", "\0", text), "\0")


def enclosed(text: str) -> tuple[str, str, str] | None:
  r"""`(left, inside, right)` where one pair of brackets encloses the whole text.

  Intervals may open and close with different brackets; `\{` and `\}` are returned as
  such. None where the first bracket closes before the end.
  """
  size = 2 if text.startswith("\\{") else 1
  if text[size - 1 : size] not in ("(", "[", "{"):
    return None
  end = 2 if text.endswith("\\}") else 1
  if len(text) < size + end or text[-1] not in ")]}":
    return None
  depth = 0
  for at, char in enumerate(text):
    depth += (char in "([{") - (char in ")]}")
    if depth <= 0 and at < len(text) - 1 and at >= size - 1:
      return None
  if depth or (size != end) or (text[size - 1] == "{") != (text[-1] == "}"):
    return None
  return text[:size], text[size:-end].strip(), text[-end:]


def words(text: str) -> str | None:
  r"""A text answer in lower case, "east" of `\text{East}`; None for anything else.

  A choice among letters is one too: "(e)", "E" and `\text{(E)}` need `letter`.
  """
  bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
  if not re.fullmatch(r"[A-Za-z(][A-Za-z .'()/&-]*", bare):
    return None
  if bare == text and not any(
    len(word) >= 3 and word.lower() not in NAMES for word in re.findall("[A-Za-z]+", bare)
  ):
    return None
  return " ".join(bare.lower().split())


_LETTER = re.compile(r"\(?([A-Za-z])[).:]*|\(([A-Za-z])\) ?.*")


def letter(text: str) -> str | None:
  r"""The letter of a multiple choice: "C" of `\text{(C)}`, "(C)", "C." and "(C) 12"."""
  bare = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", text).strip()
  match = _LETTER.fullmatch(bare)
  return match and (match[1] or match[2]).upper()


_FUNCTIONS = (
  "sqrt",
  "sin",
  "cos",
  "tan",
  "cot",
  "sec",
  "csc",
  "arcsin",
  "arccos",
  "arctan",
  "sinh",
  "cosh",
  "tanh",
  "ln",
  "log",
  "exp",
  "min",
  "max",
  "gcd",
  "lcm",
)
_SYMBOLS = (
  "pi",
  "theta",
  "alpha",
  "beta",
  "gamma",
  "delta",
  "omega",
  "lambda",
  "sigma",
  "tau",
  "phi",
  "rho",
  "mu",
  "infty",
)
NAMES = frozenset([*_FUNCTIONS, *_SYMBOLS, "infinity", "mod"])
_BARE_NAME = re.compile(
  rf"(?<![A-Za-z\\])({'|'.join(sorted([*_FUNCTIONS, *_SYMBOLS], key=len, reverse=True))})"
  r"(?![A-Za-z])"
)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([-+]?[0-9]+)(?![0-9.])")
_THOUSANDS = re.compile(r"(?<![0-9.,(\[])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_OPENING = re.compile(r"\\sqrt\s*\(|\^\s*\(")


def for_parser(text: str) -> str:
  """A cleaned expression as the LaTeX parser takes it: names with backslashes, powers braced."""
  text = _THOUSANDS.sub(lambda m: m.group().replace(",", ""), text)
  text = text.replace("np.", "").replace("**", "^").replace(r"\odot", r"\text{sun}")
  # To the parser E is Euler's number, even under a subscript; and "1." is no number.
  text = re.sub(r"(?<![A-Za-z\\])E ?_ ?(?:\{([^{}]*)\}|([0-9A-Za-z]))", r"\\text{E_\1\2}", text)
  text = re.sub(r"(?<=[0-9])\.(?![0-9])", "", text)
  # It drops a prime in silence.
  text = re.sub(r"([A-Za-z])('{1,2})", lambda m: rf"\{'d' * len(m[2])}ot{{{m[1]}}}", text)
  text = re.sub(r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty", text)
  text = re.sub(r"(?<![A-Za-z\\])arc(?=\\)", "", text)
  text = _BARE_NAME.sub(r"\\\1", text)
  text = re.sub(rf"\\text\{{\s*({'|'.join(_FUNCTIONS)})\s*\}}", r"\\\1", text)
  text = re.sub(r"\\text\{\s*([A-Za-z])\s*\}", r"\1", text)
  text = _SCIENTIFIC.sub(lambda m: rf"{m[1]} \times 10^{{{int(m[2])}}}", text)
  match = _OPENING.search(text)
  while match:  # sqrt(2) and x^(1/2) need braces around what the parentheses hold
    opening = match.end() - 1
    depth, at = 0, opening
    for at in range(opening, len(text)):
      depth += (text[at] == "(") - (text[at] == ")")
      if not depth:
        break
    if depth:
      break
    text = text[:opening].rstrip() + "{" + text[opening + 1 : at] + "}" + text[at + 1 :]
    match = _OPENING.search(text, opening)
  return text
