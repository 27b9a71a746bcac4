"""What every model family keeps, over the table of them: the next one is tested by being there."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from igpo_jax.config import (
  RUN_CHOOSES,
  LoRAConfig,
  ModelConfig,
  MoEConfig,
  SamplerConfig,
  SFTConfig,
  default_config,
  freeze,
  load_config_file,
)
from igpo_jax.convert.entries import entries
from igpo_jax.convert.families import hf_config, read_config
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.errors import UserError
from igpo_jax.models import FAMILIES, families, lora, make_lm, moe, network
from igpo_jax.models.family import Router
from igpo_jax.ops.load_balance import balance
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.parallel.sharding import is_axes
from igpo_jax.rl.estimate import estimate
from igpo_jax.rl.estimators.base import Group, Sizes
from igpo_jax.rl.estimators.mean_field import MeanField
from igpo_jax.train.ahead_of_time import programs
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.sft_update import make_sft_update
from igpo_jax.types import Canvas, Rollout, Routing, TrainState
from tests import families_mesh_program, golden_families
from tests.convert_helpers import assert_same_bits, convert, load
from tests.paths import REPO, for_long_runs, run_on_devices, shared_path

VOCAB, EOS, MASK = 24, 0, 1
ROWS, PROMPT, LENGTH, BLOCK = 4, 6, 8, 4
ROUTED = [name for name, family in FAMILIES.items() if "moe" in family.reads]
BLOCK_CAUSAL = [
  name
  for name, family in FAMILIES.items()
  if family.design(families.model_config(name, family.tiny)).block_length
]
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@functools.lru_cache
def tiny(name: str, **more):
  """(config, lm, params) of a family's tiny model, whose choices are far from even."""
  ids = {"vocab_size": VOCAB, "mask_id": MASK, "eos_id": EOS}
  config = families.model_config(name, FAMILIES[name].tiny, **ids, **more)
  lm = make_lm(config)
  shapes = jax.eval_shape(lm.init, jax.random.key(0))
  params = jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(drawn, shapes))
  return config, lm, params


@functools.lru_cache
def hidden_of(name: str):
  """A family's `hidden(tokens, valid)`, compiled: one program for many tests."""
  _, lm, params = tiny(name)
  return jax.jit(lambda tokens, valid: lm.hidden(params, tokens, valid)[0])


def logits_of(name: str, tokens):
  _, lm, params = tiny(name)
  return lm.head(params, hidden_of(name)(tokens, jnp.ones(tokens.shape, bool)))


def drawn(path, like):
  """A parameter with large weights; biases and adapters are not zero. No program is compiled."""
  name = path[-1].key
  if name == "scale":
    return np.ones(like.shape, like.dtype)
  sizes = {"bias": 0.3, "lora_b": 0.3, "embedding": like.shape[-1] ** -0.5}
  size = sizes[name] if name in sizes else 2 * like.shape[-2] ** -0.5
  rng = np.random.default_rng([ord(c) for key in path for c in key.key])
  return rng.normal(scale=size, size=like.shape).astype(like.dtype)


