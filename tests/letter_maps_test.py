"""The task `letter_maps`: tables, answers that no hint shows, careless and wrong traces."""

from __future__ import annotations

import functools
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.hints.inject import hint_canvas
from igpo_jax.rewards.score import Scorer
from igpo_jax.tasks import letter_maps
from igpo_jax.tasks.common import split_of

examples = functools.partial(hypothesis.settings, deadline=None, derandomize=True)

COUNT = len(letter_maps.LETTERS)
MAPS, DOUBTFUL = 4, 0.2
# Every way to write a trace that ends in the right answer.
RIGHT = ("", "noise=0.4", "noise=1", "detours=1", "detours=3&steps=2", "detours=2&noise=0.3")


def load(options=""):
  return load_records(f"synthetic:maps?n=400&seed=1&{options}").records


def hand(record, table=0, wrong=None, maps=MAPS, letters=COUNT):
  """The letters that a problem passes through; `wrong` transitions go where it says."""
  right, path = letter_maps.tables(table, maps, letters), []
  at = letter_maps.LETTERS.index(record.question[0])
  for m in map(int, record.question[1:]):
    at = (wrong or {}).get((m, at), right[m, at])
    path.append(letter_maps.LETTERS[at])
  return "".join(path)


def written(record):
  """The letters that a concise trace states."""
  return record.trace.replace("=>", "")


@pytest.fixture(scope="module")
def records():
  return load()


@pytest.fixture(scope="module")
def tokenizer():
  return CharTokenizer(letter_maps.ALPHABET)


def test_the_same_options_give_the_same_records_and_a_seed_others(records):
  assert load() == records
  everything = f"doubtful={DOUBTFUL}&slips=0.5&noise=0.3&detours=1"
  assert load(everything) == load(everything)
  other = load_records("synthetic:maps?n=400&seed=2").records
  assert len({r.id for r in other} & {r.id for r in records}) < 40


def test_records_are_distinct_and_as_many_as_asked_for(records):
  assert len({r.question for r in records}) == len({r.id for r in records}) == 400
  assert all(len(r.question) == 13 for r in records)


def test_train_and_test_are_disjoint_whatever_the_seed(records):
  for seed in range(3):
    test = load_records(f"synthetic:maps?split=test&n=200&seed={seed}").records
    assert not {r.question for r in test} & {r.question for r in records}
    assert all(split_of(r.question) == "test" for r in test)
  assert all(split_of(r.question) == "train" for r in records)


@examples(max_examples=30)
@hypothesis.given(st.integers(0, 2**31), st.integers(1, 10), st.integers(4, COUNT))
def test_every_map_is_a_permutation(table, number, letters):
  tables = letter_maps.tables(table, number, letters)
  assert tables.shape == (number, letters)
  assert (np.sort(tables, axis=1) == np.arange(letters)).all()


def test_another_table_has_other_permutations():
  same = letter_maps.tables(0, MAPS) == letter_maps.tables(1, MAPS)
  assert same.mean() < 0.1
  assert all(hand(r, table=1)[-1] == r.answer for r in load("table=1"))


@pytest.mark.parametrize("table", (0, 3))
def test_the_trace_is_what_following_the_tables_gives(table):
  for record in load(f"table={table}&doubtful={DOUBTFUL}&slips=0"):
    path = hand(record, table)
    assert record.trace == f"{path[:-1]}=>{path[-1]}"
    assert record.answer == path[-1]


@pytest.mark.parametrize("options", RIGHT)
def test_the_answers_letter_stands_nowhere_before_the_answer(options):
  for record in load(options):
    assert record.answer not in record.trace[: record.answer_span[0]]


@examples(max_examples=300)
@hypothesis.given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, COUNT - 1))
def test_no_detour_shows_the_answer_even_where_it_is_the_start(seed, steps, answer):
  rng = np.random.default_rng(seed)
  others = [x for x in letter_maps.LETTERS if x != letter_maps.LETTERS[answer]]
  path = "".join(others[i] for i in rng.integers(len(others), size=steps - 1))
  path += letter_maps.LETTERS[answer]
  problem = path[-1] + "".join(map(str, rng.integers(MAPS, size=steps)))
  trace = letter_maps.with_detours(problem, path, 3.0, rng)
  assert trace.endswith(f"=>{path[-1]}") and trace.count(path[-1]) == 1
  assert letter_maps.without_detours(trace) == f"{path[:-1]}=>{path[-1]}"


