"""Hints: the official placement reproduced, and what must hold of every hinted canvas."""

from __future__ import annotations

import functools
import json
import math
import random
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from igpo_jax.config import HintConfig
from igpo_jax.data.spans import find_answer_span
from igpo_jax.errors import UserError
from igpo_jax.hints.chunks import choose_chunks, place_stretched, split_chunks
from igpo_jax.hints.inject import hint_canvas, hinted_group, visible_hints
from igpo_jax.hints.leak import segments, value_spans, value_tokens
from tests.paths import REPO

MASK = 1
CASES = json.loads((REPO / "tests" / "goldens" / "hints.json").read_text())
examples = functools.partial(hypothesis.settings, deadline=None, derandomize=True)


# --- the official placement -----------------------------------------------------------


def official_chunks(case):
  """The chunks that the official code reveals, from its own stream of random numbers.

  It segments the trace cut to the canvas less 30, drops a tail that is too short,
  masks a share of the chunks, and may reveal the last one whatever was drawn.
  """
  stream = random.Random(case["seed"])
  length = min(len(case["answer_ids"]), case["gen_length"] - 30)
  chunks, start = [], 0
  while start < length:
    end = min(start + stream.randint(case["min_chunk_size"], case["max_chunk_size"]), length)
    if end - start >= case["min_chunk_size"]:
      chunks.append((start, end))
    start = end
  masked = stream.sample(chunks, int(len(chunks) * (1 - case["inpaint_ratio"])))
  shown = [c for c in chunks if c not in masked]
  if case["inpaint_last_chunk_end"] and chunks and chunks[-1] not in shown:
    shown.append(chunks[-1])
  return shown


def test_stretched_placement_is_the_official_codes():
  assert len(CASES) == 420
  for case in CASES:
    trace = case["answer_ids"]
    placed = place_stretched(
      official_chunks(case), len(trace), case["gen_length"], case["max_spacing"]
    )
    positions = [at + k for at, start, end in placed for k in range(end - start)]
    tokens = [t for _, start, end in placed for t in trace[start:end]]
    assert positions == case["hint_positions"], case["seed"]
    assert tokens == case["hint_tokens"], case["seed"]
  assert sum(len(case["hint_positions"]) > 0 for case in CASES) > 200
  assert any(case["hint_positions"][-1] > len(case["answer_ids"])
             for case in CASES if case["hint_positions"])  # fmt: skip


# --- splitting and choosing -----------------------------------------------------------


@examples(max_examples=200)
@hypothesis.given(st.integers(0, 300), st.integers(1, 9), st.integers(0, 8), st.integers(0, 10**6))
def test_chunks_tile_the_trace_and_only_the_tail_is_short(length, low, more, seed):
  chunks = split_chunks(length, (low, low + more), np.random.default_rng(seed))
  assert [k for start, end in chunks for k in range(start, end)] == list(range(length))
  assert all(low <= end - start <= low + more for start, end in chunks[:-1])
  if chunks:
    assert 1 <= chunks[-1][1] - chunks[-1][0] <= low + more


def test_chunk_lengths_are_uniform_over_their_range():
  chunks = split_chunks(60_000, (5, 10), np.random.default_rng(0))
  counts = np.bincount([end - start for start, end in chunks[:-1]], minlength=11)
  assert (counts[:5] == 0).all()
  np.testing.assert_allclose(counts[5:] / counts.sum(), 1 / 6, atol=0.015)


@pytest.mark.parametrize(
  ("ratio", "count", "picked"),
  [(0.0, 10, 0), (0.29, 100, 29), (0.3, 10, 3), (0.6, 5, 3), (0.999, 3, 2), (1.0, 7, 7),
   (0.5, 0, 0), (0.7, 10, 7), (0.19, 5, 0)],
)  # fmt: skip
def test_floor_of_the_ratio_is_chosen_in_trace_order(ratio, count, picked):
  chunks = [(k, k + 1) for k in range(count)]
  chosen = choose_chunks(chunks, ratio, np.random.default_rng(3))
  assert len(chosen) == picked
  assert chosen == sorted(set(chosen)) and set(chosen) <= set(chunks)


def test_every_chunk_is_chosen_equally_often():
  rng, counts = np.random.default_rng(0), np.zeros(6)
  for _ in range(3000):
    for start, _ in choose_chunks([(k, k + 1) for k in range(6)], 0.5, rng):
      counts[start] += 1
  np.testing.assert_allclose(counts / 3000, 0.5, atol=0.03)