def rows_with_hints(seed=0, length=LENGTH, left=0):
  """A canvas with prompts of different lengths and hints in all places of the answer."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(2, VOCAB, (ROWS, PROMPT + length))
  valid = np.arange(PROMPT + length) >= np.array([[0], [1], [2], [4]])
  hinted = rng.random((ROWS, length)) < np.array([[0], [0.3], [0.3], [0.7]])
  tokens[:, PROMPT:] = np.where(hinted, tokens[:, PROMPT:], MASK)
  fixed = np.concatenate([np.ones((ROWS, PROMPT), bool), hinted], axis=1)
  pad = lambda x, value: np.pad(x, ((0, 0), (left, 0)), constant_values=value)
  return Canvas(pad(tokens, 7).astype(np.int32), pad(fixed, True), pad(valid, False))


def run(name, canvas, keys=None, **options):
  _, lm, params = tiny(name)
  keys = jax.random.split(jax.random.key(5), ROWS) if keys is None else keys
  cfg = SamplerConfig(
    **{"gen_length": LENGTH, "block_length": BLOCK, "steps": 4, "early_stop": "none"} | options
  )
  out = denoise(lm, params, jax.tree.map(jnp.asarray, canvas), keys, cfg)
  return jax.tree.map(np.asarray, out)


# --- the sampler ----------------------------------------------------------------------


@pytest.mark.slow
@every_family
def test_hints_stay_and_rows_are_their_own(name):
  canvas = rows_with_hints()
  keys = jax.random.split(jax.random.key(5), ROWS)
  out = run(name, canvas, keys, temperature=0.7)
  np.testing.assert_array_equal(out.tokens[canvas.fixed], canvas.tokens[canvas.fixed])
  assert (out.tokens[~canvas.fixed] != MASK).all() and out.finite.all()
  np.testing.assert_array_equal(out.commit_step >= 0, ~canvas.fixed)

  order = np.array([2, 0, 3, 2])  # one row twice, one row gone
  moved = run(name, jax.tree.map(lambda x: x[order], canvas), keys[order], temperature=0.7)
  np.testing.assert_array_equal(moved.tokens, out.tokens[order])
  np.testing.assert_array_equal(moved.commit_step, out.commit_step[order])

  garbage = np.where(canvas.valid, canvas.tokens, 9)
  unseen = run(name, canvas.replace(tokens=garbage), keys, temperature=0.7)
  np.testing.assert_array_equal(unseen.tokens[canvas.valid], out.tokens[canvas.valid])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llada", "dream", "llada2"])
def test_results_do_not_depend_on_padding(name):
  out, padded = (run(name, rows_with_hints(left=n), temperature=0.7) for n in (0, 3))
  np.testing.assert_array_equal(padded.tokens[:, 3 + PROMPT :], out.tokens[:, PROMPT:])
  np.testing.assert_array_equal(padded.commit_step[:, 3:], out.commit_step)


@pytest.mark.slow
@every_family
def test_a_window_reads_what_the_whole_canvas_gives(name):
  """With a cache of this very text; a window begins `left_context` earlier than what is read."""
  _, lm, params = tiny(name)
  canvas = jax.tree.map(jnp.asarray, rows_with_hints(1))
  everything = hidden_of(name)(canvas.tokens, canvas.valid)
  whole = jax.jit(lambda first: lm.hidden(params, canvas.tokens, canvas.valid, read=(first, 4),
                  cache=lm.init_cache(params, *canvas.tokens.shape)))  # fmt: skip
  width = 6 + lm.left_context

  @jax.jit
  def window(first, cache):
    begin = jnp.maximum(first - lm.left_context, 0)
    tokens = jax.lax.dynamic_slice_in_dim(canvas.tokens, begin, width, axis=1)
    read = (first - begin, 4)
    return lm.hidden(params, tokens, canvas.valid, start=begin, cache=cache, read=read)[0]

  seen = np.asarray(canvas.valid)
  for first in (0, 3, 7):
    h, cache = whole(first)
    expected = np.asarray(everything[:, first : first + 4])
    here = seen[:, first : first + 4].copy()
    if lm.shift:  # the first position that is not padding is predicted by padding
      here &= np.pad(seen, ((0, 0), (1, 0)), mode="edge")[:, first : first + 4]
    np.testing.assert_allclose(np.asarray(h)[here], expected[here], atol=5e-5)
    again = window(first, cache)
    np.testing.assert_allclose(np.asarray(again)[here], expected[here], atol=5e-5)


@pytest.mark.slow
@every_family
def test_a_renewed_cache_is_exact(name):
  """Renewed at every step, or of a block-causal model at all times."""
  canvas = rows_with_hints(2)
  _, lm, _ = tiny(name)
  exact = run(name, canvas, temperature=0.7)
  often = {} if lm.block_length else {"refresh_every": 1}
  cached = run(name, canvas, temperature=0.7, cache="dual", **often)
  np.testing.assert_array_equal(cached.tokens, exact.tokens)
  np.testing.assert_array_equal(cached.commit_step, exact.commit_step)
  assert (cached.refreshes < cached.forwards) == bool(lm.block_length)


def test_a_block_causal_model_says_what_it_has_no_place_for():
  for options, message in (
    ({"block_length": 8}, "has blocks of 4 positions"), ({"cache": "prefix"}, "block-causal"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      run("sdar", rows_with_hints(), **options)


# --- what the network is ----------------------------------------------------------------


@every_family
def test_a_shifted_model_reads_each_token_one_position_earlier(name):
  config, lm, params = tiny(name)
  design = families.check(config).design(config)
  assert (lm.shift, lm.block_length) == (design.shift, design.block_length)
  tokens = jnp.asarray(rows_with_hints(3).tokens)
  if not design.shift:
    return
  h = hidden_of(name)(tokens, jnp.ones(tokens.shape, bool))
  plain = network.make_network(config, dataclasses.replace(design, shift=0))
  own, _ = jax.jit(plain.hidden)(params, tokens, jnp.ones(tokens.shape, bool))
  np.testing.assert_allclose(h[:, 1:], own[:, :-1], atol=1e-6)
  np.testing.assert_allclose(h[:, 0], own[:, 0], atol=1e-6)


@every_family
def test_a_position_sees_what_the_model_says_it_sees(name):
  _, lm, _ = tiny(name)
  tokens = jnp.asarray(rows_with_hints(4).tokens)
  other = tokens.at[0, 9].set(tokens[0, 9] % 20 + 2)
  changed = jnp.abs(logits_of(name, tokens) - logits_of(name, other)).max(axis=-1)[0] > 1e-6
  first = 8 if lm.block_length else 0  # position 9 lies in the block from 8 on
  assert changed.tolist() == [k >= first for k in range(tokens.shape[1])]


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCK_CAUSAL)
def test_two_copies_show_every_block_what_decoding_shows_it(name):
  _, lm, params = tiny(name)
  canvas = rows_with_hints(5)
  clean = np.where(canvas.tokens == MASK, 9, canvas.tokens)
  args = [jnp.asarray(x) for x in (canvas.tokens, clean, canvas.valid)]
  noisy_h = np.asarray(jax.jit(lm.hidden_of_two)(params, *args))
  begins = np.argmax(canvas.valid, axis=1)
  position = np.arange(clean.shape[1])
  for block in range(4):  # each row's own blocks; what comes after one is not seen
    first = (begins + block * BLOCK)[:, None]
    inside = (position >= first) & (position < first + BLOCK)
    shown = np.where(position < first, clean, canvas.tokens)
    h = hidden_of(name)(jnp.asarray(shown), jnp.asarray(canvas.valid))
    np.testing.assert_allclose(noisy_h[inside], np.asarray(h)[inside], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCK_CAUSAL)
def test_an_estimate_of_a_block_causal_model_reads_what_decoding_shows_it(name):
  """mean_field too: each block all masks, after the completion's own clean blocks."""
  _, lm, params = tiny(name)
  canvas = rows_with_hints(5)
  tokens = np.where(canvas.tokens == MASK, 9, canvas.tokens)
  prompt = np.repeat(tokens[::2, :PROMPT], 2, axis=0)  # two prompts, each with two completions
  valid = np.repeat(canvas.valid[::2], 2, axis=0)
  clean = np.concatenate([prompt, tokens[:, PROMPT:]], axis=1)
  of_group = lambda x, dtype=bool: jnp.asarray(x, dtype).reshape(2, 2, LENGTH)
  nothing, length = np.zeros((ROWS, LENGTH)), jnp.full((2, 2), LENGTH)
  groups = Group(
    jnp.asarray(prompt[::2]), jnp.asarray(valid[::2, :PROMPT]),
    of_group(clean[:, PROMPT:], jnp.int32), of_group(nothing), of_group(nothing, jnp.int32),
    of_group(nothing + 1), length,
  )  # fmt: skip
  sizes = Sizes(2, LENGTH, 4, BLOCK, 1, MASK, EOS, (EOS,))
  keys = jax.random.split(jax.random.key(0), 2)
  found = jax.jit(lambda p: estimate(lm, p, MeanField(), groups, keys, 0, sizes))(params)
  logp = np.asarray(found.logp).reshape(ROWS, LENGTH)
  position, begins = np.arange(clean.shape[1]), np.argmax(valid, axis=1)
  for block in range(4):
    first = (begins + block * BLOCK)[:, None]
    inside = (position >= first) & (position < first + BLOCK) & (position >= PROMPT)
    shown = np.where((position < first) | (position < PROMPT), clean, MASK)
    h = hidden_of(name)(jnp.asarray(shown), jnp.asarray(valid))
    each = jax.nn.log_softmax(lm.head(params, h))
    expected = np.take_along_axis(np.asarray(each), clean[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logp[inside[:, PROMPT:]], expected[inside], atol=1e-4)


def test_options_that_a_family_has_not_are_refused():
  for options, message in (
    ({"family": "gpt"}, "model.family='gpt' is not one of llada"),
    ({"moe": MoEConfig(4, 2, 8)}, "model.moe: the model family 'llada' has no such option"),
    ({"shift_logits": True, "router_loss": 0.1}, "model.shift_logits, model.router_loss"),
    ({"family": "llada_moe"}, "needs model.moe.experts"),
  ):
    with pytest.raises(UserError, match=message):
      make_lm(ModelConfig(vocab_size=8, **options))


@every_family
def test_every_option_that_changes_the_numbers_is_refused_in_one_message(name):
  """What is not implemented, at once: each option of `required`, lists of layers, unknown ones."""
  family = FAMILIES[name]
  written = hf_config(families.model_config(name, family.tiny, vocab_size=24, mask_id=1, eos_id=0))
  assert read_config(written, "config.json").family == name
  wrong = {
    "layer_types": ["full_attention", "sliding_attention"], "moe_layer_freq": [1, 0],
    "use_mrope": True, "use_sliding_window": True, "is_causal": True, "logit_scale": 2.0,
    "final_logit_softcapping": 30.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "quantization_config": {"bits": 4}, "pruned_heads": {"0": [1]}, "add_cross_attention": True,
    "mlp_only_layers": [1], "decoder_sparse_step": 2, "no_rope_layers": [1], "qk_norm": "layer",
    **{f"brand_new_{n}": n for n in range(9)},
  }  # fmt: skip
  wrong = {option: "something else" for option in family.required} | wrong
  with pytest.raises(UserError) as error:
    read_config(written | wrong, "config.json")
  told = str(error.value)
  assert not [option for option in wrong if option not in told] and "\n" not in told, told


@every_family
@pytest.mark.parametrize("option, right, wrong", [
  ("layer_types", ["full_attention"] * 2, (["sliding_attention"] * 2, "full_attention", [1, None])),
  ("moe_layer_freq", [1, 1], ([1, 0], [1], 2, "1")),
])  # fmt: skip
def test_what_each_layer_is_has_to_be_what_is_implemented(name, option, right, wrong):
  family = FAMILIES[name]
  written = hf_config(families.model_config(name, family.tiny, vocab_size=24, mask_id=1, eos_id=0))
  if option in family.inert:
    same = read_config(written | {option: right}, "config.json")
    assert same == read_config(written, "config.json") == read_config(written | {option: None}, "")
  for value in wrong:
    with pytest.raises(UserError, match=option):
      read_config(written | {option: value}, "config.json")


@pytest.mark.slow
def test_only_a_familys_own_folder_knows_its_name():
  """Everything else reads facts from `LM` and `Family`. The table alone imports the folders."""
  folders = {family.design.__module__ for family in FAMILIES.values()}
  names = {*FAMILIES, *(kind for family in FAMILIES.values() for kind in family.model_types)}
  for path in sorted((REPO / "igpo_jax").rglob("*.py")):
    module = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    if module in folders:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare | ast.match_case | ast.Dict | ast.Subscript):
        told = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & names
        assert not told, f"{path}:{getattr(node, 'lineno', '')}: {told}"
      if isinstance(node, ast.ImportFrom) and module != families.__name__:
        assert not folders & {node.module, *(f"{node.module}.{n.name}" for n in node.names)}, path


