"""Evaluation: pass@k, majority@k, and how sure the numbers are."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_jax.eval import metrics
from igpo_jax.rewards.score import Scorer


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.data())
def test_pass_at_k_is_the_chance_over_all_choices_of_k(case, data):
  correct, n = case
  k = data.draw(st.integers(1, n))
  drawn = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
  assert metrics.pass_at(k, correct, n) == pytest.approx(sum(map(any, drawn)) / len(drawn))


def test_pass_at_more_than_was_sampled_is_an_error():
  with pytest.raises(ValueError, match="pass@5 of 4"):
    metrics.pass_at(5, 1, 4)


def test_wilson_interval_of_the_textbook():
  # 8 of 10 and 0 of 20: by hand, from the closed form.
  assert metrics.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
  assert metrics.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_in_the_unit_interval(case):
  correct, n = case
  low, high = metrics.wilson(correct / n, n)
  assert 0 <= low <= correct / n <= high <= 1 and low < high


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_with_one_sample_the_standard_error_is_the_binomial_one(verdicts):
  n, share = len(verdicts), sum(verdicts) / len(verdicts)
  out = metrics.accuracy([int(v) for v in verdicts], 1)
  assert out["accuracy"] == pytest.approx(share)
  assert out["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / n))
  assert (out["low"], out["high"]) == pytest.approx(metrics.wilson(share, n))


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.integers(2, 16))
def test_samples_that_all_agree_make_nothing_more_certain(verdicts, k):
  once = metrics.accuracy([int(v) for v in verdicts], 1)
  often = metrics.accuracy([int(v) * k for v in verdicts], k)
  assert often == pytest.approx(once)


def test_independent_samples_narrow_the_interval():
  once = metrics.accuracy([1, 0] * 20, 1)
  often = metrics.accuracy([8] * 20 + [7] * 10 + [9] * 10, 16)
  assert often["accuracy"] == once["accuracy"] == 0.5
  assert often["high"] - often["low"] < 0.5 * (once["high"] - once["low"])
  # Never narrower than all completions as independent trials would have it.
  low, high = metrics.wilson(0.5, 40 * 16)
  assert (often["low"], often["high"]) == pytest.approx((low, high))


def test_majority_counts_equal_answers_and_lets_the_first_win_a_tie():
  same = lambda a, b: float(a) == float(b)
  assert metrics.majority(["1", "2", "2.0", "3"], same) == 1
  assert metrics.majority(["5", "7", "7.0", "5.0"], same) == 0
  assert metrics.majority([None, "", "4"], same) == 2
  assert metrics.majority([None, ""], same) is None


def test_majority_votes_are_equal_when_the_grader_says_so():
  with Scorer("math", workers=1) as scorer:
    assert scorer.same_answer("1/2", r"\frac{1}{2}")
    assert scorer.same_answer(r"\sqrt{8}", r"2\sqrt{2}")
    assert not scorer.same_answer("3", "4")
  with Scorer("exact") as scorer:
    assert scorer.same_answer("12", " 12") and not scorer.same_answer("12", "12.0")


def rows_of(*problems):
  """Rows of problems given as strings of extracted answers; "7" is the right one."""
  return [
    [
      {"correct": a == "7", "extracted": a, "status": "unparseable" if a == "?" else "ok"}
      for a in answers
    ]
    for answers in problems
  ]


def test_summary_by_hand():
  same = lambda a, b: a == b
  out = metrics.benchmark_metrics(rows_of("7777", "7512", "3377", "??7?", "1111"), same)
  assert out["n"] == 5 and out["samples"] == 4
  assert out["accuracy"] == pytest.approx(8 / 20)
  assert out["stderr"] == pytest.approx(statistics.pstdev([1, 0.25, 0.5, 0.25, 0]) / math.sqrt(5))
  assert out["pass@2"] == pytest.approx((1 + 1 / 2 + 5 / 6 + 1 / 2 + 0) / 5)
  assert out["pass@4"] == pytest.approx(4 / 5)
  # 7 alone; 7 named first; 3 named first; unreadable answers abstain; never right.
  assert out["majority@4"] == pytest.approx(3 / 5)
  assert out["unparseable"] == pytest.approx(3 / 20) and out["timeout"] == 0
  assert not any("@" in name for name in metrics.benchmark_metrics(rows_of("7", "3"), same))
