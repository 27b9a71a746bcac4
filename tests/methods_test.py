"""Published estimators and objectives: against their authors' numbers, and against slow twins.

A twin says in loops over rows and positions what the package says in arrays. Estimators are held to
what their masks must satisfy, objectives to loss and gradient. tests/golden_estimators.py compares
with the authors' code; here it runs on a few of its cases.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpo_jax.config import SamplerConfig, freeze
from igpo_jax.diffusion.completions import sample_rows
from igpo_jax.errors import UserError
from igpo_jax.rl.estimate import Estimate, read_views, views_of
from igpo_jax.rl.estimators.autoregressive import Autoregressive
from igpo_jax.rl.estimators.base import Group, Sizes, Views
from igpo_jax.rl.estimators.block_random import BlockRandom
from igpo_jax.rl.estimators.coupled_grpo import CoupledGRPO
from igpo_jax.rl.estimators.elbo import Elbo, gauss_legendre, stratified_counts
from igpo_jax.rl.estimators.every_block import EveryBlock
from igpo_jax.rl.estimators.prompt_masked import PromptMasked
from igpo_jax.rl.estimators.trace import Trace
from igpo_jax.rl.estimators.trace_sampled import TraceSampled, inverse_cdf
from igpo_jax.rl.objectives.base import Batch
from igpo_jax.rl.objectives.bgpo import BGPO
from igpo_jax.rl.objectives.clipped import Clipped
from igpo_jax.rl.objectives.elbo_ratio import ElboRatio
from igpo_jax.rl.objectives.gdsd import GDSD
from igpo_jax.rl.objectives.spg import SPG
from igpo_jax.rl.objectives.stabledrl import StableDRL
from igpo_jax.rl.objectives.trace_ppo import TracePPO
from igpo_jax.rl.objectives.wd1 import WD1
from igpo_jax.train.policy_update import make_policy_programs
from tests import golden_estimators, tiny_config, update_test
from tests.paths import run_on_devices, shared_path
from tests.tiny_lm import EOS, GOLDENS, MASK, tiny_model

# --- the authors' code ----------------------------------------------------------------

STORED = GOLDENS / "estimators"


@functools.cache
def stored_cases():
  """What the runner says of the few cases that the tests have."""
  return {name: (errors, fine) for name, errors, fine in golden_estimators.check(STORED, False)}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(golden_estimators.METHODS))
def test_losses_and_gradients_are_those_of_the_authors_code(method):
  cases = {name: case for name, case in stored_cases().items() if name.startswith(f"{method}/")}
  assert cases
  for name, (errors, fine) in cases.items():
    assert fine, golden_estimators.line(name, errors, fine)
    assert {"loss", "gradient"} <= errors.keys()


@pytest.mark.slow
def test_every_shared_case_passes(capsys):
  cases = str(shared_path("golden", "estimators"))
  assert golden_estimators.main([cases, "--no-forward"]) == 0
  # From the parameters of the model on, which takes a minute and more for all.
  for name in ("spg/ragged", "agrpo/ragged"):
    assert golden_estimators.main([cases, "--only", name]) == 0
  out = capsys.readouterr().out
  assert out.count("0 failed") == 3 and out.count("parameters") == out.count("from the model") > 1


def tampered(tmp_path, **changes):
  """A folder with one case of `tracerl`, changed."""
  with np.load(STORED / "tracerl" / "ragged.npz") as file:
    arrays = {name: file[name] for name in file.files}
  (tmp_path / "tracerl").mkdir()
  np.savez(
    tmp_path / "tracerl" / "case.npz", **(arrays | {k: f(arrays) for k, f in changes.items()})
  )
  return tmp_path


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"loss": lambda a: a["loss"] * (1 + 1e-4) + 1e-6}, "loss"),
    ({"grad_logp": lambda a: a["grad_logp"] * 1.001}, "gradient"),
    ({"masked": lambda a: ~a["masked"]}, "differ >"),
    ({"config": lambda a: np.array(str(a["config"])[:-1] + ', "new": 1}')}, "not known: new"),
    ({"config": lambda a: np.array(str(a["config"]).replace('"shrink": 4', '"shrink": 2'))}, ""),
  ],
  ids=["loss", "gradient", "masks", "unknown option", "another option"],
)
def test_the_runner_fails_where_a_case_is_off(tmp_path, capsys, change, said):
  assert golden_estimators.main([str(tampered(tmp_path, **change)), "--no-forward"]) == 1
  out = capsys.readouterr().out
  assert "FAILED" in out and said in out


def test_the_runner_names_what_it_does_not_know(tmp_path, capsys):
  assert golden_estimators.main([str(tmp_path / "nowhere")]) == 2
  assert golden_estimators.main([str(tmp_path)]) == 2
  (tmp_path / "newest").mkdir()
  shutil.copy(STORED / "wd1" / "ragged.npz", tmp_path / "newest")
  assert golden_estimators.main([str(tmp_path), "--no-forward"]) == 1
  assert "no method of this name" in capsys.readouterr().out


# --- masks ----------------------------------------------------------------------------

P, G, PROMPT, LENGTH, STEPS, VOCAB = 2, 4, 5, 12, 6, 9
SIZES = Sizes(G, LENGTH, STEPS, 4, 2, MASK, EOS, (EOS,))


def make_groups():
  """Two prompts, the second with hints; two completions end early, one of them in its hints."""
  rng = np.random.default_rng(3)
  completion = rng.integers(2, VOCAB, (P, G, LENGTH))
  completion[0, 1, 5:] = EOS
  completion[1, 2, 9:] = EOS
  hinted = np.zeros(completion.shape, bool)
  hinted[1, :3] = rng.random((3, LENGTH)) < 0.4
  step = np.empty(completion.shape, int)
  for index in np.ndindex(P, G):
    step[index] = rng.permutation(np.arange(LENGTH) % STEPS)
  step[1, 3] = np.where(step[1, 3] == 2, 3, step[1, 3])  # a step that decided nothing
  length = np.where((completion == EOS).any(-1), (completion == EOS).argmax(-1) + 1, LENGTH)
  return Group(
    prompt=jnp.asarray(rng.integers(2, VOCAB, (P, PROMPT)), jnp.int32),
    prompt_valid=jnp.asarray(np.arange(PROMPT) >= np.array([[0], [2]])),
    completion=jnp.asarray(completion, jnp.int32),
    hinted=jnp.asarray(hinted),
    commit_step=jnp.asarray(np.where(hinted, -1, step), jnp.int32),
    region=jnp.asarray(np.arange(LENGTH) < length[..., None]),
    length=jnp.asarray(length, jnp.int32),
    commit_logp=jnp.asarray(np.where(hinted, 0, rng.uniform(-3, -0.01, hinted.shape)), jnp.float32),
  )


GROUPS = make_groups()
KEYS = jax.random.split(jax.random.key(7), P)
drawn = jax.jit(views_of, static_argnums=(0, 4))


def views(estimator, groups=GROUPS, keys=KEYS, update=0):
  """Numpy views [P,R,G,...]."""
  return jax.tree.map(np.asarray, drawn(estimator, groups, keys, update, SIZES))


def rows(groups=GROUPS):
  """(prompt, row, what the group says of that row)."""
  of = jax.tree.map(np.asarray, groups)
  for p, g in np.ndindex(P, G):
    yield (
      p,
      g,
      {
        "length": int(of.length[p, g]),
        "hinted": of.hinted[p, g],
        "step": of.commit_step[p, g],
        "prompt": of.prompt_valid[p],
      },
    )


ESTIMATORS = {
  "coupled_grpo": CoupledGRPO(),
  "prompt_masked": PromptMasked(0.4),
  "elbo": Elbo(draws=3),
  "elbo response": Elbo(counts="response", draws=3, complement=False),
  "elbo nodes": Elbo(counts="gauss_legendre", draws=3, complement=False),
  "elbo plain": Elbo(weights="none"),
  "block_random": BlockRandom(draws=4, hole_probability=0.3),
  "every_block": EveryBlock(draws=3, origin="prompt"),
  "trace": Trace(shrink=2),
  "trace step by step": Trace(shrink=1, hints="context", end_tokens=0),
  "trace_sampled": TraceSampled(draws=3),
  "trace_sampled unsure": TraceSampled(draws=3, steps="unsure", step_temperature=0.5),
  "trace_sampled surprisal": TraceSampled(draws=3, steps="surprisal"),
  "trace_sampled later": TraceSampled(draws=3, score="later", hints="context"),
  "autoregressive": Autoregressive(),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_makes_the_views_that_it_declares(name):
  estimator = ESTIMATORS[name]
  out = views(estimator)
  shared, own = estimator.forwards(SIZES)
  assert out.masked.shape == out.scored.shape == (P, shared + own, G, LENGTH)
  assert (shared + own) % out.draws == 0
  assert (out.scored <= out.masked).all()
  first = out.masked[:, :shared]
  # One input for the group: nothing of a completion may be seen.
  assert first.all()
  if out.weights is not None:
    assert ((out.weights != 0) <= out.scored).all() and (out.weights >= 0).all()
  if out.prompt_masked is not None:
    seen = np.asarray(GROUPS.prompt_valid)[:, None, None]
    assert not (out.prompt_masked & ~seen).any() and (out.prompt_masked & seen).any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masks_follow_the_prompts_key_and_not_its_place_or_padding(name):
  estimator = ESTIMATORS[name]
  out = views(estimator)
  turned = views(estimator, jax.tree.map(lambda x: x[::-1], GROUPS), KEYS[::-1])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::-1], b), out, turned)
  wide = dataclasses.replace(
    GROUPS,
    prompt=jnp.pad(GROUPS.prompt, ((0, 0), (3, 0))),
    prompt_valid=jnp.pad(GROUPS.prompt_valid, ((0, 0), (3, 0))),
  )
  padded = views(estimator, wide)
  if out.prompt_masked is not None:
    np.testing.assert_array_equal(padded.prompt_masked[..., 3:], out.prompt_masked)
    padded = padded.replace(prompt_masked=out.prompt_masked)
  jax.tree.map(np.testing.assert_array_equal, out, padded)
  other = views(estimator, update=1)
  changed = (out.masked != other.masked).any()
  if out.prompt_masked is not None:
    changed |= (out.prompt_masked != other.prompt_masked).any()
  assert changed == estimator.redrawn


@pytest.mark.parametrize("name", ["trace", "trace step by step", "autoregressive"])
def test_permuting_the_rows_of_a_group_permutes_the_views_where_nothing_is_drawn(name):
  order = np.array([2, 0, 3, 1])
  of_rows = lambda x: x[:, order] if x.ndim == 2 or x.shape[1:] == (G, LENGTH) else x
  turned = jax.tree.map(of_rows, GROUPS).replace(
    prompt=GROUPS.prompt, prompt_valid=GROUPS.prompt_valid
  )
  out, other = views(ESTIMATORS[name]), views(ESTIMATORS[name], turned)
  for field in ("masked", "scored"):
    np.testing.assert_array_equal(getattr(other, field), getattr(out, field)[:, :, order])
  assert name == "autoregressive" or (other.masked != out.masked).any()


def test_prompt_masked_hides_prompt_tokens_with_one_probability_and_the_whole_completion():
  many = 200
  repeat = jax.tree.map(lambda x: jnp.repeat(x[1:], many, axis=0), GROUPS)
  out = views(ESTIMATORS["prompt_masked"], repeat, jax.random.split(jax.random.key(1), many))
  assert out.masked.shape[1] == 1 and out.masked.all() and out.scored.all()
  hidden = out.prompt_masked[:, 0]  # [X,G,Tp]; the second prompt begins with two pads
  assert not hidden[..., :2].any()
  for k in range(2, PROMPT):
    assert hidden[..., k].mean() == pytest.approx(0.4, abs=0.06)  # 800 draws: 3.5 sigma
  assert np.corrcoef(hidden[:, 0, 2:].reshape(-1), hidden[:, 1, 2:].reshape(-1))[0, 1] < 0.15


def test_the_views_of_elbo_are_counted_and_weighed_as_espo_says():
  out = views(ESTIMATORS["elbo"])
  for p, g, _ in rows():
    for draw in range(3):
      first, second = out.masked[p, 2 * draw : 2 * draw + 2, g]
      assert (first != second).all()
      for view, mask in ((2 * draw, first), (2 * draw + 1, second)):
        for k in range(LENGTH):
          weight = (LENGTH + 1) / mask.sum() / 2 / 3 if mask[k] else 0.0
          assert out.weights[p, view, g, k] == pytest.approx(weight, rel=1e-6)
  counts = out.masked[:, ::2].sum(axis=-1)  # [P,draws,G]
  for p, draw in np.ndindex(P, 3):
    expected = stratified_counts(jnp.array([counts[p, draw, 0]]), G, LENGTH)
    np.testing.assert_array_equal(counts[p, draw], expected)
  assert len({tuple(c) for c in counts.reshape(-1, G)}) > 1


def test_stratified_counts_by_hand():
  np.testing.assert_array_equal(stratified_counts(jnp.array([3]), 4, 7), [3, 5, 7, 1])
  # 33 / 8 = 4.125: 0, 4.1, 8.3, 12.4, 16.5, 20.6, 24.8, 28.9 from 0; a half goes to the even.
  expected = [0, 4, 8, 12, 16, 21, 25, 29]
  np.testing.assert_array_equal(stratified_counts(jnp.array([0]), 8, 32), expected)


def test_the_views_of_bgpo_spread_their_counts_over_the_response():
  out = views(ESTIMATORS["elbo response"])
  assert out.draws == 3
  for p, g, row in rows():
    n = out.masked[p, :, g].sum(axis=-1)
    assert (n >= 1).all() and (n <= row["length"]).all()
    # Thirds of 1..|o|: one count in each, up to where the circle begins.
    cells = np.floor((n - 0.5) / row["length"] * 3)
    assert sorted(cells) == [0, 1, 2] or len(set(n)) == 3
    for view in range(3):
      assert not out.masked[p, view, g, row["length"] :].any()
      mask = out.masked[p, view, g]
      np.testing.assert_allclose(out.weights[p, view, g], mask * row["length"] / n[view] / 3, 1e-6)


def test_the_nodes_of_gdpo_are_gauss_legendre():
  t, w = gauss_legendre(3)
  np.testing.assert_allclose(t, [0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5], atol=1e-12)
  np.testing.assert_allclose(w, [5 / 18, 8 / 18, 5 / 18], atol=1e-12)
  out = views(ESTIMATORS["elbo nodes"])
  assert out.draws == 1
  for p, g, row in rows():
    for node in range(3):
      mask = out.masked[p, node, g]
      assert mask.sum() == max(1, math.floor(t[node] * row["length"]))
      assert not mask[row["length"] :].any()
      np.testing.assert_allclose(out.weights[p, node, g], mask * w[node] / t[node], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elbo", "elbo response", "elbo plain"])
def test_each_position_counts_once_on_average(name):
  """The mean over draws of the weights of a position is 1: the bound's estimate has no bias."""
  estimator, many = ESTIMATORS[name], 600
  group = jax.tree.map(lambda x: x[:1], GROUPS)
  keys = jax.random.split(jax.random.key(0), many)
  repeat = jax.tree.map(lambda x: jnp.repeat(x, many, axis=0), group)
  weights = np.asarray(drawn(estimator, repeat, keys, 0, SIZES).weights).sum(axis=1).mean(axis=0)
  expected = np.ones((G, LENGTH))
  if name == "elbo response":
    expected = np.asarray(group.region)[0] * expected
  if name == "elbo plain":
    expected = np.full((G, LENGTH), 0.5)  # of every draw, half
  np.testing.assert_allclose(weights, expected, atol=0.25)
  np.testing.assert_allclose(weights.mean(), expected.mean(), rtol=0.04)