# --- experts ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [*((n, "float32") for n in ROUTED),
                                         ("llada_moe", "bfloat16")])  # fmt: skip
def test_grouped_products_equal_every_expert_on_every_token(name, dtype):
  """Of one layer with adapters: its output, and gradients of its input, weights and adapters."""
  cfg = LoRAConfig(rank=2, alpha=4.0, targets=".*blocks/.*")
  config, _, params = tiny(name, dtype=dtype, lora=cfg)
  design = FAMILIES[name].design(config)
  experts = params["blocks"]["experts"]
  assert experts["ff_out"]["lora_a"].shape[:2] == (network.stack_sizes(config)["blocks"], 8)
  adapters, base = lora.split(jax.tree.map(lambda x: np.asarray(x)[0], experts))
  rng = np.random.default_rng(1)
  noise = lambda size: rng.normal(size=(ROWS, PROMPT + LENGTH, size)).astype(np.float32)
  h, weigh = noise(config.d_model).astype(dtype), noise(config.d_model)
  choice = jax.jit(lambda logits: moe.route(logits, design.router, config.moe, None))(noise(8))

  def with_gradients(products):
    layer = moe.Experts(dataclasses.replace(config, expert_products=products))

    def loss(adapters, h, weights):
      chosen = choice._replace(weights=weights)
      out = layer.apply({"params": lora.combine(base, adapters)}, h, chosen)
      return jnp.sum(out * weigh), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.leaves(both(adapters, h, choice.weights))

  limit = 1e-4 if dtype == "float32" else 0.02
  for one, two in zip(with_gradients("ragged"), with_gradients("dense"), strict=True):
    one, two = (np.asarray(x, np.float32) for x in (one, two))
    assert np.abs(two).max() > 0
    assert np.abs(one - two).max() <= limit * np.abs(two).max()


