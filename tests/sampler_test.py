"""The denoising loop: against the official code, against a plain Python twin, by invariants."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion import network, sampler
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.diffusion.schedule import commit_table, commits_at, commits_until, forwards_needed
from igpo_jax.errors import UserError
from igpo_jax.types import Canvas
from tests.denoise_twin import twin_row
from tests.paths import others_slow
from tests.tiny_lm import EOS, GOLDENS, MASK, golden_model, table_lm, tiny_model

CASES = sorted((GOLDENS / "generate").glob("*.npz"))
ROWS, PROMPT, LENGTH, VOCAB = 4, 5, 12, 12
examples = functools.partial(hypothesis.settings, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


# --- the official code ----------------------------------------------------------------


def test_all_golden_cases_are_here():
  assert len(CASES) == 19


@pytest.mark.parametrize("path", others_slow(CASES, 3), ids=lambda p: p.stem)
def test_every_token_is_the_official_codes(path):
  case = np.load(path)
  model = golden_model(str(case["model"]))
  seed = int(case["noise_seed"])

  def noise(call, shape):
    return -np.log(-np.log(np.random.default_rng([seed, call]).random(shape)))

  cfg = SamplerConfig(
    gen_length=int(case["gen_length"]),
    block_length=int(case["block_length"]),
    steps=int(case["steps"]),
    temperature=float(case["temperature"]),
    cfg_scale=float(case["cfg_scale"]),
    early_stop="batch",
    allow_mask=path.stem.startswith("maskemitted"),
  )
  tokens, fixed = jnp.asarray(case["initial_x"]), jnp.asarray(case["fixed_mask"])
  out = denoise(
    model.lm,
    model.params,
    Canvas(tokens, fixed, jnp.ones(tokens.shape, bool)),
    jax.random.key(0),
    cfg,
    noise=noise if seed >= 0 else None,
  )
  np.testing.assert_array_equal(out.tokens, case["final_x"])

  # The official code counts calls, we count steps: the same thing only where no block
  # is skipped and all calls are made.
  filled = ~np.asarray(fixed) & (case["final_x"] != 511)
  np.testing.assert_array_equal(np.asarray(out.commit_step) >= 0, filled)
  all_called = int(case["num_calls"]) == int(out.forwards) == cfg.steps
  if all_called and "exit" not in path.stem:
    np.testing.assert_array_equal(out.commit_step, case["reveal_call"])
  # Never more forwards than the official loop makes, which calls the model for nothing.
  assert int(out.forwards) <= int(case["num_calls"])


def test_most_golden_cases_pin_the_commit_steps_too():
  makes_all = [np.load(p) for p in CASES if "exit" not in p.stem]
  assert sum(int(c["num_calls"]) == int(c["steps"]) for c in makes_all) >= 9


# --- the twin -------------------------------------------------------------------------


def random_canvas(rng, rows=ROWS, hint_share=None, prompt=PROMPT, length=LENGTH):
  """Rows with prompts of different lengths and with few or many hints, some end-of-text."""
  tokens = rng.integers(2, VOCAB, (rows, prompt + length))
  valid = np.arange(prompt + length) >= rng.integers(0, prompt, (rows, 1))
  share = rng.choice([0.0, 0.3, 0.8], (rows, 1)) if hint_share is None else hint_share
  hinted = rng.random((rows, length)) < share
  completion = np.where(rng.random(hinted.shape) < 0.3, EOS, tokens[:, prompt:])
  tokens[:, prompt:] = np.where(hinted, completion, MASK)
  fixed = np.concatenate([np.ones((rows, prompt), bool), hinted], axis=1)
  return Canvas(tokens.astype(np.int32), fixed, valid)


def run(cfg, canvas, seed=0, keys=None, model=None, slots=0):
  lm, params = model or tiny_model(VOCAB)
  if keys is None:
    keys = jax.random.split(jax.random.key(seed), len(canvas.tokens))
  out = denoise(lm, params, jax.tree.map(jnp.asarray, canvas), keys, cfg, slots=slots)
  return jax.tree.map(np.asarray, out)


def options(**kw):
  kw = {"gen_length": LENGTH, "block_length": 4, "steps": 6, "early_stop": "none"} | kw
  return SamplerConfig(**kw)


TWINS = {
  "plain": options(),
  "one_block": options(block_length=12, steps=5),
  "a_token_a_step": options(steps=12),
  "row_stop": options(early_stop="row"),
  "temperature": options(temperature=0.9, early_stop="row"),
  "random": options(remasking="random"),
  "random_temperature": options(remasking="random", temperature=1.3),
  "threshold": options(threshold=0.5, steps=12),
  "adaptive": options(threshold=0.5, adaptive=True, block_length=12),
  "adaptive_linear": options(
    threshold=0.6, adaptive=True, block_length=12, steps=7, schedule="rounded", temperature=0.8
  ),
  "guidance": options(cfg_scale=1.5),
  "suppress_eos": options(suppress_eos=True, steps=12),
  "allow_mask": options(allow_mask=True),
  "allow_mask_temperature": options(allow_mask=True, temperature=1.0, steps=12),
  "in_order": options(
    remasking="sequential", schedule="full_block", steps=9, early_stop="stop_token"
  ),
  "margin": options(
    remasking="topk_margin", schedule="linear", steps=12, temperature=0.9, top_p=0.7
  ),
  "entropy": options(remasking="entropy", schedule="rounded", steps=9, alg_temp=0.5),
  "maskgit_plus": options(remasking="maskgit_plus", temperature=1.1, alg_temp=0.3, top_p=0.8),
  "origin": options(remasking="origin", steps=12, temperature=0.7),
  "all": options(
    threshold=0.7, cfg_scale=0.5, temperature=0.7, early_stop="row", suppress_eos=True, steps=12
  ),
}


@pytest.mark.parametrize("name", others_slow(TWINS, 2))
def test_the_loop_equals_its_python_twin(name):
  cfg = TWINS[name]
  lm, params = tiny_model(VOCAB)
  logits = jax.jit(lambda tokens, valid: lm.logits(params, tokens[None], valid[None])[0])
  logits_of = lambda tokens, valid: np.array(logits(tokens, valid))
  for seed in range(3):
    canvas = random_canvas(np.random.default_rng([seed, 7]))
    keys = jax.random.split(jax.random.key(seed), ROWS)
    out = run(cfg, canvas, keys=keys)
    forwards = []
    for row in range(ROWS):
      tokens, steps, calls = twin_row(
        lm, logits_of, canvas.tokens[row], canvas.fixed[row], canvas.valid[row], keys[row], cfg
      )
      np.testing.assert_array_equal(out.tokens[row], tokens)
      np.testing.assert_array_equal(out.commit_step[row], steps)
      forwards.append(calls.sum())
    # No row waits for another: the slowest one decides, and each is worked at as often as alone.
    np.testing.assert_array_equal(out.calls, forwards)
    assert out.forwards == max(forwards)


@pytest.fixture(scope="module")
def programs_with_narrow_heads():
  """`_denoise` with programs of its own: those of the other tests stay."""
  function = sampler._denoise.__wrapped__
  return jax.jit(lambda *args: function(*args), static_argnums=(0, 4, 6))


@pytest.fixture
def narrow_heads(monkeypatch, programs_with_narrow_heads):
  """The head on few positions at this size, too, where it would not pay."""
  monkeypatch.setattr(network, "FEW_LOGITS", 0)
  monkeypatch.setattr(sampler, "_denoise", programs_with_narrow_heads)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["row_stop", "random_temperature", "threshold", "allow_mask_temperature", "all"]
)
def test_results_do_not_depend_on_how_many_positions_the_head_sees(name, narrow_heads):
  assert network.head_sizes(ROWS * 4, VOCAB) == [4 * ROWS, 3 * ROWS, 2 * ROWS, ROWS]
  test_the_loop_equals_its_python_twin(name)


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES[::3], ids=lambda p: p.stem)
def test_the_official_tokens_with_a_narrow_head(path, narrow_heads):
  test_every_token_is_the_official_codes(path)


@pytest.mark.slow
def test_the_twin_cases_reach_what_they_are_named_after():
  canvas = random_canvas(np.random.default_rng([0, 7]))
  plain = run(TWINS["plain"], canvas).tokens
  for name in ("temperature", "random", "guidance", "allow_mask"):
    assert (run(TWINS[name], canvas).tokens != plain).any(), name
  assert run(TWINS["threshold"], canvas).forwards < run(TWINS["a_token_a_step"], canvas).forwards
  by_share = dataclasses.replace(TWINS["adaptive"], adaptive=False)
  assert (run(TWINS["adaptive"], canvas).commit_step != run(by_share, canvas).commit_step).any()
  assert any(
    (run(TWINS["allow_mask"], random_canvas(np.random.default_rng([s, 7]))).tokens == MASK).any()
    for s in range(3)
  )


# --- invariants -----------------------------------------------------------------------


@examples(max_examples=25)
@hypothesis.given(
  st.integers(0, 10**6), st.sampled_from(["plain", "random_temperature", "all", "row_stop"])
)
def test_fixed_tokens_never_change_and_masks_are_committed_once(seed, name):
  cfg = TWINS[name]
  canvas = random_canvas(np.random.default_rng(seed))
  out = run(cfg, canvas, seed)
  np.testing.assert_array_equal(out.tokens[canvas.fixed], canvas.tokens[canvas.fixed])
  assert (out.tokens[~canvas.fixed] != MASK).all()
  assert (out.commit_step[canvas.fixed] == -1).all()
  steps = out.commit_step[~canvas.fixed]
  assert ((steps >= 0) & (steps < cfg.steps)).all()
  if cfg.threshold is None and cfg.early_stop == "none":
    # Each step commits exactly the row's share of what its block held.
    for row in range(ROWS):
      for block in range(cfg.num_blocks):
        inside = slice(PROMPT + block * 4, PROMPT + block * 4 + 4)
        had = (~canvas.fixed[row, inside]).sum()
        first = block * cfg.steps_per_block
        counts = [(out.commit_step[row, inside] == first + i).sum() for i in range(2)]
        assert counts == [had // 2 + (had % 2 > 0), had // 2]


@pytest.mark.slow
@examples(max_examples=60)
@hypothesis.given(
  st.sampled_from(["linear", "rounded", "full_block"]), st.integers(1, 40), st.integers(1, 40)
)
def test_a_tabulated_schedule_commits_every_mask_in_steps_that_each_commit_some(name, most, steps):
  table = commit_table(name, most, steps)
  np.testing.assert_array_equal(table.sum(axis=1), np.arange(most + 1))
  done = np.cumsum(table == 0, axis=1) > 0
  assert (table[done] == 0).all()


@pytest.mark.parametrize("name", ["linear", "rounded", "full_block"])
@pytest.mark.parametrize(("most", "steps"), [(1, 1), (3, 7), (40, 9)])
def test_what_a_tabulated_schedule_says_is_what_is_in_its_table(name, most, steps):
  table, masked = commit_table(name, most, steps), np.arange(most + 1)
  needed = forwards_needed(masked, steps, name, most)
  np.testing.assert_array_equal(needed, (table > 0).sum(axis=1))
  for i in (0, steps - 1):
    np.testing.assert_array_equal(commits_at(masked, steps, i, name, most), table[:, i])
  until = commits_until(masked, steps, steps - 1, name, most)
  np.testing.assert_array_equal(until, masked)


def test_dreams_schedule_by_hand():
  """Its time ends at 0.001: the first of 24 steps would commit 0.999 of a token, so none."""
  assert commit_table("linear", 24, 24)[24].tolist() == [1] * 22 + [2, 0]
  # 12 masks in 5 steps: 12 x 0.1998 = 2.4, 10 x 0.2497 = 2.5, 8 x 0.333 = 2.7, 6 x 0.499 = 2.99
  assert commit_table("linear", 12, 5)[12].tolist() == [2, 2, 2, 2, 4]
  # dllm rounds, halves to the even number: 5 x 1/4 = 1.25, 4 x 1/3 = 1.33, 3 x 1/2 = 1.5, 1
  assert commit_table("rounded", 5, 4)[5].tolist() == [1, 1, 2, 1]
  # SDAR: 4 positions in 3 steps are 2, 1, 1, of which 3 masks need the first two.
  assert commit_table("full_block", 4, 3)[3].tolist() == [2, 1, 0]


def test_a_fixed_mask_token_stays():
  canvas = random_canvas(np.random.default_rng(0), hint_share=0.5)
  tokens = np.where(canvas.fixed & (np.arange(PROMPT + LENGTH) >= PROMPT), MASK, canvas.tokens)
  out = run(options(), Canvas(tokens, canvas.fixed, canvas.valid))
  assert (out.tokens[canvas.fixed] == tokens[canvas.fixed]).all()
  assert (out.commit_step[canvas.fixed] == -1).all()


def test_a_canvas_without_masks_costs_nothing():
  canvas = random_canvas(np.random.default_rng(0), hint_share=1.0)
  out = run(options(), canvas)
  assert out.forwards == 0
  np.testing.assert_array_equal(out.tokens, canvas.tokens)


@examples(max_examples=200)
@hypothesis.given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 12))
def test_a_schedule_commits_every_mask_within_its_steps(masked, steps):
  masked = np.array(masked)
  counts = np.stack([commits_at(masked, steps, i) for i in range(steps)])
  assert (counts.sum(axis=0) == masked).all()
  until = np.stack([commits_until(masked, steps, i) for i in range(steps)])
  np.testing.assert_array_equal(until, np.cumsum(counts, axis=0))
  assert (np.diff(counts, axis=0) <= 0).all() and (counts.max(0) - counts.min(0) <= 1).all()
  np.testing.assert_array_equal(forwards_needed(masked, steps), (counts > 0).sum(axis=0))


@pytest.mark.parametrize("name", ["row_stop", "temperature", "random_temperature", "all"])
def test_results_do_not_depend_on_batch_composition(name):
  cfg = TWINS[name]
  canvas = random_canvas(np.random.default_rng(3))
  keys = jax.random.split(jax.random.key(3), ROWS)
  together = run(cfg, canvas, keys=keys)
  order = np.array([2, 0, 3, 2])  # one row twice, one row gone
  moved = run(cfg, jax.tree.map(lambda x: x[order], canvas), keys=keys[order])
  np.testing.assert_array_equal(moved.tokens, together.tokens[order])
  np.testing.assert_array_equal(moved.commit_step, together.commit_step[order])


@pytest.mark.parametrize("name", ["plain", "temperature"])
def test_results_do_not_depend_on_padding(name):
  cfg, more = TWINS[name], 6
  canvas = random_canvas(np.random.default_rng(4))
  pad = lambda x, value: np.pad(x, ((0, 0), (more, 0)), constant_values=value)
  wider = Canvas(pad(canvas.tokens, 7), pad(canvas.fixed, True), pad(canvas.valid, False))
  out, padded = run(cfg, canvas), run(cfg, wider)
  np.testing.assert_array_equal(padded.tokens[:, more + PROMPT :], out.tokens[:, PROMPT:])
  np.testing.assert_array_equal(padded.commit_step[:, more:], out.commit_step)


def test_one_key_gives_rows_of_their_own():
  cfg = TWINS["temperature"]
  canvas = jax.tree.map(
    lambda x: np.repeat(x[:1], ROWS, 0), random_canvas(np.random.default_rng(1))
  )
  canvas.fixed[:, PROMPT:] = False
  canvas.tokens[:, PROMPT:] = MASK
  for key in (jax.random.key(0), jax.random.PRNGKey(0)):
    out = run(cfg, canvas, keys=key)
    assert len({tuple(row) for row in out.tokens}) == ROWS


# --- options --------------------------------------------------------------------------

LOGITS = np.array([2.0, 5.0, 1.0, 0.0, -1.0, -2.0], np.float32)  # token 1 is the mask


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampling_matches_the_softmax_distribution(temperature):
  import scipy.special  # here, as every process that collects tests would wait a second for it
  import scipy.stats

  rows, length = 512, 8
  canvas = Canvas(
    np.full((rows, length), MASK, np.int32), np.zeros((rows, length), bool),
    np.ones((rows, length), bool),
  )  # fmt: skip
  # Random remasking: among the candidates of a step, confidence would prefer likely ones.
  cfg = SamplerConfig(length, 4, 4, temperature=temperature, remasking="random", early_stop="none")
  out = run(cfg, canvas, seed=11, model=(table_lm(), jnp.asarray(LOGITS)))
  seen = np.bincount(out.tokens.reshape(-1), minlength=6)
  assert seen[MASK] == 0
  kept = np.arange(6) != MASK

  def p_value(temperature):
    expected = scipy.special.softmax(LOGITS[kept].astype(np.float64) / temperature)
    return scipy.stats.chisquare(seen[kept], expected * rows * length).pvalue

  assert p_value(temperature) > 1e-3
  assert p_value(1.2 * temperature) < 1e-6


def test_the_confidence_is_that_of_the_plain_softmax():
  """Position 0 has the likelier token, position 1 the likelier token once the mask is out."""
  table = np.full((2, 6), -9.0, np.float32)
  table[0, 2] = np.log(0.5)
  table[0, 3:] = np.log(0.5 / 3)
  table[1, 2] = np.log(0.4)
  table[1, MASK] = np.log(0.6)
  canvas = Canvas(np.full((1, 2), MASK, np.int32), np.zeros((1, 2), bool), np.ones((1, 2), bool))
  model = (table_lm(), jnp.asarray(table))
  out = run(SamplerConfig(2, 2, 2, early_stop="none"), canvas, model=model)
  np.testing.assert_array_equal(out.commit_step, [[0, 1]])
  np.testing.assert_array_equal(out.tokens, [[2, 2]])
  allowed = run(SamplerConfig(2, 2, 2, early_stop="none", allow_mask=True), canvas, model=model)
  # The mask wins its slot and stays one, twice: what the official code does.
  np.testing.assert_array_equal(allowed.tokens, [[MASK, MASK]])
  np.testing.assert_array_equal(allowed.commit_step, [[-1, -1]])


def test_end_of_text_is_committed_last_when_suppressed():
  table = np.tile(np.array([0.0, -9, -9, -9, -9, -9], np.float32), (4, 1))
  table[2, 3] = 0.5  # the only position that wants something else, and the least sure
  canvas = Canvas(np.full((1, 4), MASK, np.int32), np.zeros((1, 4), bool), np.ones((1, 4), bool))
  model = (table_lm(), jnp.asarray(table))
  cfg = SamplerConfig(4, 4, 4, early_stop="none")
  assert run(cfg, canvas, model=model).commit_step[0, 2] == 3
  suppressed = SamplerConfig(4, 4, 4, early_stop="none", suppress_eos=True)
  assert run(suppressed, canvas, model=model).commit_step[0, 2] == 0


def twice_the_first(canvas):
  """A batch of nothing but the first row, in the shape of both."""
  return jax.tree.map(lambda x: x[[0, 0]], canvas)


@pytest.mark.slow
@pytest.mark.parametrize("early_stop", ["row", "batch", "none"])
def test_early_stop_is_decided_by_the_row_or_by_the_batch(early_stop):
  table = np.tile(np.array([0.0, -9, -9, -9, -9, -9], np.float32), (8, 1))
  table[4:] = [-9, -9, -9, 0, -9, -9]  # the second block would be token 3
  tokens = np.full((2, 8), MASK, np.int32)
  tokens[0, 6] = 5
  tokens[1, 1] = 5  # the second row's first block is not all end of text
  canvas = Canvas(tokens, tokens != MASK, np.ones((2, 8), bool))
  cfg = SamplerConfig(8, 4, 4, early_stop=early_stop)
  out = run(cfg, canvas, model=(table_lm(), jnp.asarray(table)))
  stopped = [0, 0, 0, 0, 0, 0, 5, 0] if early_stop == "row" else [0, 0, 0, 0, 3, 3, 5, 3]
  np.testing.assert_array_equal(out.tokens, [stopped, [0, 5, 0, 0, 3, 3, 3, 3]])
  if early_stop == "row":
    np.testing.assert_array_equal(out.commit_step[0], [0, 0, 1, 1, 1, 1, -1, 1])
  alone = run(cfg, twice_the_first(canvas), model=(table_lm(), jnp.asarray(table)))
  ends = early_stop != "none"
  np.testing.assert_array_equal(alone.tokens[0, 4:], [0, 0, 5, 0] if ends else [3, 3, 5, 3])
  assert alone.forwards == (2 if ends else 4)


def test_a_block_of_hints_that_are_end_of_text_does_not_stop_its_row():
  """It was not finished by the model, whether or not a neighbour takes steps there."""
  table = np.full((8, 6), -9, np.float32)
  table[:, 3] = 0
  tokens = np.full((2, 8), MASK, np.int32)
  tokens[0, :4] = EOS
  canvas = Canvas(tokens, tokens != MASK, np.ones((2, 8), bool))
  cfg = SamplerConfig(8, 4, 4)
  for rows in (canvas, twice_the_first(canvas)):
    out = run(cfg, rows, model=(table_lm(), jnp.asarray(table)))
    np.testing.assert_array_equal(out.tokens[0], [0, 0, 0, 0, 3, 3, 3, 3])


@pytest.mark.slow
def test_a_threshold_never_commits_less_than_the_schedule():
  canvas = random_canvas(np.random.default_rng(5))
  plain = run(options(steps=12), canvas)
  never = run(options(steps=12, threshold=1.0), canvas)
  np.testing.assert_array_equal(never.tokens, plain.tokens)
  np.testing.assert_array_equal(never.commit_step, plain.commit_step)
  always = run(options(steps=12, threshold=1e-6), canvas)
  assert always.forwards == 3  # one per block


@pytest.mark.parametrize(
  ("change", "complaint"),
  [
    ({"fixed": np.ones((ROWS, 3), bool)}, "must have one shape"),
    ({"tokens": np.zeros((ROWS, 3), np.int32)}, "must have one shape"),
    ({"keys": jax.random.split(jax.random.key(0), 3)}, "one for each of 4 rows"),
    ({"gen_length": 24}, "shorter than sampler.gen_length=24"),
  ],
)
def test_shapes_that_do_not_fit_are_told(change, complaint):
  canvas = random_canvas(np.random.default_rng(0))
  cfg = options(gen_length=change.pop("gen_length", LENGTH))
  keys = change.pop("keys", None)
  with pytest.raises(UserError, match=complaint):
    run(cfg, canvas.replace(**change), keys=keys)
