r"""Names: left sides that say which quantity the answer is, such as `f(3)` in `f(3) = 7`.

A name stands for one quantity. `2x`, `x^2` and `a + b` are not names but expressions: "2x = 10"
is an equation, and it does not say that the answer is 10.
"""

from __future__ import annotations

from igpo_jax.rewards.math.tokens import Tokens, Unreadable, closing, enclosed, split, written
from igpo_jax.rewards.math.words import GREEK, bare, looks_like_word

_ACCENTS = frozenset(
  (
    r"\overline \bar \hat \tilde \dot \ddot \overrightarrow \widehat \widetilde \overset"
    r" \overarc \overparen \stackrel"
  ).split()
)
_FIGURES = frozenset(r"\angle \triangle \measuredangle \odot \square \parallelogram \arc".split())
_OF_ANYTHING = frozenset(r"\max \min \sup \inf \lim \det \dim \deg \Pr \arg".split())
_OF_AN_ANGLE = frozenset(r"\sin \cos \tan \cot \sec \csc".split())
# Letters before brackets that are usually functions, not factors: f(x + 1), P(A \cap B).
_CALLED = frozenset("f g h F G H P E S T V N".split())


def _ends_of_symbol(tokens: Tokens, at: int) -> int:
  """The index after the subscripts, primes and stars that follow the symbol before `at`."""
  while at < len(tokens):
    if tokens[at].text == "_" and at + 1 < len(tokens):
      at = closing(tokens, at + 2) + 1 if tokens[at + 1].text == "{" else at + 2
    elif tokens[at].text == "'":
      at += 1
    elif tokens[at].text == "^" and tokens[at + 1 : at + 2] and tokens[at + 1].text in ("*", "+"):
      at += 2
    else:
      return at
  return at


def _symbol(tokens: Tokens) -> int:
  """How many tokens the symbol at the start has; 0 if none is there.

  Symbols are `x_1`, `\\theta`, `\\overline{AB}` and the like.
  """
  first = tokens[0]
  if first.text in _ACCENTS and len(tokens) > 1:
    end = closing(tokens, 2) + 1 if tokens[1].text == "{" else 2
    return _ends_of_symbol(tokens, end)
  if first.text in _FIGURES and len(tokens) > 1 and tokens[1].kind in ("letters", "word"):
    return _ends_of_symbol(tokens, 2)
  if first.text == "m" and len(tokens) > 2 and tokens[1].text in _FIGURES:
    return _ends_of_symbol(tokens, 3)
  greek = first.kind == "command" and first.text[1:].lower() in GREEK | {"ell", "hbar"}
  if first.kind in ("letters", "word") or greek:
    return _ends_of_symbol(tokens, 1)
  if first.text in (r"\R", r"\E", r"\P") and len(tokens) > 1:
    return 1  # \mathbb{E}[X]
  return 0


def _inverted(tokens: Tokens, at: int) -> int:
  r"""The index after a `^{-1}` that begins at `at`, as in `f^{-1}(3)`; `at` if there is none."""
  power = [token.text for token in tokens[at : at + 5]]
  return at + 5 if power == ["^", "{", "-", "1", "}"] else at


def _is_called(head: Tokens, inside: Tokens) -> bool:
  """Whether a symbol before brackets is a function of them, rather than a factor."""
  first = head[0]
  if first.kind != "letters" or len(first.text) > 1 or first.text in _CALLED or len(head) > 1:
    return True
  return all(
    len(part) == 1 and (part[0].kind in ("letters", "word", "number", "command"))
    for part in split(inside, ",")
  )