def test_the_weights_of_coupled_grpo_are_halves_of_one_and_of_the_inverse_ratio():
  out = views(ESTIMATORS["coupled_grpo"])
  for p in range(P):
    (m,) = {round(float(0.5 / x), 5) for x in out.weights[p, 1][out.masked[p, 1]]}
    assert 0.2 <= m <= 0.8
    for g in range(G):
      assert (out.masked[p, 1, g] != out.masked[p, 2, g]).all() and out.masked[p, 0, g].all()
      for k in range(LENGTH):
        total = 0.5 + (0.5 / m if out.masked[p, 1, g, k] else 0.5 / (1 - m))
        assert out.weights[p, :, g, k].sum() == pytest.approx(total, rel=1e-4)


def test_block_random_stands_in_distinct_blocks():
  out = views(ESTIMATORS["block_random"])
  earlier_holes = 0
  for p, g, row in rows():
    chosen = []
    finished = -(-row["length"] // 4)
    for view in range(4):
      mask, scored = out.masked[p, view, g], out.scored[p, view, g]
      np.testing.assert_array_equal(scored, mask & (np.arange(LENGTH) < row["length"]))
      assert mask[row["length"] :].all()
      # The last block that is not wholly masked, or the first, if all are.
      per_block = [scored[4 * b : min(4 * b + 4, row["length"])] for b in range(finished)]
      candidates = [b for b in range(finished) if all(x.all() for x in per_block[b + 1 :])]
      assert any(per_block[b].any() for b in candidates)
      chosen.append(candidates[0])
      earlier_holes += sum(x.sum() for x in per_block[: candidates[0]])
      np.testing.assert_allclose(out.weights[p, view, g], scored / scored.sum() / 4, rtol=1e-6)
    assert out.weights[p, :, g].sum() == pytest.approx(1, rel=1e-6)
    assert len(set(chosen)) > 1 or finished == 1
  assert earlier_holes > 0


def test_every_block_has_a_share_of_masks_that_its_weights_undo():
  out = views(ESTIMATORS["every_block"])
  for p, g, row in rows():
    first = int(row["prompt"].sum())
    block = lambda k, first=first: (first + k) // 4
    for view in range(3):
      mask, weights = out.masked[p, view, g], out.weights[p, view, g]
      assert not mask[row["length"] :].any()
      for b in {block(k) for k in range(row["length"])}:
        inside = [k for k in range(row["length"]) if block(k) == b]
        n = sum(mask[k] for k in inside)
        assert 1 <= n <= len(inside)
        for k in inside:
          expected = len(inside) / n / 3 if mask[k] else 0.0
          assert weights[k] == pytest.approx(expected, rel=1e-6)
    assert out.weights[p, :, g].sum() == pytest.approx(row["length"], rel=1e-6)


def merged_by_hand(step, shrink):
  """Each token's merged step, -1 of a hint."""
  order = {s: i // shrink for i, s in enumerate(sorted({int(s) for s in step if s >= 0}))}
  return [order.get(int(s), -1) for s in step]


def test_trace_reads_every_token_in_the_state_that_it_was_decided_in():
  out = views(ESTIMATORS["trace"])
  assert not np.asarray(out.aux["of_hints"])[:, 1:].any() and out.aux["of_hints"][:, 0].all()
  assert ESTIMATORS["trace"].forwards(SIZES) == (1, 3)
  for p, g, row in rows():
    merged = merged_by_hand(row["step"], 2)
    for k in range(LENGTH):
      hint = row["hinted"][k]
      assert out.masked[p, 0, g, k] and out.scored[p, 0, g, k] == hint
      for view in range(3):
        assert out.scored[p, 1 + view, g, k] == (merged[k] == view)
        assert out.masked[p, 1 + view, g, k] == (not hint and merged[k] >= view)
      assert out.scored[p, :, g, k].sum() == 1
  assert np.asarray(GROUPS.hinted).any()


def test_trace_step_by_step_leaves_out_hints_and_ends_where_told():
  out = views(ESTIMATORS["trace step by step"])
  completion = np.asarray(GROUPS.completion)
  for p, g, row in rows():
    merged = merged_by_hand(row["step"], 1)
    for k in range(LENGTH):
      end, hint = completion[p, g, k] == EOS, row["hinted"][k]
      assert out.scored[p, :, g, k].sum() == (0 if end or hint else 1)
      for view in range(STEPS):
        assert out.masked[p, view, g, k] == (merged[k] >= view and not hint)
  one_end = views(Trace(shrink=1, hints="context", end_tokens=1)).scored
  ends = (one_end.any(axis=1) & (completion == EOS)).sum(axis=-1)
  first_is_own = [
    (completion[p, g] == EOS).any()
    and not row["hinted"][(completion[p, g] == EOS).argmax()] for p, g, row in rows()
  ]  # fmt: skip
  np.testing.assert_array_equal(ends.reshape(-1), np.array(first_is_own, int))


def test_trace_sampled_reads_steps_of_the_completion_evenly():
  out = views(ESTIMATORS["trace_sampled"])
  for p, g, row in rows():
    steps = sorted({int(s) for s in row["step"][: row["length"]] if s >= 0})
    np.testing.assert_array_equal(out.scored[p, 0, g], row["hinted"])
    for view in range(1, 4):
      taken = {int(s) for s in row["step"][out.scored[p, view, g]]}
      assert len(taken) == 1 and taken <= set(steps)
      (step,) = taken
      np.testing.assert_array_equal(out.scored[p, view, g], row["step"] == step)
      np.testing.assert_array_equal(out.masked[p, view, g], row["step"] >= step)
  later = views(ESTIMATORS["trace_sampled later"])
  np.testing.assert_array_equal(later.scored, later.masked)
  assert (later.aux["current"] <= later.scored).all() and later.aux["current"].any(-1).all()


def surprisals(p, g, counted):
  """step -> -log p of its tokens, of one completion."""
  of = {}
  step, logp = np.asarray(GROUPS.commit_step[p, g]), np.asarray(GROUPS.commit_logp[p, g])
  for k in range(counted):
    if step[k] >= 0:
      of.setdefault(int(step[k]), []).append(-float(logp[k]))
  return of


def many_steps(estimator, many=400):
  """i[many,P,R,G], the steps that many draws read."""
  keys = jax.vmap(lambda k: jax.random.split(k, P))(jax.random.split(jax.random.key(1), many))
  draw = lambda keys: views_of(estimator, GROUPS, keys, 0, SIZES)
  out = jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys))
  step = np.asarray(GROUPS.commit_step)[None, :, None]
  assert out.scored.any(axis=-1).all()
  return np.where(out.scored, step, -1).max(axis=-1), out