def test_a_router_by_hand():
  logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2, 0.0001]]))
  sizes = MoEConfig(experts=4, experts_per_token=2, expert_hidden=1)
  plain = moe.route(logits, Router(), sizes, None)
  assert plain.experts.tolist() == [[0, 1]]
  np.testing.assert_allclose(plain.weights, [[0.5, 0.3]], rtol=1e-3)
  shared = moe.route(logits, Router(renormalise=True), dataclasses.replace(sizes, scale=2.5), None)
  np.testing.assert_allclose(shared.weights, [[2.5 * 0.625, 2.5 * 0.375]], rtol=1e-3)
  # A bias chooses and does not count; of two groups the one whose experts are better together.
  bias = jnp.asarray([0.0, 0.0, 0.0, 1.0])
  pushed = moe.route(logits, Router(bias=True), sizes, bias)
  assert pushed.experts.tolist() == [[3, 0]]
  np.testing.assert_allclose(pushed.weights, [[0.0001, 0.5]], rtol=1e-2)
  grouped = dataclasses.replace(sizes, groups=2, groups_kept=1)
  assert moe.route(logits, Router(), grouped, jnp.asarray([0, 0, 0.4, 0.4])).experts.tolist() == [
    [2, 3]
  ]


@pytest.mark.slow
def test_the_load_balancing_loss_by_hand():
  even = Routing(jnp.full((1, 1, 4, 2), 0.5), jnp.asarray([0, 1, 0, 1]).reshape(1, 1, 4, 1))
  assert float(balance(even, None)[0]) == pytest.approx(1.0)
  one = Routing(jnp.asarray([[1.0, 0.0]] * 4)[None, None], jnp.zeros((1, 1, 4, 1), int))
  loss, load = balance(one, None)
  assert float(loss) == pytest.approx(2.0) and load.tolist() == [[1.0, 0.0]]
  # Padding does not count.
  probabilities = one.probabilities.at[0, 0, 3].set(jnp.asarray([0.0, 1.0]))
  half = Routing(probabilities, one.experts.at[0, 0, 3].set(1))
  assert float(balance(half, jnp.asarray([[True, True, True, False]])).loss) == 2.0
  told = balance(half, None).metrics()  # three of four positions, none without an expert
  assert (told["router_busiest"], told["router_idle"]) == (1.5, 0.0)
  assert balance(one, None).metrics()["router_idle"] == 0.5
  _, lm, params = tiny("llada_moe")
  canvas = rows_with_hints(7)
  args = jnp.asarray(canvas.tokens), jnp.asarray(canvas.valid)
  h, routing = jax.jit(lm.routed)(params, *args)
  np.testing.assert_allclose(h, hidden_of("llada_moe")(*args), atol=1e-6)
  assert routing.experts.shape == (2, *canvas.tokens.shape, 2)


