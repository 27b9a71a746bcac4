"""What a denoising step commits: the dynamic factor by hand, the search for the largest logit."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.diffusion.choose import argmax_last, factor_count
from tests.sampler_test import options, random_canvas, run


@pytest.mark.parametrize(
  ("confidences", "factor", "expected"),
  [
    # (n + 1) (1 - c): 2 x 0.05, 3 x 0.2, 4 x 0.4, 5 x 0.5
    ([0.95, 0.8, 0.6, 0.5], 1.0, 2),
    ([0.6, 0.5, 0.95, 0.8], 1.0, 2),  # the order they stand in does not matter
    ([0.95, 0.8, 0.6, 0.5], 0.05, 0),
    ([0.95, 0.8, 0.6, 0.5], 0.61, 2),
    ([0.95, 0.8, 0.6, 0.5], 0.59, 1),
    ([0.95, 0.8, 0.6, 0.5], 9.0, 4),
    ([1.0, 1.0, 1.0, 1.0], 0.01, 4),
  ],
)
def test_the_factor_by_hand(confidences, factor, expected):
  log_confidence = jnp.log(jnp.asarray([confidences, confidences]))
  candidates = jnp.asarray([[True] * 4, [False] * 4])
  assert factor_count(log_confidence, candidates, factor).tolist() == [expected, 0]


def test_only_candidates_count():
  """0.95 is not one: 2 x 0.2 passes, 3 x 0.4 does not."""
  log_confidence = jnp.log(jnp.asarray([[0.95, 0.8, 0.6, 0.5]]))
  candidates = jnp.asarray([[False, True, True, True]])
  assert factor_count(log_confidence, candidates, 1.0).tolist() == [1]
  assert factor_count(log_confidence, candidates, 99.0).tolist() == [3]


@pytest.mark.slow
def test_a_factor_commits_at_least_the_schedule_and_more_when_sure():
  canvas = random_canvas(np.random.default_rng(5), hint_share=0.0)
  plain = run(options(steps=12), canvas)
  never = run(options(steps=12, factor=1e-9), canvas)
  np.testing.assert_array_equal(never.tokens, plain.tokens)
  np.testing.assert_array_equal(never.commit_step, plain.commit_step)
  some = run(options(steps=12, factor=2.5), canvas)
  always = run(options(steps=12, factor=1e3), canvas)
  assert always.forwards == 3 < some.forwards < plain.forwards  # 3: one for each block


largest = jax.jit(argmax_last, static_argnums=1)


@pytest.mark.slow
@hypothesis.settings(deadline=None, derandomize=True, max_examples=50)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([1, 2, 7, 12, 128, 1024, 2048, 1031]))
def test_the_largest_of_a_row_is_found_and_the_first_of_equals(seed, size):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 4, (3, 2, size)).astype(np.float32)  # many equals
  x = np.where(rng.random(x.shape) < 0.2, -np.inf, x)
  np.testing.assert_array_equal(largest(x), np.argmax(x, axis=-1))
  but = int(rng.integers(size))
  x[..., but] = 9
  others = np.where(np.arange(size) == but, -np.inf, x)
  if np.isfinite(others).any(axis=-1).all():
    found = largest(x, but)
    np.testing.assert_array_equal(found, np.argmax(others, axis=-1))
