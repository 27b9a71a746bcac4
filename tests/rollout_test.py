"""Exploration: which groups are hinted, what is replaced, and what stays bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from igpo_jax.config import Config, HintConfig, ObjectiveConfig, RLConfig, SamplerConfig
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.diffusion.completions import RowQueue, prompt_keys
from igpo_jax.errors import UserError
from igpo_jax.hints.inject import visible_hints
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import PendingScores, Scores
from igpo_jax.rl import rows
from igpo_jax.rl.rollout import Explorer, num_replacements, repeated_tokens
from igpo_jax.rl.sampling import (
  Cut,
  DeviceClock,
  GroupSampler,
  cut_by_length,
  group_buckets,
)
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.setup import make_optimizer, make_state, purpose_key
from tests.tiny_lm import tiny_model

P, G, LENGTH, SEED, ENOUGH = 6, 4, 16, 4, 9
TOKENIZER = CharTokenizer("abcdefgh=")
TRACE = "hhghhhhhgh=hh"  # the answer span is "=hh"
CONFIG = Config(
  seed=17,  # groups of both kinds, and several that hints make right
  sampler=SamplerConfig(LENGTH, 8, 8, temperature=1.5),
  hints=HintConfig(0.4, 0.8, 2, 3),
  rl=RLConfig(prompts_per_step=P, group_size=G, exploration="inpaint", inner_updates=1),
  objective=ObjectiveConfig(beta=0.0),
)


def score(texts, records):
  """Correct: nine h or more. A shaped part of the reward comes on top."""
  correct = np.array([text.count("h") >= ENOUGH for text in texts])
  shaped = np.array([record.answer == "shaped" for record in records])
  reward = (correct + 0.25 * shaped * np.array([len(t) % 2 for t in texts])).astype(np.float32)
  return Scores(
    reward=reward,
    correct=correct,
    status=["ok" if text else "unparseable" for text in texts],
    extracted=list(texts),
    parts={"correct": correct.astype(np.float32), "shaped": reward - correct},
    reason=["enough h" if right else "too few h" for right in correct],
  )


class Grader:
  """Scores later, as the workers of a real scorer do."""

  def submit(self, texts, records):
    return PendingScores(lambda: score(texts, records))


def record(k, trace=TRACE, answer="hh"):
  span = (trace.rindex("="), len(trace)) if "=" in trace else None
  question = "".join("abcdefgh"[(k * 5 + j * (k + 1)) % 8] for j in range(3 + k % 3))
  return Record(f"r{k}", ({"role": "user", "content": question},), trace, answer, span)


def batch_of(records, bucket=8):
  """The records in their order, as one batch."""
  return next(iter(PromptStream(records, TOKENIZER, len(records), (bucket,), 0).ordered_batches()))


RECORDS = [record(k) for k in range(P)]


@functools.lru_cache
def explorer(config):
  lm, _ = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  return Explorer(lm, TOKENIZER, Grader(), config, make_mesh())


def explore(batch=None, step=0, config=CONFIG, **rl):
  config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, **rl))
  keys = {p: purpose_key(config.seed, step, p) for p in ("sample", "resample")}
  _, params = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  return explorer(config)(params, batch or batch_of(RECORDS), step, keys)


@pytest.mark.slow
def test_completions_from_logits_that_are_no_numbers_are_counted(none):
  assert none.metrics["not_finite"] == 0
  _, params = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  broken = jax.tree.map(lambda x: x * np.nan, params)
  config = dataclasses.replace(CONFIG, rl=dataclasses.replace(CONFIG.rl, exploration="none"))
  keys = {p: purpose_key(config.seed, 0, p) for p in ("sample", "resample")}
  assert explorer(config)(broken, batch_of(RECORDS), 0, keys).metrics["not_finite"] == 1


def test_a_block_causal_model_is_shown_no_hint_past_what_it_writes():
  """A trace that fills the canvas to its end, all of it hinted but for what is hidden."""
  lm, _ = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  hints = dataclasses.replace(CONFIG.hints, ratio_low=0.99, ratio_high=1.0, leak_answer=True)
  config = dataclasses.replace(CONFIG, hints=hints)
  batch = batch_of([record(0, trace="hg" * LENGTH)])
  of = lambda lm: Explorer(lm, TOKENIZER, Grader(), config, make_mesh())._hints(batch, 0, 0)
  everywhere, block_causal = of(lm), of(lm._replace(block_length=4))
  prompt_length = int(batch.valid.sum())
  expected = visible_hints(*everywhere, prompt_length, 4, lm.mask_id)
  np.testing.assert_array_equal(block_causal, expected)
  assert block_causal[1].sum() < everywhere[1].sum()


@pytest.fixture(scope="module")
def none():
  return explore(exploration="none")


@pytest.fixture(scope="module")
def inpaint():
  return explore()


@pytest.fixture(scope="module")
def resample():
  return explore(exploration="resample")


def learnt(explored):
  """The rows that the policy learns from, in their places: P lists of G."""
  groups = [[None] * G for _ in range(P)]
  for row in explored.rows:
    if row["used"] in ("kept", "inserted"):
      place = row["partner"] if row["used"] == "inserted" else row["number"]
      assert groups[row["group"]][place] is None
      groups[row["group"]][place] = row
  return groups


def all_wrong(explored):
  return np.array([not any(row["correct"] for row in group) for group in learnt(explored)])


def inserted(explored):
  return np.array([[row["used"] == "inserted" for row in group] for group in learnt(explored)])


def host(rollout):
  return jax.tree.map(np.asarray, rollout)


@pytest.mark.slow
def test_the_cases_have_both_kinds_of_groups(none, inpaint):
  assert 2 <= all_wrong(none).sum() <= P - 2
  assert inserted(inpaint).any()


@pytest.mark.parametrize("exploration", ["inpaint", "resample"])
def test_groups_that_are_not_all_wrong_are_bit_identical_to_plain_sampling(
  exploration, none, request
):
  explored = request.getfixturevalue(exploration)
  plain, other = host(none.rollout), host(explored.rollout)
  right = ~all_wrong(none)
  for name in ("completion", "commit_step", "hinted", "advantages", "prompt", "prompt_valid"):
    np.testing.assert_array_equal(getattr(other, name)[right], getattr(plain, name)[right])
  assert not inserted(explored)[right].any()
  # and in the others, what was not replaced:
  kept = ~inserted(explored)
  np.testing.assert_array_equal(other.completion[kept], plain.completion[kept])
  assert not other.hinted[kept].any()


@pytest.mark.parametrize("exploration", ["inpaint", "resample"])
def test_only_wrong_groups_are_replaced_and_only_by_correct_ones(exploration, none, request):
  explored = request.getfixturevalue(exploration)
  replaced = inserted(explored)
  wrong = all_wrong(none)
  correct = np.array([[row["correct"] for row in group] for group in learnt(explored)])
  assert correct[replaced].all()
  for p in np.flatnonzero(wrong):
    k = replaced[p].sum()
    assert k <= 2 and correct[p].sum() == k  # floor(lambda G) = 2
    advantages = np.asarray(explored.rollout.advantages)[p]
    np.testing.assert_array_equal(advantages, np.where(replaced[p], 1 - k / G, -k / G))


def test_as_many_are_replaced_as_are_correct_up_to_the_share():
  """floor(lambda G) of 4: lambda 0.5 allows 2, 0.75 allows 3, 1 all."""
  seen = {}
  for share in (0.5, 0.75, 1.0):
    hints = dataclasses.replace(CONFIG.hints, replace_fraction=share)
    seen[share] = inserted(explore(config=dataclasses.replace(CONFIG, hints=hints))).sum(axis=1)
  correct = seen[1.0]  # of the extra samples
  assert correct.max() > 2
  for share, most in ((0.5, 2), (0.75, 3)):
    np.testing.assert_array_equal(seen[share], np.minimum(correct, most))


def test_hints_stand_at_their_index_and_never_in_the_answer(inpaint):
  rollout, replaced = host(inpaint.rollout), inserted(inpaint)
  trace = np.array(TOKENIZER.encode(TRACE))
  hinted, completion = rollout.hinted[replaced], rollout.completion[replaced]
  assert hinted.any()
  for row_hinted, row in zip(hinted, completion, strict=True):
    at = np.flatnonzero(row_hinted)
    assert (at < TRACE.index("=")).all()
    np.testing.assert_array_equal(row[at], trace[at])
  np.testing.assert_array_equal(rollout.commit_step == -1, rollout.hinted)


def test_resampling_gives_no_hints_and_other_noise(none, resample, inpaint):
  assert not np.asarray(resample.rollout.hinted).any()
  assert resample.metrics["answer_shown"] == 0
  assert inpaint.metrics["extra_correct"] > resample.metrics["extra_correct"] > 0
  own = np.asarray(none.rollout.completion)
  replaced = inserted(resample)
  assert (np.asarray(resample.rollout.completion)[replaced] != own[replaced]).any(axis=1).all()


def test_shares_that_are_logged_count_what_happened(none, inpaint):
  wrong = all_wrong(none).sum()
  after = inpaint.metrics
  assert after["all_wrong_before"] == pytest.approx(wrong / P)
  assert after["all_wrong_after"] == pytest.approx(all_wrong(inpaint).sum() / P)
  assert after["all_wrong_after"] < after["all_wrong_before"]
  assert after["replaced"] == pytest.approx(inserted(inpaint).sum() / (P * G))
  assert after["accuracy"] == none.metrics["accuracy"]
  assert after["reward_after"] > after["reward"] == none.metrics["reward"]
  assert none.metrics["extra_correct"] == none.metrics["replaced"] == 0


def test_rows_for_the_record_say_what_each_completion_was(inpaint):
  rollout = host(inpaint.rollout)
  for p, group in enumerate(learnt(inpaint)):
    for g, row in enumerate(group):
      assert row["id"] == RECORDS[p].id and row["prompt"] == RECORDS[p].question
      assert row["completion"] == TOKENIZER.decode(rollout.completion[p, g])
      assert row["commit_step"] == rollout.commit_step[p, g].tolist()
      hinted = np.zeros(LENGTH, bool)
      for start, end in row["hints"]:
        hinted[start:end] = True
      np.testing.assert_array_equal(hinted, rollout.hinted[p, g])
      assert row["correct"] == (row["completion"].count("h") >= ENOUGH)
      assert row["tokens"] == rollout.completion[p, g].tolist() and row["version"] == 2
      assert TOKENIZER.decode(row["tokens"]) == row["extracted"] == row["completion"]
      text = "".join(row["pieces"]).partition("<eos>")[0]
      assert text.replace("<mask>", "").replace("<2>", "") == row["completion"]
      np.testing.assert_allclose(row["commit_logp"], rollout.commit_logp[p, g], atol=5.1e-5)
      assert row["advantage"] == pytest.approx(rollout.advantages[p, g], abs=5.1e-5)
      assert row["reward"] == pytest.approx(row["parts"]["correct"] + row["parts"]["shaped"])
      assert row["reason"] == ("enough h" if row["correct"] else "too few h")
  assert all(row["advantage"] is None for row in inpaint.rows if row["used"] == "dropped")
  shown = [row["answer_shown"] for row in inpaint.rows if row["phase"] == "hinted"]
  assert sum(shown) / len(shown) == pytest.approx(inpaint.metrics["answer_shown"])


def test_a_few_rows_for_the_record_are_the_first_of_all(inpaint):
  few = rows.sample_rows(inpaint.tries, TOKENIZER, 5)
  assert json.dumps(few) == json.dumps(inpaint.rows[:5])


def test_what_the_update_made_of_a_token_stands_with_the_completion_it_learned_from(inpaint):
  group = next(row["group"] for row in inpaint.rows if row["used"] == "inserted")
  place = np.arange(G)[:, None] + np.linspace(0, 0.5, LENGTH)
  stats = {group: {"entropy": place, "kept": place > 1}}
  made = rows.sample_rows(inpaint.tries, TOKENIZER, 0, stats)
  for row in made:
    slot = {"kept": row["number"], "inserted": row["partner"]}.get(row["used"])
    if row["group"] != group or slot is None:
      assert "token_stats" not in row
      continue
    told = row["token_stats"]
    assert np.floor(told["entropy"]).tolist() == [slot] * LENGTH
    assert told["kept"] == [slot > 1 or (slot == 1 and k > 0) for k in range(LENGTH)]


@pytest.mark.parametrize(
  ("exploration", "second"), [("inpaint", "hinted"), ("resample", "resampled")]
)
def test_rows_for_the_record_have_both_tries_of_all_wrong_groups_first(
  exploration, second, none, request
):
  explored = request.getfixturevalue(exploration)
  wrong = set(np.flatnonzero(all_wrong(none)))
  groups = list(dict.fromkeys(row["group"] for row in explored.rows))
  assert set(groups[: len(wrong)]) == wrong and len(groups) == P
  assert len(explored.rows) == P * G + len(wrong) * G
  for group in groups:
    rows = [row for row in explored.rows if row["group"] == group]
    tries = {phase: [r for r in rows if r["phase"] == phase] for phase in ("own", second)}
    for phase, expected in (("own", range(G)), (second, range(G) if group in wrong else ())):
      assert sorted(row["number"] for row in tries[phase]) == list(expected)
    assert {row["used"] for row in tries["own"]} <= {"kept", "replaced"}
    assert {row["used"] for row in tries[second]} <= {"inserted", "dropped"}
    assert not any(row["hints"] for row in tries["own"])
    # What was inserted comes first, and after each what it replaced.
    pairs = sum(row["used"] == "inserted" for row in rows)
    for first, other in zip(rows[: 2 * pairs : 2], rows[1 : 2 * pairs : 2], strict=True):
      assert (first["used"], other["used"]) == ("inserted", "replaced")
      assert (first["partner"], other["partner"]) == (other["number"], first["number"])
      assert first["correct"] and not other["correct"]
    assert all(row["partner"] is None for row in rows[2 * pairs :])
    if group in wrong:  # a few rows are enough to show both tries
      assert {row["phase"] for row in rows[:2]} == {"own", second}
      assert sum(row["phase"] == "own" for row in rows[:G]) == G // 2
  assert any(row["hints"] for row in explored.rows) == (exploration == "inpaint")
  # Groups in which something was inserted come before the others that were all wrong.
  kinds = [any(r["used"] == "inserted" for r in explored.rows if r["group"] == g) for g in groups]
  assert kinds == sorted(kinds, reverse=True) and any(kinds)


def test_results_follow_the_prompt_not_its_place_in_the_batch(inpaint):
  order = np.array([3, 5, 0, 1, 4, 2])
  moved = host(explore(batch_of([RECORDS[k] for k in order])).rollout)
  rollout = host(inpaint.rollout)
  for name in ("completion", "commit_step", "hinted", "advantages"):
    np.testing.assert_array_equal(getattr(moved, name), getattr(rollout, name)[order])


@pytest.mark.slow
def test_results_do_not_depend_on_the_prompts_bucket(inpaint):
  wider = host(explore(batch_of(RECORDS, bucket=13)).rollout)
  assert wider.prompt.shape[1] == 13
  for name in ("completion", "commit_step", "hinted", "advantages"):
    np.testing.assert_array_equal(getattr(wider, name), getattr(host(inpaint.rollout), name))


@pytest.mark.slow
def test_the_same_step_explores_the_same_and_another_does_not(inpaint):
  again, other = explore(), explore(step=1)
  np.testing.assert_array_equal(again.rollout.completion, inpaint.rollout.completion)
  assert (np.asarray(other.rollout.completion) != np.asarray(inpaint.rollout.completion)).any()


def test_all_wrong_is_the_verifiers_word_not_the_rewards(none):
  shaped = [dataclasses.replace(r, answer="shaped") for r in RECORDS]
  explored = explore(batch_of(shaped))
  np.testing.assert_array_equal(
    inserted(explored).any(axis=1) | ~all_wrong(none) | all_wrong(explored), True
  )
  assert inserted(explored).any()
  assert explored.metrics["all_wrong_before"] == none.metrics["all_wrong_before"]
  plain = explore(batch_of(shaped), exploration="none")
  assert (np.asarray(plain.rollout.advantages)[all_wrong(none)] != 0).any()


def test_an_empty_trace_is_explored_without_hints_and_counted():
  records = [record(k, trace="" if k % 2 else TRACE) for k in range(P)]
  explored = explore(batch_of(records))
  assert explored.metrics["no_trace"] == 0.5
  assert not np.asarray(explored.rollout.hinted)[1::2].any()


def test_a_trace_longer_than_the_canvas_is_cut_to_it():
  trace = "hhg" * 20 + "=hh"
  explored = explore(batch_of([record(k, trace=trace) for k in range(P)]))
  hinted = np.asarray(explored.rollout.hinted)
  assert hinted.any() and hinted.shape[-1] == LENGTH
  assert (np.asarray(explored.rollout.completion)[hinted] >= 3).all()


@pytest.mark.parametrize("hide", [True, False])
def test_hints_that_show_the_answers_value_are_counted_and_can_be_hidden(hide):
  hints = HintConfig(1.0, 1.0, 3, 3, hide_answer_value=hide)
  records = [record(k, trace="h=h=ab=g=h=ab", answer="ab") for k in range(P)]
  explored = explore(batch_of(records), config=dataclasses.replace(CONFIG, hints=hints))
  assert explored.metrics["all_wrong_before"] > 0
  assert (explored.metrics["answer_shown"] == 0) == hide


def test_buckets_are_few_and_hold_every_number_of_groups():
  assert group_buckets(8, 1) == [1, 2, 4, 8]
  assert group_buckets(8, 4) == [4, 8]
  assert group_buckets(6, 1) == [1, 2, 4, 6]
  assert group_buckets(1, 1) == [1]


def test_hinted_groups_are_padded_to_whole_slices_and_one_bucket():
  sampler = explorer(
    dataclasses.replace(CONFIG, rl=dataclasses.replace(CONFIG.rl, sample_slices=2))
  )
  assert sampler.group_sampler.buckets == [1, 2, 3]
  assert [sampler.group_sampler.padded(k) for k in range(P + 1)] == [0, 1, 2, 3, 4, 5, 6]
  assert [explorer(CONFIG).group_sampler.padded(k) for k in range(P + 1)] == [0, 1, 2, 4, 4, 6, 6]


# --- slices of like length ------------------------------------------------------------

BUCKETS = (5, 9, 13)
RAGGED = [  # prompts of 12, 3, 8, 4, 9 and 5 tokens
  dataclasses.replace(record(k), prompt=({"role": "user", "content": "abcdefgh"[k] * n},))
  for k, n in enumerate((11, 2, 7, 3, 8, 4))
]


def bucket_of(length):
  return next(bucket for bucket in BUCKETS if bucket >= length)


@pytest.fixture
def shapes(monkeypatch):
  """(rows, slots, positions of the prompt) of every queue of rows, as it is made."""
  seen = []

  class Watched(RowQueue):
    def __init__(self, lm, params, mesh, cfg, rows, *rest):
      super().__init__(lm, params, mesh, cfg, rows, *rest)
      seen.append((len(rows.prompt), *self.shape[1:]))

  monkeypatch.setattr("igpo_jax.rl.sampling.RowQueue", Watched)
  return seen


def queues(lengths, slices):
  """What `shapes` should see of groups in falling order of length, cut into so many slices."""
  size = P // slices
  buckets = [bucket_of(n) for n in lengths[::size]]
  rows = {b: buckets.count(b) * size * G for b in buckets}
  return [(n, min(n, size * G), bucket) for bucket, n in rows.items()]


def ragged(buckets, **rl):
  config = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, prompt_buckets=buckets)
  )
  return explore(batch_of(RAGGED, bucket=13), config=config, **rl)


@pytest.fixture(scope="module")
def unsorted():
  """Exploration -> what is explored in the order of the batch, in one piece and one length."""
  in_order = lambda sampler, batch, groups, hinted: (
    np.arange(len(groups)), [Cut(0, len(groups), batch.tokens.shape[1])]
  )  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(GroupSampler, "cuts", in_order)
    explored = {name: ragged((13,), exploration=name) for name in ("inpaint", "resample")}
  assert inserted(explored["inpaint"]).any() and (~all_wrong(explored["inpaint"])).any()
  return explored


def assert_same_rollout(left, right):
  """To the last bit; but log-probabilities of choices round with the shape of their program."""
  left, right = host(left), host(right)
  np.testing.assert_allclose(left.commit_logp, right.commit_logp, atol=1e-5)
  bare = lambda rollout: dataclasses.replace(rollout, commit_logp=None)
  jax.tree.map(np.testing.assert_array_equal, bare(left), bare(right))


def assert_same_rows(left, right):
  """As `assert_same_rollout`, of the rows of samples.jsonl, where they have four decimals."""
  logps = lambda rows: np.array([row["commit_logp"] for row in rows])
  np.testing.assert_allclose(logps(left), logps(right), atol=1.1e-4)
  bare = lambda rows: [row | {"commit_logp": None} for row in rows]
  assert bare(left) == bare(right)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("exploration", "slices"), [("inpaint", 2), ("inpaint", 3), ("inpaint", 6), ("resample", 3)]
)
def test_slices_of_like_length_explore_what_the_whole_batch_does(
  exploration, slices, unsorted, shapes
):
  plain = unsorted[exploration]
  sliced = ragged(BUCKETS, sample_slices=slices, exploration=exploration)
  assert_same_rows(sliced.rows, plain.rows)
  assert sliced.metrics == plain.metrics
  assert_same_rollout(sliced.rollout, plain.rollout)
  expected = queues([12, 9, 8, 5, 4, 3], slices)
  assert shapes[: len(expected)] == expected


def test_hinted_groups_are_padded_only_as_far_as_they_need(shapes):
  wrong = all_wrong(ragged(BUCKETS, exploration="none"))
  shapes.clear()
  ragged(BUCKETS, sample_slices=6)
  lengths = np.array([len(TOKENIZER.encode_prompt(r.prompt)) for r in RAGGED])
  first = queues(sorted(lengths, reverse=True), 6)
  expected = queues(sorted(lengths[wrong], reverse=True), 6)
  assert len(expected) > 1 and shapes == first + expected


def test_slices_hold_the_longest_prompt_that_any_process_has_there(monkeypatch):
  """As in a run of two processes, of which the other has prompts of 6, 6, 6, 4, 4 and 4 tokens."""
  other = np.array([6, 6, 6, 4, 4, 4])
  monkeypatch.setattr(
    "igpo_jax.rl.sampling.over_processes", lambda mine, reduce: reduce([mine, other], axis=0)
  )
  data = dataclasses.replace(CONFIG.data, prompt_buckets=BUCKETS)
  rl = dataclasses.replace(CONFIG.rl, sample_slices=6)
  sampler = explorer(dataclasses.replace(CONFIG, data=data, rl=rl)).group_sampler
  batch, fixed = batch_of(RAGGED, bucket=13), np.zeros((P, G, LENGTH), bool)
  order, cuts = sampler.cuts(batch, np.arange(P), fixed)
  assert order.tolist() == [0, 4, 2, 5, 3, 1]  # 12, 9, 8, 5, 4 and 3 tokens here
  assert [cut.positions for cut in cuts] == [13, 9, 9, 5, 5, 5]
  fixed[[0, 4]] = True  # nothing to sample in the two longest: 8, 5, 4, 3, and two of no length
  order, cuts = sampler.cuts(batch, np.arange(P), fixed)
  assert order.tolist() == [2, 5, 3, 1, 0, 4]
  assert [cut.positions for cut in cuts] == [9, 9, 9, 5, 5, 5]


def test_slices_are_cut_where_they_save_most():
  assert cut_by_length([9, 8, 3, 2], 2, (4, 9)) == [Cut(0, 2, 9), Cut(2, 4, 4)]
  assert cut_by_length([9, 3, 3, 2, 1], 4, (4, 9)) == [Cut(0, 1, 9), Cut(1, 5, 4)]
  assert cut_by_length([9, 8, 8, 8, 1], 4, (4, 9)) == [Cut(0, 4, 9), Cut(4, 5, 4)]
  # one length: the rest stays at the end
  assert cut_by_length([3, 3, 3], 2, (4, 9)) == [Cut(0, 2, 4), Cut(2, 3, 4)]
  # two groups of padding, which have no length, go with the shortest
  assert cut_by_length([9, 8, 0, 0], 2, (4, 9)) == [Cut(0, 2, 9), Cut(2, 4, 4)]
  assert cut_by_length([], 2, (4, 9)) == []


def mean_positions(batches, slices, buckets, completion=256):
  """Positions of a row, prompt and completion, on average over the slices of all batches."""
  size = batches.shape[1] // slices
  cuts = [cut_by_length(sorted(b, reverse=True), size, buckets, completion) for b in batches]
  return np.mean([[cut.positions + completion for cut in of_batch] for of_batch in cuts])


def test_a_rows_positions_fall_by_30_percent_with_4_slices():
  """Lengths as of GSM8K and MATH prompts: log-normal, with a long tail."""
  rng = np.random.default_rng(0)
  drawn = np.exp(rng.normal(4.6, 0.5, (200, 64))).astype(int)
  batches, buckets = np.clip(drawn, 20, 512), (128, 256, 512)
  assert 90 < np.median(batches) < 110 and np.percentile(batches, 99) > 300
  whole = mean_positions(batches, 1, buckets)
  for slices in (4, 8, 16):
    assert mean_positions(batches, slices, buckets) < 0.7 * whole, slices


def test_prompts_that_do_not_share_out_over_the_slices_are_a_clear_error():
  with pytest.raises(UserError, match=r"rl\.sample_slices=4"):
    explore(sample_slices=4)


def test_idle_seconds_are_those_without_queued_work(monkeypatch):
  now = iter([0.0, 2.0, 10.0, 13.0])
  monkeypatch.setattr("igpo_jax.rl.sampling.time.perf_counter", lambda: next(now))
  clock = DeviceClock()  # at 0
  clock.dispatched()  # at 2
  clock.dispatched()  # busy already
  clock.drained()  # at 10
  clock.dispatched()  # at 13
  assert clock.idle_seconds == 5.0


class Stop(Exception):
  """Raised by `Follower` where it is asked to."""


class Follower(DeviceClock):
  """Writes down what a step tells; stops it at the n-th slice that arrives."""

  def __init__(self, stop_at=None):
    super().__init__()
    self.told, self.stop_at = [], stop_at

  @contextlib.contextmanager
  def program(self, name, shape):
    self.told.append((name, shape))
    yield

  def sampling(self, rows):
    self.told.append(("rows", rows))

  def sampled(self, commit_step, prompt_length):
    self.told.append(("arrived", commit_step.shape, prompt_length))
    if [t[0] for t in self.told].count("arrived") == self.stop_at:
      raise Stop


def follow(clock, **rl):
  """`explore` without hints, in three slices, watched by `clock`."""
  rl = dataclasses.replace(CONFIG.rl, sample_slices=3, exploration="none", **rl)
  config = dataclasses.replace(CONFIG, rl=rl)
  _, params = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  key = {"sample": purpose_key(CONFIG.seed, 0, "sample")}
  return explorer(config)(params, batch_of(RECORDS), 0, key, clock)


@pytest.mark.slow
def test_a_step_tells_how_far_it_is_and_keeps_two_slices_on_the_devices(none):
  clock = Follower()
  explored = follow(clock)
  names = [told[0] for told in clock.told]
  assert names == ["rows", "rollout", "rollout", "arrived", "rollout", "arrived", "arrived"]
  assert clock.told[0] == ("rows", P * G) and clock.told[1] == ("rollout", (32, 8, 8))
  back = [told[1:] for told in clock.told if told[0] == "arrived"]
  assert sum(shape[0] for shape, _ in back) == P * G and {length for _, length in back} == {8}
  assert_same_rollout(explored.rollout, none.rollout)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_step_can_be_stopped_after_any_slice(stop_at):
  clock = Follower(stop_at)
  with pytest.raises(Stop):
    follow(clock)
  assert [t[0] for t in clock.told].count("rollout") == min(3, 1 + stop_at)  # none is sent after it


# --- into the update ------------------------------------------------------------------


def test_groups_without_advantage_are_left_out_of_what_is_learnt(none, inpaint):
  for explored in (none, inpaint):
    advantages = np.asarray(explored.rollout.advantages)
    live = np.flatnonzero((advantages != 0).any(axis=1))
    assert 0 < len(live) < P
    assert len(explored.update_groups) == next(size for size in (1, 2, 4, 6) if size >= len(live))
    assert set(live) <= set(explored.update_groups)
    assert list(explored.update_groups) == sorted(explored.update_groups)
    for name in ("prompt", "completion", "hinted", "advantages"):
      learnt = np.asarray(getattr(explored.rollout, name))[explored.update_groups]
      np.testing.assert_array_equal(getattr(explored.update_rollout, name), learnt)
    assert explored.metrics["no_advantage"] == pytest.approx(1 - len(live) / P)


def test_with_a_kl_term_every_group_is_learnt_from(inpaint):
  explored = explore(config=dataclasses.replace(CONFIG, objective=ObjectiveConfig(beta=0.01)))
  np.testing.assert_array_equal(explored.update_groups, np.arange(P))
  jax.tree.map(np.testing.assert_array_equal, host(explored.update_rollout), host(inpaint.rollout))


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_what_is_learnt_divides_into_micro_batches(micro_batches):
  rl = dataclasses.replace(CONFIG.rl, micro_batches=micro_batches)
  explore_with = explorer(dataclasses.replace(CONFIG, rl=rl))
  for live in range(P + 1):
    groups = explore_with._groups_to_update(np.arange(P)[:, None] < live)
    assert len(groups) % micro_batches == 0 and len(groups) >= live


def gradient_norm(explored, beta=0.0):
  config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(beta=beta))
  lm, params = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  mesh = make_mesh()
  optimizer = make_optimizer(config.rl_optimizer, 10)
  shardings = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, jax.P()), params)
  state = make_state(optimizer, params, shardings, mesh)
  programs = make_policy_programs(lm, optimizer, config)
  rollout = explored.rollout
  keys = prompt_keys(jax.random.key(0), np.arange(rollout.prompt.shape[0]))
  scores = programs.score(params, params if beta else None, rollout, keys)
  _, metrics = programs.update(state, {}, rollout, scores, keys, 0)
  return float(metrics["grad_norm"])


@pytest.mark.slow
def test_all_wrong_groups_give_no_gradient_at_all_unless_they_are_inpainted(none, inpaint):
  wrong = np.flatnonzero(all_wrong(none) & inserted(inpaint).any(axis=1))
  assert len(wrong)
  only = lambda explored: dataclasses.replace(
    explored, rollout=jax.tree.map(lambda x: x[wrong], explored.rollout)
  )
  assert gradient_norm(only(none)) == 0
  assert gradient_norm(only(inpaint)) > 1e-3


def test_repeated_tokens_are_counted_through_the_stop_token():
  completion = np.array([[5, 5, 5, 0, 0, 0], [5, 6, 6, 7, 8, 9]])
  assert repeated_tokens(completion, np.array([4, 6])) == (2 + 1, 3 + 5)


def test_as_many_are_replaced_as_are_correct_up_to_a_share_of_the_group():
  assert [num_replacements(k, 0.5, 8) for k in (0, 1, 4, 5, 8)] == [0, 1, 4, 4, 4]
  assert num_replacements(9, 0.7, 10) == 7  # in binary 0.7 * 10 is a little less


def test_groups_outside_the_window_of_accuracy_have_no_advantage(none):
  """By the share of correct completions in what is learnt from; at its edges a group is inside."""
  correct = np.array([[row["correct"] for row in group] for group in learnt(none)]).mean(axis=1)
  edges = sorted(set(correct[(correct > 0) & (correct < 1)]))
  assert len(edges) >= 2
  out = explore(exploration="none", accuracy_low=edges[0], accuracy_high=edges[-2])
  inside = (correct >= edges[0]) & (correct <= edges[-2])
  advantages = np.asarray(host(out.rollout).advantages)
  before = np.asarray(host(none.rollout).advantages)
  assert 0 < inside.sum() < (before != 0).any(axis=1).sum()
  np.testing.assert_array_equal(advantages, np.where(inside[:, None], before, 0))


# --- refilling (DAPO) -----------------------------------------------------------------

FURTHER = [batch_of([record(P * n + k) for k in range(P)]) for n in (1, 2, 3)]


def refill(bound, batch=None, further=FURTHER, config=CONFIG):
  """(explored, how many further batches were asked for)."""
  asked = []
  take = lambda k: lambda: asked.append(k) or further[k]
  config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, exploration="none"))
  keys = {p: purpose_key(config.seed, 0, p) for p in ("sample", "resample")}
  _, params = tiny_model(TOKENIZER.vocab_size, 1.0, seed=SEED)
  others = [take(k) for k in range(bound)]
  explored = explorer(config)(params, batch or batch_of(RECORDS), 0, keys, further=others)
  assert asked == list(range(len(asked)))
  return explored, len(asked)


def live(rollout):
  return (np.asarray(rollout.advantages) != 0).any(axis=1)


@pytest.fixture(scope="module")
def alone():
  """Every batch explored for itself."""
  return [explore(batch, exploration="none") for batch in (None, *FURTHER)]


def test_refilling_takes_the_first_groups_with_an_advantage_in_the_order_of_the_prompts(alone):
  explored, asked = refill(3)
  counts = np.cumsum([live(one.rollout).sum() for one in alone])
  needed = int(np.argmax(counts >= P))  # of the further batches
  assert counts[0] < P <= counts[-1] and asked == needed == explored.metrics["refills"]
  assert live(explored.rollout).all() and explored.metrics["filled"] == 1
  order = [(n, k) for n, one in enumerate(alone) for k in np.flatnonzero(live(one.rollout))][:P]
  for name in ("prompt", "completion", "commit_step", "advantages"):
    expected = [np.asarray(getattr(alone[n].rollout, name))[k] for n, k in order]
    np.testing.assert_array_equal(getattr(explored.rollout, name), np.stack(expected))
  batches = [batch_of(RECORDS), *FURTHER]
  np.testing.assert_array_equal(explored.row_id, [batches[n].row_id[k] for n, k in order])
  # Shares are of all that was sampled, and so are the rows for the record.
  sampled = alone[: asked + 1]
  assert explored.metrics["reward"] == pytest.approx(
    np.mean([one.metrics["reward"] for one in sampled])
  )
  assert {row["id"] for row in explored.rows} == {row["id"] for one in sampled for row in one.rows}
  assert len({(row["group"], row["number"]) for row in explored.rows}) == (asked + 1) * P * G


def test_refilling_ends_at_its_bound_and_is_filled_up_with_the_first_others(alone, none):
  has_advantage = np.concatenate([live(one.rollout) for one in alone])
  poor, rich = ([record(k) for k in np.flatnonzero(has_advantage == x)] for x in (False, True))
  first, second = batch_of(poor[:4] + rich[:2]), batch_of(poor[4:9] + rich[2:3])
  explored, asked = refill(1, first, [second])
  assert asked == 1 and explored.metrics["filled"] == 3 / P
  np.testing.assert_array_equal(live(explored.rollout), [False] * 3 + [True] * 3)
  expected = [*first.row_id[:3], *first.row_id[4:], second.row_id[5]]
  np.testing.assert_array_equal(explored.row_id, expected)
  same, asked = refill(0)
  assert asked == 0
  jax.tree.map(np.testing.assert_array_equal, host(same.rollout), host(none.rollout))
  assert "refills" not in none.metrics


@pytest.mark.slow
def test_refilled_batches_of_other_prompt_lengths_are_padded_alike():
  wide = [batch_of([record(P * n + k) for k in range(P)], bucket=12) for n in (1, 2, 3)]
  narrow, _ = refill(3)
  mixed, _ = refill(3, further=wide)
  assert mixed.rollout.prompt.shape[1] == 12 and narrow.rollout.prompt.shape[1] == 8
  np.testing.assert_array_equal(mixed.rollout.prompt_valid[:, 4:], narrow.rollout.prompt_valid)
  assert not np.asarray(mixed.rollout.prompt_valid)[:, :4].any()
  for name in ("completion", "advantages"):
    np.testing.assert_array_equal(getattr(mixed.rollout, name), getattr(narrow.rollout, name))


def test_a_window_the_wrong_way_round_is_told():
  with pytest.raises(UserError, match=r"rl\.accuracy_low=0\.8 is above rl\.accuracy_high=0\.2"):
    RLConfig(accuracy_low=0.8, accuracy_high=0.2)
