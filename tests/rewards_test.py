"""Graders: equal and different answers, texts without an answer, hostile texts."""

from __future__ import annotations

import collections
import decimal
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from igpo_jax.data.records import Record
from igpo_jax.rewards import answers, score
from igpo_jax.rewards.math import equivalence, parts
from igpo_jax.rewards.math.spelling import spell
from igpo_jax.rewards.math.tokens import lex
from igpo_jax.rewards.pool import Pool
from igpo_jax.rewards.score import Scorer
from tests import paths


def record(answer: str, name: str = "r") -> Record:
  return Record(name, ({"role": "user", "content": "?"},), "", answer)


@pytest.fixture(scope="module")
def scorer():
  with Scorer("math", workers=2, timeout=3.0) as one:
    one(["\\boxed{2x}"], [record("x+x")])  # the workers are up before anything is timed
    yield one


@pytest.fixture(scope="module")
def hasty():
  with Scorer("math", workers=2, timeout=1.0) as one:
    one(["\\boxed{2x}"], [record("x+x")])
    yield one


# --- the same answer ---------------------------------------------------------------

SAME = (
  # numbers
  ("72", "72.00"),
  ("72", r"\$72"),
  ("18.90", r"\$18.90"),
  ("1375", "$1,375"),
  ("0.5", r"\frac12"),
  ("-3./2", "-1.5"),
  ("10080", r"10,\!080"),
  ("10080", r"10\,080"),
  ("10080", r"7! \times 2!"),
  (r"137 \frac{1}{2}", "137.5"),
  (r"1\frac{4}{5}", "1 4/5"),
  (r"\frac{270}7\text{ degrees}", "270/7"),
  (r"0.1\overline{6}", "1/6"),
  ("1/3", "0.333333"),
  ("204_5", "204_{5}"),
  ("11", "+11"),
  ("4.5e33", r"4.5 \times 10^{33}"),
  ("4.5e33", "4.5 \u00d7 10³³"),
  ("5.3e-9", "0.0000000053"),
  ("5000000", "5 million"),
  ("1,000,000", "10^6"),
  ("27", "27.0"),
  # percent signs, units, degrees, money
  ("60", r"60\%"),
  (r"60\%", "60"),
  ("0.6", r"60\%"),
  (r"\frac{3}{4}", "75 percent"),
  ("5", "5 changes/day"),
  (r"15\mbox{ cm}^2", "15 cm^2"),
  (r"90^\circ", "90 degrees"),
  ("4.5e33", r"4.5 \cdot 10^{33} \text{ erg/s}"),
  ("300", r"300 \mathrm{~km} / \mathrm{s}"),
  (r"5.4 \text{ cents}", "5.4"),
  ("928", r"928 ^{\circ} \mathrm{C}"),
  ("2", "Juice box C is 2 dollars more than juice box B."),
  # expressions
  (r"2 \sqrt{5}", r"\sqrt{20}"),
  (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
  ("p - q", "-q+p"),
  ("(a+5)(b+2)", "ab+2a+5b+10"),
  (r"\cot x", r"\frac{\cos x}{\sin x}"),
  ("-2 + 7i", "7i - 2"),
  (r"\frac{e^{2 i t}}{(2+2 i)}", r"\frac{1-i}{4}e^{2it}"),
  (r"\pi", "pi"),
  (r"\sqrt{51}", "sqrt(51)"),
  (r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})", r"\frac{e^{at}-e^{-at}}{2a}"),
  ("np.arcsin(10/13)", r"\sin^{-1}(10/13)"),
  (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", "(E_1+2E_2)/3"),
  (r"I(0) e^{-\frac{t}{R C}}", "I(0)e^{-t/(RC)}"),
  ("8", "2^3"),
  ("0", r"\sin(\pi)"),
  # equations
  ("5", "x = 5"),
  ("x=5", "5"),
  ("5", "2 + 3 = 5"),
  ("y = 2x + 3", "2x - y + 3 = 0"),
  ("5x - 7y + 11z + 4 = 0", "10x-14y+22z+8=0"),
  (r"\frac{1}{3}", r"\frac13 \approx 0.33"),
  (r"y^{\prime}+r y-r x(t)=0", "y' + ry = rx(t)"),
  # sets in any order, tuples in theirs, intervals, matrices
  ("3, 5, 7", "7, 3, 5"),
  ("3, 5, 7", r"\{7, 5, 3\}"),
  ("3,5", r"5 \text{ and } 3"),
  ("3,5", "x=3 or x=5"),
  (r"3 \pm 2 \sqrt{2}", r"3-\sqrt{8}, 3+\sqrt{8}"),
  (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1-\sqrt5, 1+\sqrt{5}\}"),
  ("(8,-2)", r"\left( 8, -2 \right)"),
  ("(8,-2)", "8,-2"),
  ("(1/2, 3)", "(0.5, 3)"),
  (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty,2)"),
  (r"x \in [-2,7]", "[-2,7]"),
  (r"x \in [-2,7]", r"-2 \le x \le 7"),
  ("(3,4]", "3 < x ≤ 4"),
  (r"(2,\infty)", "x > 2"),
  (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}"),
  # text
  (r"\text{Evelyn}", "evelyn"),
  (r"\text{(E)}", "E"),
  (r"\text{(E)}", r"\textbf{(E)}\ 25"),
  (r"\text{C}", "(C)"),
  (r"\text{east}", r"\text{East}."),
)
SAME += (
  ("e^{100}", r"e^{99}\cdot e"),
  ("e^{453438}", r"e^{453437}e"),
  ("e^{x^2}+1", "1+e^{x^2}"),
  (r"3\pi+\sin\pi", r"3\pi"),
  (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
  (r"\sin 20", r"2\sin 10\cos 10"),
)
DIFFERENT = (
  ("60", "0.6"),
  ("5", "50"),
  ("5.3e-9", "1e-8"),
  ("5.3e-9", "0"),
  (".0000672", ".0000671"),
  ("1/3", "0.333"),
  (r"\pi", "3.14"),
  ("204_5", "204_6"),
  ("11", "1 1"),
  (r"\frac{11}{2}", "1 1/2"),
  ("10", r"10.3\%"),
  ("2", "2k"),
  ("5", "-5"),
  ("5", "5x"),
  ("5", "5 or 6"),
  ("5", "x > 5"),
  ("5", "5!"),
  ("120", "5"),
  ("10", "2x = 10"),
  ("10", "20 = 10"),
  ("2", "1 + 1 = 3"),
  ("1", "1 = 2"),
  ("x", "|x|"),
  ("3R^2", "3r^2"),
  ("6 - 5i", "6+5i"),
  ("I(0)", "I(1)"),
  ("5", r"\frac{5}{0}"),
  (r"\infty", r"-\infty"),
  ("0", r"\frac{0}{0}"),
  (r"\frac{1}{3}", "10:30"),
  ("(8,-2)", "(-2,8)"),
  ("(2,4)", "[2,4]"),
  ("(2,4)", "4,2"),
  (r"\{1,2\}", "(1,2)"),
  ("3,5", "3"),
  ("3,5", "3,5,7"),
  ("3,5", "3,3"),
  (r"(-\infty,0]", r"(-\infty,0)"),
  ("(3,4]", r"3 \le x \le 4"),
  ("x=5", "y=5"),
  ("y=2x+3", "y=2x-3"),
  ("MR=SRMC", "SRAC=LRAC"),
  (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
  (r"\text{east}", "seat"),
  (r"\text{(C)}", "D"),
  ("e^{100}", "e^{100}+1"),
  ("e^{453438}", "e^{453438}+9"),
  (r"\pi", r"\pi+10^{-40}"),
  (r"\sinh 100", r"\cosh 100"),
  (r"e^{x}+10^{60}", r"e^{x}+10^{60}+x"),
  ("2", "it is minus 2 in all"),
)


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_equal_answers_are_equal(gold, answer):
  assert equivalence.compare(gold, answer) == ("ok", True)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_are_different(gold, answer):
  assert not equivalence.compare(gold, answer)[1]


@pytest.mark.parametrize(("gold", "answer"), (*SAME, *DIFFERENT))
def test_the_fast_path_never_contradicts_the_parser(gold, answer):
  quick = equivalence.quick(gold, answer)
  assert quick is None or quick == equivalence.compare(gold, answer)


@hypothesis.given(st.decimals(-(10**9), 10**9, places=3), st.decimals(-(10**9), 10**9, places=3))
def test_decimals_are_equal_exactly_when_their_values_are(one, other):
  assert equivalence.quick(str(one), f"{one:,}") == ("ok", True)
  assert equivalence.quick(str(one), str(other)) == ("ok", one == other)


@hypothesis.given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 9))
def test_a_fraction_equals_its_multiples_and_not_its_neighbours(top, bottom, times):
  gold = rf"\frac{{{top}}}{{{bottom}}}"
  assert equivalence.quick(gold, f"{top * times}/{bottom * times}") == ("ok", True)
  assert equivalence.quick(gold, rf"\dfrac{{{top + 1}}}{{{bottom}}}") == ("ok", False)


@hypothesis.given(st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True), st.data())
@hypothesis.settings(max_examples=30)
def test_order_matters_in_tuples_and_not_in_sets(values, data):
  shuffled = data.draw(st.permutations(values))
  inside, mixed = ", ".join(map(str, values)), ", ".join(map(str, shuffled))
  assert equivalence.compare(rf"\{{{inside}\}}", rf"\{{{mixed}\}}") == ("ok", True)
  assert equivalence.compare(f"({inside})", f"({mixed})") == ("ok", values == shuffled)