def test_unsure_steps_are_drawn_more_often_and_not_twice():
  """RLDF: without replacement, the first by softmax of the mean surprisal / T."""
  estimator = TraceSampled(draws=2, steps="unsure", step_temperature=0.5, hints="context")
  steps, out = many_steps(estimator)
  assert out.weights is None
  for p, g, row in rows():
    mean = {s: np.mean(x) / 0.5 for s, x in surprisals(p, g, row["length"]).items()}
    total = sum(math.exp(x) for x in mean.values())
    first = steps[:, p, 0, g]
    for s, x in mean.items():
      assert np.mean(first == s) == pytest.approx(math.exp(x) / total, abs=0.09)
    assert set(steps[:, p, :, g].ravel()) <= set(mean)
    assert (steps[:, p, 0, g] != steps[:, p, 1, g]).all() or len(mean) == 1


def test_weights_undo_that_surprising_steps_are_drawn_more_often():
  estimator = TraceSampled(draws=3, steps="surprisal", hints="context")
  steps, out = many_steps(estimator)
  for p, g, row in rows():
    of = {s: sum(x) for s, x in surprisals(p, g, row["length"]).items()}
    total = sum(of.values())
    for s, x in of.items():
      at = steps[:, p, :, g] == s
      assert at.mean() == pytest.approx(x / total, abs=0.07)
      weights = out.weights[:, p, :, g].max(axis=-1)[at]
      np.testing.assert_allclose(weights, total / x / len(of), rtol=1e-4)