@pytest.mark.slow
def test_fine_tuning_logs_how_evenly_experts_work():
  told = {"router_loss", "router_busiest", "router_idle"}
  for name in ("llada_moe", "llada"):
    _, lm, params = tiny(name)
    optimizer, zero = optax.sgd(0.1), jnp.int32(0)
    state = TrainState(zero, params, optimizer.init(params), zero, zero)
    update = make_sft_update(lm, optimizer, SFTConfig(batch_size=ROWS, micro_batches=2))
    canvas = rows_with_hints()
    response = jnp.ones((ROWS, LENGTH), bool)
    args = (jnp.asarray(canvas.tokens), jnp.asarray(canvas.valid), response, jax.random.key(0))
    _, metrics = jax.eval_shape(update, state, {}, *args)
    assert told & metrics.keys() == (told if lm.routed else set())


@pytest.mark.slow
def test_rl_logs_how_evenly_experts_work_and_has_the_routers_loss():
  """The mean over micro-batches and views, whichever way the loss is divided."""
  routers = ["router_busiest", "router_idle", "router_loss"]
  rng = np.random.default_rng(0)
  prompt, seen = rows_with_hints().tokens[:, :PROMPT], rows_with_hints().valid[:, :PROMPT]
  completion = jnp.asarray(rng.integers(2, VOCAB, (ROWS, 2, LENGTH)), jnp.int32)
  nothing = jnp.zeros(completion.shape, bool)
  still = jnp.zeros((ROWS, 2))  # advantages: without the routers' loss there would be no gradient
  rollout = Rollout(
    jnp.asarray(prompt), jnp.asarray(seen), completion, nothing, completion * 0, still
  )
  config = default_config()
  config.update_from_flattened_dict({
    "data.sft": "a", "data.rl": "b", "sampler.gen_length": LENGTH, "sampler.block_length": BLOCK,
    "sampler.steps": LENGTH, "rl.prompts_per_step": ROWS, "rl.group_size": 2,
    "rl.micro_batches": 2, "rl.inner_updates": 1, "rl.loss_region": "all", "objective.beta": 0.0,
  })  # fmt: skip
  plain = freeze(config)
  config.rl.objective, config.rl.estimator = "stabledrl", "random_ratio"
  divided_later = freeze(config)
  keys = jax.random.split(jax.random.key(0), ROWS)
  for name, chosen in (("llada_moe", plain), ("llada_moe", divided_later), ("llada", plain)):
    _, lm, params = tiny(name, **({} if name == "llada" else {"router_loss": 0.5}))
    optimizer, zero = optax.sgd(0.0), jnp.int32(0)
    programs = make_policy_programs(lm, optimizer, chosen)
    scores = jax.eval_shape(programs.score, params, params, rollout, keys)
    scores = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), scores)
    state = TrainState(zero, params, optimizer.init(params), zero, zero)
    args = ({}, rollout, scores, keys, zero)
    if chosen is plain:
      _, metrics = jax.eval_shape(programs.update, state, *args)
      assert sorted(k for k in metrics if "router" in k) == (routers if lm.routed else [])
    if lm.routed is None:
      continue
    loss, sums, gradient = programs.gradient(params, *args)
    assert float(loss) == pytest.approx(0.5 * float(sums.added["routers"]["router_loss"]), rel=1e-5)
    assert np.abs(gradient["blocks"]["router"]["scores"]).max() > 1e-3
    if chosen is not plain:
      continue

    @jax.jit
    def expected(params, lm=lm):
      masks = jnp.full((ROWS, LENGTH), MASK)
      tokens, valid = (
        jnp.concatenate([prompt, masks], axis=1),
        jnp.pad(seen, ((0, 0), (0, LENGTH)), constant_values=True),
      )
      parts = [slice(k, None, 2) for k in range(2)]
      return sum(0.25 * balance(lm.routed(params, tokens[i], valid[i])[1], valid[i]).loss
                 for i in parts)  # fmt: skip

    theirs, direct = jax.value_and_grad(expected)(params)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(close, gradient, direct)


