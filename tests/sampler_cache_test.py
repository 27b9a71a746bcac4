"""Denoising with cached keys and values: goldens, a twin without any cache code, invariants.

The goldens are the official IGPO code's prefix-cached generation, and Fast-dLLM's dual
cache (rows one by one). The twin keeps no cache: it remembers the hidden inputs that a
cache would have seen and computes their keys and values again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion import network
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.errors import UserError
from igpo_jax.types import Canvas
from tests.sampler_test import MASK, PROMPT, ROWS, VOCAB, options, random_canvas, run
from tests.tiny_lm import GOLDENS, golden_model, tiny_model

CASES = sorted((GOLDENS / "generate_cache").glob("*.npz"))


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


# --- the official code and Fast-dLLM ------------------------------------------------------


def golden_run(case, **kw):
  model = golden_model("llada_tiny")
  sizes = {name: int(case[name]) for name in ("gen_length", "block_length", "steps")}
  tokens = jnp.asarray(case["initial_x"])
  canvas = Canvas(tokens, jnp.asarray(case["fixed_mask"]), jnp.ones(tokens.shape, bool))
  return denoise(model.lm, model.params, canvas, jax.random.key(0), SamplerConfig(**sizes, **kw))


def test_all_golden_cases_are_here():
  assert len(CASES) == 8
  assert sum("fastdllm_dual_final_x" in np.load(path) for path in CASES) == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_every_token_of_a_prefix_cached_run_is_the_official_codes(path):
  case = np.load(path)
  out = golden_run(case, cache="prefix", early_stop="batch")
  np.testing.assert_array_equal(out.tokens, case["prefix_final_x"])
  assert int(out.forwards) == int(case["prefix_model_calls"])
  assert int(out.refreshes) == int(case["gen_length"]) // int(case["block_length"])


@pytest.mark.parametrize(
  "path", [p for p in CASES if p.stem.startswith("no")], ids=lambda p: p.stem
)
def test_every_token_of_a_dual_cached_run_is_fast_dllms(path):
  case = np.load(path)
  out = golden_run(case, cache="dual", early_stop="none")
  np.testing.assert_array_equal(out.tokens, case["fastdllm_dual_final_x"])
  np.testing.assert_array_equal(out.calls, case["fastdllm_dual_nfe"])


# --- what a cache may and may not change ------------------------------------------------


# What is cached in which way, so that each kind of option meets a cache once.
EXACT_CASES = {
  "row_stop": {"early_stop": "row", "cache": "prefix"},
  "noise": {"remasking": "random", "temperature": 1.3, "cache": "dual"},
  "factor": {"factor": 2.0, "steps": 12, "cache": "dual"},
  "guidance": {"cfg_scale": 1.5, "temperature": 0.7, "cache": "dual"},
  "six_blocks": {"block_length": 2, "threshold": 0.5, "steps": 12, "cache": "prefix"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT_CASES)
def test_with_one_layer_nothing_goes_stale(name):
  """Its keys depend on the tokens alone, and outside the active block these stay."""
  cached = options(**EXACT_CASES[name])
  exact = dataclasses.replace(cached, cache="none")
  for seed in range(2):
    canvas = random_canvas(np.random.default_rng([seed, 7]))
    expected = run(exact, canvas, seed)
    out = run(cached, canvas, seed)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.commit_step, expected.commit_step)
    np.testing.assert_array_equal(out.calls, expected.calls)
    assert expected.forwards == expected.refreshes == max(expected.calls)
    # Two rows at a time, or one, begin a block.
    assert exact.num_blocks <= out.refreshes <= exact.num_blocks * ROWS


def deep_canvas(seed, rows=ROWS):
  """Hinted and padded rows, 24 + 24 positions."""
  return random_canvas(np.random.default_rng(seed), rows=rows, prompt=24, length=24)


def deep_run(canvas, seed=0, keys=None, slots=0, **kw):
  """With two layers: the second one's keys hang on other positions, so they go stale in a cache."""
  cfg = SamplerConfig(**({"gen_length": 24, "block_length": 4, "steps": 24} | kw))
  return run(cfg, canvas, seed, keys, tiny_model(VOCAB, n_layers=2), slots)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_is_always_renewed_is_exact(cache):
  kw = {"cfg_scale": 0.5, "temperature": 1.0, "block_length": 12}
  canvas = deep_canvas(3)
  exact = deep_run(canvas, **kw)
  renewed = deep_run(canvas, cache=cache, refresh_every=1, **kw)
  np.testing.assert_array_equal(renewed.tokens, exact.tokens)
  assert renewed.refreshes == renewed.forwards
  np.testing.assert_array_equal(renewed.calls, exact.calls)
  never, sometimes = (deep_run(canvas, cache=cache, refresh_every=n, **kw) for n in (0, 2))
  assert (never.tokens != exact.tokens).any() and (sometimes.tokens != never.tokens).any()
  assert never.refreshes < sometimes.refreshes < renewed.refreshes


