"""The policy loss: against the official code's numbers, and by hand for the paper's defaults.

The goldens' `clip_fraction` is not compared: the official metric counts tokens whose
ratio term is below the clipped one, ours those where the clipped branch is active.
"""

from __future__ import annotations

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.config import ObjectiveConfig
from igpo_jax.errors import UserError
from igpo_jax.ops.masked import masked_mean, topk_mask
from igpo_jax.rl.advantages import group_advantages
from igpo_jax.rl.hint_filter import entropy_filter, hints_to_keep
from igpo_jax.rl.objectives.clipped import (
  loss_denominator,
  metrics_from_sums,
  policy_loss,
  policy_loss_sums,
)
from tests.tiny_lm import GOLDENS

CASES = sorted((GOLDENS / "loss").glob("*.npz"))
OFFICIAL = {"seq": "sequence_official", "tok": "token"}
RATIOS = ("sequence", "token", "sequence_official")
examples = functools.partial(hypothesis.settings, deadline=None, derandomize=True)


@functools.partial(jax.jit, static_argnames="cfg")
def on_device(logps, entropy, old, ref, advantages, loss_mask, hinted, cfg):
  fn = lambda x: policy_loss(x, entropy, old, ref, advantages, loss_mask, hinted, cfg)
  (loss, metrics), gradient = jax.value_and_grad(fn, has_aux=True)(logps)
  return loss, metrics, gradient


def loss_and_gradient(*arguments):
  """(loss, metrics, gradient) in numpy: each comparison in jax would be another program."""
  return jax.device_get(on_device(*arguments))


loss_sums = jax.jit(policy_loss_sums, static_argnames="cfg")
filtered = jax.jit(entropy_filter, static_argnums=3)


# --- the official code ----------------------------------------------------------------


def mean_term(case, level, eps_low, eps_high, mask):
  """Mean size of the clipped terms that a loss sums up, from the goldens' ratios."""
  advantage = case["advantages_group8"][:, None]
  ratio = case["sequence_ratio"][:, None] if level == "seq" else case["token_ratio"]
  terms = np.minimum(ratio * advantage, np.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage)
  kept = case["token_mask_entropy_filtered" if mask == "filtered" else "masked_positions"]
  return np.abs(terms * np.ones(kept.shape))[kept].mean()


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_losses_and_gradients_are_the_official_codes(path):
  case = np.load(path)
  compared = 0
  for mask in ("filtered", "unfiltered"):
    hinted = case["hint_positions"] & (mask == "filtered")
    for level, ratio in OFFICIAL.items():
      for eps_low, eps_high in ((0.2, 0.2), (0.2, 0.28)):
        for beta in (0.01, 0.0):
          cfg = ObjectiveConfig(ratio, eps_low, eps_high, beta, 0.2, "token")
          loss, metrics, gradient = loss_and_gradient(
            case["policy_logps"],
            case["entropy"],
            case["old_logps"],
            case["ref_logps"],
            case["advantages_group8"],
            case["masked_positions"],
            hinted,
            cfg,
          )
          prefix = f"{mask}__{level}_eps{eps_low}_{eps_high}_beta{beta}__"
          expected = case[prefix + "grad_policy_logps"]
          # The terms of the loss cancel down to a few per cent of their size.
          size = mean_term(case, level, eps_low, eps_high, mask)
          assert abs(loss - case[prefix + "loss"]) <= 2e-6 * size
          assert np.abs(gradient - expected).max() <= 2e-6 * np.abs(expected).max()
          if beta:
            np.testing.assert_allclose(metrics["kl"], case[prefix + "mean_kl"], rtol=2e-6)
          compared += 1
  assert compared == 16


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_filter_and_advantages_are_the_official_codes(path):
  case = np.load(path)
  kept = filtered(case["entropy"], case["masked_positions"], case["hint_positions"], 0.2)
  np.testing.assert_array_equal(kept, case["token_mask_entropy_filtered"])
  assert (case["masked_positions"] & ~np.asarray(kept)).any()
  for size in (4, 8):
    np.testing.assert_allclose(
      group_advantages(case["rewards"], size), case[f"advantages_group{size}"], atol=1e-6
    )


