"""Arms: what they may change, what is told of mistakes, and the report that compares them."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from etils import epath
from PIL import Image

from igpo_jax.config import arms_of, default_config, freeze, load_config_file
from igpo_jax.errors import UserError
from igpo_jax.parallel.machine import modelled
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.train import arms as train_arms
from igpo_jax.train import memory
from igpo_jax.train.ahead_of_time import programs
from igpo_jax.train.arms import resolve_all
from igpo_jax.train.sizes import model_of
from igpo_jax.viewer.comparison import example_in_words, method_of, write_comparison
from tests.paths import REPO


def with_arms(*arms, **changes):
  """A tiny run with its sizes left to the devices, and arms."""
  config = default_config()
  config.arms = arms
  config.data.sft = config.data.rl = "synthetic:chains?n=8"
  config.data.prompt_buckets = (12,)
  config.reward.verifier = "exact"
  config.model.d_model, config.model.n_layers, config.model.n_heads = 16, 1, 2
  config.model.mlp_hidden = 32
  config.sampler.gen_length, config.sampler.block_length, config.sampler.steps = 16, 8, 4
  config.sft.batch_size = 8
  config.rl.prompts_per_step = config.rl.group_size = 2
  config.rl.sample_slices = config.rl.micro_batches = config.sft.micro_batches = 0
  config.mesh.data = config.mesh.fsdp = 0
  config.update_from_flattened_dict(changes)
  return freeze(config)


def test_an_arm_is_the_run_with_what_it_says_changed_and_nothing_else():
  config = with_arms(
    "GRPO: rl.exploration=none",
    "other: data.rl=synthetic:chains?n=9,  estimator.coupled_grpo.ratio_low=0.1, objective.beta=0,"
    "reward.weights=(('correct', 2.0),), hints.ratio_high=0.8, sampler.temperature=0.5",
    "cheap: sampler.adaptive=True, sampler.cache=dual, sampler.refresh_every=1, sampler.steps=2, "
    "sampler.threshold=0.9",  # adaptive alone is refused, whatever comes first
    stages=("sft", "rl", "eval"),
  )
  grpo, other, cheap = arms_of(config).values()
  replace = dataclasses.replace
  plain = replace(config, arms=(), stages=("sft", "rl"))
  assert grpo == replace(plain, rl=replace(plain.rl, exploration="none"))
  assert other == replace(
    plain,
    data=replace(plain.data, rl="synthetic:chains?n=9"),
    estimator=replace(
      plain.estimator, coupled_grpo=replace(plain.estimator.coupled_grpo, ratio_low=0.1)
    ),
    objective=replace(plain.objective, beta=0),
    reward=replace(plain.reward, weights=(("correct", 2.0),)),
    hints=replace(plain.hints, ratio_high=0.8),
    sampler=replace(plain.sampler, temperature=0.5),
  )
  assert cheap.sampler == replace(
    plain.sampler, adaptive=True, cache="dual", refresh_every=1, steps=2, threshold=0.9
  )
  assert replace(cheap, sampler=plain.sampler) == plain
  assert arms_of(replace(config, stages=("sft",))) == {}
  # A user who asks for GRPO where that is an arm gets it once.
  itself = with_arms("GRPO: rl.exploration=none", "two: rl.steps=2", **{"rl.exploration": "none"})
  assert set(arms_of(itself)) == {"two"}


@pytest.mark.parametrize(
  ("arms", "message"),
  [
    (("GRPO",), "'GRPO' should be NAME: OPTION=VALUE, OPTION=VALUE, such as"),
    (("GRPO: none",), "'GRPO: none' should be NAME: OPTION=VALUE"),
    (("../up: rl.steps=1",), "should be NAME: OPTION=VALUE"),
    ((": rl.steps=1",), "should be NAME: OPTION=VALUE"),
    (("a: rl.steps=1", "a: rl.steps=2"), "arms: 'a' is there twice"),
    (("a: rl.step=1",), "a: there is no option rl.step; did you mean steps?"),
    (("a: rl=1",), "a: there is no option rl"),
    (("a: rl.steps.more=1",), "a: there is no option rl.steps.more"),
    (("a: model.d_model=32",), "a: model.d_model is not RL's alone; an arm may change rl, "),
    (("a: sampler.gen_length=8",), "a: sampler.gen_length is not RL's alone"),
    (("a: sampler.early_stop=none",), "a: sampler.early_stop is not RL's alone"),
    (("a: sampler.steps=3",), "a: sampler.steps=3 is not a multiple of the 2 blocks"),
    (("a: sampler.refresh_every=1",), "a: sampler.refresh_every=1 needs a cache"),
    (("a: sampler.threshold=0.5, sampler.factor=1",), "a: .* are two rules for one thing"),
    (("a: rl.steps=many",), "a: rl.steps='many' should be a whole number"),
    (("a: rl.exploration=nothing",), "a: rl.exploration='nothing' is not one of inpaint"),
    (("a: rl.estimator=mean_fields",), r"a: .*mean_fields"),
    (("a: hints.replace_fraction=0.1",), "a: hints.replace_fraction=0.1 of rl.group_size=2"),
  ],
)
def test_a_mistake_in_an_arm_is_told_with_its_name(arms, message):
  with pytest.raises(UserError, match=message) as error:
    with_arms(*arms)
  assert str(error.value).startswith("config: arms: ") and "\n" not in str(error.value)


def test_every_arm_is_sized_on_the_runs_mesh_and_one_that_does_not_share_out_is_told():
  config = with_arms("wide: rl.prompts_per_step=8, rl.group_size=4", "GRPO: rl.exploration=none",
                     **{"rl.prompts_per_step": 4})  # fmt: skip
  sized, (wide, grpo) = resolve_all(config, modelled("cpu", 4))
  assert sized.mesh == wide.config.mesh == grpo.config.mesh and sized.mesh.fsdp == 4
  assert wide.config.rl.sample_slices == 2 and grpo.config.rl.sample_slices == 1
  assert (wide.given.mesh.fsdp, wide.changes) == (0, "rl.prompts_per_step=8, rl.group_size=4")
  with pytest.raises(UserError, match=r"config: arms: odd: rl\.prompts_per_step=2 does not share"):
    resolve_all(dataclasses.replace(config, arms=("odd: rl.prompts_per_step=2",)),
                modelled("cpu", 4))  # fmt: skip


def test_an_arm_whose_rollouts_the_model_cannot_make_is_told_at_the_start():
  config = with_arms("GRPO: rl.exploration=none", "fast: sampler.cache=prefix",
                     **{"model.family": "sdar", "model.attention_block": 8})  # fmt: skip
  with pytest.raises(UserError, match=r"^config: arms: fast: sampler\.cache='prefix' and .* block"):
    resolve_all(config, modelled("cpu", 1))
  other = dataclasses.replace(config.sampler, block_length=4)
  with pytest.raises(UserError, match=r"^config: sampler\.block_length=4: .* blocks of 8"):
    resolve_all(dataclasses.replace(config, sampler=other), modelled("cpu", 1))


def test_programs_of_an_arm_are_there_where_they_are_others_and_the_start_is_counted():
  """What the arms begin with has to outlive RL. It takes room where RL's state took it over."""
  sizes = {"mesh.data": 1, "mesh.fsdp": 1, "rl.sample_slices": 1, "rl.micro_batches": 1,
           "sft.micro_batches": 1}  # fmt: skip
  config = with_arms("GRPO: rl.exploration=none", "spg: rl.estimator=random_ratio", **sizes)
  config = dataclasses.replace(config, model=model_of(config))
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  made = set(programs(config, mesh))
  own = {"rollout", "likelihood", "update"}
  assert made == {"sft", *own, *(f"spg/{name}" for name in own)}

  cast = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
  held = lambda c: memory.memory(c, mesh)["rollout"].held
  assert held(cast)["start of the arms"] == held(cast)["parameters"] > 0
  alone = dataclasses.replace(cast, arms=())
  assert set(held(cast)) - set(held(alone)) == {"start of the arms"}
  assert "start of the arms" not in held(config)