# --- weights --------------------------------------------------------------------------------


def write_directory(directory, config, params):
  """A Hugging Face directory of a model that was made here."""
  directory.mkdir()
  tensors = {}
  for entry in entries(config):
    value = params
    for key in entry.path:
      value = value[key]
    parts = np.asarray(value).reshape(-1, *entry.slice_shape)
    for key, part in zip(entry.keys, parts, strict=True):
      tensors[key] = np.ascontiguousarray(part.T if entry.transposed else part)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(hf_config(config)))
  return directory


@pytest.mark.slow
@every_family
def test_round_trips_keep_every_bit(name, tmp_path):
  config, lm, params = tiny(name)
  hf = write_directory(tmp_path / "hf", config, params)
  orbax = convert(hf, tmp_path / "orbax")
  back = convert(orbax, tmp_path / "back", "--max_shard_size=20KB")
  assert_same_bits(load(back), load(hf))
  assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()
  pre = load_pretrained(back, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, pre.params, params)
  assert dataclasses.replace(pre.config, stop_ids=()) == dataclasses.replace(
    config, n_kv_heads=config.kv_heads, head_dim=pre.config.head_dim
  )
  assert pre.config.head_size == config.head_size and pre.lm.shift == lm.shift


@pytest.mark.slow
@every_family
def test_adapters_go_to_peft_and_back(name, tmp_path):
  cfg = LoRAConfig(rank=2, alpha=4.0, targets="blocks/.*")
  config, _, params = tiny(name, lora=cfg)
  plain = dataclasses.replace(config, lora=LoRAConfig())
  adapters, base = lora.split(params)
  hf = write_directory(tmp_path / "hf", plain, base)
  directory = tmp_path / "peft"
  directory.mkdir()
  from igpo_jax.convert import peft

  tensors = {}
  for entry in entries(config):
    if entry.path[-1].startswith("lora_"):
      value = adapters
      for key in entry.path:
        value = value[key]
      for key, part in zip(
        entry.keys, np.asarray(value).reshape(-1, *entry.slice_shape), strict=True
      ):
        tensors[key] = np.ascontiguousarray(part.T)
  safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
  peft.write_config(directory, config, str(hf))
  pre = load_pretrained(hf, dtype="float32", adapter=directory)
  jax.tree.map(np.testing.assert_array_equal, lora.split(pre.params)[0], adapters)
  back = convert(hf, tmp_path / "back", "--to=peft", f"--adapter={directory}")
  assert_same_bits(load(back), load(directory))
  # Merged, every kernel has the product of its adapters, and nothing else has changed.
  merged = convert(hf, tmp_path / "merged", "--merge_lora", f"--adapter={directory}")
  found = load_pretrained(merged, dtype="float32").params
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found,
               merged_by_hand(jax.tree.map(np.asarray, params)))  # fmt: skip