def _is_name(tokens: Tokens) -> bool:
  tokens = bare(tokens)
  if not tokens:
    return False
  first = tokens[0].text
  if first == "|" and tokens[-1].text == "|" and len(tokens) > 2:
    inside = tokens[1:-1]
    return "|" not in (t.text for t in inside[1:-1]) and _is_name(
      tuple(t for t in inside if t.text != "|")
    )
  group = enclosed(tokens)
  if group and group[0] == "(":
    parts = split(group[1], ",")
    return len(parts) > 1 and all(_is_name(part) for part in parts)
  if group and group[0] == "[":  # [ABC], an area
    return len(group[1]) == 1 and group[1][0].text.isupper()
  if first in _OF_ANYTHING and len(tokens) > 1:
    return True
  if first in _OF_AN_ANGLE and len(tokens) > 1:
    angle = tokens[1:]
    inside = enclosed(angle)
    angle = inside[1] if inside and inside[0] in "({" else angle
    return (
      bool(angle)
      and _symbol(angle) == len(angle)
      and (angle[0].kind == "command" or angle[0].text.isupper())
    )
  if first == r"\frac":
    return _is_ratio(tokens[1:])
  if _is_phrase(tokens):
    return True
  if len(tokens) > 3 and tokens[0].text == "(":  # (f \circ g)(2)
    end = closing(tokens, 1)
    return any(t.text == r"\circ" for t in tokens[:end]) and _is_arguments(tokens[end + 1 :])
  size = _symbol(tokens)
  if not size:
    return False
  rest = tokens[_inverted(tokens, size) :]
  if not rest:
    return size == len(tokens)
  if rest[0].text in ("/", ":") and _is_segment(tokens[:size]):
    return _is_segment(rest[1:])
  return _is_arguments(rest) and _is_called(tokens[:size], rest[1:-1])


def _is_arguments(tokens: Tokens) -> bool:
  group = enclosed(tokens)
  return bool(group) and group[0] in "([" and bool(group[1])


def _is_segment(tokens: Tokens) -> bool:
  """Whether this is a line segment: two capital letters, its ends."""
  tokens = bare(tokens)
  return len(tokens) == 1 and len(tokens[0].text) == 2 and tokens[0].text.isupper()


def _is_ratio(tokens: Tokens) -> bool:
  r"""Whether these are the arguments of a fraction like `\frac{NO}{BO}` or `\frac{dy}{dx}`."""
  if not tokens or tokens[0].text != "{":
    return False
  end = closing(tokens, 1)
  top, bottom = tokens[1:end], bare(tokens[end + 1 :])
  if not top or not bottom:
    return False
  if _is_segment(top) and _is_segment(bottom):
    return True
  return is_derivative(top, bottom)


def is_derivative(top: Tokens, bottom: Tokens) -> bool:
  r"""Whether `\frac{top}{bottom}` is a derivative: both begin with d or \partial."""

  def begins(tokens: Tokens) -> bool:
    first = tokens[0]
    if first.text == r"\partial":
      return True
    return first.kind in ("letters", "word") and first.text[0] == "d" and len(first.text) <= 2

  return (
    bool(top and bottom)
    and begins(top)
    and begins(bottom)
    and len(written(bottom)) > 1
    and not any(token.kind == "number" and token.text != "2" for token in bottom)
  )


def _is_phrase(tokens: Tokens) -> bool:
  """Whether these are words, with or without names among them: "Area of ABC"."""
  return any(
    (t.kind == "word" and len(t.text) > 1) or (t.kind == "letters" and looks_like_word(t.text))
    for t in tokens
  ) and all(
    t.kind in ("word", "letters") or t.text in _FIGURES or t.text in ("'", "-", ".", ",")
    for t in tokens
  )


def name(tokens: Tokens) -> str | None:
  """The name that a left side is, normalized; None if the left side is not a name."""
  if tokens and tokens[-1].text == ":":  # x := 5
    tokens = tokens[:-1]
  try:
    if not _is_name(tokens):
      return None
  except Unreadable:
    return None
  return written(t for t in bare(tokens) if t.text not in ("{", "}"))


def names_of(tokens: Tokens) -> list[str] | None:
  """The names in a tuple of names, `(p, q)`; None for anything else."""
  group = enclosed(bare(tokens))
  if not group or group[0] != "(":
    return None
  found = [name(part) for part in split(group[1], ",")]
  return found if len(found) > 1 and all(found) else None  # type: ignore[return-value]


def sides(tokens: Tokens) -> list[Tokens]:
  r"""The sides of an equation: the parts between its equals signs.

  Without an equals sign all tokens are one side. Of several equations with arrows between them,
  the sides of the last are returned.
  """
  tokens = split(tokens, (r"\Rightarrow", r"\implies", r"\therefore", r"\Longrightarrow"))[-1]
  return split(tokens, "=")
