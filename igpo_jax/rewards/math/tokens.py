r"""Tokens: the pieces of an answer, in LaTeX or in plain text.

`lex` turns a spelled text into tokens in one pass. Commands that only change the appearance are
dropped, commands of equal meaning become one, and the content of `\text{...}` is marked as words.
So the tokens of `\dfrac{1}{2}\,\mathrm{cm}` and `\frac 12 \text{ cm}` differ in little more than
braces, and later steps need not know all spellings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Unreadable(ValueError):
  """The text is not an answer, or it cannot be read."""


class Token(NamedTuple):
  r"""One token.

  Attributes:
    kind: "number"; "letters", a run of letters in mathematics or plain text; "word", a run of
      letters inside `\text`; "command"; "matrix", the begin or end of one; "symbol".
    text: as written. That of a command has its backslash, and synonyms are replaced.
    gap: whether a blank stands before the token.
  """

  kind: str
  text: str
  gap: bool = False


Tokens = tuple[Token, ...]

# What commands mean. A command that is in none of these tables stands for itself.
_NOTHING = (
  "displaystyle textstyle scriptstyle limits nolimits left right middle big Big bigg Bigg bigl "
  "bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm ensuremath boxed fbox rm bf it mathop "
  "mathord mathrel mathbin mathstrut noindent centering hfill large Large ! mathopen mathclose"
).split()
_BLANK = [*", ; : > quad qquad enspace thinspace medspace thickspace space newline".split(), " "]
_WORDS = (
  "text textrm textbf textit textsf texttt textnormal textup textmd mathrm mathsf operatorname "
  "operatorname* mbox hbox"
).split()
_LOOK = "mathbf mathit mathtt mathcal mathscr boldsymbol bm emph underline pmb mathnormal".split()
_SKIPPED = "hspace hspace* vspace vspace* phantom hphantom vphantom color label".split()
_ONE_OF = {
  "frac": "dfrac tfrac cfrac",
  "binom": "dbinom tbinom",
  "le": "leq leqslant",
  "ge": "geq geqslant",
  "ne": "neq",
  "emptyset": "varnothing",
  "to": "rightarrow longrightarrow",
  "infty": "infin",
  "setminus": "smallsetminus backslash",
  "approx": "simeq cong",
  "epsilon": "varepsilon",
  "phi": "varphi",
  "theta": "vartheta",
  "rho": "varrho",
  "dots": "ldots cdots dotsc dotsb",
  "top": "intercal",
  "R": "reals Reals",
  "arcsin": "asin",
  "arccos": "acos",
  "arctan": "atan",
  "overrightarrow": "vec",
}
_SYNONYMS = {f"\\{w}": f"\\{name}" for name, many in _ONE_OF.items() for w in many.split()}
_SYMBOLS = {
  r"\lbrace": r"\{",
  r"\lcub": r"\{",
  r"\rbrace": r"\}",
  r"\rcub": r"\}",
  r"\langle": "(",
  r"\rangle": ")",
  r"\lbrack": "[",
  r"\rbrack": "]",
  r"\lparen": "(",
  r"\rparen": ")",
  r"\lt": "<",
  r"\gt": ">",
  r"\le": "<=",
  r"\ge": ">=",
  r"\ne": "!=",
  "=<": "<=",
  "==": "=",
  "**": "^",
  r"\cdot": "*",
  r"\times": "*",
  r"\ast": "*",
  r"\div": "/",
  r"\lvert": "|",
  r"\rvert": "|",
  r"\vert": "|",
  r"\mid": "|",
  r"\|": "|",
  r"\lVert": "|",
  r"\rVert": "|",
  r"\Vert": "|",
  r"\colon": ":",
  r"\degree": "°",
  r"\degrees": "°",
  r"\prime": "'",
  r"\land": "and",
  r"\wedge": "and",
  r"\lor": "or",
  r"\vee": "or",
  r"\&": "&",
  r"\#": "#",
  r"\_": "_",
  r"\%": "%",
  r"\dollar": r"\$",
  r"\pounds": "£",
  r"\textsterling": "£",
  r"\euro": "€",
  r"\texteuro": "€",
  r"\yen": "¥",
}
_DROPPED_ENVIRONMENTS = frozenset(
  "aligned align align* equation equation* gathered gather gather* split math displaymath".split()
)
MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix array".split())
_TAKES_ARGUMENT = frozenset(
  (
    r"\frac \sqrt \binom \overline \bar \hat \tilde \dot \ddot \overrightarrow \widehat "
    r"\widetilde \mathbb"
  ).split()
)

_PIECE = re.compile(
  r"""(?P<space>[\s~]++)
  |(?P<number>(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++(?![A-Za-z.]))?)
  |(?P<letters>[^\W\d_]++)
  |(?P<command>\\(?:(?:operatorname|[hv]space)\*|[A-Za-z]++|.))
  |(?P<symbol>\*\*|<=|>=|=<|==|!=|.)""",
  re.VERBOSE | re.DOTALL,
)
_ENVIRONMENT = re.compile(r"(?<!\s)\s*+\{([A-Za-z]++\*?)\}(?:\s*+\{[lcr|@\s]*+\})?")
_ROW_SKIP = re.compile(r"\[[-0-9a-z. ]{0,12}\]")
_LETTER = re.compile(r"(?<!\s)\s*+\{?\s*+([A-Z])(?![A-Za-z])\s*+\}?")
_GROUPED = re.compile(r"\{,\}\s*+|,\\!\s*+|\\,")  # between digits: thousands, or a decimal comma

OPENING = frozenset(("(", "[", "{", r"\{", r"\lfloor", r"\lceil"))
CLOSING = frozenset((")", "]", "}", r"\}", r"\rfloor", r"\rceil"))


class _Lexer:
  def __init__(self, text: str):
    self.text = text
    self.at = 0
    self.gap = False
    self.out: list[Token] = []
    # For each open brace: whether it became a token, and whether its content is words.
    self.braces: list[tuple[bool, bool]] = []
    self.words = 0  # number of open braces whose content is words
    self.dropped = 0  # number of open environments that have no meaning

  def emit(self, kind: str, text: str) -> None:
    self.out.append(Token(kind, text, self.gap))
    self.gap = False

  def open_brace(self, words: bool, hide: bool) -> None:
    last = self.out[-1].text if self.out else ""
    shown = not hide or last in ("_", "^") or last in _TAKES_ARGUMENT
    if shown:
      self.emit("symbol", "{")
    self.braces.append((shown, words))
    self.words += words

  def close_brace(self) -> None:
    if not self.braces:
      raise Unreadable("a closing brace too many")
    shown, words = self.braces.pop()
    self.words -= words
    if shown:
      self.emit("symbol", "}")

  def brace_follows(self) -> bool:
    """Whether a brace follows, as before an argument; if so, moves behind it."""
    after = len(self.text) - len(self.text[self.at :].lstrip(" "))
    if self.text[after : after + 1] != "{":
      return False
    self.at = after + 1
    return True

  def command(self, name: str) -> None:
    bare = name[1:]
    if bare in _WORDS or bare in _LOOK:
      if self.brace_follows():
        self.open_brace(words=bare in _WORDS, hide=True)
    elif bare in _SKIPPED:
      if self.brace_follows():
        end = self.text.find("}", self.at)
        self.at = len(self.text) if end < 0 else end + 1
      self.gap = True
    elif bare in _NOTHING:
      self.delimiter(bare)
    elif bare in _BLANK:
      self.gap = True
    elif bare in "()[]":
      self.gap = True  # \( and \[ only mark where mathematics begins
    elif bare in ("begin", "end"):
      self.environment(bare)
    elif bare in ("mathbb", "Bbb"):
      letter = _LETTER.match(self.text, self.at)
      if not letter:
        raise Unreadable("no letter after \\mathbb")
      self.at = letter.end()
      self.emit("command", f"\\{letter[1]}")
    elif bare == "\\":
      skip = _ROW_SKIP.match(self.text, self.at)
      self.at = skip.end() if skip else self.at
      self.emit("symbol", r"\\")
    elif bare == "not":
      rest = self.text[self.at :].lstrip()
      if not rest.startswith("="):
        raise Unreadable("a negation")
      self.at = len(self.text) - len(rest) + 1
      self.emit("symbol", "!=")
    else:
      name = _SYNONYMS.get(name, name)
      symbol = _SYMBOLS.get(name)
      if symbol in ("and", "or"):
        self.gap = True
        self.emit("word", symbol)
        self.gap = True
      else:
        self.emit("symbol" if symbol or not bare.isalpha() else "command", symbol or name)

  def delimiter(self, bare: str) -> None:
    r"""The bracket after \left or \right: a dot is none, < and > are angle brackets."""
    following = self.text[self.at : self.at + 1]
    if bare in ("left", "right") and following and following in ".<>":
      self.at += 1
      if following != ".":
        self.emit("symbol", "(" if bare == "left" else ")")

  def environment(self, which: str) -> None:
    match = _ENVIRONMENT.match(self.text, self.at)
    if not match:
      raise Unreadable(f"\\{which} of nothing")
    self.at = match.end()
    if match[1] in _DROPPED_ENVIRONMENTS:
      self.dropped += 1 if which == "begin" else -1
      self.gap = True
    elif match[1] in MATRICES:
      self.emit("matrix", f"{which} {match[1]}")
    else:
      self.emit("command", rf"\{which} {match[1]}")

  def run(self) -> Tokens:
    text = self.text
    while self.at < len(text):
      match = _PIECE.match(text, self.at)
      assert match, "the last alternative takes any character"
      kind, piece = match.lastgroup, match[0]
      self.at = match.end()
      if kind == "space":
        self.gap = True
      elif kind == "number":
        self.emit("number", piece)
        self.separator()
      elif kind == "letters" and not self.words:
        self.letters(piece)
      elif kind == "letters":
        self.emit("word", piece)
      elif kind == "command":
        self.command(piece)
      elif piece == "{":
        self.open_brace(words=False, hide=bool(self.words))
      elif piece == "}":
        self.close_brace()
      elif piece == "$" or (piece == "&" and self.dropped):
        self.gap = True  # a dollar sign without a backslash marks where mathematics begins
      elif piece == "!=" and self.out and self.out[-1].kind == "number" and not self.gap:
        self.emit("symbol", "!")  # "5!=120" is a factorial
        self.emit("symbol", "=")
      else:
        self.emit("symbol", _SYMBOLS.get(piece, piece))
    if self.braces:
      raise Unreadable("a brace that never closes")
    return tuple(self.out)

  def letters(self, run: str) -> None:
    """A run of letters; splits off an "or" or "and" right after a value: "x=3orx=5"."""
    last = self.out[-1] if self.out else None
    after_value = last and not self.gap and (last.kind == "number" or last.text in CLOSING)
    for word in ("or", "and"):
      rest = run.removeprefix(word)
      if after_value and run.startswith(word) and len(rest) <= 1:
        self.emit("letters", word)
        if not rest:
          return
        run = rest
        break
    self.emit("letters", run)

  def separator(self) -> None:
    """A comma in braces or a thin space between digits becomes a token of its own."""
    match = _GROUPED.match(self.text, self.at)
    if match and self.text[match.end() : match.end() + 1].isdigit():
      self.at = match.end()
      self.emit("symbol", "{,}" if "," in match[0].replace("\\,", "") else r"\,")


def _scripts(tokens: Tokens) -> Tokens:
  r"""Moves degree signs and primes out of superscripts: `90^{\circ}` becomes 90 and "°"."""
  out: list[Token] = []
  at = 0
  while at < len(tokens):
    braced = at + 1 < len(tokens) and tokens[at + 1].text == "{"
    inner = at + 2 if braced else at + 1
    if tokens[at].text == "^" and inner < len(tokens) and tokens[inner].text in (r"\circ", "'"):
      mark = "°" if tokens[inner].text == r"\circ" else "'"
      while inner < len(tokens) and tokens[inner].text in (r"\circ", "'"):
        out.append(Token("symbol", mark))
        inner += 1
      at = inner
      if braced:  # what else stands in the braces follows, `^{\circ C}`, without them
        end = closing(tokens, at)
        out += tokens[at:end]
        at = end + 1
    else:
      out.append(tokens[at])
      at += 1
  return tuple(out)


def _is_group(token: Token) -> bool:
  return token.kind == "number" and len(token.text.split(".")[0]) == 3


def _thousands(tokens: Tokens) -> Tokens:
  """Joins numbers with grouped digits into one token; turns a decimal comma into a point.

  "1,234,567" is one number, but "(1,234)" is a pair and "1, 234" is a list.
  """
  separators = {"{,}", r"\,", ","}
  if not any(token.text in separators for token in tokens):
    return tokens
  spaced = _groups_with_spaced_commas(tokens)
  out: list[Token] = []
  depth_of = _depths(tokens)
  at = 0
  while at < len(tokens):
    token = tokens[at]
    out.append(token)
    at += 1
    if token.kind != "number" or not token.text.isdigit():
      continue
    sign = tokens[at].text if at < len(tokens) else ""
    if sign not in separators or (sign == "," and not _may_group(tokens, at, depth_of, spaced)):
      continue
    end, digits = at, token.text
    while (
      end + 1 < len(tokens)
      and tokens[end].text == sign
      and _is_group(tokens[end + 1])
      and not (sign == "," and (tokens[end].gap or tokens[end + 1].gap))
      and "." not in digits
    ):
      digits += tokens[end + 1].text
      end += 2
    more = end < len(tokens) and tokens[end].text == sign and sign != ","
    more = more or (end + 1 < len(tokens) and tokens[end].text == sign and not tokens[end + 1].gap)
    if end > at and len(token.text) <= 3 and not more:
      out[-1] = token._replace(text=digits)
      at = end
    elif sign == "{,}" and tokens[at + 1].text.isdigit():
      out[-1] = token._replace(text=f"{token.text}.{tokens[at + 1].text}")
      at += 2
  return tuple(
    token._replace(text=",") if token.text == "{,}" else token
    for token in out
    if token.text != r"\,"
  )


def _depths(tokens: Tokens) -> list[int]:
  """For each token, the index of the innermost bracket around it; -1 outside all brackets."""
  stack, depths = [-1], []
  for at, token in enumerate(tokens):
    if token.text in CLOSING and len(stack) > 1:
      stack.pop()
    depths.append(stack[-1])
    if token.text in OPENING:
      stack.append(at)
  return depths


def _groups_with_spaced_commas(tokens: Tokens) -> set[int]:
  """The brackets (as in `_depths`) inside which a blank follows a comma, or a semicolon stands."""
  depths = _depths(tokens)
  return {
    depths[at]
    for at in range(len(tokens) - 1)
    if tokens[at].text in (",", ";") and (tokens[at + 1].gap or tokens[at].text == ";")
  }


def _may_group(tokens: Tokens, at: int, depths: list[int], spaced: set[int]) -> bool:
  """Whether the comma at `at`, which has no blank after it, may separate thousands."""
  tight_before = at >= 2 and tokens[at - 2].text == "," and not tokens[at - 1].gap
  return not tight_before and (depths[at] == -1 or depths[at] in spaced)


@functools.lru_cache(maxsize=256)
def lex(text: str) -> Tokens:
  """The tokens of a text.

  Args:
    text: as `spelling.spell` returns it.

  Raises:
    Unreadable: braces that do not match, or an environment without a name.
  """
  return _thousands(_scripts(_Lexer(text).run()))


# --- lists of tokens -----------------------------------------------------------------


def closing(tokens: Sequence[Token], at: int) -> int:
  """The index of the bracket that closes the innermost group around index `at`.

  Raises:
    Unreadable: no bracket closes it.
  """
  depth = 1
  for index in range(at, len(tokens)):
    text = tokens[index].text
    depth += (text in OPENING) - (text in CLOSING)
    if not depth:
      return index
  raise Unreadable("a bracket that never closes")


def split(tokens: Sequence[Token], separators: Iterable[str]) -> list[Tokens]:
  """Splits at each token whose text is a separator, outside of brackets and matrices.

  Returns:
    The parts, one more than there are separators; a part may be empty.
  """
  found, parts, depth, start = frozenset(separators), [], 0, 0
  for at, token in enumerate(tokens):
    if token.text in OPENING or (token.kind == "matrix" and token.text.startswith("begin")):
      depth += 1
    elif token.text in CLOSING or token.kind == "matrix":
      depth -= 1
    elif not depth and token.text in found:
      parts.append(tuple(tokens[start:at]))
      start = at + 1
  return [*parts, tuple(tokens[start:])]


def enclosed(tokens: Sequence[Token]) -> tuple[str, Tokens, str] | None:
  r"""`(left, inside, right)` if one pair of brackets encloses all tokens; else None.

  The brackets may be of two kinds, as those of a half-open interval.
  """
  if len(tokens) < 2 or tokens[0].text not in OPENING or tokens[-1].text not in CLOSING:
    return None
  left, right = tokens[0].text, tokens[-1].text
  round_or_square = left in "([" and right in ")]"
  if not round_or_square and (left, right) not in (("{", "}"), (r"\{", r"\}")):
    return None
  try:
    return (left, tuple(tokens[1:-1]), right) if closing(tokens, 1) == len(tokens) - 1 else None
  except Unreadable:
    return None


def written(tokens: Iterable[Token]) -> str:
  """The tokens as one string, with a blank only between letters and digits that would merge."""
  parts, before = [], ""
  for token in tokens:
    if before[-1:].isalnum() and token.text[:1].isalnum():
      parts.append(" ")
    parts.append(token.text)
    before = token.text
  return "".join(parts)