@pytest.mark.slow
def test_what_a_trace_reads_is_what_the_sampler_saw():
  """Step by step, the estimate is the log-probability that each token was chosen with."""
  lm, params = tiny_model(VOCAB)
  sampler = SamplerConfig(gen_length=LENGTH, block_length=4, steps=STEPS, temperature=1.0)
  flat = lambda x: np.asarray(x).reshape(P * G, -1)
  each = lambda x: np.repeat(x, G, axis=0)
  canvas = np.where(GROUPS.hinted, GROUPS.completion, MASK)
  completion, step, logp, finite = sample_rows(
    lm, params, each(GROUPS.prompt), each(GROUPS.prompt_valid), flat(canvas), flat(GROUPS.hinted),
    jax.random.split(jax.random.key(3), P * G), sampler,
  )  # fmt: skip
  grouped = lambda x: x.reshape(P, G, LENGTH)
  groups = dataclasses.replace(GROUPS, completion=grouped(completion), commit_step=grouped(step))
  estimator = Trace(shrink=1, hints="context")
  views = drawn(estimator, groups, KEYS, 0, SIZES)
  read = jax.jit(read_views, static_argnums=(0, 2, 5))(lm, params, estimator, groups, views, SIZES)
  filled = np.asarray(grouped(logp)) == 0  # hints, and what early stopping filled
  assert finite.all() and (filled >= np.asarray(GROUPS.hinted)).all() and (~filled).sum() > 50
  np.testing.assert_allclose(np.where(filled, 0, read.tokens), grouped(logp), atol=2e-5)


