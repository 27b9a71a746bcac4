"""Finding and comparing answers, kind by kind: what people reported of graders, in our own words.

`cases/grading.tsv` holds pairs of answers under a heading per kind, the near misses that
must stay wrong among them. The completions below are found first and compared then.
"""

from __future__ import annotations

# ruff: noqa: RUF001  end markers have characters that look alike
import pathlib
import re
import time

import pytest

from igpo_jax.rewards import answers
from igpo_jax.rewards.math import equivalence, names, numbers, sets, spelling, units, values, words
from igpo_jax.rewards.math.tokens import lex

TABLE = pathlib.Path(__file__).parent / "cases" / "grading.tsv"


def kinds() -> dict[str, list[tuple[str, bool, str]]]:
  found: dict[str, list[tuple[str, bool, str]]] = {}
  for line in TABLE.read_text("utf-8").splitlines():
    if line.startswith("## "):
      rows = found.setdefault(line[3:], [])
    elif line and not line.startswith("#"):
      line = re.sub("<([0-9a-f]{4})>", lambda m: chr(int(m[1], 16)), line)
      gold, sign, answer = line.split("\t")
      assert sign in ("=", "/="), line
      rows.append((gold, sign == "=", answer))
  return found


KINDS = kinds()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_each_kind_are_equal_exactly_when_they_mean_the_same(kind):
  wrong = []
  for gold, same, answer in KINDS[kind]:
    status, equal = equivalence.compare(gold, answer)
    if equal != same:
      wrong.append((gold, answer, status, equal))
  assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_process_decides_as_a_worker_would(kind):
  for gold, _, answer in KINDS[kind]:
    quick = equivalence.quick(gold, answer)
    assert quick is None or quick == equivalence.compare(gold, answer), (gold, answer)


def test_each_kind_has_siblings_and_near_misses():
  for kind, rows in KINDS.items():
    assert sum(same for _, same, _ in rows) >= 3, kind
    assert any(not same for _, same, _ in rows), kind


