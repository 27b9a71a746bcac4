r"""Finding the places where a text shows a value, however it is spelled: 448000, "448 thousand".

It serves to hide an answer, so a doubtful place counts as showing it. It does not grade: plain
numbers are compared by value, everything else by its letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

Span = tuple[int, int]

_MOST_DIGITS = 400  # a longer number is compared by its letters only
_GROUPS = (  # how thousands are set apart
  "(?:,|\\{,\\}|\\\\[,!]|,\\\\!|['\u2019\u00a0\u2009\u202f])",
  " ",  # a pass of its own: "12 300" may be two numbers
)
_BEFORE = r"(?<![\w.])"
_WORD_BEFORE, _WORD_AFTER = re.compile(r"[\w.]"), re.compile(r"\w|\.\d")
# Units and ordinal ends that are written right after a number.
_GLUED = r"(?=(?:[kcm]?m|k?g|m?l|km/h|mph|lbs?|oz|ft|in|hrs?|h|min|s|am|pm|st|nd|rd|th|k)\b)"
_AFTER = rf"(?:(?!\w|\.\d)|{_GLUED})"
_SCALES = {
  "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
  "trillion": 10**12,
}  # fmt: skip
_SCALE = rf"(?:[\s\\,~-]{{0,3}}(?P<scale>{'|'.join(_SCALES)})s?\b)?"
_TIMES = (
  r"(?:\s*(?:\\times|\\cdot|[\u00d7x*])\s*10\s*(?:\^|\*\*)\s*\{?(?P<power>[-\u2212]?\d{1,3})\}?)?"
)
_PERCENT = r"(?:\s*\\?(?P<percent>%|percent\b))?"
_COUNT = r"(?:\{\s*(\d+)\s*\}|(\d))"
_FRACTION = re.compile(
  rf"(?<![\d.])(?:(?P<whole>\d+)\s*)?(?:\\[dtc]?frac\s*{_COUNT}\s*{_COUNT}"
  r"|(?<!\d)(\d+)\s*/\s*(\d+)|\{\s*(\d+)\s*\\over\s*(\d+)\s*\}|([\u00bc-\u00be\u2150-\u215e]))"
)
_ONES = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
  " sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: n for n, word in enumerate(_ONES)} | {
  word: 10 * n for n, word in enumerate(_TENS, start=2)
}
_PARTS = {
  "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4,
  "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "eighth": 8, "eighths": 8,
  "tenth": 10, "tenths": 10,
}  # fmt: skip
_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
_IN_WORDS = re.compile(
  rf"\b(?P<number>(?:{_WORD})(?:(?:[\s-]+|\s+and\s+)(?:{_WORD}))*)?"
  rf"(?:(?(number)[\s-]+)(?P<part>{'|'.join(_PARTS)}))?\b",
  re.IGNORECASE,
)
# What a formula means the same with and without.
_SKIPPED = re.compile(
  r"\\(?:left|right|text|textbf|mathrm|mathbf|operatorname|displaystyle|quad|qquad)(?![A-Za-z])"
  r"|\\[,;:! ()\[\]]|[\s${}]"
)
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")


def _number_pattern(groups: str) -> re.Pattern:
  digits = rf"(?:\d{{1,3}}(?:{groups}\d{{3}})+(?!\d)|\d+)"
  return re.compile(
    rf"{_BEFORE}(?P<digits>{digits}(?:\.\d+)?|\.\d+)(?:e(?P<e>[-+]?\d{{1,3}})|(?P<k>k))?"
    rf"{_AFTER}{_TIMES}{_SCALE}{_PERCENT}",
    re.IGNORECASE,
  )


_NUMBERS = tuple(_number_pattern(groups) for groups in _GROUPS)


class _Number(NamedTuple):
  """A number in a text: its place, what it means, and what it shows besides ("5 thousand": 5)."""

  span: Span
  means: frozenset[Fraction]
  shows: frozenset[Fraction]


def _numbers(text: str) -> Iterator[_Number]:
  for pattern in _NUMBERS:
    for match in pattern.finditer(text):
      digits = re.sub(r"[^\d.]", "", match["digits"])
      if len(digits) > _MOST_DIGITS:
        continue
      plain = Fraction(digits)
      power = int((match["power"] or match["e"] or "0").replace("\u2212", "-"))
      scale = 1000 if match["k"] else _SCALES.get((match["scale"] or "").lower(), 1)
      value = plain * Fraction(10) ** power * scale
      means = {value, value / 100} if match["percent"] else {value}
      yield _Number(match.span(), frozenset(means), frozenset({plain}))
  for match in _FRACTION.finditer(text):
    *pairs, sign = match.groups()[1:]
    numbers = [int(x) for x in pairs if x is not None and len(x) <= _MOST_DIGITS]
    if sign:
      part = Fraction(unicodedata.numeric(sign)).limit_denominator(100)
    elif len(numbers) == 2 and numbers[1]:
      part = Fraction(*numbers)
    else:
      continue
    value = Fraction((match["whole"] or "0")[:_MOST_DIGITS]) + part
    # "12/2" is a calculation that comes to 6, and no spelling of it.
    if value.denominator > 1:
      yield _Number(match.span(), frozenset({value}), frozenset({part}))
  for match in _IN_WORDS.finditer(text):
    if match["number"] or match["part"]:
      value = frozenset({_in_words(match["number"], match["part"])})
      yield _Number(match.span(), value, value)


def _in_words(number: str | None, part: str | None) -> Fraction:
  """ "two hundred and five" is 205, "three quarters" is 3/4, "half" 1/2."""
  total = group = 0
  for word in re.findall(r"[a-z]+", (number or "one").lower()):
    if word in _WORDS:
      group += _WORDS[word]
    elif word in _SCALES and _SCALES[word] > 100:
      total, group = total + (group or 1) * _SCALES[word], 0
    elif word in _SCALES:
      group = (group or 1) * _SCALES[word]
  return Fraction(total + group, _PARTS[part.lower()] if part else 1)


def numbers_of(text: str) -> frozenset[Fraction]:
  r"""The values that a text may mean if it is one number, with or without a name, currency or unit.

  The sign is dropped. "50%" may mean 50 or 1/2, so there can be several values. For any other text
  the set is empty. Examples of numbers: "$1,250.50", "x = 12", "18 dollars", r"\frac{3}{4}", "-5",
  "twelve".
  """
  plain = _bare(text).rpartition("=")[2].strip().strip("$").strip()
  plain = re.sub(r"^[-\u2212+]?\s*(?:\\?[$\u20ac\u00a3\u00a5])?\s*[-\u2212]?\s*", "", plain)
  whole = [number for number in _numbers(plain) if number.span[0] == 0]
  longest = max(whole, key=lambda number: number.span[1], default=None)
  if longest is None or re.search(r"[\d+*/=(<>_^]", plain[longest.span[1] :]):
    return frozenset()
  return longest.means


def _bare(text: str) -> str:
  return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1 ", text)


def value_spans(text: str, answer: str) -> list[Span]:
  """All places of the value `answer` in a text, as character ranges [start, end).

  A place counts if a whole number, word or formula there has this value.

  Example: in "72 of 172 is 72.5, 72." the answer "72" stands at (0, 2) and (19, 21).
  """
  answer = answer.strip()
  if not answer:
    return []
  spans = _whole(text, answer)
  values = numbers_of(answer)
  if values:
    spans += [n.span for n in _numbers(text) if values & (n.means | n.shows)]
  else:
    spans += _letters(text, answer)
  merged: list[Span] = []
  for start, end in sorted(spans):
    if merged and start < merged[-1][1]:
      merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
    else:
      merged.append((start, end))
  return merged


def _whole(text: str, answer: str) -> list[Span]:
  """Where `answer` stands letter for letter, and is no part of a longer word or number."""
  found, end = [], 0
  while (start := text.find(answer, end)) >= 0:
    end = start + len(answer)
    if not _WORD_BEFORE.match(text[start - 1 : start]) and not _WORD_AFTER.match(text, end):
      found.append((start, end))
  return found


def _skeleton(text: str) -> tuple[str, list[int]]:
  """The letters of a formula that count, and where each of them stands."""
  out, at, places = [], 0, []
  while at < len(text):
    if skipped := _SKIPPED.match(text, at):
      at = skipped.end()
    elif frac := _FRAC.match(text, at):
      out.append("\\frac")
      places += [at, *range(frac.end() - 4, frac.end())]
      at = frac.end()
    else:
      out.append(text[at].lower() if len(text[at].lower()) == 1 else text[at])
      places.append(at)
      at += 1
  return "".join(out), places


def _letters(text: str, answer: str) -> list[Span]:
  """Where a text has the letters of `answer`, whatever the case, blanks and brackets of LaTeX."""
  wanted, _ = _skeleton(answer)
  if len(wanted) < 2:
    return []
  letters, places = _skeleton(text)
  found, at = [], letters.find(wanted)
  while at >= 0:
    start, end = places[at], places[at + len(wanted) - 1] + 1
    next_to_it = at > 0 and places[at - 1] == start - 1  # else what stands before is skipped
    inside = next_to_it and _WORD_BEFORE.match(text[start - 1])
    if not inside and not _WORD_AFTER.match(text, end):
      found.append((start, end))
    at = letters.find(wanted, at + 1)
  return found


def may_equal(text: str, answer: str) -> bool:
  """False if `text`, a statement of an answer, plainly states another answer than `answer`.

  That is so for two numbers that differ, for letters alone if the answer is a number, and for words
  that do not contain the answer. In doubt it is True.
  """
  if value_spans(text, answer):
    return True
  ours, theirs = numbers_of(answer), numbers_of(text)
  if ours and theirs:
    return bool(ours & theirs)
  if ours and not re.search(r"\d|\\", text):
    return False
  return re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", text)) is None