def test_stages_with_equal_programs_share_them(monkeypatch):
  monkeypatch.setattr(train_arms, "make_policy_programs", lambda *args: object())
  config = with_arms(
    "GRPO: rl.exploration=none, hints.ratio_high=0.8, rl.advantage=std, data.rl=x",
    "spg: rl.estimator=random_ratio", "tau: objective.entropy_keep=1.0", "long: rl.steps=9",
    "fast: rl_optimizer.learning_rate=1.0", "wide: rl.prompts_per_step=4",
  )  # fmt: skip
  make_programs = train_arms.SharedPrograms()
  made = lambda config: make_programs(None, None, config, None)
  first, grpo, *others = map(made, (config, *arms_of(config).values()))
  assert first is grpo is made(config)
  assert len({id(each) for each in (first, *others)}) == 6


def evaluated(stage, step, accuracy):
  result = {"accuracy": accuracy, "stderr": 0.01, "low": 0.0, "high": 1.0, "n": 9, "samples": 1}
  return {"stage": stage, "step": step} | {f"eval/t/{k}": v for k, v in result.items()}


def rl_row(step, before, after, accuracy):
  shares = {"all_wrong_before": before, "all_wrong_after": after, "reward": 0.5,
            "extra_correct": 0.25, "answer_shown": 0.0}  # fmt: skip
  return evaluated("rl", step, accuracy) | {f"rl/{name}": value for name, value in shares.items()}