# --- canvases -------------------------------------------------------------------------


@st.composite
def traces(draw):
  """(trace, answer span or None, gen_length, ratio, chunk range, seed)"""
  length = draw(st.integers(0, 90))
  start = draw(st.integers(0, length))
  span = draw(st.sampled_from([None, (start, length), (start, draw(st.integers(start, length)))]))
  low = draw(st.integers(1, 8))
  return (
    list(range(100, 100 + length)),
    span,
    draw(st.integers(1, 80)),
    draw(st.sampled_from([0.0, 0.2, 0.29, 0.5, 0.6, 0.8, 1.0])),
    (low, low + draw(st.integers(0, 5))),
    draw(st.integers(0, 10**6)),
  )


@examples(max_examples=300)
@hypothesis.given(traces())
def test_floor_eta_n_chunks_stand_at_their_own_index(example):
  trace, span, length, ratio, sizes, seed = example
  tokens, hinted = hint_canvas(trace, span, length, ratio, sizes, np.random.default_rng(seed), MASK)
  assert tokens.shape == hinted.shape == (length,)
  assert tokens.dtype == np.int32 and hinted.dtype == bool
  assert all(tokens[k] == trace[k] for k in np.flatnonzero(hinted))
  assert (tokens[~hinted] == MASK).all()
  usable = min(len(trace) if span is None else span[0], length)
  chunks = split_chunks(usable, sizes, np.random.default_rng(seed))
  shown = [hinted[start:end].all() for start, end in chunks]
  assert all(hinted[start:end].any() == s for (start, end), s in zip(chunks, shown, strict=True))
  assert sum(shown) == math.floor(round(ratio * len(chunks), 9))
  assert hinted.sum() == sum(e - s for (s, e), all_ in zip(chunks, shown, strict=True) if all_)


@examples(max_examples=300)
@hypothesis.given(traces(), st.sampled_from(["index", "stretch"]))
def test_hints_never_touch_the_answer_span(example, placement):
  trace, span, length, ratio, sizes, seed = example
  tokens, hinted = hint_canvas(
    trace, span, length, ratio, sizes, np.random.default_rng(seed), MASK, placement
  )
  shown = tokens[hinted] - 100  # trace positions
  assert (np.diff(shown) > 0).all()
  if span is not None:
    assert (shown < span[0]).all()
  if placement == "stretch":
    assert not hinted[max(length - 30, 0) :].any()


def test_stretched_hints_spread_by_at_most_half_again():
  trace = list(range(100, 140))
  tokens, hinted = hint_canvas(
    trace, None, 256, 0.5, (5, 5), np.random.default_rng(0), MASK, "stretch"
  )
  at = np.flatnonzero(hinted)
  index = tokens[hinted] - 100
  assert len(at) == 20
  assert (at >= index).all() and (at <= 1.5 * index + 1).all() and (at > index).any()


def test_a_forbidden_range_drops_the_chunks_that_overlap_it():
  trace = list(range(100, 120))
  draw = lambda forbidden: hint_canvas(
    trace, None, 20, 1.0, (5, 5), np.random.default_rng(0), MASK, "index", forbidden
  )[1]
  assert draw([]).all()
  np.testing.assert_array_equal(np.flatnonzero(~draw([(7, 8)])), range(5, 10))
  np.testing.assert_array_equal(np.flatnonzero(~draw([(9, 11)])), range(5, 15))
  # Half of the four chunks are still drawn before any is dropped.
  half = [
    hint_canvas(trace, None, 20, 0.5, (5, 5), np.random.default_rng(s), MASK, "index", [(0, 5)])[1]
    for s in range(20)
  ]
  assert {int(hinted.sum()) for hinted in half} == {5, 10}


def test_an_empty_trace_gives_an_unhinted_canvas():
  for placement in ("index", "stretch"):
    tokens, hinted = hint_canvas(
      [], None, 8, 1.0, (2, 3), np.random.default_rng(0), MASK, placement
    )
    assert not hinted.any() and (tokens == MASK).all()


def test_a_trace_longer_than_the_canvas_is_cut_to_it():
  trace = list(range(100, 400))
  tokens, hinted = hint_canvas(trace, (290, 300), 16, 1.0, (5, 10), np.random.default_rng(0), MASK)
  assert hinted.all()
  np.testing.assert_array_equal(tokens, trace[:16])