def test_a_step_is_where_the_running_sum_of_shares_passes():
  share = jnp.array([[0.25, 0, 0.5, 0.25, 0]])
  points = jnp.array([[0.0], [0.2], [0.25], [0.7], [0.75], [0.9999999]])
  np.testing.assert_array_equal(inverse_cdf(share, points)[:, 0], [0, 0, 2, 2, 3, 3])


def test_autoregressive_scores_every_position_once_behind_what_stands_before():
  out = views(ESTIMATORS["autoregressive"])
  for t, k in np.ndindex(LENGTH, LENGTH):
    assert (out.masked[:, t, :, k] == (k >= t)).all()
    assert (out.scored[:, t, :, k] == (k == t)).all()


# --- objectives -----------------------------------------------------------------------

R = 4


def make_batch(estimates=("policy", "old", "ref"), zero_group=False):
  """Random views of which two have no weights in places, hints, an end, overlapping views."""
  rng = np.random.default_rng(11)
  shape = (P, R, G, LENGTH)
  scored = rng.random(shape) < 0.4
  scored[0, 3, 1] = False  # a view that scores nothing
  current = scored & (rng.random(shape) < 0.5)
  out = Views(
    masked=jnp.asarray(scored),
    scored=jnp.asarray(scored),
    weights=jnp.asarray(np.where(scored, rng.uniform(0.5, 2, shape), 0), jnp.float32),
    aux={"current": jnp.asarray(current)},
    draws=2,
  )
  advantages = rng.normal(size=(P, G))
  advantages[0, 2] = 0.0
  if zero_group:
    advantages[1] = 0.0
  batch = Batch(
    completion=GROUPS.completion, hinted=GROUPS.hinted, commit_step=GROUPS.commit_step,
    advantages=jnp.asarray(advantages, jnp.float32), region=GROUPS.region, length=GROUPS.length,
    views=out,
  )  # fmt: skip
  base = rng.uniform(-3, -0.1, shape)
  size = {"policy": 0.0, "old": 0.15, "ref": 0.3}
  logps = {
    name: jnp.asarray(base + size[name] * rng.normal(size=shape), jnp.float32) for name in estimates
  }
  # Of the hints some are dropped by the filter.
  kept = np.asarray(GROUPS.region) & scored.any(axis=1)
  kept &= ~np.asarray(GROUPS.hinted) | (rng.random(kept.shape) < 0.5)
  return batch, logps, jnp.asarray(kept)


def estimate(logp, of):
  logp = jnp.where(of.scored, logp, 0.0)
  return Estimate(logp, jnp.zeros_like(logp), of)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective, batch, logps, kept):
  """(loss, its gradient for the policy's log-probabilities, metrics) of a whole batch."""

  def of(logp):
    policy, old = estimate(logp, batch.views), estimate(logps["old"], batch.views)
    ref = estimate(logps["ref"], batch.views)
    needs = getattr(objective, "totals_need_old", False)
    totals = objective.totals(batch, *((old,) if needs else ()))
    out = objective.sums(
      policy, old if objective.needs_old else None, ref if objective.needs_reference else None,
      batch, totals, kept,
    )  # fmt: skip
    loss = out.numerator
    if out.denominator is not None:
      loss = loss / jax.lax.stop_gradient(out.denominator)
    return loss, objective.metrics(out.sums, out.most)

  (loss, metrics), gradient = jax.value_and_grad(of, has_aux=True)(logps["policy"])
  return loss, gradient, metrics