@pytest.mark.parametrize("options", RIGHT)
@pytest.mark.parametrize("ratio", (0.5, 1.0))
def test_no_hint_shows_the_answers_token(options, ratio, tokenizer):
  rng = np.random.default_rng(0)
  for record in load(options):
    ids, offsets = tokenizer.encode_with_offsets(record.trace)
    assert offsets == [(k, k + 1) for k in range(len(ids))]  # a span of letters is one of tokens
    (answer,) = tokenizer.encode(record.answer)
    for placement in ("index", "stretch"):
      tokens, hinted = hint_canvas(
        ids, record.answer_span, 96, ratio, (2, 3), rng, tokenizer.mask_id, placement
      )
      assert answer not in tokens
      if ratio == 1.0 and placement == "index":  # all that stands before the answer is shown
        assert hinted.sum() == min(record.answer_span[0], 96)


@pytest.mark.parametrize("options", RIGHT)
def test_the_span_covers_the_end_and_its_trace_is_graded_correct(options):
  records = load(options)
  for record in records:
    start, end = record.answer_span
    assert record.trace[start:end] == f"=>{record.answer}" and end == len(record.trace)
    assert record.trace.count("=>") == 1
  other = lambda letter: letter_maps.LETTERS[letter_maps.LETTERS.index(letter) - 1]
  with Scorer("exact") as scorer:
    right = scorer([r.trace for r in records], records)
    wrong = scorer([r.trace[:-1] + other(r.answer) for r in records], records)
    case = scorer([r.trace[:-1] + r.answer.swapcase() for r in records], records)
    silent = scorer(["", "f", records[0].trace[: records[0].answer_span[0]]], records[:3])
  assert right.correct.all() and set(right.status) == {"ok"}
  assert not wrong.correct.any() and not case.correct.any()
  assert not silent.correct.any() and set(silent.status) == {"unparseable"}


@examples(max_examples=30)
@hypothesis.given(st.integers(0, 1000), st.integers(1, 10), st.integers(0, 1000))
def test_doubtful_transitions_are_so_many_and_their_targets_wrong(table, number, promille):
  wrong = letter_maps.wrong_targets(table, number, promille / 1000)
  assert len(wrong) == round(promille / 1000 * number * COUNT)
  right = letter_maps.tables(table, number)
  assert all(0 <= to < COUNT and to != right[pair] for pair, to in wrong.items())


def test_with_certain_slips_exactly_the_doubtful_transitions_go_wrong(records):
  wrong = letter_maps.wrong_targets(0, MAPS, DOUBTFUL)
  slipped = load(f"doubtful={DOUBTFUL}&slips=1")
  for record, right in zip(slipped, records, strict=True):
    assert written(record) == hand(record, wrong=wrong)
    assert record.answer == right.answer == hand(record)[-1]
  with Scorer("exact") as scorer:
    correct = scorer([r.trace for r in slipped], slipped).correct
  assert correct.tolist() == [r.trace[-1] == r.answer for r in slipped]


def test_maps_of_fewer_letters_have_no_others():
  few = {"maps": 3, "letters": 8}
  wrong = letter_maps.wrong_targets(0, 3, 0.25, 8)
  assert len(wrong) == 6 and all(0 <= to < 8 for to in wrong.values())
  for record in load("letters=8&maps=3&steps=6&doubtful=0.25&slips=1"):
    assert written(record) == hand(record, wrong=wrong, **few)
    assert record.answer == hand(record, **few)[-1]
    assert set(written(record) + record.answer + record.question[0]) <= set("abcdefgh")
  for record in load("letters=4&maps=8&steps=4&noise=1"):
    assert set(written(record)) <= set("abcd")


def test_a_slip_is_taken_with_its_probability_and_only_where_it_is_doubtful():
  right, wrong = letter_maps.tables(0, MAPS), letter_maps.wrong_targets(0, MAPS, DOUBTFUL)
  taken = []
  for record in load(f"doubtful={DOUBTFUL}&slips=0.7"):
    at = letter_maps.LETTERS.index(record.question[0])
    for m, letter in zip(map(int, record.question[1:]), written(record), strict=True):
      to = letter_maps.LETTERS.index(letter)
      if (m, at) in wrong:
        assert to in (wrong[m, at], right[m, at])
        taken.append(to == wrong[m, at])
      else:
        assert to == right[m, at]
      at = to
  assert len(taken) > 500 and abs(np.mean(taken) - 0.7) < 0.06


def test_the_share_of_wrong_traces_grows_with_slips():
  traces = [load(f"doubtful={DOUBTFUL}&slips={slips}") for slips in (0, 0.1, 0.3, 1)]
  shares = [np.mean([r.trace[-1] != r.answer for r in records]) for records in traces]
  assert shares[0] == 0 and shares[-1] > 0.8
  assert (np.diff(shares) > 0.05).all(), shares


