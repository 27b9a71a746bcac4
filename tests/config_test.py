"""Every option: defaults as published, round trips, and mistakes that are told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import typing

import pytest

from igpo_jax import flags
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
  from_json,
  load_config_file,
  renamed,
)
from igpo_jax.config.fields import Range, descriptions
from igpo_jax.errors import UserError
from tests.paths import REPO


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
  clipped = {f.name: getattr(config.objective, f.name) for f in dataclasses.fields(ObjectiveConfig)}
  assert ObjectiveConfig(**clipped) == ObjectiveConfig("sequence", 0.2, 0.2, 0.01, 0.2, "row")
  assert config.rl_optimizer == OptimizerConfig(
    5e-7, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=0.2
  )
  assert (config.rl.exploration, config.rl.estimator) == ("inpaint", "mean_field")
  assert (config.rl.loss_region, config.rl.advantage) == ("through_eos", "mean")


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
  config.reward.weights = [["correct", 1.0], ["boxed", 0.1]]
  frozen = freeze(config)
  assert frozen.rl.group_size == 4 and frozen.sampler.threshold == 0.9
  assert frozen.data.prompt_buckets == (16, 32)
  assert frozen.reward.weights == (("correct", 1.0), ("boxed", 0.1))
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
  with pytest.raises(UserError, match=r"no option rl\.group_sise; did you mean group_size"):
    freeze(config)


@pytest.mark.parametrize(("old", "now"), renamed.RENAMED.items())
def test_an_old_name_is_told_with_the_new_one(old, now, tmp_path):
  """In a config file that sets it, in one that reads it, and on the command line."""
  known = [path for path, _ in options()]
  assert any(path == now or path.startswith(f"{now}.") for path in known), f"no option {now}"
  assert not any(path == old or path.startswith(f"{old}.") for path in known)

  config = sourced()
  section, _, name = old.rpartition(".")
  (config[section] if section else config)[name] = 1
  with pytest.raises(UserError) as told:
    freeze(config)
  assert str(told.value) == f"config: {old} is {now} now: use the new name"

  file = tmp_path / "mine.py"
  for reading in (f"config.{old}", f"config['{old}']"):
    file.write_text(
      "from igpo_jax.config import default_config\n\ndef get_config():\n"
      f"  config = default_config()\n  print({reading})\n  return config\n"
    )
    with pytest.raises(UserError) as told:
      load_config_file(file)
    assert str(told.value).startswith(f"{file}, line 5: there is no option {name}: it is ")
    assert now in str(told.value)

  line = ["program", f"--config={REPO / 'configs' / 'quickstart.py'}", f"--config.{old}=1"]
  with pytest.raises(UserError) as told:
    flags.parse(flags.config_flag(), line, "")
  assert str(told.value) == f"command line: --config.{old} is --config.{now} now: use the new name"


@pytest.mark.parametrize("gone", renamed.REMOVED)
def test_an_option_that_was_removed_is_told_with_what_to_do(gone, tmp_path):
  """In a config file, on the command line; a run that had it goes on without it."""
  section, _, name = gone.rpartition(".")
  told_of = re.escape(f"there is no option {gone} any more: {renamed.REMOVED[gone]}")
  config = sourced()
  config[section][name] = 1
  with pytest.raises(UserError, match=f"^config: {told_of}$"):
    freeze(config)
  file = tmp_path / "mine.py"
  file.write_text(
    "from igpo_jax.config import default_config\n\ndef get_config():\n"
    f"  config = default_config()\n  print(config.{gone})\n  return config\n"
  )
  with pytest.raises(UserError, match=f"line 5: {told_of}$"):
    load_config_file(file)
  line = ["program", f"--config={REPO / 'configs' / 'quickstart.py'}", f"--config.{gone}=1"]
  with pytest.raises(UserError, match=f"^command line: --config.{gone}: {told_of}$"):
    flags.parse(flags.config_flag(), line, "")
  assert renamed.upgraded({section: {name: 1, "x": 2}}) == {section: {"x": 2}}


def test_old_names_in_a_runs_config_are_read_as_the_new_ones(monkeypatch):
  monkeypatch.setattr(renamed, "RENAMED", {"rl.a": "objective.b", "model.old": "model.new.part"})
  before = {"seed": 3, "rl": {"a": 1, "steps": 2}, "model": {"old": {"x": [4]}}}
  after = {
    "seed": 3, "rl": {"steps": 2}, "objective": {"b": 1}, "model": {"new": {"part": {"x": [4]}}}
  }  # fmt: skip
  assert renamed.upgraded(before) == after == renamed.upgraded(after)
  assert before["rl"] == {"a": 1, "steps": 2}, "what was given has changed"
  assert renamed.upgraded({"rl": {"a": 1}, "objective": {"b": 2}}) == {
    "rl": {}, "objective": {"b": 2}
  }, "what has the new name counts"  # fmt: skip
  for odd in ({"rl": 3}, {"rl": {"a": 1}, "objective": 7}, {"model": None}):
    assert renamed.upgraded(odd).keys() == odd.keys()  # told by whoever checks the sections
  assert renamed.new_name("model.old.x") == "model.new.part.x"
  assert renamed.new_name("model.older") == renamed.new_name("rl") == ""


MISTAKES = [
  ("rl.group_size", 1, "a group of one has no advantage"),
  ("rl.group_size", 0, "a group of one has no advantage"),
  ("rl.prompts_per_step", 0, "rl.prompts_per_step=0 must be at least 1"),
  ("rl.inner_updates", 0, "rl.inner_updates=0 must be at least 1"),
  ("rl.micro_batches", 3, "rl.prompts_per_step=8 is not a multiple of rl.micro_batches=3"),
  ("rl.exploration", "hint", "'hint' is not one of inpaint, resample, none"),
  ("rl.estimator", "exact", "rl.estimator='exact' is not one of"),
  ("rl.loss_region", "some", "rl.loss_region"),
  ("rl.advantage", "median", "rl.advantage"),
  ("objective.filter_entropy", "new", "objective.filter_entropy"),
  ("sampler.block_length", 48, "sampler.gen_length=256 is not a multiple of"),
  ("sampler.block_length", 0, "sampler.block_length=0 must be at least 1"),
  ("sampler.gen_length", 0, "sampler.gen_length=0 must be at least 1"),
  ("sampler.steps", 100, "sampler.steps=100 is not a multiple of the 8 blocks"),
  ("sampler.steps", 0, "sampler.steps=0 must be at least 1"),
  ("sampler.temperature", -1.0, "sampler.temperature"),
  ("sampler.cfg_scale", -0.5, "sampler.cfg_scale"),
  ("sampler.threshold", 1.5, "sampler.threshold=1.5 must be in"),
  ("sampler.remasking", "margin", "sampler.remasking='margin' is not one of"),
  ("sampler.early_stop", "always", "sampler.early_stop"),
  ("sampler.cache", "suffix", "sampler.cache='suffix' is not one of none, prefix, dual"),
  ("hints.ratio_low", 0.7, "hints.ratio_low=0.7 is above hints.ratio_high=0.6"),
  ("hints.ratio_high", 1.2, r"hints.ratio_high=1.2 must be in \[0, 1\]"),
  ("hints.chunk_min", 0, "hints.chunk_min=0 must be at least 1"),
  ("hints.chunk_max", 4, "hints.chunk_min=5 is above hints.chunk_max=4"),
  ("hints.replace_fraction", 0.0, r"hints.replace_fraction=0.0 must be in \(0, 1\]"),
  ("hints.replace_fraction", 0.1, "of rl.group_size=8 completions replaces none"),
  ("hints.placement", "middle", "hints.placement"),
  ("objective.ratio", "gspo", "objective.ratio='gspo' is not one of"),
  ("objective.normalize", "batch", "objective.normalize"),
  ("objective.entropy_keep", 1.5, "objective.entropy_keep=1.5 must be in"),
  ("objective.beta", -0.1, "objective.beta=-0.1 must be at least 0"),
  ("objective.eps_low", -0.1, "objective.eps_low=-0.1 must be"),
  ("sft.batch_size", 0, "sft.batch_size=0 must be at least 1"),
  ("sft.micro_batches", 3, "sft.batch_size=64 is not a multiple of sft.micro_batches=3"),
  ("sft.response_lengths", (40, 24), r"sft.response_lengths=\(40, 24\): give increasing"),
  ("sft.epochs", -1.0, "sft.epochs=-1.0 must be at least 0"),
  ("sft.group_batches", 0, "sft.group_batches=0 must be at least 1"),
  ("sft.select", "first", "sft.select='first' is not one of last, best"),
  ("sft.select", "best", r"sft.select='best' needs checkpoint.best_metric, .* \(it is ''\)"),
  ("sft_optimizer.schedule", "step", "sft_optimizer.schedule='step' is not one of"),
  ("rl_optimizer.clip_norm", 0.0, "rl_optimizer.clip_norm=0.0 must be above 0"),
  ("rl_optimizer.learning_rate", -1.0, "rl_optimizer.learning_rate=-1.0"),
  ("model.n_heads", 5, "model.d_model=96 is not a multiple of model.n_heads=5"),
  ("model.d_model", 4, r"must be even \(RoPE\)"),
  ("model.n_kv_heads", 3, "model.n_heads=4 is not a multiple of model.n_kv_heads=3"),
  ("data.prompt_buckets", (32, 16), "give increasing lengths"),
  ("data.prompt_buckets", (), "give increasing lengths"),
  ("data.eval", ("synthetic:chains",), "'synthetic:chains' has no name: write NAME=SOURCE"),
  ("data.rl", "", "stages has 'rl' but data.rl names no source"),
  ("data.sft", "", "stages has 'sft' but data.sft names no source"),
  ("checkpoint.keep", 0, "checkpoint.keep=0 must be at least 1"),
  ("stages", ("sft", "dpo"), "'dpo' is not one of sft, rl, eval"),
  ("stages", ("rl", "sft"), "each stage at most once, in the order sft, rl, eval"),
  ("stages", ("sft", "sft"), "each stage at most once, in the order sft, rl, eval"),
  # of another kind
  ("rl.steps", "many", "rl.steps='many' should be a whole number"),
  ("rl.steps", 2.5, "rl.steps=2.5 should be a whole number"),
  ("rl.steps", True, "rl.steps=True should be a whole number"),
  ("rl.steps", None, "rl.steps=None should be a whole number"),
  ("sampler.temperature", "hot", "sampler.temperature='hot' should be a number"),
  ("sampler.allow_mask", 1, "sampler.allow_mask=1 should be True or False"),
  ("data.rl", 7, "data.rl=7 should be text"),
  ("data.eval", "a=b", "data.eval='a=b' should be a tuple"),
  ("data.prompt_buckets", (16, 32.5), "data.prompt_buckets: 32.5 should be a whole number"),
  ("reward.weights", (("correct",),), r"reward.weights: \('correct',\) should be a tuple of 2"),
  ("model.lora", 3, "model.lora=3 should be a section of options"),
  # larger than any program counts
  ("rl.steps", 2**31, "rl.steps=2147483648 must be at most 2147483647"),
  ("data.prompt_buckets", (16, 2**31), "data.prompt_buckets: 2147483648 must be at most"),
  pytest.param(
    "reward.weights", (("correct", 10**400),), "reward.weights: 10+ should be a number", id="weight"
  ),
]


@pytest.mark.parametrize(("path", "value", "complaint"), MISTAKES)
def test_a_value_that_cannot_be_is_told_with_its_name(path, value, complaint):
  config = sourced()
  with config.ignore_type():
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value
  with pytest.raises(UserError, match=complaint):
    freeze(config)


def test_a_number_written_without_a_point_is_a_float_where_one_is_declared():
  """jax takes no whole number past int32."""
  config = sourced()
  with config.ignore_type():
    config.model.rope_theta = 10**12
  assert type(freeze(config).model.rope_theta) is float


def test_a_number_past_every_float_in_a_runs_config_is_told():
  options = json.loads(json.dumps(dataclasses.asdict(freeze(sourced()))))
  options["rl_optimizer"]["learning_rate"] = 10**400
  with pytest.raises(UserError, match=r"^config\.json: .*rl_optimizer\.learning_rate=10+ "):
    from_json(options, "config.json")


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


def options(cls=Config, path=""):
  """(path of the option, its type with what it declares) of every option of the program."""
  for name, hint in typing.get_type_hints(cls, include_extras=True).items():
    if dataclasses.is_dataclass(hint):
      yield from options(hint, f"{path}{name}.")
    else:
      yield f"{path}{name}", hint


def numbers_of(hint, declared=None):
  """(int or float, its Range or None) for each number inside a type."""
  if typing.get_origin(hint) is typing.Annotated:
    hint, *extras = typing.get_args(hint)
    declared = next((extra for extra in extras if isinstance(extra, Range)), None)
  if hint in (int, float):
    yield hint, declared
  elif typing.get_origin(hint) is not typing.Literal:
    for part in typing.get_args(hint):
      yield from numbers_of(part, declared if part in (int, float) else None)


NUMBERS = [(path, *number) for path, hint in options() for number in numbers_of(hint)]


@pytest.mark.parametrize(("path", "kind", "declared"), NUMBERS)
def test_every_number_declares_its_range_and_is_held_to_it(path, kind, declared):
  assert declared is not None, f"{path}: which values can it have?"
  outside = [math.nan, math.inf, -math.inf] if kind is float else []
  step = 1 if kind is int else 0.5
  if declared.low > -math.inf:
    outside.append(kind(declared.low if declared.above else declared.low - step))
  if declared.high < math.inf:
    outside.append(kind(declared.high if declared.below else declared.high + step))
  assert outside or kind is float, f"{path}: any whole number at all?"
  for value in outside:
    if value == declared.also:
      value -= 1
    config = sourced()
    with config.ignore_type():
      section, _, name = path.rpartition(".")
      section = config[section] if section else config
      old = section[name]
      if path == "reward.weights":
        section[name] = (("correct", value),)
      else:
        section[name] = (value,) if isinstance(old, tuple) else value
    with pytest.raises(UserError) as info:
      freeze(config)
    said = str(info.value)
    assert said.startswith("config: ") and path in said and str(value) in said, said
    assert "\n" not in said


def test_a_choice_that_is_almost_right_is_pointed_to():
  config = sourced()
  config.model.dtype = "bfloat"
  with pytest.raises(UserError, match=r"model.dtype='bfloat' is not one .*mean bfloat16"):
    freeze(config)


def test_every_option_is_described():
  for path, _ in options():
    *sections, name = path.split(".")
    cls = Config
    for section in sections:
      cls = typing.get_type_hints(cls)[section]
    assert descriptions(cls).get(name), f"{path}: what is it for? (Attributes: of {cls.__name__})"


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_that_updates_would_not_move_are_refused(stage, dtype):
  """An update of 5e-7 is far below half of the distance between two 16-bit numbers."""
  config = sourced()
  config.stages = (stage,)
  config.model.param_dtype = dtype
  with pytest.raises(UserError, match=rf"param_dtype='{dtype}' .* model.lora.rank=0.*float32"):
    freeze(config)
  config.model.lora.rank = 4  # adapters are float32 whatever the base is
  freeze(config)
  config.model.lora.rank = 0
  config.stages = ("eval",)
  freeze(config)


def test_dropout_of_adapters_is_for_fine_tuning_only():
  config = sourced()
  config.model.lora.rank, config.model.lora.dropout = 4, 0.1
  for stages in (("rl",), ("sft", "rl")):
    config.stages = stages
    with pytest.raises(UserError, match=r"model.lora.dropout=0.1 .*'rl'"):
      freeze(config)
  config.stages = ("sft",)
  freeze(config)


@pytest.mark.parametrize(
  ("hardware", "rate"), [("v5e-8", 3e-6), ("h100-8", 3e-6), ("h100-8-full", 5e-7), ("", 5e-7)]
)
def test_the_learning_rate_of_a_preset_goes_by_what_it_trains(hardware, rate):
  config = freeze(load_config_file(REPO / "configs" / "math500.py", f"data,{hardware}"))
  assert (config.model.lora.rank > 0) == (rate == 3e-6)
  assert config.rl_optimizer == OptimizerConfig(rate, warmup_steps=50)