def test_on_policy_the_official_gradient_is_minus_the_advantage_per_token():
  """`old = policy`: both ratios are 1, nothing is clipped."""
  case = np.load(CASES[1])
  for ratio in ("token", "sequence"):
    cfg = ObjectiveConfig(ratio, beta=0.0, normalize="token", entropy_keep=0.2)
    args = [case[k] for k in ("policy_logps", "entropy", "policy_logps", "ref_logps")]
    masks = case["masked_positions"], case["hint_positions"]
    _, _, gradient = loss_and_gradient(*args, case["advantages_group8"], *masks, cfg)
    kept = case["token_mask_entropy_filtered"]
    expected = -case["advantages_group8"][:, None] * kept / kept.sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


# --- by hand: the paper's defaults ----------------------------------------------------

# Two rows of four positions. Row 0: two hints (0 and 1) of which the second has the
# higher entropy, then two tokens of its own. Row 1: ends after its second token.
HINTED = np.array([[True, True, False, False], [False] * 4])
REGION = np.array([[True] * 4, [True, True, False, False]])
ENTROPY = np.array([[0.1, 0.9, 0.5, 0.5], [1.0] * 4], np.float32)
OLD = np.log(np.array([[0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.4]], np.float32))
NEW = np.log(np.array([[0.8, 0.4, 0.5, 0.6], [0.4, 0.5, 0.9, 0.1]], np.float32))
ADVANTAGES = np.array([0.5, -0.5], np.float32)
# exp of the mean log-ratio over the region: (1.6 * 0.8 * 1 * 1.2)^(1/4), (1 * 1.25)^(1/2)
S0, S1 = 1.536**0.25, 1.25**0.5


def by_hand(new=NEW, old=OLD, ref=None, advantages=ADVANTAGES, region=REGION, hinted=HINTED, **kw):
  cfg = ObjectiveConfig(**{"beta": 0.0, "entropy_keep": 0.2} | kw)
  return loss_and_gradient(new, ENTROPY, old, ref, advantages, region, hinted, cfg)


def test_the_default_loss_by_hand():
  """Row 0 keeps 3 of its 4 tokens and is divided by 4; row 1 keeps both, divided by 2."""
  loss, metrics, gradient = by_hand()
  row0 = -0.5 * S0 * 3 / 4
  row1 = 0.5 * S1 * 2 / 2
  assert loss == pytest.approx((row0 + row1) / 2, rel=1e-6)
  # s_i's gradient goes to each kept token's own log-probability: -A s / |o| / B.
  expected = [[0, *[-0.5 * S0 / 4 / 2] * 3], [0.5 * S1 / 2 / 2] * 2 + [0, 0]]
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)
  assert metrics["hints_kept"] == 0.5
  assert metrics["ratio"] == pytest.approx((3 * S0 + 2 * S1) / 5, rel=1e-6)
  assert metrics["clip_fraction"] == 0


def test_the_kl_by_hand_of_both_kinds_and_to_either_policy():
  """Without advantages only the KL is left: row 0 keeps 3 of its 4 tokens, row 1 both of its 2."""
  none, ref = np.zeros(2, np.float32), NEW - np.float32(0.25)
  kinds = {"k2": lambda d: d**2 / 2, "k3": lambda d: math.exp(d) - d - 1}
  for kl, of in kinds.items():
    loss, metrics, _ = by_hand(advantages=none, ref=ref, beta=0.4, kl=kl)
    assert loss == pytest.approx(0.4 * of(-0.25) * (3 / 4 + 1) / 2, rel=1e-5)
    assert metrics["kl"] == pytest.approx(of(-0.25), rel=1e-5)
    d = (OLD - NEW).astype(float)
    to_old = sum(of(d[0, k]) for k in (1, 2, 3)) / 4 + sum(of(d[1, k]) for k in (0, 1)) / 2
    loss, _, _ = by_hand(advantages=none, ref=ref, beta=0.4, kl=kl, kl_to="old")
    assert loss == pytest.approx(0.4 * to_old / 2, rel=1e-5)
    loss, _, _ = by_hand(advantages=none, beta=0.4, kl=kl, kl_to="old")
    assert loss == pytest.approx(0.4 * to_old / 2, rel=1e-5)