@pytest.mark.parametrize("share", (0.1, 0.4, 1))
def test_noise_replaces_its_share_of_letters_and_leaves_the_rest_right(share, records):
  noisy = load(f"noise={share}")
  replaced = []
  for record, right in zip(noisy, records, strict=True):
    assert (record.answer, record.answer_span) == (right.answer, right.answer_span)
    assert record.trace[right.answer_span[0] :] == f"=>{right.answer}"
    letters = zip(written(record)[:-1], hand(record)[:-1], strict=True)
    replaced += [a != b for a, b in letters]
  assert abs(np.mean(replaced) - share) < 0.03


def test_detours_taken_away_leave_the_concise_trace(records):
  verbose = load("detours=1")
  for long, short in zip(verbose, records, strict=True):
    assert letter_maps.without_detours(long.trace) == short.trace
  assert np.mean([len(r.trace) for r in verbose]) > 1.5 * len(records[0].trace)
  assert all(letter_maps.without_detours(r.trace) == r.trace for r in records)


def test_detours_taken_away_leave_the_slips(records):
  wrong = letter_maps.wrong_targets(0, MAPS, DOUBTFUL)
  for record in load(f"doubtful={DOUBTFUL}&slips=1&detours=1"):
    path = hand(record, wrong=wrong)
    assert letter_maps.without_detours(record.trace) == f"{path[:-1]}=>{path[-1]}"


def test_detours_are_of_every_kind():
  text = "\n".join(r.trace for r in load("detours=1"))
  assert letter_maps.without_detours("k3=fg-T=T=>w") == "fT=>w"
  for kind in (r"[A-Za-z]\d=[A-Za-z]", r"[A-Za-z]-", r"([A-Za-z])=\1"):
    assert len(set(re.findall(kind, text))) > 10, kind


@pytest.mark.parametrize(
  "options",
  ["doubtful=0.2", f"doubtful={DOUBTFUL}&slips=0.5", "noise=0.5", "detours=2",
   "doubtful=0.1&slips=1&noise=0.2&detours=1"],
)  # fmt: skip
def test_problems_do_not_hang_on_how_their_traces_are_written(options, records):
  plain = [(r.id, r.prompt, r.answer) for r in records]
  assert [(r.id, r.prompt, r.answer) for r in load(options)] == plain


@pytest.mark.parametrize(
  "options", [*RIGHT, "maps=10&doubtful=0.3&slips=0.8", "doubtful=1&slips=1&noise=0.5&detours=2"]
)
def test_every_text_is_in_the_tokenizers_alphabet(options, tokenizer):
  for record in load(options):
    assert set(record.question + record.trace + record.answer) <= set(letter_maps.ALPHABET)
    assert tokenizer.decode(tokenizer.encode(record.trace)) == record.trace
    assert tokenizer.decode(tokenizer.encode(record.question)) == record.question
    tokenizer.encode_prompt(record.prompt)


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ("split=dev", "'dev' is not one of train, test"),
    ("steps=0", r"steps=0 is not in \[1, 64\]"),
    ("steps=65", "steps=65"),
    ("steps=many", "synthetic: steps"),
    ("steps=2.5", "steps=2.5 is not a whole number"),
    ("steps=inf", "synthetic: steps"),
    ("steps=", "synthetic: steps"),
    ("maps=0", "maps=0"),
    ("maps=11", r"maps=11 is not in \[1, 10\]"),
    ("letters=3", r"letters=3 is not in \[4, 52\]"),
    ("table=-1", "table=-1"),
    ("doubtful=1.1", "doubtful=1.1"),
    ("slips=-0.1", "slips=-0.1"),
    ("slips=nan", "slips=nan is not in"),
    ("noise=2", r"noise=2.0 is not in \[0, 1\]"),
    ("noise=some", "synthetic: noise"),
    ("detours=11", "detours=11"),
    ("colour=red", "colour"),
    ("min_steps=2", "min_steps"),
    ("n=-1", "n='-1'"),
    ("seed=-1", "seed='-1'"),
    ("steps=1&maps=1&n=500", "fewer than 500 distinct problems"),
  ],
)
def test_options_that_cannot_be_are_told(options, complaint):
  with pytest.raises(UserError, match=complaint):
    load_records(f"synthetic:maps?{options}")


def test_an_unknown_task_is_told_with_those_there_are():
  with pytest.raises(UserError, match="no task 'map'; known: chains, countdown, letter_maps"):
    load_records("synthetic:map")
