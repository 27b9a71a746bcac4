"""Every option: defaults as published, round trips, and mistakes that are told."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest

from igpo_jax.cli import UserError
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
from tests.fakes import REPO


def sourced():
  config = default_config()
  config.data.sft = config.data.rl = "synthetic:chains"
  return config


def test_the_defaults_are_the_papers():
  """docs/method.md#defaults; lambda, tau, eta and the chunks from the paper's table."""
  config = Config()
  assert (config.rl.group_size, config.rl.inner_updates) == (8, 4)
  assert (config.sampler.gen_length, config.sampler.block_length) == (256, 32)
  assert (config.sampler.steps, config.sampler.temperature) == (128, 1.2)
  assert (config.hints.ratio_low, config.hints.ratio_high) == (0.2, 0.6)
  assert (config.hints.chunk_min, config.hints.chunk_max) == (5, 10)
  assert config.hints.replace_fraction == 0.5 and config.hints.placement == "index"
  assert not config.hints.hide_answer_value
  assert config.objective == ObjectiveConfig("sequence", 0.2, 0.2, 0.01, 0.2, "row")
  assert config.rl_optimizer == OptimizerConfig(
    5e-7, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=0.2
  )
  assert (config.rl.exploration, config.rl.estimator) == ("inpaint", "mean_field")
  assert (config.rl.region, config.rl.advantage) == ("through_eos", "mean")


def test_freezing_the_defaults_gives_the_dataclasses_back():
  assert freeze(sourced()) == dataclasses.replace(
    Config(), data=DataConfig(sft="synthetic:chains", rl="synthetic:chains")
  )


