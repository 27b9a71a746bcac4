"""Likelihood estimates: shared forwards, corruption, chunked statistics, the NELBO."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.diffusion.corrupt import mask_probability, mask_rows
from igpo_jax.diffusion.nelbo import nelbo_sum
from igpo_jax.ops.token_stats import token_stats
from igpo_jax.rl.estimate import estimate, views_of
from igpo_jax.rl.estimators import Group, Sizes
from igpo_jax.rl.estimators.coupled import Coupled
from igpo_jax.rl.estimators.mean_field import MeanField
from igpo_jax.rl.estimators.random_ratio import RandomRatio
from igpo_jax.rl.region import loss_region
from tests.tiny_lm import EOS, MASK, table_lm, tiny_model

P, G, PROMPT, LENGTH, VOCAB = 2, 3, 5, 12, 12
examples = functools.partial(hypothesis.settings, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def groups():
  rng = np.random.default_rng(0)
  prompt = rng.integers(2, VOCAB, (P, PROMPT)).astype(np.int32)
  valid = np.arange(PROMPT) >= np.array([[0], [3]])
  completion = rng.integers(0, VOCAB, (P, G, LENGTH)).astype(np.int32)
  return prompt, valid, completion


KEYS = jax.random.split(jax.random.key(5), P)
SIZES = Sizes(G, LENGTH, 6, 4, 2, MASK, EOS, (EOS,))
PRESENT = {"mean_field": MeanField(), "random_ratio": RandomRatio(), "coupled": Coupled()}
drawn = jax.jit(views_of, static_argnums=(0, 4))
estimates = jax.jit(estimate, static_argnames=("lm", "estimator", "sizes", "views_at_once"))


def as_groups(prompt, valid, completion):
  nothing, ends = np.zeros(completion.shape, bool), completion == EOS
  length = np.where(ends.any(-1), ends.argmax(-1) + 1, completion.shape[-1]).astype(np.int32)
  return Group(prompt, valid, completion, nothing, nothing.astype(np.int32), ~nothing, length)


def estimate_groups(groups, estimator, update=0):
  lm, params = tiny_model(VOCAB)
  return estimates(lm, params, PRESENT[estimator], as_groups(*groups), KEYS, update, SIZES)


def corruption(estimator, keys, update, shape):
  """Which positions each view masks, bool[R,P,G,L]."""
  completion = np.full(shape, 5, np.int32)
  prompt = np.full((shape[0], PROMPT), 5, np.int32)
  groups = as_groups(prompt, np.ones(prompt.shape, bool), completion)
  masked = drawn(PRESENT[estimator], groups, keys, update, SIZES).masked
  return np.moveaxis(np.asarray(masked), 1, 0)


@jax.jit
def read_row(prompt, valid, canvas, targets):
  """Log-probabilities and entropies of one row, from its logits as they stand."""
  lm, params = tiny_model(VOCAB)
  tokens = jnp.concatenate([prompt, canvas])[None]
  seen = jnp.concatenate([valid, jnp.ones(LENGTH, bool)])[None]
  logp = jax.nn.log_softmax(lm.logits(params, tokens, seen)[0, PROMPT:])
  entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  return jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0], entropy


@pytest.mark.slow
def test_one_shared_forward_equals_a_forward_for_each_completion(groups):
  shared = estimate_groups(groups, "mean_field")
  prompt, valid, completion = groups
  canvas = np.full(LENGTH, MASK, np.int32)
  for p in range(P):
    for g in range(G):
      logp, entropy = read_row(prompt[p], valid[p], canvas, completion[p, g])
      np.testing.assert_allclose(shared.tokens[p, g], logp, atol=1e-5)
      np.testing.assert_allclose(shared.token_entropy[p, g], entropy, atol=1e-5)
  assert shared.scored.all()
  assert (estimate_groups(groups, "mean_field", update=3).logp == shared.logp).all()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["random_ratio", "coupled"])
def test_each_position_is_read_where_it_is_masked(groups, estimator):
  out = estimate_groups(groups, estimator, update=1)
  views = corruption(estimator, KEYS, 1, (P, G, LENGTH))
  prompt, valid, completion = groups
  for p in range(P):
    for g in range(G):
      expected = np.zeros(LENGTH)
      entropies = np.zeros(LENGTH)
      for view in views[:, p, g]:
        canvas = np.where(view, MASK, completion[p, g]).astype(np.int32)
        read = read_row(prompt[p], valid[p], canvas, completion[p, g])
        logp, entropy = map(np.asarray, read)
        expected[view], entropies[view] = logp[view], entropy[view]
      np.testing.assert_allclose(out.tokens[p, g], expected, atol=1e-5)
      np.testing.assert_allclose(out.token_entropy[p, g], entropies, atol=1e-5)
  np.testing.assert_array_equal(out.scored, views.any(axis=0))
  assert (np.asarray(out.tokens)[~np.asarray(out.scored)] == 0).all()


def test_coupled_views_score_every_position_once():
  views = np.asarray(corruption("coupled", KEYS, 0, (P, G, LENGTH)))
  assert views.shape == (2, P, G, LENGTH)
  assert (views.sum(axis=0) == 1).all()
  assert views[0].any() and views[1].any()


def test_corruption_follows_the_key_and_the_update_only():
  shape = (P, 4, 40)
  first = np.asarray(corruption("random_ratio", KEYS, 0, shape))
  np.testing.assert_array_equal(corruption("random_ratio", KEYS, 0, shape), first)
  assert (np.asarray(corruption("random_ratio", KEYS, 1, shape)) != first).any()
  swapped = np.asarray(corruption("random_ratio", KEYS[::-1], 0, shape))
  np.testing.assert_array_equal(swapped[:, ::-1], first)
  assert len({row.tobytes() for row in first.reshape(-1, 40)}) == P * 4


@pytest.mark.slow
def test_random_ratios_are_uniform():
  keys = jax.random.split(jax.random.key(0), 400)
  shares = np.asarray(corruption("random_ratio", keys, 0, (400, 1, 200)))[0].mean(axis=-1)
  quantiles = np.quantile(shares, [0.1, 0.3, 0.5, 0.7, 0.9])
  np.testing.assert_allclose(quantiles, [0.1, 0.3, 0.5, 0.7, 0.9], atol=0.06)


@pytest.mark.parametrize("estimator", ["mean_field", "coupled"])
def test_estimates_do_not_depend_on_padding(groups, estimator):
  prompt, valid, completion = groups
  wider = (
    np.pad(prompt, ((0, 0), (4, 0)), constant_values=9),
    np.pad(valid, ((0, 0), (4, 0))),
    completion,
  )
  out, padded = estimate_groups(groups, estimator), estimate_groups(wider, estimator)
  np.testing.assert_allclose(padded.logp, out.logp, atol=2e-5)
  np.testing.assert_allclose(padded.entropy, out.entropy, atol=2e-5)


def test_the_prompt_is_never_masked(groups):
  prompt, valid, completion = groups
  other = prompt.copy()
  other[:, -1] = (prompt[:, -1] - 1) % 10 + 2
  for estimator in ("mean_field", "random_ratio"):
    changed = estimate_groups((other, valid, completion), estimator)
    assert (changed.logp != estimate_groups(groups, estimator).logp).any()


# --- statistics in chunks -------------------------------------------------------------


@functools.cache
def statistics(chunk):
  """(h, kernel, targets, (gradient of a sum of both, (log-probabilities, entropies)))."""
  rng = np.random.default_rng(0)
  h = rng.normal(size=(2, 11, 6)).astype(np.float32)
  kernel = 2 * rng.normal(size=(6, 9)).astype(np.float32)
  targets = rng.integers(0, 9, (2, 4, 11)).astype(np.int32)

  def total(inputs):
    h, kernel = inputs
    logp, entropy = token_stats(lambda x: x @ kernel, h, targets, chunk)
    return jnp.sum(logp**2) + jnp.sum(entropy), (logp, entropy)

  return h, kernel, targets, jax.jit(jax.grad(total, has_aux=True))((h, kernel))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3, 5, 11, 100])
def test_statistics_in_chunks_equal_those_at_once(chunk):
  """L = 11: with 3 and 5 the last chunk is padded."""
  h, kernel, targets, (gradient, (picked, entropy)) = statistics(chunk)
  logits = h.astype(np.float64) @ kernel
  logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  expected = np.take_along_axis(logp[:, None], targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(picked, expected, atol=1e-5)
  np.testing.assert_allclose(entropy, -np.sum(np.exp(logp) * logp, -1), atol=1e-5)
  whole, _ = statistics(0)[-1]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, whole)


@pytest.mark.slow
def test_the_entropy_has_no_gradient():
  h = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
  fn = lambda h: jnp.sum(token_stats(lambda x: x, h, np.zeros((1, 1, 4), np.int32))[1])
  assert (np.asarray(jax.jit(jax.grad(fn))(h)) == 0).all()


# --- the loss region ------------------------------------------------------------------


def test_the_region_ends_with_the_first_stop_token():
  stops = (0, 7)
  completion = jnp.array([[3, 4, 0, 0, 5], [3, 7, 4, 0, 5], [0, 3, 3, 3, 3], [3, 4, 5, 6, 8]])
  expected = [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
  np.testing.assert_array_equal(loss_region(completion, stops, "through_eos"), expected)
  assert loss_region(completion, stops, "all").all()


# --- the NELBO ------------------------------------------------------------------------

mask = jax.jit(mask_rows, static_argnums=(3, 4))


@examples(max_examples=20)
@hypothesis.given(st.integers(0, 10**6))
def test_only_responses_are_masked_and_masks_are_what_is_said(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(2, VOCAB, (6, 20)).astype(np.int32)
  response = np.arange(20) >= rng.integers(0, 20, (6, 1))
  noisy, masked, p = mask(jax.random.key(seed), tokens, response, MASK, 1e-3)
  assert not (np.asarray(masked) & ~response).any()
  np.testing.assert_array_equal(noisy, np.where(masked, MASK, tokens))
  assert (p >= 1e-3).all() and (p <= 1).all() and len(np.unique(p)) == 6


def test_rows_are_masked_with_their_own_probability():
  tokens = np.full((40, 4000), 5, np.int32)
  _, masked, p = mask(jax.random.key(1), tokens, np.ones(tokens.shape, bool), MASK, 1e-3)
  np.testing.assert_allclose(masked.mean(axis=1), p, atol=0.04)
  assert p.min() < 0.1 and p.max() > 0.9
  np.testing.assert_allclose(mask_probability(np.array([0.0, 0.5, 1.0]), 0.2), [0.2, 0.6, 1.0])


@pytest.mark.slow
def test_the_nelbo_by_hand():
  """Two rows; the second's response of two positions has one mask, with p = 0.5."""
  logits = np.array([0.0, -30, 1.0, 2.0, -30, -30], np.float32)
  log_p = logits - np.log(np.exp(logits).sum())
  tokens = np.array([[4, 2, 3, EOS], [4, 4, 3, EOS]], np.int32)
  masked = np.array([[False, True, True, False], [False, False, True, False]])
  response = np.array([[False, True, True, True], [False, False, True, True]])
  p = np.array([0.25, 0.5], np.float32)
  total, routers = jax.jit(nelbo_sum, static_argnums=0)(
    table_lm(), logits, np.where(masked, MASK, tokens), masked, p,
    tokens, np.ones((2, 4), bool), response,
  )  # fmt: skip
  expected = -(log_p[2] + log_p[3]) / 0.25 / 3 - log_p[3] / 0.5 / 2
  assert total == pytest.approx(float(expected), rel=1e-5) and not routers