@pytest.mark.slow
def test_few_widths_are_the_same_as_one_for_each_block(monkeypatch):
  """Six blocks in calls of six, four and two: those reach past the end, where nobody looks."""
  cfg = SamplerConfig(24, 4, 24, cache="prefix")
  assert network.cached_widths(cfg) == (24, 24, 16, 16, 8, 8)
  assert network.overhang(cfg) == 4
  assert network.cached_widths(dataclasses.replace(cfg, block_length=6)) == (24, 18, 12, 6)
  assert network.overhang(dataclasses.replace(cfg, cache="dual")) == 0
  canvas = deep_canvas(1)
  uneven = {"cache": "prefix", "threshold": 0.5}  # which compiles no second program of a width
  few = deep_run(canvas, **uneven)
  monkeypatch.setattr(network, "PREFIX_PROGRAMS", 6)
  jax.clear_caches()
  assert network.cached_widths(cfg) == (24, 20, 16, 12, 8, 4)
  each = deep_run(canvas, **uneven)
  jax.clear_caches()
  np.testing.assert_array_equal(few.tokens, each.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_rows_keep_the_promises_of_exact_ones(cache):
  """Fixed tokens, noise of one's own, neighbours, padding."""
  kw = {"cache": cache, "temperature": 0.8, "steps": 12, "early_stop": "row"}
  canvas = deep_canvas(3)
  keys = jax.random.split(jax.random.key(3), ROWS)
  out = deep_run(canvas, keys=keys, **kw)
  np.testing.assert_array_equal(out.tokens[canvas.fixed], canvas.tokens[canvas.fixed])
  assert (out.tokens[~canvas.fixed] != MASK).all()
  np.testing.assert_array_equal(out.commit_step >= 0, ~canvas.fixed)

  order = np.array([2, 0, 3, 2])  # one row twice, one row gone
  moved = deep_run(jax.tree.map(lambda x: x[order], canvas), keys=keys[order], **kw)
  np.testing.assert_array_equal(moved.tokens, out.tokens[order])
  np.testing.assert_array_equal(moved.commit_step, out.commit_step[order])

  garbage = np.where(canvas.valid, canvas.tokens, 7)
  unseen = deep_run(canvas.replace(tokens=garbage), keys=keys, **kw)
  np.testing.assert_array_equal(unseen.tokens[canvas.valid], out.tokens[canvas.valid])


@pytest.mark.slow
def test_hints_in_later_blocks_are_seen_through_the_cache():
  """With one layer a dual-cached block sees a later hint only as a cached key and value."""
  canvas = random_canvas(np.random.default_rng(2), hint_share=0.0)
  hinted = canvas.fixed.copy()
  hinted[:, -3:] = True
  outs = []
  for token in (5, 9):
    tokens = np.where(hinted & ~canvas.fixed, token, canvas.tokens)
    outs.append(run(options(cache="dual"), Canvas(tokens, hinted, canvas.valid)).tokens)
  first = slice(PROMPT, PROMPT + 4)
  assert (outs[0][:, first] != outs[1][:, first]).any()


# --- a queue of rows through fewer slots ----------------------------------------------------


def ragged_canvas(rows=11, length=24):
  """Rows with few and many hints; one has no masks, three end after the first block."""
  canvas = deep_canvas(6, rows)
  for row, masks in ((0, 0), (2, 4), (3, 4), (7, 4)):
    canvas.fixed[row, length + masks :] = True
    canvas.tokens[row, length + masks :] = 3
  return canvas


# Every cache with every way to be uneven.
QUEUED = {
  "exact": {"threshold": 0.5, "temperature": 0.7, "cfg_scale": 0.5},
  "exact_row_stop": {"early_stop": "row", "remasking": "random"},
  "dual": {"cache": "dual", "threshold": 0.5, "refresh_every": 3},
  "dual_guided": {"cache": "dual", "factor": 1.0, "cfg_scale": 0.5, "temperature": 0.7},
  "prefix": {"cache": "prefix", "threshold": 0.5, "cfg_scale": 0.5, "block_length": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUEUED)
def test_rows_through_few_slots_are_those_of_the_whole_batch(name):
  """Whatever the number of slots, and beside whom: token for token, step for step."""
  canvas = ragged_canvas()
  whole = deep_run(canvas, **QUEUED[name])
  assert len(set(whole.calls.tolist())) > 2
  np.testing.assert_array_equal(whole.calls == 0, canvas.fixed.all(axis=1))
  for slots in (1, 3) if name == "exact" else (3,):
    out = deep_run(canvas, slots=slots, **QUEUED[name])
    for part in ("tokens", "commit_step", "calls", "finite"):
      np.testing.assert_array_equal(getattr(out, part), getattr(whole, part))
    np.testing.assert_allclose(out.commit_logp, whole.commit_logp, atol=1e-4)
    assert out.forwards >= -(-whole.calls.sum() // slots)
    if slots == 1:
      assert out.forwards == whole.calls.sum()
    if name == "dual":  # two rows at a time on the whole canvas, three on a block
      length, others = canvas.tokens.shape[1], out.forwards - out.refreshes
      assert out.positions == out.refreshes * 2 * length + others * 3 * 4


@pytest.mark.slow
def test_a_free_slot_takes_the_next_row_at_once():
  """Eight rows of one block and one of six through three slots: nobody waits for the long one."""
  canvas = deep_canvas(6, rows=9)
  canvas.tokens[:, 24:], canvas.fixed[:, 24:] = MASK, False
  canvas.tokens[1:, 28:], canvas.fixed[1:, 28:] = 3, True
  out = deep_run(canvas, slots=3)
  np.testing.assert_array_equal(out.calls, [24] + 8 * [4])
  assert out.forwards == 24 < -(-9 // 3) * 24
  assert out.worked == out.room == 12 * 3  # the last two are taken after twelve calls
  assert out.positions == 24 * 3 * canvas.tokens.shape[1]


@pytest.mark.slow
def test_a_call_is_made_where_it_is_needed_only():
  """XLA moves out of a loop what the loop does not change: the call would be made at every step."""
  canvas = random_canvas(np.random.default_rng(0))
  lm, params = tiny_model(VOCAB)
  keys = jax.random.split(jax.random.key(0), ROWS)
  program = jax.jit(lambda params, canvas: denoise(lm, params, canvas, keys, options(cache="dual")))
  text = program.lower(params, jax.tree.map(jnp.asarray, canvas)).compile().as_text()
  parts = [part for part in text.split("\n}") if "k_proj/dot_general" in part]
  calls = [part for part in parts if "fused" not in part.strip().split("\n")[0]]
  assert len(calls) == 2  # on the whole canvas, and on a block: each in a loop of its own


# --- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kw", "complaint"),
  [
    ({"refresh_every": 2}, "sampler.refresh_every=2 needs a cache"),
    ({"refresh_every": -1, "cache": "dual"}, "refresh_every=-1 must be at least 0"),
    ({"threshold": 0.9, "factor": 1.0}, "two rules for one thing"),
    ({"factor": 0.0}, "sampler.factor=0.0 must be above 0"),
    ({"adaptive": True}, "give sampler.threshold or sampler.factor"),
  ],
)
def test_options_that_cannot_be_are_told(kw, complaint):
  with pytest.raises(UserError, match=complaint):
    options(**kw)
