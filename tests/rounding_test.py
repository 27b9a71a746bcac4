"""Stochastic rounding: unbiased, with one rounded copy for sampling, scores and updates."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.common import TINY_MODEL
from igpo_jax.config import (
  Config,
  DataConfig,
  HintConfig,
  ObjectiveConfig,
  OptimizerConfig,
  RLConfig,
  SamplerConfig,
  default_config,
  freeze,
)
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.models import make_lm
from igpo_jax.ops.rounding import read_as, stochastic_round
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import PendingScores, Scores
from igpo_jax.tasks.chains import ALPHABET
from igpo_jax.train import rl
from igpo_jax.train.policy_update import make_policy_programs, policy_metrics
from igpo_jax.train.preflight import rl_stream
from igpo_jax.train.setup import compute_copy, make_model, rounding_key
from tests.update_test import KEYS, VOCAB, fresh_state, make_rollout

BF16 = jnp.bfloat16
f32 = functools.partial(np.asarray, dtype=np.float32)


def neighbours(x):
  """The two bfloat16 numbers around x: cut off, and the next one away from zero."""
  inner = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
  outer = ((x.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(1 << 16)).view(np.float32)
  return inner, outer


# --- the rounding ----------------------------------------------------------------------


def test_a_number_becomes_one_of_its_neighbours_and_is_their_mean():
  x = np.array([0.02, -0.0173, 1.0001, -3.14159, 1e-6, 2.0**-126, 300.7], np.float32)
  tries = 40_000
  copies = f32(stochastic_round(jnp.broadcast_to(x, (tries, len(x))), jax.random.key(0)))
  inner, outer = neighbours(x)
  assert np.all((copies == inner) | (copies == outer))
  gap = outer.astype(float) - inner
  chance = (x - inner.astype(float)) / gap
  error = (copies.mean(axis=0, dtype=float) - x) / gap
  assert np.all(np.abs(error) <= 5 * np.sqrt(chance * (1 - chance) / tries) + 1e-9)


def test_what_bfloat16_holds_and_what_is_not_finite_stay_as_they_are():
  held = [0.0, -0.0, 1.0, -0.02001953125, np.inf, -np.inf, float(jnp.finfo(BF16).max)]
  x = jnp.asarray([*held, np.nan], jnp.float32)
  # A NaN whose bits reach beyond those that are kept: a carry would make it a number.
  x = jnp.append(x, jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32))
  for seed in range(20):
    copy = f32(stochastic_round(x, jax.random.key(seed)))
    np.testing.assert_array_equal(copy[: len(held)], f32(x)[: len(held)])
    np.testing.assert_array_equal(np.signbit(copy[:2]), [False, True])
    assert np.isnan(copy[len(held) :]).all()


def test_a_weights_copy_moves_exactly_when_its_master_crosses_its_threshold():
  key, steps = jax.random.key(3), np.linspace(0.02, 0.021, 400, dtype=np.float32)
  copies = np.stack([f32(stochastic_round(jnp.full(64, x), key)) for x in steps])
  assert np.all(np.diff(copies, axis=0) >= 0)
  places = (copies[:-1] != copies[1:]).argmax(axis=0)
  assert len(set(places)) > 30  # each has its own
  # from one number to the next, never two steps at once
  assert np.all(np.diff(copies, axis=0) <= neighbours(steps[1:])[1][:, None] - steps[:1] * 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [4, 20])
def test_small_updates_show_in_the_mean_where_the_nearest_hides_them(updates):
  """At LLaDA's scale and the paper's rate, from weights that are published in bfloat16."""
  keys = jax.random.split(jax.random.key(0), 3)
  master = (0.02 * jax.random.normal(keys[0], (2048, 2048))).astype(BF16).astype(jnp.float32)
  moved = master + updates * 5e-7 * jax.random.rademacher(keys[1], master.shape, jnp.float32)
  share = {}
  for name, key in (("nearest", None), ("stochastic", keys[2])):
    copy = compute_copy({"w": moved}, "bfloat16", key)["w"].astype(jnp.float32)
    effect = moved - master
    share[name] = float(jnp.sum((copy - master) * effect) / jnp.sum(effect**2))
  assert share["nearest"] < 0.2
  assert share["stochastic"] == pytest.approx(1, abs=0.02)


def test_a_copy_depends_on_the_key_and_on_the_parameters_name_and_on_nothing_else():
  w = 0.02 * jax.random.normal(jax.random.key(0), (64, 64))
  params = {"a": {"kernel": w}, "b": {"kernel": w}}
  key = jax.random.key(1)
  copy, again = (compute_copy(params, "bfloat16", key) for _ in range(2))
  alone = compute_copy({"b": {"kernel": w}}, "bfloat16", key)
  same = lambda x, y: bool(jnp.all(x == y))
  assert same(copy["a"]["kernel"], again["a"]["kernel"])
  assert same(copy["b"]["kernel"], alone["b"]["kernel"])
  assert not same(copy["a"]["kernel"], copy["b"]["kernel"])
  other = compute_copy(params, "bfloat16", jax.random.key(2))
  assert not same(copy["a"]["kernel"], other["a"]["kernel"])


def test_what_is_not_rounded_is_not_copied():
  params = {"w": jnp.ones(4), "held": jnp.ones(4, BF16)}
  assert compute_copy(params, "float32", jax.random.key(0))["w"] is params["w"]
  copy = compute_copy(params, "bfloat16", jax.random.key(0))
  assert copy["held"].dtype == copy["w"].dtype == BF16


def test_gradients_reach_the_master_as_through_a_cast():
  master, copy = jnp.asarray([0.3, -0.7]), jnp.asarray([0.25, -0.5], BF16)
  loss = lambda x: jnp.sum(read_as(x, copy).astype(jnp.float32) ** 2)
  value, gradient = jax.value_and_grad(loss)(master)
  assert value == 0.3125 and gradient.dtype == jnp.float32
  np.testing.assert_array_equal(gradient, [0.5, -1.0])


# --- in an update ----------------------------------------------------------------------


@functools.lru_cache
def bf16_programs(micro_batches):
  model = dataclasses.replace(TINY_MODEL, n_layers=1, vocab_size=VOCAB, mask_id=1, dtype="bfloat16")
  sizes = RLConfig(prompts_per_step=len(KEYS), group_size=3, micro_batches=micro_batches)
  config = Config(model=model, rl=sizes, objective=ObjectiveConfig("token", beta=0.0))
  lm, optimizer = make_lm(model), optax.sgd(0.5)
  params = jax.jit(lm.init)(jax.random.key(0))
  return make_policy_programs(lm, optimizer, config), optimizer, params


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_ratio_is_exactly_one_at_first_and_follows_the_moved_master_by_the_same_thresholds(
  micro_batches,
):
  programs, optimizer, params = bf16_programs(micro_batches)
  rollout, key = make_rollout(), jax.random.key(5)
  scores = programs.score(compute_copy(params, "bfloat16", key), None, rollout, KEYS)

  def ratio(params, scores, key, u):
    _, sums, _ = programs.gradient(params, {}, rollout, scores, KEYS, jnp.int32(u), key)
    return float(policy_metrics(sums.added["policy"], sums.most["policy"])["own_ratio"])

  assert ratio(params, scores, key, 0) == 1.0
  # At later updates the ratio is not taken to be 1: it is, as long as nothing has moved.
  assert ratio(params, scores, key, 1) == 1.0
  for other in (None, jax.random.key(6)):  # any other rounding is another policy
    assert ratio(params, scores, other, 1) != 1.0
  state = fresh_state(optimizer, params)
  state, metrics = programs.update(state, {}, rollout, scores, KEYS, jnp.int32(0), key)
  assert metrics["ratio"] == 1.0 and metrics["clip_fraction"] == 0
  # The next update reads what a new copy by the same key would be.
  assert ratio(state.params, scores, key, 1) != 1.0
  copied = programs.score(compute_copy(state.params, "bfloat16", key), None, rollout, KEYS)
  assert ratio(state.params, copied, key, 1) == 1.0
  nearest = programs.score(compute_copy(params, "bfloat16"), None, rollout, KEYS)
  assert ratio(params, nearest, None, 1) == 1.0


# --- in a run --------------------------------------------------------------------------


class HalfRight:
  """Calls every second completion right."""

  def submit(self, texts, records):
    del records
    correct = np.arange(len(texts)) % 2 == 0
    scores = Scores(correct.astype(np.float32), correct, ["ok"] * len(texts), list(texts), {})
    return PendingScores(lambda: scores)


RUN = Config(
  stages=("rl",),
  model=dataclasses.replace(TINY_MODEL, n_layers=1, vocab_size=0, dtype="bfloat16"),
  data=DataConfig(rl="synthetic:chains?min_steps=2&max_steps=2&n=16&seed=2", prompt_buckets=(12,)),
  sampler=SamplerConfig(8, 4, 2, temperature=1.0),
  hints=HintConfig(chunk_min=1, chunk_max=2),
  objective=ObjectiveConfig("token"),
  rl=RLConfig(prompts_per_step=2, group_size=2, inner_updates=2, rounding="stochastic"),
  rl_optimizer=OptimizerConfig(learning_rate=1e-2),
)


@pytest.mark.slow
def test_a_run_samples_scores_and_learns_from_one_copy_a_step_and_resumes_exactly(monkeypatch):
  mesh, keys = make_mesh(), []

  def copy(params, dtype, key=None):
    keys.append(("copy", key))
    return compute_copy(params, dtype, key)

  def programs(*args):
    made = make_policy_programs(*args)

    def update(*args):
      keys.append(("update", args[-1]))
      return made.update(*args)

    return made._replace(update=update)

  monkeypatch.setattr(rl, "compute_copy", copy)
  with jax.set_mesh(mesh):
    start = lambda: make_model(RUN, CharTokenizer(ALPHABET), mesh)
    stream = rl_stream(RUN, CharTokenizer(ALPHABET), load_records(RUN.data.rl).records)
    make = functools.partial(rl.make_stage, RUN, mesh, make_programs=programs)
    stage, state = make(start(), HalfRight(), stream)
    state, _, _ = stage.step(state, 0)
    kept = jax.tree.map(np.array, state)
    keys.clear()
    state, _, rows = stage.step(state, 1)
    data = lambda key: jax.random.key_data(key).tolist()
    assert [(what, data(key)) for what, key in keys] == [
      (what, data(rounding_key(RUN, 1))) for what in ("copy", "update", "update")
    ]
    resumed, fresh = make(start(), HalfRight(), stream)
    put = lambda x, like: jax.device_put(x, like.sharding)
    again, _, rows_again = resumed.step(jax.tree.map(put, kept, fresh), 1)
  assert rows == rows_again
  for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(left, right)
  first, second = (jax.random.key_data(rounding_key(RUN, n)) for n in (0, 1))
  assert np.any(first != second)  # noise of one step is not that of the next


def test_without_the_option_there_is_no_key():
  assert rounding_key(dataclasses.replace(RUN, rl=RLConfig()), 3) is None


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ({"model.lora.rank": 4}, r"model\.lora\.rank=4: adapters are added in float32"),
    ({"model.dtype": "float16"}, r"model\.dtype='float16': use bfloat16, or rl\.rounding='near"),
    ({"rl.rounding": "chance"}, r"rl\.rounding='chance'"),
  ],
)
def test_where_rounding_by_chance_makes_no_sense_is_told(options, complaint):
  config = default_config()
  config.data.rl = "synthetic:chains"
  config.stages = ("rl",)
  config.rl.rounding = "stochastic"
  config.update_from_flattened_dict(options)
  with pytest.raises(UserError, match=complaint):
    freeze(config)
