"""Text of a model made safe to look at: nothing in it can act on a terminal or hide itself."""

from __future__ import annotations

import unicodedata

# What is drawn for characters that one could not see.
_SHOWN = {"\n": "⏎", "\t": "⇥", "\0": "␀", "\x1b": "␛"}
LONGEST = 20_000  # characters of one text that are shown
LONGEST_PIECE = 200  # of a token's text


def visible(text: str, newlines: bool = False) -> str:
  """A text in which control characters, direction marks and half characters are signs.

  A terminal would obey some of them; others would reorder or hide what stands beside them.
  Example: visible("a\\n\\u202eb") == "a⏎⟨202E⟩b".

  Args:
    text: anything, lone surrogates included.
    newlines: leave line ends as they are.
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
  # Joiners make one picture of several emoji; the other formats are not seen, and some reorder.
  if kind in ("Cc", "Cf", "Zl", "Zp") and character != "\u200d":
    return f"⟨{ord(character):04X}⟩"
  return character


def shortened(text: str, most: int = LONGEST) -> str:
  """A text of at most `most` characters, and how many are left out."""
  if len(text) <= most:
    return text
  return f"{text[:most]}… ({len(text) - most:,} more characters)"