def test_the_dual_clip_bounds_the_loss_of_a_bad_completion_by_hand():
  far = np.log(np.array([[0.5] * 4, [2.0, 0.4, 0.4, 0.4]], np.float32))  # ratios 1, and 5 and 1
  loss, _, gradient = by_hand(new=far, ratio="token", dual_clip=3.0)
  row0, row1 = -0.5 * 3 / 4, (0.5 * 3 + 0.5) / 2
  assert loss == pytest.approx((row0 + row1) / 2, rel=1e-6)
  assert gradient[1, 0] == 0 and gradient[1, 1] != 0
  free, _, _ = by_hand(new=far, ratio="token")
  assert free == pytest.approx((row0 + (0.5 * 5 + 0.5) / 2) / 2, rel=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_filtered_hint_token_has_exactly_zero_gradient(ratio):
  _, _, gradient = by_hand(ratio=ratio, beta=0.3, ref=OLD)
  if ratio == "sequence_official":
    # There the sequence ratio is differentiated through all tokens: the filter gates nothing.
    assert gradient[0, 0] != 0 and (gradient[1, 2:] != 0).all()
  else:
    assert gradient[0, 0] == 0 and (gradient[1, 2:] == 0).all()
  assert (gradient[0, 1:] != 0).all() and (gradient[1, :2] != 0).all()


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_filtered_hints_still_count_in_the_length_and_in_the_mean(ratio):
  kept_all, _, _ = by_hand(ratio=ratio, entropy_keep=1.0)
  filtered, _, _ = by_hand(ratio=ratio)
  first = S0 if ratio == "sequence" else min(1.6, 1.2)  # A > 0: clipped from above
  assert kept_all - filtered == pytest.approx(-0.5 * first / 4 / 2, rel=1e-5)


def test_row_and_token_normalisation_by_hand():
  """Token: 5 kept tokens share one denominator; row: each row its own length."""
  token, _, gradient = by_hand(normalize="token")
  assert token == pytest.approx((-0.5 * S0 * 3 + 0.5 * S1 * 2) / 5, rel=1e-6)
  np.testing.assert_allclose(gradient[1, :2], 0.5 * S1 / 5, rtol=1e-6)
  rows, _, _ = by_hand()
  assert abs(rows - token) > 0.01
  assert loss_denominator(REGION, HINTED, ObjectiveConfig(normalize="token")) == 5
  assert loss_denominator(REGION, HINTED, ObjectiveConfig()) == 2


@pytest.mark.parametrize("normalize", ["row", "token"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_an_empty_row_gives_zero(ratio, normalize):
  region = REGION & np.array([[True], [False]])
  loss, metrics, gradient = by_hand(region=region, ratio=ratio, normalize=normalize)
  assert np.isfinite(loss) and np.isfinite(gradient).all()
  assert (gradient[1] == 0).all() and (gradient[0, 1:] != 0).all()
  nothing, metrics, gradient = by_hand(
    region=np.zeros_like(REGION), ratio=ratio, normalize=normalize, beta=0.1, ref=OLD
  )
  assert nothing == 0 and (gradient == 0).all()
  assert all(value == 0 for value in metrics.values())


def test_what_lies_outside_the_region_may_be_anything():
  wild = NEW.copy()
  wild[1, 2:] = [1e30, -1e30]
  old = OLD.copy()
  old[1, 2:] = [-1e30, np.inf]
  for ratio in ("sequence", "token"):
    loss, _, gradient = by_hand(wild, old, ref=old, beta=0.1, ratio=ratio)
    expected, _, same = by_hand(ref=OLD, beta=0.1, ratio=ratio)
    assert loss == expected
    np.testing.assert_array_equal(gradient, same)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_clipping_by_hand(ratio, advantage):
  """min(r A, clip(r) A): clipped above for A > 0, below for A < 0, with no gradient there."""
  one = np.ones((1, 1), bool)
  zeros = np.zeros((1, 1), np.float32)
  cfg = ObjectiveConfig("token", 0.2, 0.3, 0.0)
  loss, metrics, gradient = loss_and_gradient(
    np.float32([[math.log(ratio)]]), zeros, zeros, None, np.float32([advantage]), one, ~one, cfg
  )
  clipped = (ratio > 1.3) if advantage > 0 else (ratio < 0.8)
  value = {True: 1.3 if advantage > 0 else 0.8, False: ratio}[clipped]
  assert loss == pytest.approx(-value * advantage, rel=1e-6)
  assert gradient[0, 0] == pytest.approx(0 if clipped else -ratio * advantage, rel=1e-6)
  assert metrics["clip_fraction"] == clipped


def test_the_k3_kl_by_hand():
  """ref/policy = 2: 2 - ln 2 - 1. Its gradient in log pi is 1 - 2."""
  one = np.ones((1, 1), bool)
  zeros = np.zeros((1, 1), np.float32)
  cfg = ObjectiveConfig(beta=0.5)
  loss, metrics, gradient = loss_and_gradient(
    zeros, zeros, zeros, np.float32([[math.log(2)]]), np.float32([0]), one, ~one, cfg
  )
  assert metrics["kl"] == pytest.approx(1 - math.log(2), rel=1e-6)
  assert loss == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-6)
  assert gradient[0, 0] == pytest.approx(0.5 * (1 - 2), rel=1e-6)


def test_the_kl_is_masked_like_the_policy_term():
  ref = OLD + np.float32(0.7)
  with_kl, _, gradient = by_hand(ref=ref, beta=0.4)
  without, _, plain = by_hand()
  kept = REGION & ~(HINTED & (ENTROPY < 0.5))
  log_ref = np.where(kept, ref - NEW, 0)
  k3 = np.exp(log_ref) - log_ref - 1
  expected = 0.4 * (k3[0].sum() / 4 + k3[1].sum() / 2) / 2
  assert with_kl - without == pytest.approx(expected, rel=1e-5)
  assert gradient[0, 0] == plain[0, 0] == 0


def test_without_a_reference_there_is_no_kl():
  loss, metrics, _ = by_hand(beta=0.5)
  assert loss == by_hand()[0] and metrics["kl"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_advantage_and_no_kl_is_exactly_no_gradient(ratio):
  _, _, gradient = by_hand(advantages=np.zeros(2, np.float32), ratio=ratio)
  assert (gradient == 0).all()


def random_batch(seed, rows=4, length=9):
  rng = np.random.default_rng(seed)
  normal = lambda: rng.normal(size=(rows, length)).astype(np.float32) * 0.3 - 2
  region = np.arange(length) < rng.integers(0, length + 1, (rows, 1))
  hinted = rng.random((rows, length)) < 0.5
  advantages = rng.normal(size=rows).astype(np.float32)
  return normal(), normal() + 3, normal(), normal(), advantages, region, hinted


@examples(max_examples=30)
@hypothesis.given(st.integers(0, 10**6))
def test_the_value_is_that_of_the_sequence_ratio(seed):
  """The GSPO-token form changes the gradient, not the value."""
  logps, entropy, old, _, advantages, region, hinted = random_batch(seed)
  cfg = ObjectiveConfig(beta=0.0, entropy_keep=0.3)
  loss, _, _ = loss_and_gradient(logps, entropy, old, None, advantages, region, hinted, cfg)
  kept = np.asarray(filtered(entropy, region, hinted, 0.3))
  expected = 0.0
  for row in range(len(logps)):
    n = region[row].sum()
    if n == 0:
      continue
    s = math.exp((logps[row] - old[row])[region[row]].astype(np.float64).mean())
    a = float(advantages[row])
    expected -= min(s * a, min(max(s, 0.8), 1.2) * a) * kept[row].sum() / n
  assert loss == pytest.approx(expected / len(logps), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@examples(max_examples=30)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from(RATIOS), st.sampled_from(["row", "token"]))
def test_sums_over_micro_batches_add_up_to_the_whole_batch(seed, ratio, normalize):
  batch = random_batch(seed)
  cfg = ObjectiveConfig(ratio, normalize=normalize)
  loss, metrics, _ = loss_and_gradient(*batch, cfg)
  parts = [loss_sums(*(x[rows] for x in batch), cfg=cfg) for rows in (slice(2), slice(2, 4))]
  numerator = parts[0][0] + parts[1][0]
  sums = jax.tree.map(jnp.add, parts[0][1], parts[1][1])
  denominator = loss_denominator(batch[5], batch[6], cfg)
  assert numerator / denominator == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
  for name, value in metrics_from_sums(sums).items():
    assert value == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-6), name


# --- the entropy filter ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("keep", "expected"),
  [  # of n = 0, 1, 2, ... hint positions
    (0.2, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]),
    (0.0, [0, 1, 1, 1]),
    (1.0, [0, 1, 2, 3, 4]),
    (0.5, [0, 1, 1, 1, 2, 2, 3]),
    (0.29, [0, 1, 1, 1, 1, 1, 1, 2]),
  ],
)
def test_how_many_hints_are_kept(keep, expected):
  n = len(expected)
  np.testing.assert_array_equal(hints_to_keep(jnp.arange(n), keep, n - 1), expected)


