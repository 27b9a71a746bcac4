r"""Decides whether two written answers are equal, by rules that are tried in order.

Both texts become tokens (`spelling`, `tokens`). Then the rules below are tried, from the top.
Each handles one kind of answer. The first that handles the two answers decides; a rule that
does not handle them returns None. If no rule decides, the answers are not equal.

| rule | handles |
|---|---|
| `identical` | the same tokens |
| `choices` | the letters of a multiple choice |
| `plain_numbers` | two numbers, which may have units (`numbers`, `units`) |
| `texts` | two texts, or a text and a number (`words`) |
| `labelled` | an option that stands after its letter: 12 in "(C) 12" |
| `sentences` | a sentence that contains exactly one value |
| `conclusions` | a value after an arrow or a name: 7 in "f(3) = 7" (`names`) |
| `regions` | intervals, inequalities, unions, named sets (`sets`) |
| `matrices` | two matrices, cell by cell |
| `collections` | sets and lists, whose order does not matter, and tuples, whose order does |
| `ratios` | ratios such as 2:3 and 4:6 |
| `equations` | two equations or inequalities: equal if one is a multiple of the other |
| `expressions` | everything else, by value (`parser`, `values`) |

The first four need no parser and little time. `quick` tries them on short texts, in the caller's
process. `compare` tries all of them; it runs in a worker with a time limit (`pool.Pool`).
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

QUICK_LENGTH = 200  # characters; longer answers are left to the workers
MAX_DEPTH = 20  # how deep rules may compare parts of parts
MAX_SIDES = 8  # of a chain of equations

Outcome = tuple[str, bool]  # status, equal
Rule = Callable[[Side, Side, int], bool | None]  # gold, answer, depth of nested comparisons


def quick(gold: str, answer: str) -> Outcome | None:
  """Decides by the first four rules, in linear time; None if they do not decide.

  Returns:
    `(status, equal)` as from `compare`, or None.
  """
  if max(len(gold), len(answer)) > QUICK_LENGTH:
    return ("unparseable", False) if max(len(gold), len(answer)) > MAX_LENGTH else None
  try:
    return _decided(gold, answer, QUICK_RULES)
  except Unreadable:
    return None


def compare(gold: str, answer: str) -> Outcome:
  """Compares by all rules. It may take long, so run it under a time limit.

  Args:
    gold: the gold answer.
    answer: the answer found in a completion.

  Returns:
    `(status, equal)`. The status is "ok"; "unparseable" if one of the two cannot be read; or
    "timeout" if a limit of the evaluation was exceeded (`evaluate.TooLarge`).
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
    return "ok", True  # whether it can be read or not
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
  """The verdict of the first rule that handles the two answers; None if none does."""
  for rule in rules:
    verdict = rule(gold, answer, depth)
    if verdict is not None:
      return verdict
  return None


def _equal(gold: Tokens, answer: Tokens, depth: int) -> bool:
  """Whether two parts of answers are equal, by all rules."""
  if depth >= MAX_DEPTH:
    raise Unreadable("nested too deep")
  if not gold or not answer:
    raise Unreadable("a part without anything in it")
  return bool(_verdict(Side(gold), Side(answer), depth + 1, RULES))


# --- rules ---------------------------------------------------------------------------


def identical(gold: Side, answer: Side, depth: int) -> bool | None:
  """The same tokens are equal."""
  return True if written(gold.tokens) == written(answer.tokens) else None


def choices(gold: Side, answer: Side, depth: int) -> bool | None:
  """Two letters of a multiple choice. Two bare letters may be variables: later rules decide."""
  g, a = gold.choice, answer.choice
  if not g or not a:
    return None
  letter, marked, _ = g
  if not marked and not a[1]:
    return None
  if not marked and answer.tokens[0].kind == "letters" and not a[2] and len(answer.tokens) == 1:
    return None
  return letter == a[0]


def plain_numbers(gold: Side, answer: Side, depth: int) -> bool | None:
  """Two numbers: equal values whose units do not contradict each other."""
  g, a = gold.number, answer.number
  if not g or not a:
    return None
  if units.contradict(gold.unit, answer.unit):
    return False
  return numbers.equal(g, a)


def texts(gold: Side, answer: Side, depth: int) -> bool | None:
  """Two texts: equal word for word, or both name one set ("no solution"). A text is no number."""
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
  """If one side is an option after its letter and the other has no letter: compare the option."""
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
  """If the answer is a sentence with exactly one value: compare that value."""
  if gold.text or sets.read(answer.tokens):
    return None
  value = words.in_sentence(answer.tokens)
  if value is None:
    return False if answer.text else None
  return _equal(gold.tokens, value, depth)


def conclusions(gold: Side, answer: Side, depth: int) -> bool | None:
  """Compares values without the names before them. Later rules decide if the names differ."""
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
  """Two sets of real numbers, however they are written."""
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
    if len(variables) > 1:  # x < y may equal y > x, but 0 < x < 1 does not equal 0 < y < 1
      signs = [sets.relation(side.tokens) for side in (gold, answer)]
      return None if all(sign and len(sign[1]) == 1 for sign in signs) else False
    return sets.equal(one, other, lambda g, a: _equal(g, a, depth))
  return False if one or other else None


def matrices(gold: Side, answer: Side, depth: int) -> bool | None:
  """Two matrices that are written out: cell by cell."""
  g, a = parts.cells(gold.tokens), parts.cells(answer.tokens)
  if not g or not a:
    return None
  return [len(row) for row in g] == [len(row) for row in a] and all(
    _equal(one, other, depth)
    for rows in zip(g, a, strict=True)
    for one, other in zip(*rows, strict=True)
  )


def collections(gold: Side, answer: Side, depth: int) -> bool | None:
  """Sets and lists in any order, tuples and intervals in order."""
  g, a = parts.collection(gold), parts.collection(answer)
  if not g and not a:
    return None
  (g_kind, golds) = g or ("list", [parts.unwrapped(gold.tokens)])
  (a_kind, answers) = a or ("list", [parts.unwrapped(answer.tokens)])
  if {g_kind, a_kind} <= {"set", "list"}:
    return _same_set(golds, answers, depth)
  # A tuple may lack its brackets. Its order counts all the same. A set does not equal a tuple.
  if g_kind != a_kind and {g_kind, a_kind} != {"()", "list"}:
    return False
  return len(golds) == len(answers) and all(
    _equal(one, other, depth) for one, other in zip(golds, answers, strict=True)
  )


def _same_set(golds: list[Tokens], answers: list[Tokens], depth: int) -> bool:
  """Whether the elements of the two can be paired so that each pair is equal."""
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
  """Ratios are equal if their quotients are. Times of day ("10:30") are equal only if identical."""
  g, a = (split(parts.unwrapped(side.tokens), ":") for side in (gold, answer))
  if len(g) == len(a) == 1:
    return None
  if any(map(parts.is_time, (gold.tokens, answer.tokens))):
    return False
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
  """Equal if `left - right` of one is a constant multiple of the other's, signs considered."""
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
  """Two expressions are equal if they have equal values (`values.same`)."""
  if any(side.number and side.number.base for side in (gold, answer)):
    return False  # digits in a base equal plain numbers only, and `plain_numbers` compared those
  if gold.text or answer.text:
    return False  # a word is not the product of its letters
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
