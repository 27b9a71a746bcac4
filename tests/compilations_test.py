"""What compiles and how much memory it takes: bounded, whatever the data are."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.common import TINY_MODEL, CompileCounter
from benchmarks.token_statistics import temporaries
from igpo_jax.config import (
  Config,
  DataConfig,
  HintConfig,
  ObjectiveConfig,
  RLConfig,
  SamplerConfig,
)
from igpo_jax.data.pipeline import PromptBatch
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.diffusion.completions import RowQueue, Rows, dealt, row_keys, sample_rows
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import PendingScores, Scores
from igpo_jax.rl.sampling import DeviceClock, GroupSampler, group_buckets
from igpo_jax.tasks.chains import ALPHABET
from igpo_jax.train.preflight import rl_stream
from igpo_jax.train.rl import make_stage
from igpo_jax.train.setup import make_model
from tests.tiny_lm import tiny_model

# --- log-probabilities and entropies --------------------------------------------------

VOCAB, ROWS, WIDTH = 126_464, 8, 64


def test_memory_of_token_statistics_does_not_grow_with_positions_times_vocabulary():
  short = temporaries(ROWS, 256, VOCAB, WIDTH)
  long = temporaries(ROWS, 1024, VOCAB, WIDTH)
  all_logits = 4 * ROWS * 1024 * VOCAB
  for name in ("forward", "gradient"):
    assert long[name] < 1.02 * short[name] and long[name] < all_logits / 7, name


def test_all_positions_at_once_would_take_more_than_all_logits():
  at_once = temporaries(ROWS, 1024, VOCAB, WIDTH, chunk=1024)
  assert min(at_once.values()) > 4 * ROWS * 1024 * VOCAB * 0.99


# --- a training run -------------------------------------------------------------------

P, G = 4, 2
CONFIG = Config(
  stages=("rl",),
  model=dataclasses.replace(TINY_MODEL, n_layers=1, vocab_size=0),
  data=DataConfig(
    rl="synthetic:chains?min_steps=2&max_steps=2&split=train&n=16&seed=2", prompt_buckets=(12,)
  ),
  sampler=SamplerConfig(8, 4, 2, temperature=1.0),
  hints=HintConfig(chunk_min=1, chunk_max=2),
  objective=ObjectiveConfig(beta=0.0),
  rl=RLConfig(prompts_per_step=P, group_size=G, inner_updates=2),
)


class Told:
  """Calls the first groups of a step wrong, however sampled, and one row of each other right."""

  def __init__(self):
    self.wrong = 0

  def submit(self, texts, records):
    del records
    rows = np.arange(len(texts))
    correct = (rows % G == 0) & (rows >= self.wrong * G) & (len(texts) == P * G)
    scores = Scores(correct.astype(np.float32), correct, ["ok"] * len(texts), list(texts), {})
    return PendingScores(lambda: scores)


@pytest.mark.slow
def test_a_run_compiles_a_program_for_each_bucket_and_nothing_after_warming_up():
  mesh, grader, counter = make_mesh(), Told(), CompileCounter()
  with jax.set_mesh(mesh):
    model = make_model(CONFIG, CharTokenizer(ALPHABET), mesh)
    stream = rl_stream(CONFIG, model.tokenizer, load_records(CONFIG.data.rl).records)
    stage, state = make_stage(CONFIG, mesh, model, grader, stream)
    before, counts = dict(counter.names), {}
    buckets = group_buckets(P, 1)
    assert buckets == [1, 2, 4]
    for n, grader.wrong in enumerate([0, 1, 2, 3, 4, 1, 0, 3, 2, 4, 4, 0]):
      state, metrics, _ = stage.step(state, n)
      assert metrics["all_wrong_before"] == metrics["no_advantage"] == grader.wrong / P
      counts[n] = counter.count
  jax.block_until_ready(state)
  compiled = {k: v - before.get(k, 0) for k, v in counter.names.items()}
  for name in ("sample_more", "score", "update"):
    assert 2 <= compiled[f"jit({name})"] <= len(buckets), compiled
  assert counts[11] == counts[4]  # five steps have seen every number of wrong groups
  assert counter.count > 6


@pytest.mark.slow
def test_sampling_compiles_no_more_than_a_program_for_each_size_and_length_of_a_queue():
  """Whatever the prompts' lengths are, and however many groups are sampled again.

  Queues are as large as a slice's buckets, or a slice twice, four times, ...
  """
  buckets = (4, 8, 12)
  data = dataclasses.replace(CONFIG.data, prompt_buckets=buckets)
  rl = dataclasses.replace(CONFIG.rl, prompts_per_step=4, sample_slices=2)
  config = dataclasses.replace(CONFIG, data=data, rl=rl)
  mesh, counter, rng = make_mesh(), CompileCounter(), np.random.default_rng(0)
  model = make_model(config, CharTokenizer(ALPHABET), mesh)
  sample = GroupSampler(model.lm, model.tokenizer, Told(), config, mesh)
  assert sample.buckets == [1, 2]
  before = counter.names["jit(sample_more)"]
  for _ in range(30):
    lengths = rng.integers(1, 13, 4)
    valid = np.arange(12) >= 12 - lengths[:, None]
    batch = PromptBatch(
      tokens=np.where(valid, 3, 0).astype(np.int32), valid=valid, records=[None] * 4, traces=[],
      answer_spans=[], row_id=np.arange(4, dtype=np.uint32), real=np.ones(4, bool),
    )  # fmt: skip
    groups = np.arange(sample.padded(rng.integers(1, 5)))
    canvas = np.full((len(groups), G, 8), model.lm.mask_id, np.int32)
    fixed = np.zeros_like(canvas, bool)
    sample(model.params, batch, groups, canvas, fixed, jax.random.key(0), DeviceClock())
  compiled = counter.names["jit(sample_more)"] - before
  assert 4 <= compiled <= len(buckets) * (len(sample.buckets) + 1)


@pytest.mark.slow
def test_queues_of_like_size_share_a_program_and_give_every_row_once():
  """13, 11 and 16 rows through 4 slots: one program; what each row becomes is `sample_rows`'."""
  lm, params = tiny_model()
  cfg = SamplerConfig(8, 4, 8, temperature=0.9, threshold=0.5)
  counter, rng, mesh, key = (
    CompileCounter(),
    np.random.default_rng(0),
    make_mesh(),
    jax.random.key(3),
  )
  before = counter.names["jit(sample_more)"]
  for n in (13, 11, 16):
    prompt = rng.integers(2, 12, (n, 5)).astype(np.int32)
    hinted = rng.random((n, 8)) < rng.choice([0, 0.3, 0.9, 1], (n, 1))
    canvas = np.where(hinted, 3, lm.mask_id).astype(np.int32)
    numbers = np.arange(n)
    rows = Rows(prompt, np.ones(prompt.shape, bool), canvas, hinted, numbers.astype(np.uint32),
                numbers.astype(np.int32))  # fmt: skip
    queue = RowQueue(lm, params, mesh, cfg, rows, key, 4)
    rounds = list(queue)
    assert len(rounds) == queue.rounds == -(-n // 4)
    came = np.concatenate([made.rows for made in rounds])
    np.testing.assert_array_equal(np.sort(came), numbers)
    assert (came != numbers).any()  # as they are done
    found = np.concatenate([made.completion for made in rounds])[np.argsort(came)]
    np.testing.assert_array_equal(found[hinted], 3)
    if n == 16:  # what has no masks comes back at once
      assert set(np.flatnonzero(hinted.all(axis=1))) <= set(rounds[0].rows.tolist())
      keys = row_keys(key, rows.prompt_ids, rows.numbers)
      expected, *_ = sample_rows(lm, params, *rows[:4], keys, cfg)
      np.testing.assert_array_equal(found, expected)
  assert counter.names["jit(sample_more)"] - before == 1


def test_rows_are_dealt_out_so_that_devices_have_equally_much_to_do():
  assert dealt([1, 4, 3, 2], 2).tolist() == [1, 0, 2, 3]
  work = np.random.default_rng(0).integers(0, 33, 64)
  shares = work[dealt(work, 8)].reshape(8, 8)
  assert np.ptp(shares.sum(axis=1)) <= 8 < np.ptp(work.reshape(8, 8).sum(axis=1))
  assert (np.diff(shares, axis=1) <= 0).all() and sorted(dealt(work, 8)) == list(range(64))


@pytest.mark.parametrize("prompts", [1, 2, 3, 8, 48, 64, 1024])
def test_buckets_grow_with_the_logarithm_of_the_prompts(prompts):
  assert len(group_buckets(prompts, 1)) <= np.log2(prompts) + 2