@pytest.mark.parametrize(("keep", "n", "kept"), [(0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7)])
def test_a_share_in_decimals_counts_as_written(keep, n, kept):
  """In binary 0.29 * 100 is 28.999...; in float32 it is worse."""
  assert hints_to_keep(jnp.int32(n), keep, n) == kept


@examples(max_examples=50)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_the_filter_keeps_the_hints_of_highest_entropy(seed, keep):
  _, entropy, _, _, _, region, hinted = random_batch(seed)
  kept = np.asarray(filtered(entropy, region, hinted, keep))
  np.testing.assert_array_equal(kept & ~hinted, region & ~hinted)
  assert not (kept & ~region).any()
  for row in range(len(entropy)):
    hints = region[row] & hinted[row]
    n = hints.sum()
    assert (kept[row] & hinted[row]).sum() == (max(1, math.floor(keep * n)) if n else 0)
    dropped = hints & ~kept[row]
    if dropped.any():
      assert entropy[row][kept[row] & hints].min() >= entropy[row][dropped].max()


def test_the_entropy_carries_no_gradient():
  fn = lambda e: policy_loss(NEW, e, OLD, None, ADVANTAGES, REGION, HINTED, ObjectiveConfig())[0]
  assert (jax.jit(jax.grad(fn))(jnp.asarray(ENTROPY)) == 0).all()