# --- finding the answer ------------------------------------------------------------


@pytest.mark.parametrize(
  ("completion", "answer"),
  (
    (r"\boxed{1} so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{5}<|eot_id|>\boxed{6}", "5"),
    (r"\boxed{5}</s> \boxed{6}<|endoftext|>", "5"),
    (r"\boxed{\{1, 2\}} as asked", r"\{1, 2\}"),
    ("<answer>\n\\boxed{78\n</answer>", "78"),
    (r"so \boxed 7.", "7"),
    (r"so $\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
    (r"so \fbox{7}", "7"),
    ("the answer is 9 \\boxed{}", ""),
    ("<answer>\nboxed{27}\n</answer>", "27"),
    ("<answer>5 changes/day", "5 changes/day"),
    ("she has 12.\n#### 1,200", "1,200"),
    ("Therefore the answer is: 42.", "42"),
    ("it is 17, I think", None),
    ("<answer></answer>", None),
    ("", None),
  ),
)
def test_the_final_answer_is_found_by_the_stated_rules(completion, answer):
  assert answers.find_answer(completion) == answer


def test_the_last_number_is_an_answer_only_by_name():
  text = "first 3, then 1,250.5 in all"
  assert answers.find_answer(text) is None
  assert answers.find_answer(text, (*answers.DEFAULT_RULES, "last_number")) == "1,250.5"


@pytest.mark.parametrize(
  ("field", "gold"),
  (
    ("2 + 2 = <<2+2=4>>4\n#### 4", "4"),
    (27.0, "27"),
    (2.5, "2.5"),
    (3, "3"),
    (r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"so $s=\boxed{1.6} \mathrm{~cm}$", "1.6"),
  ),
)
def test_gold_answers_are_read_from_every_benchmarks_field(field, gold):
  assert answers.gold_answer(field) == gold


@pytest.mark.parametrize(
  "field",
  (float("nan"), float("inf"), 10**5000, -(10**5000), None, True),
  ids=("nan", "inf", "huge", "minus huge", "none", "true"),
)
def test_what_is_no_answer_is_refused_as_a_gold_answer(field):
  with pytest.raises(ValueError, match="an answer"):
    answers.gold_answer(field)


# --- hostile input -----------------------------------------------------------------

DEEP = 10_000
NASTY = {
  "braces": "{" * DEEP + "5" + "}" * DEEP,
  "open braces": "{" * DEEP + "5",
  "parentheses": "(" * 900 + "5" + ")" * 900,
  "tower": "9**9**9**9",
  "latex tower": "9^{9^{9^{9}}}",
  "power": "2^{10^{10}}",
  "exponent": "1e999999999",
  "factorial": "(10^{9})!",
  "sum": r"\sum_{i=1}^{10^{12}} \frac{1}{i}",
  "integral": r"\int_0^{\infty} e^{-x^{x^x}} dx",
  "modulus": r"10^{10^{10}} \mod 7",
  "expansion": "(a+b+c+d+e)^{400}",
  "functions": r"\sin(" * 38 + "x" + ")" * 38,
  "fractions": r"\frac{1}{" * 38 + "2" + "}" * 38,
  "definition": r"\def\a{\a\a}\a",
  "megabyte of digits": "5" * 10**6,
  "megabyte of spaces": "5 " * 500_000,
  "commands": r"\left" * 300,
  "texts": r"\text{" * 300,
  "backslashes": "\\" * 1999,
  "dollars": "$" * 1999,
  "spaces": "5" + " " * 1900 + "6",
  "units": "5" + r"\text{m}" * 280 + "!",
  "words": "5 " + "a " * 950 + "!",
  "letters": "E" * 1500,
  "list": "1," * 900 + "1",
  "matrix": r"\begin{pmatrix}" + "&".join("1" * 900) + r"\end{pmatrix}",
  "chain": "=".join("5" * 900),
  "code": '__import__("os").system("false")',
  "NUL": "5\0",
  "bell": "5\a",
  "zero width": "5\u200b",
  "right to left": "\u202e5",
  "surrogate": "5\ud800",
  "combining": "5\u0301",
  "fullwidth": "\uff15",
  "Arabic": "\u0665",
  "circled": "⑤",
  "emoji": "5🙂",
  "not a number": r"\frac{0}{0}",
}


@pytest.mark.parametrize("gold", ("5", "x^2+1"))
def test_hostile_answers_are_never_correct_and_never_hang(hasty, gold):
  start = time.monotonic()
  scores = hasty([rf"\boxed{{{nasty}}}" for nasty in NASTY.values()], [record(gold)] * len(NASTY))
  elapsed = time.monotonic() - start
  assert not any(scores.correct), [k for k, c in zip(NASTY, scores.correct, strict=True) if c]
  assert len(scores.status) == len(NASTY)
  late = scores.status.count("timeout")
  assert elapsed < 1.0 * late / 2 + 15, (elapsed, late)  # two workers, one second an item


@pytest.mark.parametrize("line", ["x" + " *" * 300_000, "* " * 300_000 + "x", "x" + "_." * 300_000])
def test_marks_around_an_answer_take_linear_time(line):
  """They are taken off in the caller's process, which has no time limit."""
  began = time.process_time()
  assert answers.find_answer(f"#### {line}").strip("_.") == "x"
  assert time.process_time() - began < 3


def test_answers_without_end_are_not_remembered(scorer):
  long = lambda n: rf"\boxed {n}{'0' * 100_000}"
  scorer([long(1)], [record("5")])
  tracemalloc.start()
  for n in range(2, 22):
    assert scorer([long(n)], [record("5")]).status == ["unparseable"]
  kept, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert kept < 500_000


def test_a_batch_may_have_more_answers_than_are_remembered(scorer, monkeypatch):
  monkeypatch.setattr(score, "CACHE_SIZE", 2)
  monkeypatch.setattr(scorer, "_cache", collections.OrderedDict())
  scores = scorer(
    [rf"\boxed{{{n}}}" for n in range(900, 906)], [record("900")] * 3 + [record("903")] * 3
  )
  assert list(scores.correct) == [True, False, False, True, False, False]
  assert scores.status == ["ok"] * 6


def test_a_killed_worker_is_replaced_and_its_item_is_a_timeout(hasty):
  completions = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{x+x}"] * 2 + [r"\boxed{2x+0}"]
  scores = hasty(completions, [record("2x")] * 5)
  assert scores.status == ["timeout", "ok"] * 2 + ["ok"]
  assert list(scores.correct) == [False, True, False, True, True]


@pytest.mark.slow
@hypothesis.given(
  st.text(max_size=60)
  | st.lists(
    st.sampled_from(
      [
        *r"\{}()[]^_=,.;+-*/%$ 0123456789abxiE<>&",
        r"\frac",
        r"\sqrt",
        r"\pm",
        r"\cup",
        r"\text{",
        r"\begin{pmatrix}",
        r"\infty",
        r"\boxed{",
      ]
    ),
    max_size=30,
  ).map("".join)
)
@hypothesis.settings(max_examples=300, deadline=1000)
def test_no_text_crashes_extraction_or_the_fast_path(text):
  answers.find_answer(text)
  outcome = equivalence.quick("31415.9265", text)
  assert outcome is None or not outcome[1] or re.search("31[,.]?415", text)
  assert equivalence.quick(text, "31415.9265") in (None, ("ok", False), ("unparseable", False)) or (
    re.search("31[,.]?415", text)
  )


@hypothesis.given(
  st.lists(
    st.lists(
      st.sampled_from(
        [
          *r"{}()[]^_=,+-*/%!0123456789xyi",
          r"\frac{1}",
          r"\sqrt",
          r"\pm ",
          r"\cup ",
          r"\text{a}",
          r"\sin ",
          r"\infty ",
          r"\ln ",
        ]
      ),
      min_size=1,
      max_size=14,
    ).map("".join),
    min_size=8,
    max_size=8,
  )
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_no_expression_crashes_the_workers(scorer, texts):
  gold = "31415.9265 x"
  scores = scorer([rf"\boxed{{{text}}}" for text in texts], [record(gold)] * len(texts))
  assert not any(scores.correct)


# --- the pool ----------------------------------------------------------------------


@pytest.mark.slow
def test_workers_die_with_the_process_that_started_them():
  code = (
    "from igpo_jax.rewards.pool import Pool; import os, time\n"
    "p = Pool(2, 60.0); p.submit('x', '9^{9^{9^{9}}}'); p.submit('2x', 'x+x').result()\n"
    "print(p._process.pid, flush=True); os.kill(os.getpid(), 9)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.REPO, check=False
  )
  assert done.returncode == -signal.SIGKILL
  group = int(done.stdout)  # the server leads a session of its own, its workers are in it
  deadline = time.monotonic() + 10
  while time.monotonic() < deadline:
    try:
      os.killpg(group, 0)
    except ProcessLookupError:
      return
    time.sleep(0.05)
  os.killpg(group, signal.SIGKILL)
  pytest.fail("workers outlived their program")


def test_a_closed_pool_refuses_work_and_a_memory_bomb_is_a_timeout():
  with Pool(1, 5.0, memory=600 << 20) as pool:
    bomb = pool.submit("2x", "x+10^{300000000}+x^{10^{8}}-3^{900000000}")
    assert bomb.result() == ("timeout", False)
    assert pool.submit("2x", "x+x").result() == ("ok", True)
  with pytest.raises(RuntimeError, match="closed"):
    pool.submit("1", "1")


FLOOD = """
import concurrent.futures, sys, threading
from igpo_jax.rewards.math import equivalence, parts
from igpo_jax.rewards.math.spelling import spell
from igpo_jax.rewards.math.tokens import lex
from igpo_jax.rewards.pool import Pool
items, repeats = map(int, sys.argv[1:])
for _ in range(repeats):
  with Pool(2, 30.0) as pool:
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
      halves = [
        threads.submit(lambda: [pool.submit("7" * 40, "7" * 39 + "8") for _ in range(items // 2)])
        for _ in range(2)
      ]
    verdicts = {f.result() for half in halves for f in half.result()}
    assert verdicts == {("ok", False)}, verdicts
"""


@pytest.mark.slow
def test_a_queue_of_any_length_does_not_deadlock():
  """8,000 items here; 20,000 ten times is `python -c "$FLOOD" 20000 10`, which takes minutes."""
  done = subprocess.run(  # a process of its own: a deadlock ends with it
    [sys.executable, "-c", FLOOD, "8000", "1"],
    capture_output=True,
    text=True,
    cwd=paths.REPO,
    check=False,
    timeout=90,
  )
  assert done.returncode == 0, done.stderr[-500:]


def test_neither_grader_nor_worker_imports_jax():
  code = (
    "import sys, igpo_jax.rewards.score, igpo_jax.grade, igpo_jax.rewards.worker\n"
    "igpo_jax.rewards.math.equivalence.warm_up(); print('jax' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.REPO, check=True
  )
  assert done.stdout.strip() == "False"


# --- real answers ------------------------------------------------------------------

SETS = ("gsm8k/train", "gsm8k/test", "math500/test", "amc23/test", "minerva_math/test")


def real_golds(name: str) -> list[str]:
  lines = paths.shared_path("data", f"{name}.jsonl").read_text("utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  return [answers.gold_answer(row.get("answer", row.get("solution"))) for row in rows]


def independent_value(text: str) -> object:
  """What the test holds two real answers to be equal by: a decimal, or the bare characters."""
  bare = re.sub(r"\\[!,$]|[\s$,{}]|\\left|\\right|\\mbox.*|\\text\{ .*|\^\\circ", "", text)
  bare = bare.replace("dfrac", "frac")
  try:
    return decimal.Decimal(bare)
  except decimal.InvalidOperation:
    return bare


@pytest.mark.parametrize("name", SETS)
def test_every_real_answer_equals_itself_and_only_equal_neighbours(scorer, name):
  golds = real_golds(name)
  records = [record(gold) for gold in golds]
  own = scorer([rf"so \boxed{{{gold}}}" for gold in golds], records)
  assert all(own.correct) and set(own.status) == {"ok"}
  following = golds[1:] + golds[:1]
  scores = scorer([rf"so \boxed{{{gold}}}" for gold in following], records)
  expected = [
    independent_value(a) == independent_value(b) for a, b in zip(golds, following, strict=True)
  ]
  wrong = [
    row for row in zip(golds, following, scores.correct, expected, strict=True) if row[2] != row[3]
  ]
  assert not wrong
  assert "timeout" not in scores.status


@pytest.mark.parametrize("name", ("math500/test", "minerva_math/test"))
def test_the_parser_reads_every_real_expression(name):
  """The identity of the test above needs no parser; here every scalar goes through it."""
  unread = []
  for gold in real_golds(name):
    side = parts.Side(lex(spell(gold)))
    if side.number or side.text or side.choice or parts.cells(side.tokens):
      continue
    if parts.collection(side) or parts.sets.read(side.tokens):
      continue
    left, equals, right = gold.partition("=")
    other = f"{left} = 0 + {right}" if equals else f"0 + {gold}"
    if equivalence.compare(gold, other) != ("ok", True):
      unread.append(gold)
  assert not unread


@pytest.mark.slow
def test_a_signal_to_all_processes_lets_the_step_under_way_be_graded():
  with Pool(1, 20.0) as pool:
    assert pool.submit("x+1", "1+x").result() == ("ok", True)
    pool._process.terminate()
    assert pool.submit("x+2", "2+x").result() == ("ok", True)