def test_the_report_keeps_the_runs_keys_and_has_the_arms_beside_them(tmp_path):
  before = [evaluated("init", 0, 0.1), evaluated("sft", 40, 0.2)]
  own = [*before, rl_row(1, 1.0, 0.5, 0.4), rl_row(2, 0.5, 0.0, 0.8)]
  grpo = [*before, rl_row(1, 1.0, 1.0, 0.2), rl_row(2, 0.8, 0.8, 0.3)]
  summary, text = write_comparison(own, {"GRPO": grpo}, "IGPO", epath.Path(tmp_path))
  assert {k: v["accuracy"] for k, v in summary["eval"].items()} == {
    "init/t": 0.1, "sft/t": 0.2, "rl/t": 0.8,
  }  # fmt: skip
  assert summary["rl"]["all_wrong_after"] == 0.25
  arm = summary["arms"]["GRPO"]
  assert {k: v["accuracy"] for k, v in arm["eval"].items()} == {"rl/t": 0.3}
  assert arm["rl"]["all_wrong_before"] == pytest.approx(0.9) and arm["steps"] == {"rl": 2}
  lines = text.splitlines()
  assert [line.split(" | ")[:2] for line in lines[2:6]] == [
    ["| t, before training", "0.100"], ["| t, after SFT", "0.200"],
    ["| t, after RL with GRPO", "0.300"], ["| t, after RL with IGPO", "0.800"],
  ]  # fmt: skip
  assert "| RL, mean over all steps | GRPO | IGPO |" in lines
  assert "| groups all wrong, after inpainting | 0.900 | 0.250 |" in lines
  assert (tmp_path / "table.md").read_text() == text + "\n"
  with Image.open(tmp_path / "curves.png") as image:
    assert image.size == (1100, 418)
  _, text = write_comparison(own, {"IGPO": grpo}, "IGPO", epath.Path(tmp_path))
  assert "after RL with IGPO |" in text and "after RL with IGPO, the run itself |" in text


def test_an_inpainted_example_is_told_with_what_it_replaced():
  row = lambda **of: {"step": 5, "group": 1, "prompt": "k12", "hints": [], "partner": None} | of
  own = [row(phase="own", number=k, used="kept", completion=f"bad{k}") for k in range(3)]
  own[2] |= {"used": "replaced", "partner": 7}
  made = row(phase="hinted", number=7, used="inserted", partner=2, completion="fTa=>w",
             hints=[[0, 1], [2, 3]], pieces=["f", "T", "a", "=>", "w"])  # fmt: skip
  text = example_in_words([*own, made])
  for part in ("RL step 5", "k12", "bad2", "... f ... a ...", "fTa=>w"):
    assert part in text
  assert "bad0" not in text
  assert example_in_words(own) == example_in_words([made | {"hints": []}, *own]) == ""


def test_the_quickstart_compares_igpo_with_grpo():
  for preset in ("", "smoke"):
    config = freeze(load_config_file(REPO / "configs" / "quickstart.py", preset))
    assert method_of(config) == "IGPO" and config.stages == ("sft", "rl")
    assert {name: method_of(arm) for name, arm in arms_of(config).items()} == {"GRPO": "GRPO"}
    assert default_config().arms == ()
