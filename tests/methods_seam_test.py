"""The interface of estimators and objectives: a method is one file, and no other code names it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpo_jax.config import Config, Count, ModelConfig, freeze, load_config_file, registry
from igpo_jax.errors import UserError
from igpo_jax.flags import config_flag, parse
from igpo_jax.models import make_lm
from igpo_jax.rl.estimate import estimate, groups_of, sizes_of, views_of
from igpo_jax.rl.estimators import Estimator, Forwards, Views, register_estimator
from igpo_jax.rl.methods import estimator_of, forwards_of, rows_per_prompt, views_kept
from igpo_jax.rl.objectives import LossSums, Objective, register_objective
from igpo_jax.train.policy_update import make_policy_programs
from tests.paths import REPO
from tests.tiny_lm import EOS, MASK, tiny_model
from tests.update_test import KEYS, VOCAB, make_rollout

# That of `tiny_model`.
TINY = ModelConfig(
  d_model=16, n_layers=1, n_heads=2, mlp_hidden=32, vocab_size=VOCAB, mask_id=MASK, eos_id=EOS
)
OWN = REPO / "examples" / "own_estimator.py"
PACKAGE = REPO / "igpo_jax"


# --- one file a method --------------------------------------------------------------------


def help_of(capsys, *words):
  with pytest.raises(SystemExit):
    parse(config_flag(), ["x", f"--config={OWN}", *words], "usage")
  return capsys.readouterr().out


def test_the_options_of_a_registered_method_are_listed_checked_and_settable(capsys):
  text = help_of(capsys, "--help")
  assert "estimator.halves.parts = 7    (a whole number, at least 1; default 2)" in text
  assert "How many stretches; divides the completion's length." in text
  shown = json.loads(
    help_of(capsys, "--print_config", "--config.objective.weighted_nll.floor=0.25")
  )
  assert shown["objective"]["weighted_nll"]["floor"] == 0.25
  config = load_config_file(OWN)
  config.objective.weighted_nll.floor = 1.5
  with pytest.raises(UserError, match=r"objective\.weighted_nll\.floor=1\.5 must be in \[0, 1\]"):
    freeze(config)
  config = load_config_file(OWN)
  config.estimator.halves.part = 3
  with pytest.raises(UserError, match=r"no option estimator\.halves\.part; did you mean parts"):
    freeze(config)


def test_an_unknown_method_is_told_with_those_there_are():
  config = load_config_file(OWN)
  config.rl.estimator = "halfs"
  with pytest.raises(UserError, match=r"rl\.estimator='halfs' is not one of .*mean_field.*halves"):
    freeze(config)
  config = load_config_file(OWN)
  config.rl.objective = "clip"
  with pytest.raises(UserError, match=r"rl\.objective='clip' is not one of .*clipped.*"):
    freeze(config)


def test_what_cannot_be_a_method_is_refused_when_it_is_registered():
  @dataclasses.dataclass
  class Thawed(Estimator):
    pass

  @dataclasses.dataclass(frozen=True)
  class Bare(Estimator):
    size: int

  @dataclasses.dataclass(frozen=True)
  class Odd(Estimator):
    size: dict = dataclasses.field(default_factory=dict)

  @dataclasses.dataclass(frozen=True)
  class Kind(Estimator):
    size: object = None

  @dataclasses.dataclass(frozen=True)
  class Late(Estimator):
    pass

  for cls, complaint in (
    (Thawed, "frozen=True"), (Bare, "size needs a default"), (Odd, "size needs a default"),
    (Kind, "an option is an int"),
  ):  # fmt: skip
    with pytest.raises(TypeError, match=complaint):
      register_estimator("refused")(cls)
  with pytest.raises(ValueError, match="already registered"):
    register_estimator("mean_field")(
      dataclasses.dataclass(frozen=True)(type("M", (Estimator,), {}))
    )
  with pytest.raises(ValueError, match="letters, digits"):
    register_objective("my-loss")
  assert "refused" not in registry.classes("estimator")


def test_nobody_compares_names_of_methods_or_weights_of_the_kl_outside_the_methods_files():
  """A method declares what it needs; everything else asks."""
  names = {name for kind in registry.FOLDERS for name in registry.classes(kind)}
  compared = []
  for path in sorted(PACKAGE.rglob("*.py")):
    if path.parent.name in ("estimators", "objectives"):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Compare):
        continue
      sides = [node.left, *node.comparators]
      text = [side.value for side in sides if isinstance(side, ast.Constant)]
      read = [side.attr for side in sides if isinstance(side, ast.Attribute)]
      if names & {t for t in text if isinstance(t, str)} or "beta" in read:
        compared.append(f"{path.relative_to(REPO)}:{node.lineno}")
  assert len(names) >= 4 and not compared
  assert registry.OWNERS == {"objective": "clipped"}  # the one name the config knows


# --- what is declared is what happens -----------------------------------------------------


def of(**rl):
  config = Config()
  sizes = {"group_size": 3, "prompts_per_step": 4, "inner_updates": 2}
  sampler = dataclasses.replace(config.sampler, gen_length=10, block_length=5, steps=10)
  rl = dataclasses.replace(config.rl, **{**sizes, **rl})
  return dataclasses.replace(config, rl=rl, sampler=sampler)


ESTIMATORS = sorted(name for name in registry.classes("estimator"))


@pytest.fixture(scope="module")
def rollout():
  made = make_rollout()
  steps = np.random.default_rng(1).integers(0, 10, made.completion.shape)
  return dataclasses.replace(
    made, commit_step=jnp.where(made.hinted, -1, jnp.asarray(steps, jnp.int32))
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_makes_the_views_that_it_declares(name, rollout):
  lm, _ = tiny_model(VOCAB)
  config = of(estimator=name)
  estimator, sizes = estimator_of(config), sizes_of(config, lm)
  groups = groups_of(rollout, lm.stop_ids, "through_eos")
  draw = jax.jit(lambda keys, u: views_of(estimator, groups, keys, u, sizes))
  views, later = draw(KEYS, 0), draw(KEYS, 1)
  declared = estimator.forwards(sizes)
  assert views.masked.shape == (4, declared.views, 3, 10)
  shared = np.asarray(views.masked)[:, : declared.shared]
  # One input for a group: it may show no token of a completion.
  assert shared.all()
  assert declared.views % views.draws == 0
  # One prompt's masks follow from its own key, whatever else is in the batch.
  alone = jax.tree.map(lambda x: x[2:3], groups)
  one = jax.jit(lambda: views_of(estimator, alone, KEYS[2:3], 0, sizes))()
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2:3], y), views, one)
  same = all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(views), jax.tree.leaves(later), strict=True)
  )
  assert same == (not estimator.redrawn)


def test_rows_and_forwards_are_counted_from_the_declaration():
  counted = {
    name: (forwards_of(of(estimator=name)), rows_per_prompt(of(estimator=name)),
           views_kept(of(estimator=name)))
    for name in ("mean_field", "random_ratio", "coupled")
  }  # fmt: skip
  assert counted == {
    "mean_field": (Forwards(1, 0), 1, 1),
    "random_ratio": (Forwards(0, 1), 3, 1),
    "coupled": (Forwards(0, 2), 3, 2),
  }
  assert Forwards(1, 2).per_completion(4) == 2.25 and Forwards(1, 2).views == 3


@pytest.fixture(scope="module")
def read_six_views(rollout):
  """`read(at_once)`: ((a sum of squares, the estimate), its gradient) of an estimate of 6 views."""
  lm, params = tiny_model(VOCAB)
  sizes = sizes_of(of(), lm)._replace(length=10)
  groups = groups_of(rollout, lm.stop_ids, "through_eos")
  estimator = Stretches(6)

  @functools.cache
  def read(at_once):
    def total(params):
      out = estimate(lm, params, estimator, groups, KEYS, 0, sizes, at_once)
      return jnp.sum(out.tokens**2), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

  return read


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_views_that_are_read_a_few_at_a_time_give_the_same_numbers_and_gradient(
  count, read_six_views
):
  """6 views: 2 at a time and 4 at a time (which 6 is no multiple of) against all at once."""
  (_, expected), gradient = read_six_views(6)
  (_, out), other = read_six_views(count)
  np.testing.assert_allclose(out.logp, expected.logp, atol=1e-5)
  np.testing.assert_allclose(out.entropy, expected.entropy, atol=1e-5)
  close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()) + 1e-7)
  jax.tree.map(close, other, gradient)


@dataclasses.dataclass(frozen=True)
class Stretches(Estimator):
  """As in examples/own_estimator.py, unregistered; the first of its views is shared by a group."""

  parts: Count = 2
  redrawn = False

  def forwards(self, sizes):
    return Forwards(shared=0, own=self.parts)

  def views(self, group, key, sizes):
    stretch = jnp.arange(sizes.length) * self.parts // sizes.length
    masked = (stretch == jnp.arange(self.parts)[:, None])[:, None]
    masked = jnp.broadcast_to(masked, (self.parts, *group.completion.shape))
    return Views(masked=masked, scored=masked, weights=jnp.full(masked.shape, 0.5))


@register_objective("self_normalized")
@dataclasses.dataclass(frozen=True)
class SelfNormalized(Objective):
  """-sum_i w_i A_i l_i with w a softmax over the whole batch: known only after the forward pass."""

  def totals(self, batch):
    return {}

  def sums(self, policy, old, ref, batch, totals, kept):
    row = lambda x: jnp.mean(jnp.where(kept, x, 0.0), axis=-1)
    weight = jax.lax.stop_gradient(jnp.exp(row(policy.tokens - old.tokens)))
    return LossSums(
      -jnp.sum(weight * batch.advantages * row(policy.tokens)), jnp.sum(weight),
      # Names that the metrics of every method have, too.
      {"entropy": jnp.sum(weight), "denominator": jnp.float32(7)}, {"ratio": jnp.max(weight)},
    )  # fmt: skip

  def metrics(self, sums, most):
    return {"weight": sums["entropy"], "largest": most["ratio"]}


def second_update(rollout, micro_batches):
  """Metrics and gradient of the second inner update, which is off policy."""
  registry._OWN["objective", "self_normalized"] = SelfNormalized
  lm, params = tiny_model(VOCAB)
  config = of(objective="self_normalized", estimator="random_ratio", micro_batches=micro_batches)
  programs = make_policy_programs(lm, optax.sgd(0.1), config)
  scores = programs.score(params, None, rollout, KEYS)
  now = jax.tree.map(lambda x: 1.05 * x, params)
  loss, sums, gradient = programs.gradient(now, {}, rollout, scores, KEYS, jnp.int32(1))
  return float(loss), jax.device_get(sums), gradient


@pytest.mark.slow
def test_a_denominator_that_is_known_only_afterwards_is_that_of_the_whole_batch(rollout):
  loss, sums, gradient = second_update(rollout, 1)
  parts, others, gradients = second_update(rollout, 2)
  assert parts == pytest.approx(loss, rel=1e-5) and abs(loss) > 1e-4
  own, other = sums.added["objective"], others.added["objective"]
  assert other["entropy"] == pytest.approx(own["entropy"], rel=1e-5)
  assert sums.added["denominator"] == pytest.approx(own["entropy"], rel=1e-5)
  largest = lambda sums: sums.most["objective"]["ratio"]
  assert largest(others) == pytest.approx(largest(sums), rel=1e-5)
  close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()) + 1e-8)
  jax.tree.map(close, gradients, gradient)


# bfloat16 shows what float32 hides: two programs that round one number in different places. One
# estimator of each kind is read in float32, too: a shared view, views of its own, the trajectory.
QUICK = [("mean_field", "float32"), ("mean_field", "bfloat16"), ("coupled", "bfloat16")]
FIRST = QUICK + [
  pytest.param(name, dtype, marks=pytest.mark.slow)
  for name, dtype in [(name, "bfloat16") for name in ESTIMATORS]
  + [("elbo", "float32"), ("trace_sampled", "float32")]
  if (name, dtype) not in QUICK
]


@pytest.mark.parametrize(("name", "dtype"), FIRST)
def test_at_the_first_inner_update_every_ratio_is_exactly_one(name, dtype, rollout):
  lm, params = tiny_model(VOCAB)
  config = of(estimator=name, micro_batches=2)
  if dtype == "bfloat16":
    model = dataclasses.replace(TINY, dtype=dtype)
    lm, config = make_lm(model), dataclasses.replace(config, model=model)
  programs = make_policy_programs(lm, optax.sgd(0.0), config)
  if dtype == "float32":
    scores = programs.score(params, params, rollout, KEYS)
  else:  # here it is exact whatever was scored (`rounds_alike`): these scores are far off
    read_only = jax.tree.map(lambda x: x.astype(dtype), params)
    scores = jax.eval_shape(programs.score, read_only, read_only, rollout, KEYS)
    scores = jax.tree.map(lambda x: np.full(x.shape, -3, x.dtype), scores)
  _, sums, _ = programs.gradient(params, {}, rollout, scores, KEYS, jnp.int32(0))
  for kind in ("own", "hint"):
    policy = sums.added["policy"]
    assert policy[f"{kind}_ratio"] == policy[f"{kind}_reads"] > 0, kind
