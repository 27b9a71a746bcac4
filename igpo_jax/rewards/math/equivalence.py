r"""Whether two written answers are the same: the rules, and their order.

Both texts become tokens (`spelling`, `tokens`). Then the first rule below that knows the
kind of the two answers decides. A rule that does not know it passes; where all pass, the
answers are not equal.

| rule | decides |
|---|---|
| `identical` | the same tokens |
| `choices` | the letter of a multiple choice |
| `plain_numbers` | two numbers, with their units (`numbers`, `units`) |
| `texts` | two texts, or a text and a number (`words`) |
| `labelled` | an option behind its letter: 12 for "(C) 12" |
| `sentences` | the one value that a sentence holds |
| `conclusions` | what stands after an arrow or a name: "f(3) = 7" for 7 (`names`) |
| `regions` | intervals, inequalities, unions, named sets (`sets`) |
| `matrices` | two matrices, cell by cell |
| `collections` | sets and lists in any order, tuples in theirs |
| `ratios` | 2:3 and 4:6 |
| `equations` | equations and inequalities that are multiples of each other |
| `expressions` | all else: by value (`parser`, `values`) |

The first four need no parser and little time: `quick` tries them in the caller's process,
on short texts. `compare` tries all, and runs in a worker under a time limit (`pool.Pool`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from igpo_jax.rewards.math import names, numbers, parts, sets, units, values, words
from igpo_jax.rewards.math.evaluate import TooLarge
from igpo_jax.rewards.math.parser import parse
from igpo_jax.rewards.math.parts import Side
from igpo_jax.rewards.math.spelling import MAX_LENGTH, spell
from igpo_jax.rewards.math.tokens import Tokens, Unreadable, lex, split, written
from igpo_jax.rewards.math.tree import Node

QUICK_LENGTH = 200  # characters of an answer that the caller's process looks at
MAX_DEPTH = 20  # rules within rules
MAX_SIDES = 8  # of a chain of equations

Outcome = tuple[str, bool]  # status, equal
Rule = Callable[[Side, Side, int], bool | None]  # gold, answer, how deep in their parts


def quick(gold: str, answer: str) -> Outcome | None:
  """Decides by the first rules where they can, in linear time; None where they cannot."""
  if max(len(gold), len(answer)) > QUICK_LENGTH:
    return ("unparseable", False) if max(len(gold), len(answer)) > MAX_LENGTH else None
  try:
    return _decided(gold, answer, QUICK_RULES)
  except Unreadable:
    return None


def compare(gold: str, answer: str) -> Outcome:
  """`(status, equal)` with status "ok", "unparseable" or "timeout".

  May run long. "timeout" says that a limit of the evaluation was met (`evaluate`).
  """
  try:
    return _decided(gold, answer, RULES) or ("ok", False)
  except TooLarge:
    return "timeout", False
  except (Unreadable, RecursionError):
    return "unparseable", False


def _decided(gold: str, answer: str, rules: Sequence[Rule]) -> Outcome | None:
  spelled = spell(gold), spell(answer)
  if not all(spelled):
    return "unparseable", False
  if spelled[0] == spelled[1]:
    return "ok", True  # whatever it may be
  sides = Side(lex(spelled[0])), Side(lex(spelled[1]))
  if not all(side.tokens for side in sides):
    return "unparseable", False
  verdict = _verdict(*sides, 0, rules)
  return None if verdict is None else ("ok", verdict)


def warm_up() -> None:
  """Runs every rule once, so that forked workers start ready."""
  for gold, answer in (
    (r"\frac{\sqrt{2}}{2}x", r"x/\sqrt{2}"),
    ("x+y=1", "y=1-x"),
    (r"\sin(2x)+\pi", "3"),
    (r"(-\infty, 2)", "x < 2"),
    (r"\{1, 2\}", "2, 1"),
  ):
    compare(gold, answer)


def _verdict(gold: Side, answer: Side, depth: int, rules: Sequence[Rule]) -> bool | None:
  """What the first rule says that knows the two kinds of answer."""
  for rule in rules:
    verdict = rule(gold, answer, depth)
    if verdict is not None:
      return verdict
  return None


def _equal(gold: Tokens, answer: Tokens, depth: int) -> bool:
  """Whether two parts of answers are equal."""
  if depth >= MAX_DEPTH:
    raise Unreadable("nested too deep")
  if not gold or not answer:
    raise Unreadable("a part without anything in it")
  return bool(_verdict(Side(gold), Side(answer), depth + 1, RULES))


# --- rules ---------------------------------------------------------------------------


def identical(gold: Side, answer: Side, depth: int) -> bool | None:
  return True if written(gold.tokens) == written(answer.tokens) else None


def choices(gold: Side, answer: Side, depth: int) -> bool | None:
  g, a = gold.choice, answer.choice
  if not g or not a:
    return None
  letter, marked, _ = g
  if not marked and not a[1]:
    return None  # two bare letters may be variables
  if not marked and answer.tokens[0].kind == "letters" and not a[2] and len(answer.tokens) == 1:
    return None
  return letter == a[0]


def plain_numbers(gold: Side, answer: Side, depth: int) -> bool | None:
  g, a = gold.number, answer.number
  if not g or not a:
    return None
  if units.contradict(gold.unit, answer.unit):
    return False
  return numbers.equal(g, a)


def texts(gold: Side, answer: Side, depth: int) -> bool | None:
  if gold.text and answer.text:
    phrases = {sets.phrase(gold.tokens), sets.phrase(answer.tokens)}
    if phrases != {None}:
      return len(phrases) == 1
    return gold.text == answer.text
  if gold.text and answer.number:
    return False
  if gold.text and all(token.kind == "word" for token in gold.tokens) and len(answer.tokens) == 1:
    return True if gold.text == answer.tokens[0].text.lower() else None
  return None


def labelled(gold: Side, answer: Side, depth: int) -> bool | None:
  for side, other in ((gold, answer), (answer, gold)):
    found = side.choice
    if found and found[1] and found[2] and not other.choice:
      return (
        _equal(found[2], other.tokens, depth)
        if side is gold
        else _equal(other.tokens, found[2], depth)
      )
  return None


def sentences(gold: Side, answer: Side, depth: int) -> bool | None:
  if gold.text or sets.read(answer.tokens):
    return None
  value = words.in_sentence(answer.tokens)
  if value is None:
    return False if answer.text else None
  return _equal(gold.tokens, value, depth)


def conclusions(gold: Side, answer: Side, depth: int) -> bool | None:
  g_sides, a_sides = names.sides(gold.tokens), names.sides(answer.tokens)
  if max(len(g_sides), len(a_sides)) > MAX_SIDES:
    raise Unreadable("too long a chain of equations")
  (g_names, g_value), (a_names, a_value) = map(parts.concluded, (gold.tokens, answer.tokens))
  if g_names and a_names:
    if g_names != a_names:
      order = parts.reordered(g_names, a_names, a_value)
      return None if order is None else _equal(g_value, order, depth)
    return _equal(g_value, a_value, depth)
  if min(len(g_sides), len(a_sides)) > 1:
    return None
  if (g_value, a_value) != (gold.tokens, answer.tokens):
    return _equal(g_value, a_value, depth)
  if max(len(g_sides), len(a_sides)) > 1 and not any(
    map(parts.is_list, (gold.tokens, answer.tokens))
  ):
    # "2 + 3 = 5" is 5, "2x = 10" is not 10.
    return all(_equal(one, other, depth) for one in g_sides for other in a_sides)
  return None


def regions(gold: Side, answer: Side, depth: int) -> bool | None:
  tokens = gold.tokens + answer.tokens
  if not any(token.text in sets.MARKS for token in tokens) and not (
    sets.phrase(gold.tokens) or sets.phrase(answer.tokens)
  ):
    return None
  g, a = parts.member(gold.tokens), parts.member(answer.tokens)
  if (g, a) != (gold.tokens, answer.tokens):
    return _equal(g, a, depth)
  one, other = sets.read(gold.tokens), sets.read(answer.tokens)
  if one and other:
    variables = {one.variable, other.variable} - {None}
    if len(variables) > 1:  # x < y may be y > x; 0 < x < 1 is not 0 < y < 1
      signs = [sets.relation(side.tokens) for side in (gold, answer)]
      return None if all(sign and len(sign[1]) == 1 for sign in signs) else False
    return sets.equal(one, other, lambda g, a: _equal(g, a, depth))
  return False if one or other else None


def matrices(gold: Side, answer: Side, depth: int) -> bool | None:
  g, a = parts.cells(gold.tokens), parts.cells(answer.tokens)
  if not g or not a:
    return None
  return [len(row) for row in g] == [len(row) for row in a] and all(
    _equal(one, other, depth)
    for rows in zip(g, a, strict=True)
    for one, other in zip(*rows, strict=True)
  )


def collections(gold: Side, answer: Side, depth: int) -> bool | None:
  g, a = parts.collection(gold), parts.collection(answer)
  if not g and not a:
    return None
  (g_kind, golds) = g or ("list", [parts.unwrapped(gold.tokens)])
  (a_kind, answers) = a or ("list", [parts.unwrapped(answer.tokens)])
  if {g_kind, a_kind} <= {"set", "list"}:
    return _same_set(golds, answers, depth)
  # A tuple whose brackets were left out is still in order; a set is not a tuple.
  if g_kind != a_kind and {g_kind, a_kind} != {"()", "list"}:
    return False
  return len(golds) == len(answers) and all(
    _equal(one, other, depth) for one, other in zip(golds, answers, strict=True)
  )


def _same_set(golds: list[Tokens], answers: list[Tokens], depth: int) -> bool:
  """Each element of one is in the other, and there are as many."""
  if len(golds) != len(answers):
    return False
  left = list(answers)
  for gold in golds:
    for at, answer in enumerate(left):
      if _equal(gold, answer, depth):
        del left[at]
        break
    else:
      return False
  return True


def ratios(gold: Side, answer: Side, depth: int) -> bool | None:
  g, a = (split(parts.unwrapped(side.tokens), ":") for side in (gold, answer))
  if len(g) == len(a) == 1:
    return None
  if any(map(parts.is_time, (gold.tokens, answer.tokens))):
    return False  # times of day that are not written alike
  if not all(g) or not all(a) or 1 < len(a) != len(g) > 1:
    return False
  trees = [[parse(part) for part in parts] for parts in (g, a)]
  quotients = [[_over(part, parts[-1]) for part in parts[:-1]] or parts for parts in trees]
  if len(quotients[0]) != len(quotients[1]):
    return False
  return all(values.same(one, other) for one, other in zip(*quotients, strict=True))


def _over(top: Node, bottom: Node) -> Node:
  return Node("div", (top, bottom))


def equations(gold: Side, answer: Side, depth: int) -> bool | None:
  one, other = parts.relation(gold.tokens), parts.relation(answer.tokens)
  if not one and not other:
    return None
  if not one or not other:
    return False
  (g_tree, g_sign), (a_tree, a_sign) = one, other
  if g_sign.strip("<>") != a_sign.strip("<>"):
    return False
  ratio = values.factor(g_tree, a_tree)
  if ratio is None:
    return False
  if g_sign in ("=", "!="):
    return True
  return bool(ratio > 0) == (g_sign == a_sign)


def expressions(gold: Side, answer: Side, depth: int) -> bool | None:
  if any(side.number and side.number.base for side in (gold, answer)):
    return False  # digits in a base, and what is no plain number
  if gold.text or answer.text:
    return False  # a word is no product of its letters
  return values.same(*(parse(parts.unwrapped(side.tokens)) for side in (gold, answer)))


QUICK_RULES = (identical, choices, plain_numbers, texts)
RULES = (
  *QUICK_RULES,
  labelled,
  sentences,
  conclusions,
  regions,
  matrices,
  collections,
  ratios,
  equations,
  expressions,
)