class Twin:
  """The losses in loops, in double precision."""

  def __init__(self, batch, logps, kept):
    get = lambda x: np.asarray(x, np.float64)
    self.logp, self.old, self.ref = (get(logps[k]) for k in ("policy", "old", "ref"))
    self.a, self.length = get(batch.advantages), np.asarray(batch.length)
    self.scored = np.asarray(batch.views.scored) & np.asarray(batch.region)[:, None]
    self.w, self.kept = get(batch.views.weights), np.asarray(kept)
    self.current = np.asarray(batch.views.aux["current"])
    self.draws = batch.views.draws
    self.rows = list(np.ndindex(P, G))

  def at(self, p, g, views=range(R)):
    """(view, position) of every term of a row that is kept."""
    return [(r, k) for r in views for k in range(LENGTH)
            if self.scored[p, r, g, k] and self.kept[p, g, k]]  # fmt: skip

  def bound(self, x, p, g, views=range(R)):
    return sum(self.w[p, r, g, k] * x[p, r, g, k] for r, k in self.at(p, g, views))

  def draw(self, x, p, g, d):
    per = R // self.draws
    return self.draws * self.bound(x, p, g, range(d * per, (d + 1) * per))

  @staticmethod
  def ppo(ratio, a, low, high, dual=None):
    loss = max(-ratio * a, -min(max(ratio, 1 - low), 1 + high) * a)
    return min(loss, -dual * a) if dual and a < 0 else loss

  def clipped(self, o, frozen):
    """The mean in the ratio of a sequence is over all that is scored, filtered hints included."""
    token = lambda x, p, g, k: sum(self.w[p, :, g, k] * x[p, :, g, k] * self.scored[p, :, g, k])
    total = 0.0
    for p, g in self.rows:
      inside = [k for k in range(LENGTH) if self.scored[p, :, g, k].any()]
      change = [token(frozen - self.old, p, g, k) for k in inside]
      for k in inside:
        if not self.kept[p, g, k]:
          continue
        ratio = math.exp(token(self.logp - self.old, p, g, k))
        if o.ratio == "sequence":
          ratio = math.exp(np.mean(change) + token(self.logp - frozen, p, g, k))
        d = token(self.ref - self.logp, p, g, k)
        kl = d * d / 2 if o.kl == "k2" else math.exp(d) - d - 1
        loss = self.ppo(ratio, self.a[p, g], o.eps_low, o.eps_high, o.dual_clip)
        total += (loss + o.beta * kl) / len(inside)
    return total / (P * G)

  def elbo_ratio(self, o):
    total = 0.0
    for p, g in self.rows:
      n = {"canvas": LENGTH, "length": self.length[p, g], "none": 1}[o.scale]
      ratio = math.exp(self.bound(self.logp - self.old, p, g) / n)
      loss = self.ppo(ratio, self.a[p, g], o.eps_low, o.eps_high)
      if o.row_weight == "length":
        loss /= self.length[p, g]
      total += loss + o.beta * 0.5 * self.bound(self.logp - self.ref, p, g) ** 2 / n
    return total / (P * G)

  def bgpo(self, o):
    total = 0.0
    for p, g in self.rows:
      for d in range(self.draws):
        change = self.draw(self.logp - self.old, p, g, d) / LENGTH
        ratio = 1 + change if self.a[p, g] > 0 else math.exp(change)
        loss = self.ppo(ratio, self.a[p, g], o.eps_low, o.eps_high, o.dual_clip)
        total += loss * self.length[p, g] / self.draws
    return total / self.length.sum()

  def gdsd(self, o):
    total = 0.0
    for p, g in self.rows:
      for d in range(self.draws):
        change = self.draw(self.logp - self.old, p, g, d)
        change = min(max(change, math.log(1 - o.eps)), math.log(1 + o.eps))
        total += (change / LENGTH - o.psi * self.a[p, g]) ** 2
        kl = 0.5 * self.draw(self.logp - self.ref, p, g, d) ** 2
        total += o.beta * kl / self.draws / LENGTH
    return total / (P * G)

  def wd1(self, o):
    total = 0.0
    for p, g in self.rows:
      rivals = self.a[p] if o.softmax == "group" else self.a.reshape(-1)
      plus = math.exp(self.a[p, g]) / np.exp(rivals).sum()
      minus = math.exp(-self.a[p, g]) / np.exp(-rivals).sum()
      total += (minus - plus) * self.bound(self.logp, p, g)
    return total / (P if o.softmax == "group" else 1)

  def lower(self, x, p, g):
    total = 0.0
    for r in range(R):
      n = self.scored[p, r, g].sum()
      total += sum(x[p, r, g, k] for _, k in self.at(p, g, [r])) / max(n, 1) / R
    return total

  def upper(self, p, g, beta):
    total, count = 0.0, self.scored[p, :, g].any(axis=0).sum()
    for k in range(LENGTH):
      terms = [
        math.exp(beta * self.logp[p, r, g, k]) * self.length[p, g] / self.scored[p, r, g].sum()
        for r in range(R) if self.scored[p, r, g, k] and self.kept[p, g, k]
      ]  # fmt: skip
      total += math.log(sum(terms) / R) if terms else 0.0
    return total / count / beta

  def likelihood(self, o, p, g):
    low, high = self.lower(self.logp, p, g), self.upper(p, g, o.upper_beta)
    if self.a[p, g] > 0:
      return low
    mix = o.mix * high + (1 - o.mix) * low
    return {"mix": mix, "upper": high, "lower": low, "zero": 0.0}[o.negative]

  def spg(self, o):
    terms = [-self.a[i] * self.likelihood(o, *i) * self.length[i] for i in self.rows]
    return sum(terms) / self.length.sum()

  def weight(self, o, p, g, frozen):
    return min(math.exp(self.lower(frozen, p, g) - self.lower(self.old, p, g)), o.largest)

  def stabledrl(self, o, frozen):
    weights = [self.weight(o, *i, frozen) for i in self.rows]
    terms = [-w * self.a[i] * self.likelihood(o, *i)
             for w, i in zip(weights, self.rows, strict=True)]  # fmt: skip
    return sum(terms) / sum(weights)

  def counts(self, o, p, r, g, k):
    sure = self.old[p, r, g, k] >= math.log(o.threshold) if o.threshold else True
    return self.scored[p, r, g, k] and (sure or self.current[p, r, g, k])

  def trace_ppo(self, o):
    terms, divisors = {}, {}
    counted = np.zeros(self.scored.shape, bool)
    for p, r, g, k in np.ndindex(P, R, G, LENGTH):
      counted[p, r, g, k] = self.counts(o, p, r, g, k)
    for p, r, g, k in zip(*np.nonzero(counted), strict=True):
      if not self.kept[p, g, k]:
        continue
      logp, old, a = self.logp[p, r, g, k], self.old[p, r, g, k], self.a[p, g]
      loss = -logp * a
      if o.ratio == "token":
        loss = self.ppo(math.exp(logp - old), a, o.eps_low, o.eps_high, o.dual_clip)
      d = (old if o.kl_to == "old" else self.ref[p, r, g, k]) - logp
      kl = o.beta * (d * d / 2 if o.kl == "k2" else math.exp(d) - d - 1)
      tokens, used = counted[p, r, g].sum(), counted.any(axis=-1)
      divisor = {
        "view": tokens * used.sum(),
        "row": tokens * used[p, :, g].sum() * P * G,
        "step": counted[:, r].sum() * R,
        "row_step": tokens * P * G * R,
        "draws": G * R,
        "valid_rows": LENGTH * ((self.a != 0).sum() + 1e-5),
      }[o.reduce]
      divisors[p, r, g, k] = divisor
      terms[p, r, g, k] = loss * self.w[p, r, g, k] / divisor
      terms[p, r, g, k] += kl / (divisor / tokens if o.kl_sum else divisor)
    return sum(terms.values())