def test_a_frozen_config_is_hashable_and_cannot_be_edited():
  config = freeze(sourced())
  assert hash(config) == hash(freeze(sourced()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 3


def test_edits_arrive_and_do_not_leak_into_the_next_default():
  config = sourced()
  config.rl.group_size = 4
  config.sampler.threshold = 0.9
  config.data.eval = ("a=synthetic:chains",)
  config.data.prompt_buckets = [16, 32]
  config.reward.parts = [["correct", 1.0], ["boxed", 0.1]]
  frozen = freeze(config)
  assert frozen.rl.group_size == 4 and frozen.sampler.threshold == 0.9
  assert frozen.data.prompt_buckets == (16, 32)
  assert frozen.reward.parts == (("correct", 1.0), ("boxed", 0.1))
  assert hash(frozen) != hash(freeze(sourced()))
  assert default_config().rl.group_size == 8


def test_a_wrong_type_is_refused_where_it_is_written():
  config = sourced()
  with pytest.raises(TypeError):
    config.rl.steps = "many"
  with pytest.raises(TypeError):
    config.sampler.threshold = "high"


def test_an_unknown_option_is_named():
  config = sourced()
  config.rl.group_sise = 4
  with pytest.raises(UserError, match=r"unknown option config\.rl\.group_sise"):
    freeze(config)


MISTAKES = [
  ("rl.group_size", 1, "a group of one has no advantage"),
  ("rl.group_size", 0, "a group of one has no advantage"),
  ("rl.prompts_per_step", 0, "rl.prompts_per_step must be at least 1"),
  ("rl.inner_updates", 0, "rl.inner_updates must be at least 1"),
  ("rl.micro_batches", 3, "rl.prompts_per_step=8 is not a multiple of rl.micro_batches=3"),
  ("rl.exploration", "hint", "'hint' is not one of inpaint, resample, none"),
  ("rl.estimator", "exact", "rl.estimator='exact' is not one of"),
  ("rl.region", "some", "rl.region"),
  ("rl.advantage", "median", "rl.advantage"),
  ("rl.entropy", "new", "rl.entropy"),
  ("sampler.block_length", 48, "sampler.gen_length=256 is not a multiple of"),
  ("sampler.block_length", 0, "sampler.block_length must be at least 1"),
  ("sampler.gen_length", 0, "sampler.gen_length must be at least 1"),
  ("sampler.steps", 100, "sampler.steps=100 is not a multiple of the 8 blocks"),
  ("sampler.steps", 0, "sampler.steps must be at least 1"),
  ("sampler.temperature", -1.0, "sampler.temperature"),
  ("sampler.cfg_scale", -0.5, "sampler.cfg_scale"),
  ("sampler.threshold", 1.5, "sampler.threshold must be in"),
  ("sampler.remasking", "entropy", "sampler.remasking='entropy' is not one of"),
  ("sampler.early_stop", "always", "sampler.early_stop"),
  ("sampler.cache", "suffix", "sampler.cache='suffix' is not one of none, prefix, dual"),
  ("hints.ratio_low", 0.7, "need 0 <= low <= high <= 1"),
  ("hints.ratio_high", 1.2, "need 0 <= low <= high <= 1"),
  ("hints.chunk_min", 0, "need 1 <= min <= max"),
  ("hints.chunk_max", 4, "need 1 <= min <= max"),
  ("hints.replace_fraction", 0.0, "hints.replace_fraction must be in"),
  ("hints.replace_fraction", 0.1, "of a group of 8 replaces nothing"),
  ("hints.placement", "middle", "hints.placement"),
  ("objective.ratio", "gspo", "objective.ratio='gspo' is not one of"),
  ("objective.normalize", "batch", "objective.normalize"),
  ("objective.entropy_keep", 1.5, "objective.entropy_keep must be in"),
  ("objective.beta", -0.1, "objective.beta must not be negative"),
  ("objective.eps_low", -0.1, "objective.eps_"),
  ("sft.batch_size", 0, "sft.batch_size must be at least 1"),
  ("sft.micro_batches", 3, "sft.batch_size=64 is not a multiple of sft.micro_batches=3"),
  ("sft.response_lengths", (40, 24), r"sft.response_lengths=\(40, 24\): give increasing"),
  ("sft.epochs", -1.0, "sft.epochs=-1.0 must not be negative"),
  ("sft.group_batches", 0, "sft.group_batches must be at least 1"),
  ("sft.hand_on", "first", "sft.hand_on='first' is not one of last, best"),
  ("sft.hand_on", "best", "sft.hand_on='best' goes by checkpoint.best_metric=''"),
  ("sft_optimizer.schedule", "step", "optimizer.schedule"),
  ("rl_optimizer.clip_norm", 0.0, "optimizer.clip_norm must be positive"),
  ("rl_optimizer.learning_rate", -1.0, "optimizer.learning_rate"),
  ("model.n_heads", 5, "model.d_model must be a multiple of model.n_heads"),
  ("model.d_model", 4, r"must be even \(RoPE\)"),
  ("model.n_kv_heads", 3, "model.n_heads must be a multiple of model.n_kv_heads"),
  ("data.prompt_buckets", (32, 16), "give increasing positive lengths"),
  ("data.prompt_buckets", (), "give increasing positive lengths"),
  ("data.eval", ("synthetic:chains",), "not of the form name=uri"),
  ("data.rl", "", "stages has 'rl' but data.rl names no source"),
  ("data.sft", "", "stages has 'sft' but data.sft names no source"),
  ("checkpoint.keep", 0, "checkpoint.keep must be at least 1"),
  ("stages", ("sft", "dpo"), "'dpo' is not one of sft, rl, eval"),
  ("stages", ("rl", "sft"), "each at most once, in order"),
  ("stages", ("sft", "sft"), "each at most once, in order"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), MISTAKES)
def test_a_value_that_cannot_be_is_told_with_its_name(path, value, complaint):
  config = sourced()
  with config.ignore_type():
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value
  with pytest.raises(UserError, match=complaint):
    freeze(config)


def test_what_replaces_nothing_matters_only_where_something_is_replaced():
  config = sourced()
  config.hints.replace_fraction = 0.1
  config.rl.exploration = "none"
  assert math.floor(0.1 * freeze(config).rl.group_size) == 0


def test_blocks_and_steps_are_counted_from_the_lengths():
  cfg = SamplerConfig(64, 16, 32)
  assert (cfg.num_blocks, cfg.steps_per_block) == (4, 8)
  with pytest.raises(UserError):
    SamplerConfig(60, 16, 32)


def test_dataclasses_check_themselves_too():
  for make in (
    lambda: RLConfig(group_size=1),
    lambda: HintConfig(ratio_low=0.9),
    lambda: ObjectiveConfig(ratio="other"),
  ):
    with pytest.raises(UserError, match=r"^config: "):
      make()


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_of_the_repository_freezes(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  for name in ("sft", "rl"):  # some take their data by flag
    config.data[name] = config.data[name] or "synthetic:chains"
  assert isinstance(freeze(config), Config)
