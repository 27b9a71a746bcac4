"""Scores, the registry, and the graders of puzzles."""

from __future__ import annotations

import json
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.rewards import registry
from igpo_jax.rewards.score import Scorer, Verdict, register_reward, register_verifier
from igpo_jax.tasks import countdown
from tests import paths


def record(answer: str) -> Record:
  return Record("r", ({"role": "user", "content": "?"},), "", answer)


@pytest.fixture(scope="module")
def scorer():
  with Scorer("math", workers=2, timeout=3.0) as one:
    yield one


# --- scores ------------------------------------------------------------------------


def test_rows_keep_their_order_and_the_verdict_ignores_the_shaped_reward():
  with Scorer("exact", parts={"correct": 1.0, "boxed": 0.25}) as exact:
    scores = exact(["=> 7", r"\boxed{8} => 8", "nothing", "1\n#### 7"], [record("7")] * 4)
  assert list(scores.correct) == [True, False, False, True]
  assert scores.status == ["ok", "ok", "unparseable", "ok"]
  assert scores.extracted == ["7", "8", None, "7"]
  np.testing.assert_array_equal(scores.reward, np.float32([1, 0.25, 0, 1]))
  np.testing.assert_array_equal(scores.parts["boxed"], np.float32([0, 1, 0, 0]))
  assert scores.reward.dtype == np.float32 and scores.correct.dtype == bool


def test_an_empty_or_missing_box_is_unparseable_and_wrong(scorer):
  scores = scorer([r"it is 5 \boxed{}", "no box", ""], [record("5")] * 3)
  assert scores.status == ["unparseable"] * 3
  assert scores.extracted == ["", None, None] and not any(scores.correct)


def test_submitted_scores_are_those_of_a_call_and_may_overlap(scorer):
  rows = [r"\boxed{x+x}", r"\boxed{\frac{4x}{2}}", r"\boxed{3x}"] * 3
  pending = [scorer.submit(rows, [record("2x")] * 9) for _ in range(3)]
  for scores in (p.result() for p in pending):
    assert list(scores.correct) == [True, True, False] * 3


def test_a_registered_verifier_and_part_plug_in_by_name():
  @register_verifier("test-length")
  def length(completion, gold):
    return Verdict(len(completion) == int(gold.answer), str(len(completion)), "ok")

  @register_reward("test-short")
  def short(completion, gold, verdict):
    del gold, verdict
    return 1.0 / len(completion)

  with Scorer("test-length", parts={"correct": 2.0, "test-short": 1.0}) as mine:
    scores = mine(["ab", "abcd"], [record("2"), record("2")])
  np.testing.assert_allclose(scores.reward, [2.5, 0.25])
  with pytest.raises(ValueError, match="already registered"):
    register_verifier("test-length")(length)


@pytest.mark.parametrize(
  "wrong", ({"verifier": "maths"}, {"parts": {"corect": 1.0}}, {"rules": ("box",)})
)
def test_an_unknown_name_is_a_users_mistake_that_names_the_known(wrong):
  with pytest.raises(UserError, match=r"known: .*(math|correct|boxed)"):
    Scorer(**wrong)


# --- Countdown and Sudoku ----------------------------------------------------------

COUNTDOWN = record(json.dumps({"numbers": [3, 7, 2], "target": 23}))


@pytest.mark.parametrize(
  ("completion", "correct", "status"),
  (
    ("<answer>3 * 7 + 2</answer>", True, "ok"),
    ("<answer>2 + (7 * 3) = 23</answer>", True, "ok"),
    (r"\boxed{3 \times 7 + 2}", True, "ok"),
    (r"<answer>\boxed{7 \cdot 3 + 2}</answer>", True, "ok"),
    ("<answer>23</answer>", False, "ok"),
    ("<answer>3 * 7 + 1 + 1</answer>", False, "ok"),
    ("<answer>7 * 3 + 2 + 2 - 2</answer>", False, "ok"),
    ("<answer>3 * 7 - 2</answer>", False, "ok"),
    ("<answer>3 / (7 - 7) + 2</answer>", False, "unparseable"),
    ("<answer>3 ** 7</answer>", False, "unparseable"),
    ("<answer>__import__('os').abort()</answer>", False, "unparseable"),
    ("<answer>" + "(" * 10**5 + "</answer>", False, "unparseable"),
    ("3 * 7 + 2", False, "unparseable"),
  ),
)
def test_countdown_uses_each_number_once_and_hits_the_target(completion, correct, status):
  verdict = countdown.verify(completion, COUNTDOWN)
  assert (verdict.correct, verdict.status) == (correct, status)


@hypothesis.given(
  st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
      lambda t: f"({t[0]}{t[1]}{t[2]})"
    ),
    max_leaves=8,
  )
)
def test_countdown_arithmetic_is_pythons(expression):
  hypothesis.assume(not re.search(r"\b0[0-9]", expression))
  value, used = countdown.evaluate(expression)
  assert value == eval(expression)  # the expression is the test's own
  assert used == [int(n) for n in re.findall("[0-9]+", expression)]


def test_sudoku_counts_empty_cells_and_is_correct_only_when_whole():
  gold = record(json.dumps({"puzzle": "1034341221434300", "solution": "1234341221434321"}))
  with Scorer("sudoku", parts={"sudoku_cells": 1.0}) as sudoku:
    scores = sudoku(
      [
        "<answer>1234 3412\n2143 4321</answer>",
        "<answer>1234341221434312</answer>",
        "<answer>12343412214343211</answer>",
        "2143",
      ],
      [gold] * 4,
    )
  assert list(scores.correct) == [True, False, False, False]
  np.testing.assert_allclose(scores.reward, [1, 1 / 3, 1, 0], rtol=1e-6)
  assert scores.status == ["ok", "ok", "ok", "unparseable"]


def test_a_countdown_gold_that_is_no_json_is_a_users_mistake():
  with pytest.raises(UserError, match="must be JSON"):
    countdown.verify("<answer>1</answer>", record("23"))


def test_registry_names_every_built_in_verifier():
  for name in ("exact", "countdown", "sudoku"):
    assert callable(registry.verifier(name))


def test_the_page_on_grading_has_an_example_that_runs():
  page = (paths.REPO / "docs" / "grading.md").read_text("utf-8")
  scope: dict = {}
  exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], scope)
  with scope["scorer"] as own:
    scores = own(["it is 7", "8", "none"], [record("3")] * 3)
  assert list(scores.correct) == [True, False, False]
  assert scores.status == ["ok", "ok", "unparseable"]
  np.testing.assert_allclose(scores.reward[0], 1 + 0.1 / 1.007, rtol=1e-6)
