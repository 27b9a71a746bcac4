"""Makes a model's text safe to show: nothing in it can control a terminal or be invisible."""

from __future__ import annotations

import unicodedata

# What is shown instead of invisible characters; `_sign` has the others.
_SHOWN = {"\n": "⏎", "\t": "⇥", "\0": "␀", "\x1b": "␛"}
LONGEST = 20_000  # how many characters of a text are shown at most
LONGEST_PIECE = 200  # how many characters of one token are shown at most


def visible(text: str, newlines: bool = False) -> str:
  """Replaces control characters, direction marks and lone surrogates by visible signs.

  A terminal would obey some of these characters; others reorder or hide the text beside them.

  Args:
    text: any text.
    newlines: keep line ends as they are.

  Example: visible("a\\n\\u202eb") == "a⏎⟨202E⟩b".
  """
  if text.isascii() and text.isprintable():
    return text
  return "".join(c if newlines and c == "\n" else _sign(c) for c in text)


def _sign(character: str) -> str:
  if character in _SHOWN:
    return _SHOWN[character]
  kind = unicodedata.category(character)
  if kind == "Cs":  # half of a character
    return "\ufffd"
  # U+200D joins several emoji into one and is kept. Other format characters are invisible.
  if kind in ("Cc", "Cf", "Zl", "Zp") and character != "\u200d":
    return f"⟨{ord(character):04X}⟩"
  return character


def shortened(text: str, most: int = LONGEST) -> str:
  """The first `most` characters of a longer text, and how many are left out."""
  if len(text) <= most:
    return text
  return f"{text[:most]}… ({len(text) - most:,} more characters)"