COMPLETIONS = (
  ("end markers", r"\boxed{4}<|assistant|>\boxed{5}", "4", True),
  ("end markers", r"\boxed{4}<|system|>\boxed{5}", "4", True),
  ("end markers", r"\boxed{4} [/INST] \boxed{5}", "4", True),
  ("end markers", "<|assistant|>\n\\boxed{5}", "5", True),
  (
    "a formula and a closing sentence",
    "The final answer is $42$. I hope it is correct.",
    "42",
    True,
  ),
  (
    "a formula and a closing sentence",
    "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.",
    "\\frac12",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $x=5$. I hope it is correct.",
    "5",
    True,
  ),
  ("a formula and a closing sentence", "The final answer is 42. I hope it is correct.", "42", True),
  (
    "a formula and a closing sentence",
    "The final answer is $(1,2)$. I hope it is correct.",
    "(1,2)",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $\\$18.90$. I hope it is correct.",
    "18.90",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $43$. I hope it is correct.",
    "42",
    False,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $2\\text{ cm}$. I hope it is correct.",
    "2",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $3$ or $4$. I hope it is correct.",
    "3",
    False,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $3$ and $4$. I hope it is correct.",
    "3,4",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $3.5e-7$. I hope it is correct.",
    "3.5e-7",
    True,
  ),
  (
    "a formula and a closing sentence",
    "Final Answer: The final answer is $\\boxed{42}$. I hope it is correct.",
    "42",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $42$ dollars. I hope it is correct.",
    "42",
    True,
  ),
  (
    "a formula and a closing sentence",
    "The final answer is $ 6.5 \\times 10^{-2} $. I hope it is correct.",
    "6.5e-2",
    True,
  ),
  ("Markdown", "The **answer is 4**.", "4", True),
  ("Markdown", "The answer is: **4**", "4", True),
  ("Markdown", "The answer is **4 apples**.", "4", True),
  ("Markdown", "The answer is __4__.", "4", True),
  ("Markdown", "The answer is *4*.", "4", True),
  ("Markdown", "The answer is `4`.", "4", True),
  ("Markdown", "**The answer is 4.**", "4", True),
  ("Markdown", "The **final answer** is **4**.", "4", True),
  ("Markdown", "The final answer is: **$x = 4$**.", "4", True),
  ("Markdown", "The answer is **5**.", "4", False),
  ("Markdown", "#### **72**", "72", True),
  ("Markdown", "<answer>**4**</answer>", "4", True),
  ("Markdown", "The answer is **(C)**.", "C", True),
  ("Markdown", "The answer is ***4***", "4", True),
  ("Markdown", "The answer is 2**3", "8", True),
  ("the next line", "The answer is:\n\n72", "72", True),
  ("the next line", "The answer is \n72", "72", True),
  ("the next line", "The answer is:\n72", "72", True),
  ("the next line", "The final answer is:\n$72$", "72", True),
  ("the next line", "The answer is:\n\\[\n72\n\\]", "72", True),
  ("the next line", "The answer is:\n$$\n\\frac{1}{2}\n$$\nDone.", "\\frac12", True),
  ("the next line", "The answer is: \n\n**72**\n", "72", True),
  ("the next line", "The answer is:\r\n72", "72", True),
  ("the next line", "The answer is:\n73\n72", "72", False),
  ("the next line", "The answer is:", "72", False),
  ("the next line", "####\n72", "72", True),
  ("the next line", "So the answer is\n\n $72$ dollars.", "72", True),
  ("a box that is only spoken of", "So \\boxed{5}. I put it in \\boxed as asked.", "5", True),
  ("a box that is only spoken of", "So \\boxed{5}. The answer is in \\boxed{}.", "5", True),
  ("a box that is only spoken of", "So \\boxed{5}. I used `\\boxed{}` as required.", "5", True),
  ("a box that is only spoken of", "\\boxed{5}\nNote that \\boxed is required.", "5", True),
  ("a box that is only spoken of", "\\boxed{5}. We use the \\boxed command", "5", True),
  ("a box that is only spoken of", "\\boxed{5} is inside \\boxed{...}", "5", True),
  ("a box that is only spoken of", "\\boxed{5} is inside \\boxed{answer}", "5", True),
  ("a box that is only spoken of", "\\boxed{5} then \\boxed 7.", "7", True),
  ("a box that is only spoken of", "\\boxed{5} then \\boxed x$", "x", True),
  ("a box that is only spoken of", "put it in \\boxed. The answer is 6", "6", True),
  ("a box that is only spoken of", "put it in \\boxed{} The answer is 6", "6", False),
  ("a box that is only spoken of", "\\boxed{5} and then \\boxed{6}", "5", False),
  ("a box that is only spoken of", "\\boxed{5}. Hence \\boxed{6}", "6", True),
  ("a box that is only spoken of", "\\boxed{5}. Done, boxed.", "5", True),
  ("a box that is only spoken of", "\\boxed{5}, written with \\fbox or \\boxed", "5", True),
  ("end markers", "\\boxed{5}<|im_end|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<end_of_turn>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|eom_id|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<｜end▁of▁sentence｜>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|return|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|EOT|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|role_end|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|END_OF_TURN_TOKEN|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|end_of_turn|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}\n<|im_start|>user\nwrong\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}\n<start_of_turn>user \\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}[INST] \\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|start_header_id|>user<|end_header_id|>\\boxed{6}", "5", True),
  (
    "end markers",
    "<|start_header_id|>assistant<|end_header_id|>\n\n\\boxed{5}<|eot_id|>",
    "5",
    True,
  ),
  ("end markers", "<|im_start|>assistant\n\\boxed{5}<|im_end|>", "5", True),
  ("end markers", "\\boxed{5}<|endoftext|>\\boxed{6}", "6", False),
  ("end markers", "so \\boxed{4} <think> hmm </think> \\boxed{6}", "6", True),
  ("end markers", "\\boxed{5}<|end|><|user|>\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}</s><s>[INST]\\boxed{6}", "5", True),
  ("end markers", "\\boxed{5}<|eos|>\\boxed{6}", "5", True),
  ("boxes in a row", "The solutions are \\boxed{2} and \\boxed{3}.", "2,3", True),
  ("boxes in a row", "The solutions are $\\boxed{2}$, $\\boxed{3}$.", "2,3", True),
  ("boxes in a row", "x = \\boxed{2} or x = \\boxed{3}", "2,3", True),
  ("boxes in a row", "x = \\boxed{2}, y = \\boxed{3}", "(2,3)", True),
  ("boxes in a row", "The solutions are \\boxed{2} and \\boxed{3}.", "3", False),
  ("boxes in a row", "\\boxed{2}, \\boxed{2}", "2", True),
  ("boxes in a row", "First \\boxed{2}. Then \\boxed{3}.", "3", True),
  ("boxes in a row", "First \\boxed{2}\n\nand \\boxed{3}.", "3", True),
  ("boxes in a row", "\\boxed{2}\n\\boxed{3}", "3", True),
  ("boxes in a row", "\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1,2,3", True),
  ("hashes", "####42", "42", True),
  ("hashes", "so\n####  42", "42", True),
  ("hashes", "##### 42 is a heading", "42", False),
  ("hashes", "### 42", "42", False),
  ("loose ends", "\\boxed{\\text{540 dollars}}", "540", True),
  ("loose ends", "The answer is 5.", "5", True),
  ("loose ends", "The answer is St. Louis.", "\\text{St. Louis}", True),
  ("loose ends", "The answer is $5", "5", True),
  ("loose ends", "The answer is $5 per hour.", "5", True),
  ("loose ends", "The answer is (C).", "C", True),
  ("loose ends", "The answer is C. Because of it.", "C", True),
  ("loose ends", "The answer is 0.5.", "1/2", True),
  ("loose ends", "The answer is 10:30 a.m.", "10:30 a.m.", True),
)