OBJECTIVES = {
  "espo": ElboRatio(beta=0.05),
  "gdpo": ElboRatio(scale="none", row_weight="length", eps_low=0.5, eps_high=0.5, beta=0.0),
  "ebpo": ElboRatio(scale="length", eps_high=0.28, beta=0.02),
  "bgpo": BGPO(eps_low=0.05, eps_high=0.05),
  "gdsd": GDSD(eps=0.5, beta=0.1),
  "wd1": WD1(),
  "wd1 batch": WD1(softmax="batch"),
  "spg": SPG(),
  "spg upper": SPG(negative="upper", upper_beta=1.0),
  "spg zero": SPG(negative="zero"),
  "stabledrl": StableDRL(largest=1.05),
  "tracerl": TracePPO(kl_to="old", kl_sum=True, beta=0.3),
  "cj_grpo": TracePPO(reduce="step", dual_clip=1.1, beta=0.0, eps_high=0.05),
  "cj_grpo paper": TracePPO(reduce="row", beta=0.0),
  "rldf": TracePPO(reduce="step", threshold=0.3, kl="k2"),
  "rldf one update": TracePPO(reduce="row_step", ratio="none", threshold=0.3),
  "agrpo": TracePPO(reduce="draws", beta=0.0),
  "justgrpo": TracePPO(reduce="valid_rows", beta=0.0),
}


def twin_loss(objective, batch, logps, kept, frozen):
  twin = Twin(batch, logps, kept)
  extra = (frozen,) if objective.name in ("stabledrl", "clipped") else ()
  return getattr(twin, objective.name)(objective, *extra)


# What else is said of these is in objective_test.
CLIPPED = {
  "clipped": Clipped(beta=0.05),
  "clipped token": Clipped(
    ratio="token", beta=0.1, kl="k2", eps_low=0.05, eps_high=0.1, dual_clip=1.1
  ),
}


@pytest.mark.parametrize("name", [*OBJECTIVES, *CLIPPED])
def test_every_objective_is_its_twin(name):
  objective = (OBJECTIVES | CLIPPED)[name]
  batch, logps, kept = make_batch()
  loss, gradient, _ = loss_and_gradient(objective, batch, logps, kept)
  frozen = np.asarray(logps["policy"], np.float64)
  assert loss == pytest.approx(twin_loss(objective, batch, logps, kept, frozen), rel=2e-5, abs=2e-6)
  # Five entries of the gradient that is not 0, by central differences.
  gradient = np.asarray(gradient)
  used = np.argwhere(gradient != 0)
  assert len(used) > 20
  size = float(np.abs(gradient).max())
  for index in map(tuple, used[:: len(used) // 5]):
    sides = []
    for step in (1e-5, -1e-5):
      moved = np.array(logps["policy"], np.float64)
      moved[index] += step
      sides.append(twin_loss(objective, batch, logps | {"policy": moved}, kept, frozen))
    slope = (sides[0] - sides[1]) / 2e-5
    assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-4 * size), index


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_that_is_not_kept_has_exactly_no_gradient(name):
  batch, logps, kept = make_batch()
  loss, gradient, _ = loss_and_gradient(OBJECTIVES[name], batch, logps, kept)
  left_out = ~(np.asarray(kept)[:, None] & np.asarray(batch.views.scored))
  assert (np.asarray(gradient)[left_out] == 0).all()
  dropped = np.asarray(batch.hinted & batch.region & ~kept)
  assert (dropped[:, None] & np.asarray(batch.views.scored)).any()
  # What is not kept may be anything, in the policy at least.
  wild = logps | {"policy": jnp.where(left_out, -500.0, logps["policy"])}
  again, wilder, _ = loss_and_gradient(OBJECTIVES[name], batch, wild, kept)
  assert again == loss and (wilder == gradient).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_permuting_the_rows_of_a_group_permutes_the_gradient(name):
  batch, logps, kept = make_batch()
  order = np.array([2, 0, 3, 1])
  of_views = lambda x: x[:, :, order]
  of_rows = lambda x: x[:, order]
  permuted = jax.tree.map(of_rows, dataclasses.replace(batch, views=None))
  permuted = dataclasses.replace(permuted, views=jax.tree.map(of_views, batch.views))
  loss, gradient, _ = loss_and_gradient(OBJECTIVES[name], batch, logps, kept)
  other, turned, _ = loss_and_gradient(
    OBJECTIVES[name], permuted, jax.tree.map(of_views, logps), of_rows(kept)
  )
  assert other == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
  np.testing.assert_allclose(turned, of_views(gradient), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_to_the_whole_batch(name):
  objective = OBJECTIVES[name]
  batch, logps, kept = make_batch()

  @jax.jit
  def in_parts(logp):
    needs = getattr(objective, "totals_need_old", False)
    whole_old = estimate(logps["old"], batch.views)
    totals = objective.totals(batch, *((whole_old,) if needs else ()))
    top = bottom = 0.0
    sums = {}
    for p in range(P):
      part = jax.tree.map(lambda x, p=p: x[p : p + 1], (batch, logps, kept, logp))
      one, other, keep, policy = part
      of = lambda x, one=one: estimate(x, one.views)
      out = objective.sums(
        of(policy), of(other["old"]) if objective.needs_old else None,
        of(other["ref"]) if objective.needs_reference else None, one, totals, keep,
      )  # fmt: skip
      top += out.numerator
      bottom += 0.0 if out.denominator is None else out.denominator
      sums = {k: sums.get(k, 0.0) + v for k, v in out.sums.items()}
      has_denominator = out.denominator is not None
    return (top / jax.lax.stop_gradient(bottom) if has_denominator else top), sums

  loss, gradient, metrics = loss_and_gradient(objective, batch, logps, kept)
  (parts, sums), of_parts = jax.value_and_grad(in_parts, has_aux=True)(logps["policy"])
  assert parts == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
  np.testing.assert_allclose(of_parts, gradient, rtol=1e-5, atol=1e-7)
  again = objective.metrics(sums, {"weight": jnp.float32(0)})
  for key, value in metrics.items():
    if "largest" not in key:
      assert again[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.needs_old])
def test_on_policy_every_ratio_is_exactly_one(name):
  batch, logps, kept = make_batch()
  on = logps | {"old": logps["policy"]}
  _, gradient, metrics = loss_and_gradient(OBJECTIVES[name], batch, on, kept)
  if "ratio" in metrics:
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0
  assert np.isfinite(gradient).all() and (np.asarray(gradient) != 0).any()


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.drops_zero_advantage])
def test_a_group_without_advantage_adds_exactly_nothing_where_it_may_be_left_out(name):
  batch, logps, kept = make_batch(zero_group=True)
  _, gradient, _ = loss_and_gradient(OBJECTIVES[name], batch, logps, kept)
  assert (np.asarray(gradient)[1] == 0).all() and (np.asarray(gradient)[0] != 0).any()


