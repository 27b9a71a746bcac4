r"""The parser: from the tokens of an expression to its tree, by recursive descent.

    sum      = product {("+" | "-") product}
    product  = power {["*" | "/" | "mod"] power}        without an operator: multiplication
    power    = postfix ["^" exponent]
    postfix  = primary {"!" | "°"}
    primary  = number | symbol | symbol "(" arguments ")" | function argument
             | "(" sum ")" | "|" sum "|" | command with its arguments | matrix

Tokens that have no meaning here raise `Unreadable`: a dot, a word among symbols, two numbers side
by side. Otherwise answers could be equal by accident. Nothing is evaluated.
"""

from __future__ import annotations

from fractions import Fraction

from igpo_jax.rewards.math import constructs, numbers
from igpo_jax.rewards.math.tokens import Token, Tokens, Unreadable, closing, split, written
from igpo_jax.rewards.math.tree import Node, number
from igpo_jax.rewards.math.words import FUNCTIONS, GREEK, is_prose

MAX_DEPTH = 60  # of the tree
MAX_RUN = 40  # letters without a blank between them

_ARGUMENT_COMMANDS = frozenset(
  r"\overline \bar \hat \tilde \dot \ddot \overrightarrow \widehat \widetilde".split()
)
_CONSTANTS = {r"\pi": Node("symbol", ("pi",)), r"\infty": Node("infinity")}
_GREEK = frozenset(f"\\{name}" for name in GREEK - {"pi"}) | frozenset(
  (
    r"\Gamma \Delta \Theta \Lambda \Xi \Sigma \Upsilon \Phi \Psi \Omega \hbar \ell \odot \star"
  ).split()
)
_COMMAND_FUNCTIONS = frozenset(f"\\{name}" for name in FUNCTIONS) | {r"\Re", r"\Im"}
_STARTS = (
  frozenset(("(", "[", "{", "|", r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil", r"\angle"))
  | frozenset((r"\sum", r"\prod", r"\int", r"\lim", r"\triangle"))
  | _CONSTANTS.keys()
  | _GREEK
  | _COMMAND_FUNCTIONS
  | _ARGUMENT_COMMANDS
)
_PAIRS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_PREFIXES = tuple(sorted((f for f in FUNCTIONS if len(f) > 2), key=len, reverse=True))
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot"}
_MANY = frozenset(("gcd", "lcm", "min", "max"))


def _product(factors: list[Node]) -> Node:
  return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


class Parser:
  """Reads one list of tokens from the left.

  `at` is the index of the next token. Every method reads from there and moves `at` behind what it
  has read. `constructs` reads the commands that have arguments.

  Args:
    tokens: all tokens of the expression.
    depth: how deep in the whole tree the expression stands.
    angles: how many trigonometric functions enclose it. Inside one, a degree is pi / 180.
  """

  def __init__(self, tokens: Tokens, depth: int = 0, angles: int = 0):
    self.tokens = list(tokens)
    self.at = 0
    self.depth = depth
    self.angles = angles
    self.bars = 0  # number of absolute values that are open

  def text(self) -> str:
    """The text of the next token; "" at the end."""
    return self.tokens[self.at].text if self.at < len(self.tokens) else ""

  def kind(self) -> str:
    """The kind of the next token; "" at the end."""
    return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

  def take(self, text: str) -> None:
    """Steps over the next token, which must have this text."""
    if self.text() != text:
      raise Unreadable(f"{self.text() or 'the end'} where {text} was due")
    self.at += 1

  def inside(self, start: int) -> Tokens:
    """The tokens of the group whose first token has the index `start`; `at` moves behind it."""
    end = closing(self.tokens, start)
    if _PAIRS.get(self.tokens[start - 1].text) != self.tokens[end].text:
      raise Unreadable("brackets that do not match")
    self.at = end + 1
    return tuple(self.tokens[start:end])

  def tree(self, tokens: Tokens) -> Node:
    """The tree of all of `tokens`, one level deeper."""
    parser = Parser(tokens, self.depth, self.angles)
    node = parser.sum()
    if parser.at != len(parser.tokens):
      raise Unreadable(f"{parser.text()} in the middle")
    return node

  def sum(self) -> Node:
    """A sum: products with signs between them."""
    terms = [self.product()]
    while self.text() in ("+", "-"):
      negative = self.text() == "-"
      self.at += 1
      term = self.product()
      terms.append(Node("neg", (term,)) if negative else term)
    return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

  def product(self) -> Node:
    """A product: factors with or without an operator between them."""
    negative = self.signs()
    factors = [self.mixed() or self.power()]
    while True:
      text = self.text()
      if text in ("*", "/"):
        self.at += 1
        flip = self.signs()
        factor = (text == "*" and self.mixed()) or self.power()
        factor = Node("neg", (factor,)) if flip else factor
        factors.append(factor if text == "*" else Node("inverse", (factor,)))
      elif text in (r"\bmod", r"\mod", "mod"):
        self.at += 1
        factors = [Node("function", ("mod", _product(factors), self.power()))]
      elif self.starts_factor():
        factors.append(self.power())
      else:
        node = _product(factors)
        return Node("neg", (node,)) if negative else node

  def signs(self) -> bool:
    """Steps over plus and minus signs; whether they amount to a minus."""
    negative = False
    while self.text() in ("+", "-"):
      negative ^= self.text() == "-"
      self.at += 1
    return negative

  def starts_factor(self) -> bool:
    """Whether a factor follows without an operator."""
    if self.at >= len(self.tokens):
      return False
    token, before = self.tokens[self.at], self.tokens[self.at - 1]
    if token.kind == "number":
      if before.kind in ("number", "letters", "word"):
        raise Unreadable("a number beside a number or a letter")
      return True
    if token.text == "|":
      return not self.bars
    return (token.kind in ("letters", "word", "matrix") and not token.text.startswith("end ")) or (
      token.text in _STARTS
    )

  def mixed(self) -> Node | None:
    """`1\\frac{4}{5}` and "1 4/5" where a factor begins: a sum, not a product; else None."""
    if self.kind() != "number" or not self.text().isdigit():
      return None
    following = self.tokens[self.at + 1 : self.at + 2]
    if not following or (following[0].text != r"\frac" and following[0].kind != "number"):
      return None
    for size in (9, 8, 7, 6, 5, 4, 3):
      part = tuple(self.tokens[self.at : self.at + size])
      if len(part) < size or (part[-1].kind == "symbol" and part[-1].text != "}"):
        continue
      value = numbers.read(part)
      if value and not value.percent and not value.base and not value.decimal:
        after = self.tokens[self.at + size : self.at + size + 1]
        if after and (after[0].text in ("^", "_", "!") or after[0].kind == "number"):
          return None
        self.at += size
        return number(value.value)
    return None

  def power(self) -> Node:
    """A factor, which may have an exponent."""
    node = self.postfix(self.primary())
    if self.text() == "^":
      self.at += 1
      node = self.postfix(Node("pow", (node, self.exponent())))
    return node

  def postfix(self, node: Node) -> Node:
    """Applies the factorials and degree signs that follow to `node`."""
    while self.text() in ("!", "°"):
      if self.text() == "!":
        node = Node("factorial", (node,))
      elif self.angles:
        node = Node("div", (Node("mul", (node, _CONSTANTS[r"\pi"])), number(180)))
      self.at += 1
    return node

  def exponent(self) -> Node:
    """What follows "^": a group; or a number or letter, which may have a sign."""
    text = self.text()
    if text in ("{", "("):
      inside = self.inside(self.at + 1)
      if len(inside) == 1 and inside[0].text in ("*", "+", "-", r"\top", r"\dagger"):
        return Node("symbol", (inside[0].text,))
      return self.tree(inside)
    if text in (r"\top", r"\dagger", "*"):
      self.at += 1
      return Node("symbol", (text,))
    negative = self.signs()
    if self.kind() == "letters" and self.text() not in FUNCTIONS:
      self.first_letter()
    node = self.primary()
    return Node("neg", (node,)) if negative else node

  def first_letter(self) -> None:
    """Splits the next run of letters after its first letter, as TeX does after "^" and `\\frac`."""
    token = self.tokens[self.at]
    if len(token.text) > 1 and token.text not in GREEK:
      self.tokens[self.at : self.at + 1] = [
        token._replace(text=token.text[:1]),
        token._replace(text=token.text[1:], gap=False),
      ]

  def primary(self) -> Node:
    """The smallest part of an expression, one level deeper in the tree."""
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise Unreadable("nested too deep")
    node = self.one()
    self.depth -= 1
    return node

  def one(self) -> Node:
    """Chooses by the next token what to read."""
    if self.at >= len(self.tokens):
      raise Unreadable("the end where a number or a symbol was due")
    token = self.tokens[self.at]
    text = token.text
    if token.kind == "number":
      return self.literal()
    if token.kind in ("letters", "word"):
      return self.letters()
    if token.kind == "matrix":
      return constructs.matrix(self)
    if text in ("(", "[", "{"):
      return self.group()
    if text == "|":
      self.at += 1
      self.bars += 1
      node = self.sum()
      self.bars -= 1
      self.take("|")
      return Node("abs", (node,))
    if text in _CONSTANTS:
      self.at += 1
      return _CONSTANTS[text]
    if text in _COMMAND_FUNCTIONS and text != r"\sqrt":
      self.at += 1
      return self.function(text[1:])
    return self.command(text)

  def command(self, text: str) -> Node:
    """A LaTeX command with its arguments."""
    if text in _GREEK or text in _ARGUMENT_COMMANDS or text in (r"\angle", r"\triangle"):
      return self.symbol()
    self.at += 1
    if text == r"\frac":
      return constructs.fraction(self)
    if text == r"\sqrt":
      return constructs.root(self)
    if text == r"\binom":
      return Node("function", ("binom", self.argument(), self.argument()))
    if text in (r"\lfloor", r"\lceil"):
      return Node(
        "function", ("floor" if text == r"\lfloor" else "ceil", self.tree(self.inside(self.at)))
      )
    if text in (r"\sum", r"\prod"):
      return constructs.repeated(self, "sum" if text == r"\sum" else "product")
    if text == r"\int":
      return constructs.integral(self)
    if text == r"\lim":
      return constructs.limit(self)
    raise Unreadable(f"{text} is no part of an expression")

  def literal(self) -> Node:
    """A number, which may have a repeating decimal."""
    start = self.at
    self.at += 1
    if self.text() in (r"\overline", r"\bar", r"\dot") and "." in self.tokens[start].text:
      for size in (5, 3):
        value = numbers.read(tuple(self.tokens[start : start + size]))
        if value:
          self.at = start + size
          return number(value.value)
    text = self.tokens[start].text
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > 1000 or len(exponent) > 5 or self.text() == "_":
      raise Unreadable("a number too long, or with a base")
    whole, _, places = mantissa.partition(".")
    value = Fraction(int(whole + places or "0"), 10 ** len(places))
    return number(value * Fraction(10) ** int(exponent or 0), bool(places or exponent))

  def group(self) -> Node:
    r"""An expression in brackets, or a binomial in the old TeX notation `n \choose k`."""
    inside = self.inside(self.at + 1)
    halves = split(inside, (r"\choose",))
    if len(halves) == 2:
      return Node("function", ("binom", *map(self.tree, halves)))
    return self.tree(inside)

  def letters(self) -> Node:
    """A run of letters: the name of a function, a word inside `\\text`, or a product of symbols."""
    token = self.tokens[self.at]
    text = token.text
    if text in FUNCTIONS:
      self.at += 1
      return constructs.root(self) if text == "sqrt" else self.function(_ALIASES.get(text, text))
    if text in ("pi", "infinity", "infty"):
      self.at += 1
      return _CONSTANTS[r"\pi" if text == "pi" else r"\infty"]
    if token.kind == "letters" and text not in GREEK:
      if not text.isascii() or len(text) > MAX_RUN or is_prose(text):
        raise Unreadable("letters that are no mathematics")
      for at in range(len(text)):
        function = next((name for name in _PREFIXES if text.startswith(name, at)), None)
        if function and (at or text != function):  # "tsin(2t)", "sinx"
          pieces = [text[:at], function, text[at + len(function) :]]
          self.tokens[self.at : self.at + 1] = [
            token._replace(text=piece) for piece in pieces if piece
          ]
          return self.letters()
      self.first_letter()
    return self.symbol()

  def symbol(self) -> Node:
    """A symbol with its accents, subscripts and primes; or, before brackets, perhaps a call."""
    token = self.tokens[self.at]
    self.at += 1
    if token.text in _ARGUMENT_COMMANDS:
      if self.text() == "{":
        inside = self.inside(self.at + 1)
      else:
        inside, self.at = tuple(self.tokens[self.at : self.at + 1]), self.at + 1
      name = f"{token.text} {written(inside)}"
    elif token.text in (r"\angle", r"\triangle"):
      name = f"{token.text} {self.text()}"
      self.at += 1
    else:
      name = token.text.removeprefix("\\") if token.text[1:] in GREEK else token.text
    while self.text() in ("_", "'"):
      if self.text() == "'":
        name, self.at = name + "'", self.at + 1
        continue
      self.at += 1
      if self.text() == "{":
        sub = self.inside(self.at + 1)
      else:
        if self.kind() == "letters" and len(self.text()) < 3:
          self.first_letter()
        sub, self.at = (self.tokens[self.at : self.at + 1]), self.at + 1
      if not sub:
        raise Unreadable("an empty subscript")
      name += f"_{written(t for t in sub if t.text not in ('{', '}'))}"
    called = self.call(name, token)
    return called or Node("symbol", (name,))

  def call(self, name: str, token: Token) -> Node | None:
    """`f(x)` or `I(0)`: a symbol before brackets, if it is a function; None if it is a factor."""
    if name in ("e", "i", "d", "pi"):
      return None
    inverse = [t.text for t in self.tokens[self.at : self.at + 6]]
    if inverse == ["^", "{", "-", "1", "}", "("] and name in "fgh":
      self.at += 5
      name += "^-1"
    if self.text() != "(":
      return None
    start = self.at
    inside = self.inside(start + 1)
    end, self.at = self.at, start
    parts = split(inside, ",")
    single = len(inside) == 1 and (inside[0].kind != "letters" or len(inside[0].text) == 1)
    plain = len(token.text) == 1 and token.kind == "letters" and name not in "fghFGHP"
    if len(parts) == 1 and plain and not single and "'" not in name:
      return None
    if token.kind == "command" and len(parts) == 1 and not single:
      return None
    self.at = end
    return Node("call", (name, *map(self.of_call, parts)))

  def of_call(self, part: Tokens) -> Node:
    """An argument of an unknown function; text in it is one symbol."""
    try:
      return self.tree(part)
    except Unreadable:  # P(\text{heads}), P(X = 3)
      return Node("symbol", (written(part),))

  def function(self, name: str) -> Node:
    """A function whose name was read: its base, its power and its argument."""
    base = power = None
    for _ in range(2):
      if self.text() == "_" and name == "log" and base is None:
        self.at += 1
        base = self.exponent()
      elif self.text() == "^" and power is None:
        self.at += 1
        power = self.exponent()
    if power == Node("neg", (number(1),)) and name in _INVERSES:
      name, power = _INVERSES[name], None
    angle = name in ("sin", "cos", "tan", "cot", "sec", "csc")
    self.angles += angle
    node = Node("function", (name, *self.of_function(name)))
    self.angles -= angle
    if base is not None:
      node = Node("div", (Node("function", ("ln", *node.args[1:])), Node("function", ("ln", base))))
    return node if power is None else Node("pow", (node, power))

  def of_function(self, name: str) -> list[Node]:
    """The arguments of a function, with or without brackets: `sin 2x` is `sin(2x)`."""
    if self.text() in ("(", "[", "{") or (name in _MANY and self.text() == r"\{"):
      return [self.tree(part) for part in split(self.inside(self.at + 1), ",;")]
    if self.text() == "|":
      return [self.primary()]
    negative = self.signs()
    factors = [self.power()]
    while (
      self.starts_factor()
      and self.text() not in ("(", "[", "|")
      and self.text() not in _COMMAND_FUNCTIONS - {r"\sqrt"}
      and self.text() not in FUNCTIONS - {"sqrt"}
    ):
      factors.append(self.power())
    node = _product(factors)
    return [Node("neg", (node,)) if negative else node]

  def argument(self) -> Node:
    """The argument of a command: a group, or else the next digit or letter, as in `\\frac12`."""
    if self.text() == "{":
      return self.tree(self.inside(self.at + 1))
    token = self.tokens[self.at] if self.at < len(self.tokens) else None
    if token and token.kind == "number" and token.text.isdigit():
      if len(token.text) > 1:
        self.tokens[self.at] = token._replace(text=token.text[1:], gap=False)
      else:
        self.at += 1
      return number(int(token.text[0]))
    if token and token.kind == "letters":
      self.first_letter()
      self.at += 1
      return Node("symbol", (token.text[0],))
    return self.primary()


def parse(tokens: Tokens) -> Node:
  """The tree of an expression.

  Args:
    tokens: all tokens of the expression.

  Raises:
    Unreadable: the tokens are not one complete expression.
  """
  return Parser(()).tree(tokens)