def merged_by_hand(tree):
  """Adapters of alpha / rank = 2, added to the kernels beside them."""
  if "lora_a" in tree:
    return {"kernel": tree["kernel"] + 2 * tree["lora_a"] @ tree["lora_b"],
            **{k: v for k, v in tree.items() if k == "bias"}}  # fmt: skip
  return {k: merged_by_hand(v) if isinstance(v, dict) else v for k, v in tree.items()}


@every_family
def test_every_published_model_has_a_config_that_can_be_written_and_read(name):
  for fields in FAMILIES[name].published.values():
    config = families.model_config(name, fields)
    again = read_config(hf_config(config), "config.json")
    assert dataclasses.replace(again, stop_ids=(), n_kv_heads=0, head_dim=0) == dataclasses.replace(
      config, n_kv_heads=0, head_dim=0
    )
    assert (again.kv_heads, again.head_size) == (config.kv_heads, config.head_size)


# --- meshes and machines ----------------------------------------------------------------------


@pytest.mark.slow
def test_results_do_not_depend_on_the_mesh():
  done = run_on_devices(8, "-m", "tests.families_mesh_program")
  for name, meshes in json.loads(done.stdout.splitlines()[-1]).items():
    one = meshes.pop("1x1x1x1")
    for mesh, found in meshes.items():
      told = {"err_msg": f"{name} {mesh}"}
      np.testing.assert_allclose(found["loss"], one["loss"], rtol=1e-5, **told)
      np.testing.assert_allclose(found["gradient"], one["gradient"], rtol=1e-5, atol=1e-5, **told)
      assert found.get("tokens") == one.get("tokens"), f"{name} {mesh}"
      if "experts" in found:  # each device has its own experts, and its own part of them
        _, fsdp, expert, tensor = map(int, mesh.split("x"))
        assert found["experts"] == 8 // expert
        assert found["share"] == 1 / (fsdp * expert * tensor)