@pytest.mark.parametrize(
  ("change", "complaint"),
  [
    ({"ratio": 1.2}, "1.2 is not in"),
    ({"ratio": -0.1}, "is not in"),
    ({"answer_span": (3, 99)}, "not inside a trace of 10 tokens"),
    ({"answer_span": (5, 4)}, "not inside"),
    ({"chunk_range": (0, 3)}, "need 1 <= min <= max"),
    ({"chunk_range": (4, 3)}, "need 1 <= min <= max"),
    ({"placement": "middle"}, "'middle' is not one of index, stretch"),
  ],
)
def test_options_that_make_no_sense_are_told(change, complaint):
  kwargs = {
    "trace_ids": range(10),
    "answer_span": (8, 10),
    "gen_length": 16,
    "ratio": 0.5,
    "chunk_range": (2, 3),
    "rng": np.random.default_rng(0),
    "mask_id": MASK,
  }
  with pytest.raises(UserError, match=complaint):
    hint_canvas(**kwargs | change)


def test_each_canvas_of_a_group_has_a_ratio_of_its_own():
  cfg = HintConfig(ratio_low=0.2, ratio_high=0.6, chunk_min=1, chunk_max=1)
  trace, size = list(range(100, 200)), 400
  tokens, hinted = hinted_group(trace, (90, 100), size, 100, cfg, np.random.default_rng(0), MASK)
  assert tokens.shape == hinted.shape == (size, 100)
  counts = hinted.sum(axis=1)
  assert counts.min() >= 18 and counts.max() <= 54  # 0.2 and 0.6 of 90 chunks
  assert abs(counts.mean() - 36) < 2 and counts.std() > 8
  assert len({tuple(row) for row in hinted}) == size
  again, _ = hinted_group(trace, (90, 100), size, 100, cfg, np.random.default_rng(0), MASK)
  np.testing.assert_array_equal(again, tokens)


@pytest.mark.parametrize("hide", [True, False])
def test_hiding_the_answers_value_is_a_switch(hide):
  cfg = HintConfig(1.0, 1.0, 4, 4, hide_answer_value=hide)
  _, hinted = hinted_group(
    range(100, 112), (8, 12), 3, 12, cfg, np.random.default_rng(0), MASK, [(4, 5)]
  )
  shown = [True] * 4 + [not hide] * 4 + [False] * 4
  np.testing.assert_array_equal(hinted, [shown] * 3)


def test_a_leaked_answer_stands_at_its_index_in_every_canvas():
  cfg = HintConfig(0.0, 0.0, 4, 4, leak_answer=True)
  group = lambda length: hinted_group(
    range(100, 112), (8, 12), 3, length, cfg, np.random.default_rng(0), MASK
  )
  tokens, hinted = group(14)
  np.testing.assert_array_equal(hinted, [[False] * 8 + [True] * 4 + [False] * 2] * 3)
  np.testing.assert_array_equal(tokens[:, 8:12], [range(108, 112)] * 3)
  _, hinted = group(10)
  np.testing.assert_array_equal(hinted, [[False] * 8 + [True] * 2] * 3)
  assert not group(8)[1].any()
  with pytest.raises(UserError, match="contradict"):
    HintConfig(hide_answer_value=True, leak_answer=True)


# --- leaks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "answer", "spans"),
  [
    ("72 of 172 is 72.5, 72.", "72", [(0, 2), (19, 21)]),
    ("x=72", "72", [(2, 4)]),
    ("a72 72b 1.72 72", "72", [(13, 15)]),
    ("3*4=12", " 12 ", [(4, 6)]),
    ("a+b", "a+b", [(0, 3)]),
    ("anything", "", []),
    ("anything", "  ", []),
  ],
)
def test_the_answers_value_is_found_as_a_whole_number_or_word(text, answer, spans):
  assert value_spans(text, answer) == spans