@pytest.mark.parametrize("kind", dict.fromkeys(row[0] for row in COMPLETIONS))
def test_the_answer_of_a_completion_is_found_however_it_is_dressed(kind):
  wrong = []
  for name, completion, gold, same in COMPLETIONS:
    if name == kind:
      found = answers.find_answer(completion)
      if equivalence.compare(gold, found or "")[1] != same:
        wrong.append((completion, found, gold))
  assert not wrong


# --- the tables of the rules ---------------------------------------------------------


def test_every_character_of_the_table_is_spelled_in_ascii():
  for char, spelled in spelling.CHARACTERS.items():
    assert spelled.isascii() and not char.isascii(), char
    assert spelling.spell(f"1{char}2") is not None, char


@pytest.mark.parametrize(
  "unit", [u for u in units.UNITS if u.isalpha() and u.isascii() and len(u) > 1]
)
def test_every_unit_is_set_aside_in_words(unit):
  assert equivalence.compare("15", rf"15 \text{{ {unit}}}") == ("ok", True)


def test_units_contradict_each_other_only_when_both_are_known():
  def split(text):
    return units.split(lex(text))

  for one, other, expected in (
    ("5 cm", "5 m", True),
    ("5 km/h", "5 mph", True),
    ("5 mph", "5 miles per hour", False),
    ("5 apples", "5 cm", False),
    ("5", "5 cm", False),
    (r"\$5", "5 dollars", False),
    (r"\$5", "£5", True),
    ("5 degrees", "5 celsius", False),
  ):
    assert units.contradict(split(one), split(other)) == expected, (one, other)


@pytest.mark.parametrize("word", sorted(words.TURNING["anywhere"]))
def test_no_sentence_with_a_turning_word_holds_a_number(word):
  assert words.in_sentence(lex(f"they say {word} that it is 7 today")) is None


@pytest.mark.parametrize("multiple", words.MULTIPLES)
def test_a_multiple_changes_the_number(multiple):
  value = 7 * words.MULTIPLES[multiple]
  assert equivalence.compare(str(value), f"7 {multiple}") == ("ok", True)
  assert equivalence.compare("7", rf"7 \text{{ {multiple} apples}}") == ("ok", False)