@pytest.mark.slow
def test_every_parameter_of_every_family_is_compared_on_a_mesh():
  """A family with one that none of these has needs a place in families_mesh_program.RUNS."""

  def axes_of(config):
    axes = make_lm(config).logical_axes()
    paths = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
    return {("/".join(key.key for key in path), names) for path, names in paths}

  tiny_of = families_mesh_program.tiny
  runs = families_mesh_program.RUNS.items()
  compared = set.union(*(axes_of(tiny_of(name, **more)) for name, (more, _) in runs))
  for name in FAMILIES:
    assert axes_of(tiny_of(name)) <= compared, name


@pytest.mark.slow
@pytest.mark.parametrize("name, platform", [("dream", "cuda"), ("llada_moe", "cuda"),
                                            ("llada2", "tpu")])  # fmt: skip
def test_programs_can_be_lowered_for_accelerators(name, platform):
  config = default_config()
  config.update_from_flattened_dict({
    "data.sft": "a", "data.rl": "b", "data.prompt_buckets": (8,), "model.vocab_size": 24,
    "model.mask_id": 1, "model.family": name, "model.dtype": "bfloat16",
    "model.attention": "auto", "sampler.gen_length": 8, "sampler.block_length": 4,
    "sampler.steps": 8, "rl.prompts_per_step": 4, "rl.group_size": 2, "sft.batch_size": 4,
    **{f"model.{key}": value for key, value in FAMILIES[name].tiny.items()},
  })  # fmt: skip
  config, mesh = freeze(config), make_mesh(1, 1, 1, devices=jax.devices()[:1])
  for program in programs(config, mesh).values():
    assert program.flops > 0 and program.lower(platform).as_text()


@pytest.mark.parametrize("name, published", [("dream_7b", "Dream-7B"),
                                             ("a2d_gsm8k", "A2D-Qwen3-0.6B"),
                                             ("llada_moe", "LLaDA-MoE-7B-A1B")])  # fmt: skip
def test_the_presets_are_the_published_models(name, published):
  config = load_config_file(REPO / "configs" / f"{name}.py")
  config.data.rl = "jsonl:train.jsonl"
  model = freeze(config).model
  expected = families.model_config(model.family, FAMILIES[model.family].published[published])
  run = {field: getattr(model, field) for field in (*RUN_CHOOSES, "stop_ids")}
  assert dataclasses.replace(expected, mlp_hidden=model.mlp_hidden, **run) == model
  families.check(model)


# --- learning ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_learns_from_its_own_samples_and_hints(tmp_path):
  """IGPO raises what fine-tuning reached, of two families (docs/results.md has the others)."""
  # Four prompts a step: their hinted groups need three programs to be sampled, those of 16 five.
  command = (
    "-m benchmarks.families --short --families=dream,a2d_qwen3 --sft_steps=700 --rl_steps=14 "
    "--prompts=4 --group_size=16"
  ).split()
  done = subprocess.run(
    [sys.executable, *command, f"--workdir={tmp_path}"], cwd=REPO, capture_output=True, text=True,
    env=for_long_runs(), check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads(done.stdout[done.stdout.index("\n{") :])
  for name, row in results.items():
    errors = math.hypot(*(row[stage]["standard_error"] for stage in ("sft", "rl")))
    rise = row["rl"]["accuracy"] - row["sft"]["accuracy"]
    assert rise > 2 * errors > 0 and row["rose"], (name, row)
    # How far it gets is not asked: 0.64 and 0.85 here, but seeds (and so processors that round
    # otherwise) differ much (docs/results.md).
    assert row["all_wrong_after"] < row["all_wrong_before"], (name, row)


# --- reference implementations ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["dream", "llada_moe", "sdar", "llada2"])
@pytest.mark.slow
def test_the_reference_implementations_agree(name):
  results = list(golden_families.results_of(shared_path("golden", name), brief=True))
  assert len(results) > 20
  assert not [str(result) for result in results if not result.passed]