def test_the_upper_bound_does_not_underflow():
  """p^1.5 is 0 in float32 below log p = -69; released code drops such positions silently."""
  batch, logps, kept = make_batch()
  low = logps | {"policy": logps["policy"] - 80.0}
  _, gradient, metrics = loss_and_gradient(SPG(negative="upper"), batch, low, kept)
  _, usual, before = loss_and_gradient(SPG(negative="upper"), batch, logps, kept)
  filtered = np.asarray(kept).sum() / (np.asarray(batch.region)).sum()
  assert filtered < 1 and metrics["upper_bound"] < before["upper_bound"] - 60
  np.testing.assert_allclose(gradient, usual, rtol=2e-3, atol=1e-5)


def test_a_large_change_of_bgpo_is_a_number():
  """1 + D as exp(log(1 + D)) would be NaN for D <= -1."""
  batch, logps, kept = make_batch()
  far = logps | {"policy": logps["policy"] - 40.0}
  loss, gradient, _ = loss_and_gradient(BGPO(), batch, far, kept)
  assert np.isfinite(loss) and np.isfinite(gradient).all() and loss > 0


def test_weights_of_stabledrl_are_clamped_and_reported():
  batch, logps, kept = make_batch()
  far = logps | {"old": logps["old"].at[0, :, 0].add(-30.0)}
  _, _, metrics = loss_and_gradient(StableDRL(largest=5.0), batch, far, kept)
  assert metrics["clip_fraction"] == pytest.approx(1 / (P * G))
  assert metrics["largest_weight"] == pytest.approx(5 / (5 + P * G - 1), abs=0.05)
  assert 1 / (P * G) < metrics["effective_share"] < 1


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: Elbo(counts="response"), "complement=False"),
    (lambda: Elbo(counts="gauss_legendre", draws=99, complement=False), "at most 64"),
    (lambda: CoupledGRPO(0.9, 0.2), "ratio_low=0.9"),
    (lambda: BlockRandom(min_ratio=0.9, max_ratio=0.1), "min_ratio=0.9"),
    (lambda: TracePPO(reduce="row", kl_sum=True), "reduce='view'"),
    (lambda: TracePPO(dual_clip=1.0), "dual_clip"),
  ],
)
def test_options_that_contradict_are_refused_in_one_line(make, said):
  with pytest.raises(UserError) as error:
    make()
  assert said in str(error.value) and "\n" not in str(error.value)


# --- whole updates --------------------------------------------------------------------

# Hints in a view of their own, and counts that hang on the old policy; masks in the prompt, and
# weights that are only known with the whole batch: through the programs of training.
PAIRS = {
  "trace_sampled": ("trace_ppo", {"score": "later"}, {"reduce": "step", "threshold": 0.1}),
  "block_random": ("stabledrl", {}, {}),
}


def programs_of(estimator, micro_batches):
  """The jitted programs of training for a pair, on a network of one layer."""
  objective, of_estimator, of_objective = PAIRS[estimator]
  config = tiny_config.get_config()
  config.rl.update({
    "prompts_per_step": update_test.P, "group_size": update_test.G, "inner_updates": 2,
    "micro_batches": micro_batches, "estimator": estimator, "objective": objective,
  })  # fmt: skip
  config.sampler.update({"gen_length": update_test.LENGTH, "block_length": 5, "steps": 10})
  getattr(config.estimator, estimator).update(of_estimator)
  getattr(config.objective, objective).update(of_objective)
  optimizer = optax.sgd(0.1)
  lm, params = tiny_model(update_test.VOCAB)
  return make_policy_programs(lm, optimizer, freeze(config)), optimizer, params


@pytest.mark.slow
@pytest.mark.parametrize("estimator", PAIRS)
def test_updates_do_not_depend_on_micro_batches_and_begin_with_ratios_of_one(estimator):
  rollout = update_test.make_rollout()
  step = np.random.default_rng(0).permuted(np.tile(np.arange(10), (*rollout.hinted.shape[:2], 1)),
                                           axis=2)  # fmt: skip
  rollout = dataclasses.replace(
    rollout, commit_step=jnp.where(rollout.hinted, -1, jnp.asarray(step, jnp.int32))
  )
  ends = []
  for micro_batches in (1, 2):
    programs, optimizer, params = programs_of(estimator, micro_batches)
    reference = jax.tree.map(lambda x: 0.9 * x, params)
    needs = PAIRS[estimator][0] == "trace_ppo"
    scores = programs.score(params, reference if needs else None, rollout, update_test.KEYS)
    state, history = update_test.fresh_state(optimizer, params), []
    for u in range(2):
      state, metrics = programs.update(state, {}, rollout, scores, update_test.KEYS, jnp.int32(u))
      history.append(jax.device_get(metrics))
    ends.append((state.params, history))
  (whole, expected), (parts, got) = ends
  assert update_test.relative_error(parts, whole, params) < 1e-5
  for one, other in zip(expected, got, strict=True):
    for name, value in one.items():
      assert other[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
  first, second = expected
  assert first["ratio"] == 1 and first["clip_fraction"] == 0 and first["own_ratio"] == 1
  assert first["hint_ratio"] == 1 and first["hint_logp"] < 0 and 0 < first["hints_kept"] < 1
  assert second["own_ratio"] != 1 and second["hint_ratio"] != 1
  assert first["grad_norm"] > 1e-3


@pytest.mark.slow
def test_updates_are_the_same_on_every_mesh():
  done = run_on_devices(8, "-m", "tests.methods_mesh_program")
  for one, other in json.loads(done.stdout.splitlines()[-1]).values():
    expected, found = np.array(one["gradient"]), np.array(other["gradient"])
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    for name, value in one["metrics"].items():
      assert other["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
