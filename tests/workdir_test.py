"""The workdir of a run: what may differ when it is continued, what a start leaves, its room."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import pytest
from etils import epath

from igpo_jax.config import default_config, freeze
from igpo_jax.errors import UserError
from igpo_jax.train.continued import flat
from igpo_jax.train.room import check_room
from igpo_jax.train.workdir import open_workdir

SFT_ROW, RL_ROW = {"stage": "sft", "step": 1}, {"stage": "rl", "step": 3}


def config_with(**options):
  """The default config with options by names such as `rl__steps`."""
  config = default_config()
  config.data.sft = config.data.rl = "synthetic:chains"
  config.data.prompt_buckets = (16, 64)
  config.rl.prompts_per_step = 8
  for name, value in options.items():
    section, _, option = name.rpartition("__")
    config.get(section, config)[option] = value
  return freeze(config)


def begin(folder, *rows, checkpoints=(), **options):
  """A workdir that a run has left, with rows and steps such as "rl/4"."""
  workdir = epath.Path(folder)
  open_workdir(workdir, config_with(**options))
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for step in checkpoints:
    (workdir / "checkpoints" / step).mkdir(parents=True)
  return workdir


def kept(workdir):
  return json.loads((workdir / "config.json").read_text())


FREE = [
  ("rl__micro_batches", 4),
  ("rl__sample_slices", 2),
  ("rl__steps", 500),
  ("rl__steps", 3),
  ("rl__eval_every", 7),
  ("sft__micro_batches", 4),
  ("sft__eval_every", 7),
  ("eval__batch_size", 8),
  ("reward__workers", 5),
  ("reward__timeout", 9.0),
  ("model__attention", "dot_product"),
  ("model__remat", "full"),
  ("data__prompt_buckets", (8, 16, 32, 64)),
  ("mesh__tensor", 2),
  ("log__every", 5),
  ("checkpoint__minutes", 5.0),
  ("checkpoint__best_metric", "rl/reward"),
  ("stages", ("sft", "rl", "eval")),
]


@pytest.mark.parametrize(("name", "value"), FREE)
def test_what_does_not_decide_what_is_learnt_may_differ_and_is_noted(name, value, tmp_path, capsys):
  workdir = begin(tmp_path, SFT_ROW, RL_ROW, checkpoints=["sft/9", "rl/3", "rl/2"])
  option, before = name.replace("__", "."), flat(kept(workdir))[name.replace("__", ".")]
  open_workdir(workdir, config_with(**{name: value}))
  now = list(value) if isinstance(value, tuple) else value
  assert flat(kept(workdir))[option] == now
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    f"the run is continued with {option}={now!r} (was {before!r}); noted in changes.jsonl"
  )
  open_workdir(workdir, config_with(**{name: value}))  # the same again is no change
  assert capsys.readouterr().err == ""
  (noted,) = map(json.loads, (workdir / "changes.jsonl").read_text().splitlines())
  assert noted["changes"] == {option: [before, now]} and noted["after"] == RL_ROW


REFUSED = [
  ({}, {"seed": 9}, "config.seed: 0 there, 9 now (it decides what is learned)"),
  ({}, {"sampler__temperature": 0.5}, "config.sampler.temperature: 1.2 there, 0.5 now"),
  ({}, {"rl__prompts_per_step": 16}, "config.rl.prompts_per_step: 8 there, 16 now"),
  ({}, {"rl__steps": 2}, "config.rl.steps: 100 there, 2 now (3 steps are done)"),
  ({}, {"sft__steps": 2000}, "(RL has begun with what SFT ended with)"),
  ({"rl_optimizer__schedule": "linear"}, {"rl__steps": 101},
   "(it decides the learning rates: rl_optimizer.schedule='linear')"),
  ({}, {"rl_optimizer__schedule": "cosine"}, "config.rl_optimizer.schedule: constant there"),
  ({}, {"data__prompt_buckets": (16, 32)}, "(the longest bucket decides which records are used)"),
  ({}, {"data__prompt_buckets": (128,)}, "(the longest bucket decides which records are used)"),
  ({"sft__response_lengths": (64, 256)}, {"data__prompt_buckets": (64,)},
   "(with several sft.response_lengths it decides the order of the records)"),
  ({"sampler__early_stop": "batch"}, {"rl__sample_slices": 2}, "(with sampler.early_stop='batch'"),
  ({"sampler__early_stop": "batch"}, {"eval__batch_size": 8}, "(with sampler.early_stop='batch'"),
  ({"sft__select": "best", "data__eval": ("t=synthetic:chains",),
    "checkpoint__best_metric": "eval/t/accuracy"}, {"sft__eval_every": 3},
   "(with sft.select='best' it decides which parameters the next stage gets)"),
  ({}, {"stages": ("rl",)}, "(it began with SFT, and RL would start from other weights;"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "changed", "complaint"), REFUSED)
def test_what_decides_what_is_learnt_may_not_differ(before, changed, complaint, tmp_path):
  workdir = begin(tmp_path, SFT_ROW, RL_ROW, checkpoints=["sft/9", "rl/3"], **before)
  files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
  with pytest.raises(UserError) as told:
    open_workdir(workdir, config_with(**before | changed))
  assert str(told.value).startswith(f"{workdir} holds a run with another config.")
  assert complaint in str(told.value)
  assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_sft_may_be_made_longer_until_rl_begins(tmp_path):
  workdir = begin(tmp_path, SFT_ROW, checkpoints=["sft/9"])
  open_workdir(workdir, config_with(sft__steps=2000))
  open_workdir(workdir, config_with(sft__steps=9))
  with pytest.raises(UserError, match="9 steps are done"):
    open_workdir(workdir, config_with(sft__steps=8))


def test_a_run_that_began_with_rl_gets_no_sft_afterwards(tmp_path):
  workdir = begin(tmp_path, RL_ROW, stages=("rl",))
  with pytest.raises(UserError, match="its RL began without SFT"):
    open_workdir(workdir, config_with(stages=("sft", "rl")))


@pytest.mark.parametrize("left", ["rows", "checkpoint", "damaged"])
def test_where_anything_was_trained_the_config_is_fixed(left, tmp_path):
  rows = [SFT_ROW] if left == "rows" else []
  steps = {"rows": [], "checkpoint": ["sft/4"], "damaged": ["sft/damaged-4"]}[left]
  workdir = begin(tmp_path, *rows, checkpoints=steps)
  with pytest.raises(UserError, match=r"config\.seed"):
    open_workdir(workdir, config_with(seed=1))


@pytest.mark.parametrize("config", ["other", "", "[]", "{", None])
def test_where_nothing_was_trained_a_corrected_config_is_welcome(config, tmp_path):
  """A start may fail on a mistake after it wrote some files: they are made anew."""
  workdir = begin(tmp_path)
  for folder in ("tokenizer", "evals/init", "tensorboard", "checkpoints/sft", "checkpoints/rl"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "checkpoints" / "sft" / "3.orbax-checkpoint-tmp").mkdir()
  if config is None:
    (tmp_path / "config.json").unlink()
  elif config != "other":
    (tmp_path / "config.json").write_text(config)
  open_workdir(workdir, config_with(seed=1))
  assert kept(workdir)["seed"] == 1
  assert not (tmp_path / "tokenizer").exists() and not (tmp_path / "evals").exists()
  (tmp_path / "tokenizer").mkdir()
  open_workdir(workdir, config_with(seed=1))  # the same config: what it made is kept
  assert (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
  ("text", "complaint"),
  [
    ("", "config.json: not JSON (Expecting value"),
    ("{", "config.json: not JSON ("),
    ("[]", "config.json: a JSON object was expected, not list"),
    ('"x"', "config.json: a JSON object was expected, not str"),
    (b"\xff\xfe\x00", "config.json: not JSON ("),
    ('{"rl": 3}', "holds a run with another config."),
    (None, "holds a run, but no config.json"),
  ],
)
def test_a_config_json_that_makes_no_sense_is_told_by_name(text, complaint, tmp_path):
  workdir = begin(tmp_path, SFT_ROW)
  if text is None:
    (tmp_path / "config.json").unlink()
  else:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError) as told:
    open_workdir(workdir, config_with())
  assert complaint in str(told.value) and "choose another --workdir" in str(told.value)


def test_a_workdir_from_before_an_option_existed_can_be_continued(tmp_path, capsys):
  workdir = begin(tmp_path, RL_ROW)
  old = kept(workdir)
  del old["rl"]["exploration"], old["hints"]
  old["rl"]["an_option_of_old"] = 3
  text = json.dumps(old)
  (tmp_path / "config.json").write_text(text)
  open_workdir(workdir, config_with())
  assert capsys.readouterr().err == ""
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=r"another config.rl.exploration: inpaint there, none now"):
    open_workdir(workdir, config_with(rl__exploration="none"))


def test_a_run_from_before_an_option_was_renamed_can_be_continued(tmp_path, capsys):
  settings = {"data__eval": ("t=synthetic:chains",), "checkpoint__best_metric": "eval/t/accuracy"}
  workdir = begin(tmp_path, SFT_ROW, sft__select="best", **settings)
  old = kept(workdir)
  old["sft"]["hand_on"] = old["sft"].pop("select")
  text = json.dumps(old)
  (tmp_path / "config.json").write_text(text)
  open_workdir(workdir, config_with(sft__select="best", **settings))
  assert capsys.readouterr().err == "" and flat(kept(workdir))["sft.select"] == "best"
  assert "hand_on" not in kept(workdir)["sft"]
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=r"another config.sft.select: best there, last now"):
    open_workdir(workdir, config_with(**settings))


def test_an_evaluation_looks_at_the_model_only_and_leaves_the_run_its_config(tmp_path):
  workdir = begin(tmp_path, SFT_ROW, RL_ROW)
  before = (tmp_path / "config.json").read_bytes()
  open_workdir(workdir, config_with(stages=("eval",), seed=4, eval__temperature=1.0))
  assert (tmp_path / "config.json").read_bytes() == before
  with pytest.raises(UserError, match=r"config.model.d_model: 96 there, 8 now"):
    open_workdir(workdir, config_with(stages=("eval",), model__d_model=8))


# --- room for checkpoints ---------------------------------------------------------------


def room(tmp_path, monkeypatch, free, **options):
  """Checks a model of 1,000 float32 parameters: a checkpoint of it has 12 kB."""
  usage = shutil.disk_usage(tmp_path)._replace(free=free)
  monkeypatch.setattr("igpo_jax.train.room.shutil.disk_usage", lambda path: usage)
  check_room(config_with(**options), epath.Path(tmp_path), {"w": jnp.zeros(1000, jnp.float32)})


@pytest.mark.parametrize(
  ("options", "count"),
  [
    ({"stages": ("sft",), "checkpoint__keep": 1}, 2),
    ({"stages": ("sft", "rl"), "checkpoint__keep": 2}, 5),
    ({"stages": ("rl", "eval"), "checkpoint__best_metric": "rl/reward"}, 4),
  ],
)
def test_checkpoints_that_will_not_fit_are_told_before_the_training(
  options, count, tmp_path, monkeypatch
):
  room(tmp_path, monkeypatch, 12_000 * count, **options)
  with pytest.raises(UserError, match=rf"{count} of 12 kB, one of them while .* checkpoint.keep="):
    room(tmp_path, monkeypatch, 12_000 * count - 1, **options)
  # Those of the run itself are counted, and an evaluation makes none.
  (tmp_path / "checkpoints" / "rl" / "3").mkdir(parents=True)
  (tmp_path / "checkpoints" / "rl" / "3" / "data").write_bytes(b"x" * 12_000)
  room(tmp_path, monkeypatch, 12_000 * (count - 1), **options)
  room(tmp_path, monkeypatch, 0, stages=("eval",))