@examples(max_examples=50)
@hypothesis.given(st.integers(0, 10**6))
def test_topk_takes_the_largest_allowed_and_the_first_of_equals(seed):
  rng = np.random.default_rng(seed)
  values = rng.integers(0, 4, (3, 7)).astype(np.float32)
  allowed, k = rng.random((3, 7)) < 0.6, rng.integers(0, 9, 3)
  taken = np.asarray(topk_mask(values, allowed, k))
  for row in range(3):
    order = sorted(np.flatnonzero(allowed[row]), key=lambda c: (-values[row, c], c))
    assert set(np.flatnonzero(taken[row])) == set(order[: k[row]])


def test_a_masked_mean_of_nothing_is_zero_and_infinities_do_not_leak():
  x = jnp.array([[1.0, jnp.nan, 3.0], [jnp.inf, 2.0, 2.0]])
  mask = jnp.array([[True, False, True], [False, False, False]])
  np.testing.assert_array_equal(masked_mean(x, mask, axis=1), [2, 0])


# --- advantages -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "std", "std_sample", "leave_one_out"])
@pytest.mark.parametrize("size", [3, 6, 7])
def test_equal_rewards_are_no_advantage_to_the_last_bit(kind, size):
  rewards = np.repeat(np.linspace(0.05, 1.3, 40, dtype=np.float32), size)
  np.testing.assert_array_equal(group_advantages(rewards, size, kind), 0.0)


@pytest.mark.parametrize("correct", range(9))
def test_advantages_are_one_minus_rho_and_minus_rho(correct):
  rewards = np.zeros(8, np.float32)
  rewards[:correct] = 1
  rho = correct / 8
  advantages = np.asarray(group_advantages(np.concatenate([rewards, np.zeros(8)]), 8))
  assert (advantages[:correct] == 1 - rho).all() and (advantages[correct:8] == -rho).all()
  assert (advantages[8:] == 0).all()


def test_the_other_baselines_by_hand():
  rewards = np.array([1, 0, 0, 0], np.float32)
  std = math.sqrt(3) / 4 + 1e-4
  np.testing.assert_allclose(
    group_advantages(rewards, 4, "std"), [0.75 / std] + [-0.25 / std] * 3, rtol=1e-6
  )
  np.testing.assert_allclose(
    group_advantages(rewards, 4, "leave_one_out"), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6
  )
  assert (group_advantages(np.ones(4), 4, "std") == 0).all()


@pytest.mark.parametrize(
  ("rewards", "size", "kind", "complaint"),
  [
    (4, 1, "mean", "a group of one has no advantage"),
    (5, 2, "mean", "5 rewards are not a multiple of group_size=2"),
    (4, 2, "median", "'median' is not one of"),
  ],
)
def test_groups_that_cannot_be_are_told(rewards, size, kind, complaint):
  with pytest.raises(UserError, match=complaint):
    group_advantages(np.zeros(rewards), size, kind)
