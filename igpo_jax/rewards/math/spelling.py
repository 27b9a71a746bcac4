"""Characters: replaces the many spellings of Unicode and Markdown by one.

This is the first step of reading an answer. Every pattern here takes linear time.
"""

from __future__ import annotations

# ruff: noqa: RUF001  the table is about characters that look alike
import re
import unicodedata

MAX_LENGTH = 2000  # characters; a longer text is not read as an answer
MAX_NESTING = 40  # brackets within brackets

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"  # hyphen .. full width
_GREEK = (
  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
  "sigma tau upsilon phi chi psi omega"
).split()
CHARACTERS = {
  **dict.fromkeys(_DASHES, "-"),
  **dict.fromkeys("×✕⨯∗⋆", r"\times "),
  **dict.fromkeys("·⋅∙•", r"\cdot "),
  **dict.fromkeys("÷∕⁄", "/"),
  **dict.fromkeys("°º˚", r"^\circ "),
  "℃": r"^\circ \text{C}",
  "℉": r"^\circ \text{F}",
  "√": r"\sqrt ",
  "∛": r"\sqrt[3] ",
  "∜": r"\sqrt[4] ",
  "∞": r"\infty ",
  "±": r"\pm ",
  "∓": r"\mp ",
  **dict.fromkeys("≤⩽≦", r"\le "),
  **dict.fromkeys("≥⩾≧", r"\ge "),
  "≠": r"\ne ",
  **dict.fromkeys("≈≃≅", r"\approx "),
  "∪": r"\cup ",
  "∩": r"\cap ",
  "∈": r"\in ",
  "∖": r"\setminus ",
  "∅": r"\emptyset ",
  "∑": r"\sum ",
  "∏": r"\prod ",
  "∫": r"\int ",
  "∠": r"\angle ",
  "△": r"\triangle ",
  "∣": "|",
  "∥": "|",
  "→": r"\to ",
  "ℏ": r"\hbar ",
  "ℝ": r"\R ",
  "ℤ": r"\Z ",
  "ℕ": r"\N ",
  "ℚ": r"\Q ",
  "ℂ": r"\C ",
  "⟨": r"\langle ",
  "⟩": r"\rangle ",
  "〈": r"\langle ",
  "〉": r"\rangle ",
  "⌊": r"\lfloor ",
  "⌋": r"\rfloor ",
  "⌈": r"\lceil ",
  "⌉": r"\rceil ",
  "…": r"\dots ",
  "⋯": r"\dots ",
  "′": "'",
  "″": "''",
  "’": "'",
  "‘": "'",
  "“": '"',
  "”": '"',
  "％": "%",
  "＝": "=",
  "＋": "+",
  "＜": "<",
  "＞": ">",
  "（": "(",
  "）": ")",
  "，": ", ",
  "、": ", ",
  "；": "; ",
  "：": ": ",
  "。": ".",
  # Spaces that may separate thousands keep a spelling of their own, the TeX thin space.
  **dict.fromkeys("\u00a0\u2007\u2009\u202f\u2008", r"\,"),
  **dict.fromkeys("\u2002\u2003\u2004\u2005\u2006\u200a\u205f\u3000", " "),
  **{chr(0x3B1 + at + (at > 16)): rf"\{name} " for at, name in enumerate(_GREEK)},
  **{
    unicodedata.lookup(f"GREEK CAPITAL LETTER {name}"): rf"\{name.title()} "
    for name in "GAMMA DELTA THETA XI PI SIGMA UPSILON PHI PSI OMEGA".split()
  },
  "ϕ": r"\phi ",
  "ϵ": r"\epsilon ",
  "µ": r"\mu ",
}
for _fraction in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
  _top, _bottom = unicodedata.normalize("NFKC", _fraction).split("\u2044")
  CHARACTERS[_fraction] = rf"\frac{{{_top}}}{{{_bottom}}}"
_TABLE = str.maketrans(CHARACTERS)

_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎"
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)")
_PLAIN = str.maketrans(_RAISED + _LOWERED, "0123456789+-()ni0123456789+-()")
_MODULES = re.compile(r"(?<![A-Za-z])(?:np|math|sympy)\.(?=[a-z])")
_NOON = re.compile(r"(?<![A-Za-z])([AaPp])\. ?([Mm])(?![A-Za-z])\.?")
_MARKS = ("**", "__", "``", "*", "`")  # Markdown's emphasis and code


def _script(match: re.Match) -> str:
  return f"{'^' if match[1] else '_'}{{{match[0].translate(_PLAIN)}}}"


def _nesting(text: str) -> int:
  if sum(map(text.count, "([{")) <= MAX_NESTING:
    return 0
  depth = deepest = 0
  for char in text:
    depth += (char in "([{") - (char in ")]}")
    deepest = max(deepest, depth)
  return deepest


def without_marks(text: str) -> str:
  """The text without Markdown marks that enclose all of it: "4" for "**4**"."""
  text = text.strip()
  for mark in _MARKS:
    size = len(mark)
    while len(text) > 2 * size and text.startswith(mark) and text.endswith(mark):
      text = text[size:-size].strip()
  return text


def _trimmed(text: str) -> str:
  """The text without blanks around it, and without punctuation and TeX's line breaks at its end."""
  while True:
    shorter = text.rstrip(" \t\r\n.,;:")
    if shorter.endswith("\\\\"):
      shorter = shorter[:-2]
    elif shorter.endswith("\\") and shorter != text:
      return text[: len(shorter) + 1].strip()  # "\," and "\;" are commands
    if shorter == text:
      return text.strip()
    text = shorter


def spell(text: str) -> str | None:
  r"""The text in LaTeX's spelling: "x ≤ ½" becomes `x \le \frac{1}{2}`.

  Digits of other alphabets are left as they are, and no later step reads them as numbers.

  Returns:
    The spelled text; None if it cannot be an answer. That is a text longer than `MAX_LENGTH`
    characters, with brackets nested deeper than `MAX_NESTING`, or with control, zero-width or
    unassigned characters.
  """
  if len(text) > MAX_LENGTH or _nesting(text) > MAX_NESTING:
    return None
  text = without_marks(text)
  if not text.isascii():
    text = unicodedata.normalize("NFC", text)
    for char in text:
      if char not in "\t\n\r" and char > "~" and unicodedata.category(char)[0] == "C":
        return None
    text = _SCRIPTS.sub(_script, text).translate(_TABLE)
  if any((char < " " and char not in "\t\n\r") or char == "\x7f" for char in text):
    return None
  if len(text) > 2 * MAX_LENGTH:
    return None
  return _trimmed(_NOON.sub(r"\1\2", _MODULES.sub("", text)))