def test_a_name_stands_for_one_quantity():
  for text in (r"f(3)", "|AB|", r"\angle ABC", r"\mathbf{A}", r"P(X=3)", "x_1", r"\frac{NO}{BO}"):
    assert names.name(lex(text)), text
  for text in ("2x", "x^2", "a+b", "x(x+1)", r"\frac{x}{2}", r"\sqrt{x}", "-x", "5"):
    assert names.name(lex(text)) is None, text


def test_numbers_are_read_exactly():
  for text, value in (("1,234.5", "1234.5"), (r"0.1\overline{6}", "1/6"), ("1 3/4", "7/4")):
    assert numbers.read(lex(text)).value == numbers.read(lex(value)).value
  assert numbers.read(lex("1 1")) is None and numbers.read(lex(r"\frac{1}{0}")) is None


def test_a_set_is_disjoint_pieces_in_order():
  for one, other in (
    (r"(0,1]\cup(1,2)", "(0,2)"),
    (r"(0,5)\cap[3,9]", "[3,5)"),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
  ):
    regions = sets.read(lex(one)), sets.read(lex(other))
    assert [(p.low_in, p.high_in) for p in regions[0].pieces] == [
      (p.low_in, p.high_in) for p in regions[1].pieces
    ]
    assert equivalence.compare(one, other) == ("ok", True)
  assert sets.read(lex("(5,2)")) is None  # a pair, and no interval


@pytest.mark.parametrize("name", ["min", "max", "gcd", "lcm", "mod", "binom", "sin", "log", "det"])
@pytest.mark.parametrize("arguments", ["", "5", "x", "4, 6", "4, 6, 8", r"\frac{1}{2}, 3", "i"])
def test_no_function_raises_whatever_it_is_given(name, arguments):
  for text in (rf"\{name}({arguments})", f"{name}({arguments})", rf"\{name} {arguments}"):
    status, _ = equivalence.compare("5 x", text)
    assert status in ("ok", "unparseable", "timeout")


# --- time ------------------------------------------------------------------------------

MODULES = (answers, equivalence, names, numbers, sets, spelling, units, values, words)
BITS = (
  *"{}()[]^_=,+-*/%!019xyE<>|.:;$& \t\n\"'`#~\\",
  *(r"\text{", r"\text{ m}", r"\boxed", r"\boxed{", "{,}", r",\!", "1,000", "the answer is "),
  *("the ", "**", "</", "####", "e5", "1e", " or ", "and", r"\begin{", "a.", "1.", ". A", "!="),
)


def patterns():
  import importlib
  import pkgutil

  import igpo_jax.rewards

  for module in pkgutil.walk_packages(igpo_jax.rewards.__path__, "igpo_jax.rewards."):
    for name, value in vars(importlib.import_module(module.name)).items():
      if isinstance(value, re.Pattern):
        yield pytest.param(value, id=f"{module.name}.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", list(patterns()))
def test_every_pattern_takes_linear_time_on_hostile_text(pattern):
  def seconds(text):
    best = float("inf")
    for _ in range(3):
      start = time.process_time()
      for _ in pattern.finditer(text):
        pass
      pattern.fullmatch(text)
      best = min(best, time.process_time() - start)
    return best

  pairs = [(a, b) for a in BITS for b in ("", *BITS[::5])]
  for a, b in pairs:
    size = 4000
    text = (a + b) * (size // len(a + b)) + "\0"
    taken = seconds(text)
    # Quadratic patterns take 16 times as long on a text 4 times as long, linear ones 4.
    if taken > 0.01:
      assert seconds(text[:-1] * 4 + "\0") < 9 * taken, (a, b, taken)
    assert taken < 0.2, (a, b, taken)


@pytest.mark.parametrize("bit", [r"\text{ m}", r"\text{ miles per hour }", "x ", "1,", "or 1 "])
def test_the_callers_process_is_done_in_a_moment_whatever_the_text(bit):
  for size in (10, 40, 199, 1999, 10**6):
    text = "5" + (bit * (size // len(bit) + 1))[: size - 1]
    start = time.process_time()
    equivalence.quick("5", text)
    answers.find_answer(rf"\boxed{{{text}}}")
    assert time.process_time() - start < 0.05 + 2e-6 * size, size
