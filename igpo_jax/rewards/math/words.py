r"""Words: text answers, multiple choices, and the value in a sentence.

The table `TURNING` lists words that change the meaning of a number: "5 squared", "more than 5"
and "5 is wrong" do not say that the answer is 5. A sentence with such a word has no value.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from fractions import Fraction

from igpo_jax.rewards.math.tokens import Token, Tokens, enclosed

FUNCTIONS = frozenset(
  (
    "sqrt sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh coth "
    "ln log lg exp min max gcd lcm det abs sgn floor ceil"
  ).split()
)
GREEK = frozenset(
  (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega"
  ).split()
)
NAMES = FUNCTIONS | GREEK | {"infty", "infinity", "mod"}  # have a meaning in mathematics

_COUNTS = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
  "half quarter quarters third fourth fifth"
)
_DENIALS = (
  "not no none never nor neither wrong incorrect false impossible cannot isn't aren't doesn't "
  "don't can't won't wasn't except without undefined unknown nothing unless invalid"
)
_ARITHMETIC = (
  "minus negative plus twice thrice double triple squared cubed root roots factorial reciprocal "
  "inverse divided multiplied modulo mod power logarithm log ln sine cosine tangent below"
)
_CONDITIONS = "if or either otherwise maybe perhaps instead rather unless where when for"
TURNING = {
  "anywhere": frozenset(f"{_COUNTS} {_DENIALS} {_ARITHMETIC} {_CONDITIONS}".split()),
  "before": frozenset(  # the word directly before the number
    "than least most over under above beyond between exceeds exceeding almost nearly times by "
    "past until square cube".split()
  ),
  "after": frozenset(  # the word directly after it
    "and times over to score gross pairs couples st nd rd th".split()
  ),
  "with than": frozenset("more less fewer greater smaller higher lower larger".split()),
}
# "a total of 5" is 5; "the root of 5", "half of 5" and "the square of 5" are not.
_OF = frozenset(
  "total average mean maximum minimum value cost price profit length width height area volume "
  "speed rate age distance amount radius number temperature probability".split()
)
_SHORT = frozenset(  # words of one and two letters, and those of three without a vowel
  "a an i no ok up us we he it is in on at to of or by my so do go if as be me pm am the".split()
)

MULTIPLES = {  # words after a number that multiply it
  "hundred": Fraction(100),
  "thousand": Fraction(1000),
  "million": Fraction(10**6),
  "billion": Fraction(10**9),
  "trillion": Fraction(10**12),
  "dozen": Fraction(12),
  "dozens": Fraction(12),
  "halves": Fraction(1, 2),
  "thirds": Fraction(1, 3),
  "fourths": Fraction(1, 4),
  "fifths": Fraction(1, 5),
  "sixths": Fraction(1, 6),
  "sevenths": Fraction(1, 7),
  "eighths": Fraction(1, 8),
  "ninths": Fraction(1, 9),
  "tenths": Fraction(1, 10),
  "hundredths": Fraction(1, 100),
  "thousandths": Fraction(1, 1000),
}


def looks_like_word(text: str) -> bool:
  """Whether a run of letters is a word rather than a product of variables such as "abc"."""
  low = text.lower()
  if low in _SHORT:
    return True
  if len(text) < 3 or text in NAMES or not (text.islower() or text[1:].islower()):
    return len(text) >= 3 and not text.isascii() and text not in NAMES
  return bool(set(low) & set("aeiouy")) and low not in string.ascii_lowercase and low != "xyz"


_PROSE = frozenset("was are the for than not".split())  # "at" is a product in e^{at}


def is_prose(run: str) -> bool:
  """Whether a run of letters among symbols is a word of a sentence rather than a product."""
  return run.lower() in _PROSE or (len(run) > 3 and looks_like_word(run))


def bare(tokens: Tokens) -> Tokens:
  """The tokens without braces that enclose all of them."""
  group = enclosed(tokens)
  while group and group[0] == "{":
    tokens = group[1]
    group = enclosed(tokens)
  return tokens


_PUNCTUATION = frozenset(("'", ".", "-", "/", "&", "(", ")", '"', "!", "?", ":"))


def text_of(tokens: Tokens) -> str | None:
  r"""A text answer in lower case: "east" for `\text{East}.`; None for anything else.

  A text consists of words and perhaps numbers ("June 20"). At least one of its words cannot be
  read as a product of variables. Texts with "and" or "or" are lists, so they are not one text.
  """
  words, certain = [], False
  for token in bare(tokens):
    if token.text in ("and", "or"):
      return None
    if token.kind == "word":
      certain = certain or len(token.text) > 1
    elif token.kind == "letters":
      if not looks_like_word(token.text):
        if len(token.text) > 1 or not token.text.isupper():
          return None
      else:
        certain = certain or token.text.lower() not in ("a", "i")
    elif token.kind != "number" and token.text not in _PUNCTUATION:
      return None
    if token.kind == "symbol" and token.text not in ("/", "&", "-", ":"):
      continue
    glue = "" if not words or not token.gap else " "
    words.append(glue + token.text.lower())
  return "".join(words) if certain else None


_CHOICES = frozenset("ABCDEFGHIJ")
_INTRODUCED = frozenset("option choice answer the is letter correct".split())


def choice(tokens: Tokens) -> tuple[str, bool, Tokens] | None:
  r"""The letter of a multiple choice, such as "C" in "(C)", "C.", "C) 12" or "option C".

  Returns:
    `(letter, marked, option)`, or None. The letter is upper case. `marked` says whether a bracket,
    a full stop, `\text` or a word such as "option" marks it as a choice. `option` is what stands
    after it: 12 in `\textbf{(C)}\ 12`.
  """
  tokens = bare(tokens)
  at = 0
  while at < len(tokens) and tokens[at].text.lower() in _INTRODUCED:
    at += 1
  if at < len(tokens) and at and tokens[at].text == ":":
    at += 1
  introduced, rest = at > 0, tokens[at:]
  if rest and rest[0].text == "{":  # \mathbf{(D)}\ 12
    rest = rest[1:] if "}" not in (t.text for t in rest) else _unbraced(rest)
  if not rest:
    return None
  opened = rest[0].text == "("
  rest = rest[opened:]
  if not rest or rest[0].kind not in ("letters", "word") or len(rest[0].text) != 1:
    return None
  letter, after = rest[0], rest[1:]
  closed = bool(after) and after[0].text in (")", ".", ":")
  if opened and not (closed and after[0].text == ")"):
    return None
  option = after[closed:]
  marked = opened or introduced or closed or letter.kind == "word"
  if option and not (opened or closed):
    return None
  said = [token.text.lower() for token in option]
  if said[:1] in (["is"], ["was"], ["isn"]) and (
    said[0] == "isn" or {"wrong", "incorrect", "false", "not", "impossible"}.intersection(said)
  ):
    return None
  if option and (
    option[0].text.lower() in ("or", "and", ",", "+", "-", "*", "/", "^", "=", "_", "'")
    or any(
      a.text == "(" and c.text == ")" and b.text in _CHOICES
      for a, b, c in zip(option, option[1:], option[2:], strict=False)
    )
  ):
    return None
  if letter.text.upper() not in _CHOICES and letter.kind != "word" and not opened:
    return None
  return letter.text.upper(), marked, option


def _unbraced(tokens: Tokens) -> Tokens:
  end = next(at for at, token in enumerate(tokens) if token.text == "}")
  return tokens[1:end] + tokens[end + 1 :]


def _is_word(token: Token) -> bool:
  if token.kind == "word":
    return token.text not in NAMES and (len(token.text) > 1 or token.text in "aAI")
  return token.kind == "letters" and looks_like_word(token.text)


def _is_name(token: Token) -> bool:
  """Whether a token is a single capital letter, as the C of "juice box C"."""
  return token.kind == "letters" and len(token.text) == 1 and token.text.isupper()


_OPERATORS = frozenset(("=", "<", ">", "<=", ">=", "!=", "*", "/", "^", "_", ":", ","))


def in_sentence(tokens: Tokens) -> Tokens | None:
  r"""The value in a sentence that contains exactly one; else None.

  It is 2 in "C costs 2 dollars more than B", and `\frac{3}{4}` in
  `\text{The area is } \frac{3}{4}`. None if fewer than three words stand outside `\text`, or if
  a word changes the meaning of the value (`turns`).
  """
  tokens = bare(tokens)
  while tokens and tokens[-1].text in (".", "!", "?"):
    tokens = tokens[:-1]
  start, end = 0, len(tokens)
  while start < end and (
    _is_word(tokens[start])
    or (start and tokens[start].text in (",", ":", "'"))
    or (_is_name(tokens[start]) and start + 1 < end and _is_word(tokens[start + 1]))
  ):
    start += 1
  while end > start and (
    _is_word(tokens[end - 1])
    or tokens[end - 1].text in (",", "'", "-", ".", "/")
    or (_is_name(tokens[end - 1]) and end - 2 >= start and _is_word(tokens[end - 2]))
  ):
    end -= 1
  value, outside = tokens[start:end], tokens[:start] + tokens[end:]
  words = [token for token in outside if _is_word(token)]
  if not value or not words or any(_is_word(token) for token in value):
    return None
  if value[0].text in _OPERATORS or value[-1].text in _OPERATORS | {"+", "-"}:
    return None
  said = [token for token in words if len(token.text) > 1]
  if not said or (len(said) < 3 and any(token.kind == "letters" for token in words)):
    return None
  if end < len(tokens) and len(tokens[end].text) == 1 and tokens[end].text.isalpha():
    return None  # "5 a" may be a product
  if end < len(tokens) and tokens[end].kind == "letters" and not tokens[end].gap:
    return None  # "3rd", "5x"
  before = [token.text.lower() for token in tokens[:start] if _is_word(token)]
  after = [token.text.lower() for token in tokens[end:] if _is_word(token)]
  if turns(before, after):
    return None
  if after and after[0] in MULTIPLES:
    value += (tokens[end],)
  return value


def turns(before: Sequence[str], after: Sequence[str]) -> bool:
  """Whether the words around a number change its meaning (`TURNING`).

  Args:
    before, after: the words before and after the number, in lower case and in order.
  """
  said = {*before, *after}
  if said & TURNING["anywhere"]:
    return True
  if before:
    if before[-1] in TURNING["before"] or list(before[-2:]) == ["up", "to"]:
      return True
    if before[-1] == "of" and (len(before) < 2 or before[-2] not in _OF):
      return True
  if after:
    if after[0] in TURNING["after"] or "times" in after:
      return True
    if after[0] in TURNING["with than"] and list(after[1:2]) == ["than"]:
      return True
  return False