@pytest.mark.parametrize(
  ("answer", "shown", "others"),
  [
    ("448000",
     "$448,000|448{,}000|448\\,000|448,\\!000|448,000.00|448\u202f000|448 000|448k|448 thousand"
     "|4.48e5|4.48 \\times 10^5|4.48 x 10^{5}|0.448 million|448'000",
     "448|44,800|$4,480,000|448000.5|4480001|448,0001|4.48e6|448 million|x448000"),
    ("23", "$23.00|23.0|twenty-three|23rd|23km|{23}|Twenty three|=23,|23.|(23)|23%",
     "123.00|23.01|1.23|2.3|x23|twenty-four|a23b"),
    ("1,200", "1200|1,200|1200.00|12 hundred|twelve hundred|1.2 thousand|1.2k", "1,2000|120|12"),
    ("\\frac{1}{2}",
     "1/2|0.5|.50|\\frac12|\\dfrac{1}{2}|\\frac 1 2|50%|half|a half|\u00bd|{1 \\over 2}|1 / 2",
     "1/3|0.55|12|1.5|\\frac13|5%|11/2"),
    ("6", "six|6.0|$6|6 hours|6th", "12/2|16|60"),  # 12/2 is a calculation
    ("2\\frac12", "2.5|2 1/2|2\u00bd|5/2|\\frac52|$2\\frac{1}{2}$", "2|1/2|12/5"),
    ("50\\%", "50%|0.5|50 percent|half|50", "5%|500"),
    ("$18$ dollars", "18|eighteen|$18.00|18 dollars", "180|8"),
    ("x=12", "12|twelve|a dozen|x = 12", "112|1.2"),
    ("-5", "-5|minus 5|\u22125|five", "15|-50"),
    ("205", "two hundred and five|205.0", "two hundred|5"),
    ("3/4", "three quarters|0.75|75%|\\tfrac34|three-fourths", "3 of 4|34"),
    ("\\text{Evelyn}", "evelyn's|Evelyn|\\textbf{Evelyn}", "Evelyns|Eve"),
    ("10\\sqrt{2}", "10 \\sqrt 2|10\\sqrt2|$10 \\sqrt{2}$", "210\\sqrt2|10\\sqrt{20}"),
    ("(3,4)", "(3, 4)|\\left( 3,4 \\right)|$(3,4)$", "(3,5)|(3,44)"),
    ("A", "it is A|(A)|\\text{A}", "a dog|An|BA"),  # one letter is looked for as it is
  ],
)  # fmt: skip
def test_the_answers_value_is_found_in_other_spellings(answer, shown, others):
  for text in shown.split("|"):
    places = value_spans(f"so {text} then", answer)
    assert places and all(3 <= start < end <= 3 + len(text) for start, end in places), text
  for text in others.split("|"):
    assert value_spans(f"so {text} then", answer) == [], text


@pytest.mark.parametrize(
  "text",
  ["5" + " " * 5000, "1," * 5000, "1" * 10000, "\\frac" * 2250, "one " * 2250, "1/" * 5000,
   "{" * 10000, "5 and " * 2250, "five and " * 1500, "5\\," * 2250, "#" * 10000,
   "the answer is " * 750, "\\boxed " * 1250],
)  # fmt: skip
def test_looking_for_a_value_takes_time_in_proportion_to_the_text(text):
  def seconds(text):
    began = time.process_time()
    for answer in ("7", "\\frac{1}{2}", "abc"):
      value_spans(text, answer)
      find_answer_span(text, answer)
    return time.process_time() - began

  part = seconds(text[: len(text) // 8])
  assert seconds(text) < 40 * max(part, 0.01)  # 64 if it grew as the square


def test_the_value_covers_every_token_that_overlaps_it():
  text = "is 123 or"
  offsets = [(0, 2), (2, 4), (4, 5), (5, 6), (6, 9)]  # " 1", "2", "3": the first straddles
  assert value_tokens(text, "123", offsets) == [(1, 4)]
  assert value_tokens(text, "12", offsets) == []


@examples(max_examples=100)
@hypothesis.given(st.lists(st.booleans(), max_size=30))
def test_segments_are_the_maximal_runs(bits):
  runs = segments(np.array(bits, bool))
  rebuilt = np.zeros(len(bits), bool)
  for start, end in runs:
    assert start < end and (start == 0 or not bits[start - 1])
    assert end == len(bits) or not bits[end]
    rebuilt[start:end] = True
  np.testing.assert_array_equal(rebuilt, bits)


@examples(max_examples=100)
@hypothesis.given(
  st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 9), st.integers(1, 5)
)
def test_a_block_causal_model_keeps_the_hints_that_it_sees_while_it_writes(bits, prompt, block):
  hinted = np.array([bits])
  tokens = np.where(hinted, 7, 1).astype(np.int32)
  kept_tokens, kept = visible_hints(tokens, hinted, prompt, block, mask_id=1)
  place = (prompt + np.arange(len(bits))) // block
  for k in range(len(bits)):
    seen = any(not hinted[0, j] and place[j] >= place[k] for j in range(len(bits)))
    assert kept[0, k] == (hinted[0, k] and seen)
  np.testing.assert_array_equal(kept_tokens, np.where(kept, 7, 1))
