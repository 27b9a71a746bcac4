"""The task `chains`: right answers, disjoint splits, and answers that cannot be guessed."""

from __future__ import annotations

import collections
import functools
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.hints.leak import value_spans, value_tokens
from igpo_jax.rewards.score import Scorer
from igpo_jax.tasks import chains
from igpo_jax.tasks.common import split_of

examples = functools.partial(hypothesis.settings, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def records():
  return load_records("synthetic:chains?split=train&n=400&seed=1").records


def test_the_same_options_give_the_same_records_and_a_seed_others(records):
  again = load_records("synthetic:chains?split=train&n=400&seed=1").records
  assert again == records
  other = load_records("synthetic:chains?split=train&n=400&seed=2").records
  assert len({r.id for r in other} & {r.id for r in records}) < 40


def test_records_are_distinct_and_as_many_as_asked_for(records):
  assert len({r.question for r in records}) == len({r.id for r in records}) == 400


def test_train_and_test_are_disjoint_whatever_the_seed(records):
  for seed in range(3):
    test = load_records(f"synthetic:chains?split=test&n=200&seed={seed}").records
    assert not {r.question for r in test} & {r.question for r in records}
    assert all(split_of(r.question) == "test" for r in test)
  assert all(split_of(r.question) == "train" for r in records)


def by_hand(question: str) -> list[str]:
  """The number after each step, by arithmetic on digits and without the package's."""
  first, *steps = re.findall(r"[-+^_]?\d+", question)
  number, out = np.array([*first], int), []
  for sign, *operand in steps:
    other = np.array(operand, int)
    results = {"+": number + other, "-": number - other,
               "^": np.maximum(number, other), "_": np.minimum(number, other)}  # fmt: skip
    number = np.clip(results[sign], 0, 9)
    out.append("".join(map(str, number)))
  return out


@pytest.mark.parametrize(
  "options",
  ["", "min_steps=9&max_steps=9", "detours=1&rare=add", "digits=5&ops=sub,max,min"],
)
def test_traces_and_answers_are_what_a_solver_of_its_own_finds(options):
  for record in load_records(f"synthetic:chains?n=100&seed=4&{options}").records:
    numbers = by_hand(record.question)
    assert record.answer == numbers[-1]
    if "detours" not in options:
      assert record.trace == f"{' '.join(numbers)} =>{numbers[-1]}"


def test_the_trace_ends_in_the_answer_and_the_span_covers_it(records):
  for record in records:
    start, end = record.answer_span
    assert end == len(record.trace)
    assert record.trace[start:].endswith(record.answer)
    assert record.answer and record.trace[start - 1] in " \n"


def test_the_trace_is_graded_correct_and_a_changed_answer_is_not(records):
  with Scorer("exact") as scorer:
    right = scorer([r.trace for r in records], records)
    wrong = scorer([r.trace[:-1] + ("1" if r.trace[-1] != "1" else "2") for r in records], records)
    silent = scorer(["", "nothing to see", records[0].trace[:5]], records[:3])
  assert right.correct.all() and set(right.status) == {"ok"}
  assert not wrong.correct.any()
  assert not silent.correct.any() and set(silent.status) == {"unparseable"}


def test_no_answer_is_right_by_luck(records):
  answers = collections.Counter(r.answer for r in records)
  assert answers.most_common(1)[0][1] / len(records) < 0.1
  assert len(answers) > 50


def test_every_text_is_in_the_tokenizers_alphabet(records):
  tokenizer = CharTokenizer(chains.ALPHABET)
  for record in records:
    assert tokenizer.decode(tokenizer.encode(record.trace)) == record.trace
    tokenizer.encode_prompt(record.prompt)


def test_hiding_the_value_hides_every_place_before_the_answer_that_shows_it(records):
  tokenizer = CharTokenizer(chains.ALPHABET)
  shown = 0
  for record in records:
    ids, offsets = tokenizer.encode_with_offsets(record.trace)
    start = record.answer_span[0]
    hidden = np.zeros(len(ids), bool)
    for a, b in value_tokens(record.trace, record.answer, offsets):
      hidden[a:b] = True
    before = "".join("?" if h else c for c, h in zip(record.trace, hidden, strict=True))[:start]
    assert not value_spans(before, record.answer)
    shown += hidden[:start].any()
  assert shown > 0.5 * len(records)  # the last number of a trace is the answer


@pytest.mark.slow
@examples(max_examples=30)
@hypothesis.given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 10**6))
def test_the_difficulty_knob_is_the_number_of_steps(low, more, seed):
  records = chains.make_records("train", 5, seed, min_steps=low, max_steps=low + more)
  for record in records:
    steps = record.trace[: record.answer_span[0]].split()
    assert low <= len(steps) <= low + more
    assert chains.solve(record.question) == (record.trace, record.answer)


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ("split=dev", "'dev' is not one of train, test"),
    ("min_steps=5&max_steps=3", "need 1 <= min <= max"),
    ("min_steps=2.5", "min_steps=2.5 is not a whole number"),
    ("min_steps=0", r"min_steps=0 is not in \[1, 1000\]"),
    ("rare_share=nan", r"rare_share=nan is not in \[0, 1\]"),
    ("min_steps=many", "synthetic"),
    ("colour=red", "colour"),
    ("n=-1", "n='-1'"),
    ("min_steps=1&max_steps=1&digits=1&n=500", "fewer than 500 distinct problems"),
  ],
)
def test_options_that_cannot_be_are_told(options, complaint):
  with pytest.raises(UserError, match=complaint):
    load_records(f"synthetic:chains?{options}")


def test_an_unknown_task_is_told():
  with pytest.raises(UserError, match="no task 'chess'"):
    load_records("synthetic:chess")
