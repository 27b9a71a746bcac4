"""Sizes chosen for the devices: presets start on the machines that they name, or say why not."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from etils import epath

from benchmarks.padding import mean_positions
from igpo_jax.config import default_config, freeze, load_config_file
from igpo_jax.errors import UserError
from igpo_jax.parallel.machine import Machine, check_machine, claim_memory, here, modelled
from igpo_jax.parallel.mesh import abstract_mesh, make_mesh
from igpo_jax.parallel.tpu import GIB, KINDS
from igpo_jax.rl.sampling import GroupSampler
from igpo_jax.train import memory
from igpo_jax.train.ahead_of_time import programs
from igpo_jax.train.run import train
from igpo_jax.train.sizes import asked, model_of, resolve, said
from igpo_jax.train.workdir import open_workdir
from tests.paths import REPO


def preset(name, hardware):
  return freeze(load_config_file(REPO / "configs" / f"{name}.py", f"data,{hardware}"))


def tiny(**options):
  config = default_config()
  config.update_from_flattened_dict({
    "data.sft": "synthetic:chains", "data.rl": "synthetic:chains", "data.prompt_buckets": (16,),
    "model.d_model": 16, "model.n_heads": 2, "model.n_layers": 2, "model.mlp_hidden": 32,
    "sampler.gen_length": 16, "sampler.block_length": 8, "sampler.steps": 8,
    "rl.sample_slices": 0, "rl.micro_batches": 0, "sft.micro_batches": 0, "eval.batch_size": 0,
    "mesh.data": 0, "mesh.fsdp": 0, **options,
  })  # fmt: skip
  return freeze(config)


# (devices, processes): one machine with one process for all GPUs; Slurm, with a process each
MACHINES = [(1, 1), (2, 1), (4, 1), (8, 1), (8, 8), (16, 16), (32, 32)]


@pytest.mark.parametrize(("devices", "processes"), MACHINES)
@pytest.mark.parametrize("name", ["math500", "sft_openr1"])
def test_the_gpu_preset_starts_on_any_number_of_gpus_that_divides_its_batch(
  name, devices, processes
):
  machine = modelled("h100", devices, processes)
  config = resolve(preset(name, "gpu"), machine, strict=True)
  # The base fits each card: nothing is gathered.
  assert (config.mesh.data, config.mesh.fsdp) == (devices, 1)
  rl, rows = config.rl, config.rl.prompts_per_step * config.rl.group_size
  if "rl" in config.stages:
    assert rl.prompts_per_step % (rl.sample_slices * processes) == 0
    assert rows // rl.sample_slices % devices == 0
    assert rl.sample_slices >= 2  # one is graded while the next is sampled
    assert rl.prompts_per_step // rl.micro_batches % devices == 0
  else:
    assert config.sft.batch_size // config.sft.micro_batches % devices == 0
  assert config.eval.batch_size % devices == 0


PRESETS = [
  # hardware, devices, processes, (data, fsdp), prompts, sample slices, micro-batches
  ("h100-1", 1, 1, (1, 1), 16, 8, 1),
  ("h200-1", 1, 1, (1, 1), 16, 8, 1),
  ("h100-8", 8, 1, (8, 1), 64, 4, 1),
  ("h100-16", 16, 16, (16, 1), 64, 4, 1),
  ("h100-16", 32, 32, (32, 1), 64, 2, 1),  # two prompts a process
  ("h100-16", 32, 4, (32, 1), 64, 4, 1),
  ("h100-8-full", 8, 8, (1, 8), 64, 4, 1),
  ("h100-16-full", 16, 16, (2, 8), 64, 4, 1),
  ("h100-16-full", 32, 32, (4, 8), 64, 2, 1),
]


@pytest.mark.parametrize(
  ("hardware", "devices", "processes", "mesh", "prompts", "slices", "micro"), PRESETS
)
def test_a_preset_is_sized_for_its_devices(
  hardware, devices, processes, mesh, prompts, slices, micro
):
  machine = modelled(hardware.split("-")[0], devices, processes)
  config = resolve(preset("llada_math", hardware), machine, strict=True)
  assert (config.mesh.data, config.mesh.fsdp) == mesh
  assert config.rl.prompts_per_step == prompts
  assert (config.rl.sample_slices, config.rl.micro_batches) == (slices, micro)


@pytest.mark.parametrize(("hardware", "chips", "workers"), [("v5e-8", 8, 1), ("v5e-64", 64, 16),
                                                            ("v5p-32", 16, 4)])  # fmt: skip
def test_the_presets_for_tpus_keep_their_mesh_and_have_slices(hardware, chips, workers):
  for name in ("math500", "sft_openr1"):
    given = preset(name, hardware)
    machine = modelled(hardware.split("-")[0], chips, workers)
    config = resolve(given, machine, strict=True)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, chips, 1)
    assert config.rl.sample_slices == 4 and config.rl == given.rl


# Tokens of a prompt by share of the prompts (%): GSM8K and MATH-500 in equal shares, with the
# IGPO protocol's template and 8,000 pieces (docs/scaling.md#padding).
SHARES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 97, 98, 99, 99.5, 100)
TOKENS = (27, 34, 43, 48, 60, 77, 98, 128, 170, 220, 252, 289, 349, 417)


@pytest.mark.parametrize(("hardware", "devices", "processes"), [
  ("v5e-8", 8, 1), ("v5e-64", 64, 16), ("v5p-32", 16, 4), ("gpu", 1, 1), ("gpu", 16, 16),
  ("h100-1", 1, 1), ("h200-1", 1, 1), ("h100-8", 8, 1), ("h100-8", 8, 8), ("h100-16", 16, 16),
  ("h100-16", 32, 4), ("h100-8-full", 8, 1), ("h100-16-full", 16, 16),
])  # fmt: skip
def test_slices_and_buckets_save_three_tenths_of_a_rollouts_positions(hardware, devices, processes):
  """Against one slice and the buckets 128, 256 and 512, for prompts of the lengths of a mixture."""
  config = preset("math500", hardware)
  kind = hardware.split("-")[0]
  machine = modelled("h100" if kind == "gpu" else kind, devices, processes)
  rl, buckets = resolve(config, machine, strict=True).rl, config.data.prompt_buckets
  shares = np.random.default_rng(0).uniform(0, 100, (200, rl.prompts_per_step))
  batches = np.interp(shares, SHARES, TOKENS).astype(int)
  each = rl.sample_slices, processes
  sliced = np.mean([mean_positions(batch, *each, buckets, 256) for batch in batches])
  whole = np.mean([mean_positions(batch, 1, 1, (128, 256, 512), 256) for batch in batches])
  assert sliced < 0.7 * whole


def test_a_base_that_does_not_fit_a_card_is_split_over_as_few_as_hold_it():
  small = dataclasses.replace(modelled("h100", 8), memory=22 * GIB)
  config = resolve(preset("math500", "gpu"), small, strict=True)
  assert (config.mesh.data, config.mesh.fsdp) == (4, 2)
  needed = memory.largest(memory.memory(config, abstract_mesh(config.mesh, 8)))[1].total
  assert needed <= small.memory
  # less memory: less at a time on the same mesh, before it is split further
  roomy = resolve(preset("math500", "gpu"), modelled("h100", 1), strict=True)
  tight = resolve(
    preset("math500", "gpu"), dataclasses.replace(modelled("h100", 1), memory=26 * GIB), True
  )
  assert tight.rl.sample_slices > roomy.rl.sample_slices
  assert tight.rl.micro_batches > roomy.rl.micro_batches


def test_what_cannot_fit_is_told_with_numbers_before_anything_is_loaded():
  with pytest.raises(
    UserError, match=r"update needs about .* GiB on each device.*with 78\.\d GiB"
  ) as e:
    resolve(
      dataclasses.replace(preset("math500", "h100-8-full"), mesh=preset("math500", "gpu").mesh),
      dataclasses.replace(modelled("h100", 1), memory=int(78.5 * GIB)),
    )
  assert "use more devices, or train adapters" in str(e.value)


def test_sizes_chosen_by_hand_are_tried_unless_parameters_alone_are_too_large():
  by_hand = dataclasses.replace(
    preset("math500", "v5e-8"), mesh=dataclasses.replace(tiny().mesh, data=1, fsdp=8)
  )
  machine = dataclasses.replace(modelled("h100", 8), memory=5 * GIB)
  assert resolve(by_hand, machine).rl == by_hand.rl
  with pytest.raises(UserError, match="needs about"):
    resolve(by_hand, machine, strict=True)
  with pytest.raises(UserError, match="needs about"):
    resolve(by_hand, dataclasses.replace(machine, memory=2 * GIB))


@pytest.mark.parametrize(
  ("options", "devices", "processes", "complaint"),
  [
    ({"stages": ("sft",)}, 3, 1,
     r"sft\.batch_size=64 does not share out over 3 devices.*make it 63 or 66"),
    ({"stages": ("rl",)}, 16, 1, r"rl\.prompts_per_step=8 .* 16 devices.*make it 16"),
    ({"rl.sample_slices": 8}, 2, 2, r"rl\.prompts_per_step=8 is not a multiple of rl\.sample_sl"),
    ({"rl.micro_batches": 4}, 4, 1, r"rl\.micro_batches=4 leaves 2 of 8 rows.* 4 devices"),
    ({"stages": ("sft",), "sft.micro_batches": 16}, 8, 1,
     r"sft\.micro_batches=16 leaves 4 of 64 rows"),
    ({"mesh.tensor": 4}, 4, 2, r"tensor=4 spreads the same rows over processes 0, 1"),
    ({"mesh.tensor": 3, "stages": ("rl",), "rl.prompts_per_step": 4}, 6, 1,
     r"tensor=3\) does not divide the parameter"),
    ({"mesh.data": 3}, 8, 1, "8 devices are not a multiple of 3"),
  ],
)  # fmt: skip
def test_what_does_not_share_out_is_told_before_anything_is_loaded(
  options, devices, processes, complaint
):
  with pytest.raises(UserError, match=complaint):
    resolve(tiny(**options), Machine("cpu", "cpu", devices, processes))


def test_what_is_resolved_is_what_the_loops_accept():
  """The loops check again; with sizes of `resolve` they never complain."""
  config = tiny(**{"rl.prompts_per_step": 24, "rl.group_size": 4, "stages": ("rl",)})
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  for devices, processes in itertools.product((1, 2, 3, 4, 6, 8, 12, 24), (1, 2, 3)):
    if devices % processes == 0:
      sized = resolve(config, Machine("cpu", "cpu", devices, processes))
      assert all(size > 0 for size in asked(sized).values())
  sampler = GroupSampler(None, None, None, sized, mesh)
  assert sampler.slice_size == 24 // sized.rl.sample_slices
  with pytest.raises(UserError, match=r"rl\.sample_slices=0 is left to the devices"):
    GroupSampler(None, None, None, config, mesh)


def test_one_axis_of_the_mesh_may_be_given_and_the_other_left():
  machine = Machine("cpu", "cpu", 8)

  def shape(**sizes):
    mesh = resolve(tiny(**{f"mesh.{k}": v for k, v in sizes.items()}), machine).mesh
    return mesh.data, mesh.fsdp, mesh.tensor

  assert shape(data=-1) == shape(fsdp=1) == (8, 1, 1)
  assert shape(fsdp=-1) == shape(data=1) == (1, 8, 1)
  assert shape(fsdp=2) == shape(data=4) == (4, 2, 1)
  assert shape(tensor=2) == (1, 4, 2)  # all is trained: split over the devices of a machine


def test_the_expert_axis_takes_its_devices_from_fsdp_and_is_for_models_with_experts():
  config = load_config_file(REPO / "configs" / "llada_moe.py", "data,v5e-64")
  config.mesh.expert = 8
  machine = modelled("v5e", 64, 16)
  sized = resolve(freeze(config), machine)
  assert (sized.mesh.fsdp, sized.mesh.expert) == (8, 8) and asked(sized)["mesh.expert"] == 8
  config.mesh.expert = 3
  with pytest.raises(UserError, match=r"mesh\.expert=3 does not divide the 64 devices along fsdp"):
    resolve(freeze(config), machine)
  config.mesh.expert, config.model.moe.experts = 32, 48
  with pytest.raises(UserError, match=r"expert=32.* does not divide the parameter .*experts"):
    resolve(freeze(config), machine)
  with pytest.raises(UserError, match=r"mesh\.expert=2, and the model has no experts"):
    resolve(tiny(**{"mesh.expert": 2}), Machine("cpu", "cpu", 8))


def test_a_model_on_disk_is_counted_by_its_own_sizes():
  golden = REPO / "tests" / "goldens" / "llada_tiny"
  model = model_of(dataclasses.replace(tiny(), init_from=str(golden)))
  told = json.loads((golden / "config.json").read_text())
  assert (model.vocab_size, model.n_layers) == (told["embedding_size"], told["n_layers"])
  assert model.attention == tiny().model.attention  # how it is run is the config's


def test_a_block_causal_model_is_counted_with_both_copies_that_it_reads():
  def facts(family):
    machine = Machine("cpu", "cpu", 1)
    options = {"model.family": family, "model.head_dim": 8, "model.vocab_size": 32,
               "sampler.block_length": 4}  # fmt: skip
    config = resolve(tiny(**options), machine)
    mesh = abstract_mesh(config.mesh, 1)
    flops = {k: program.flops for k, program in programs(config, mesh).items()}
    return flops, memory.memory(config, mesh)

  (flops, work), (twice, more) = facts("a2d_qwen3"), facts("sdar")  # the same blocks
  for name in ("sft", "likelihood", "update"):
    assert twice[name] > 1.5 * flops[name]
    assert more[name].work["activations"] >= 1.9 * work[name].work["activations"]
  assert twice["rollout"] == flops["rollout"]


def test_a_mixture_of_experts_is_counted_by_its_experts():
  def work(**options):
    config = load_config_file(REPO / "configs" / "llada_moe.py")
    config.update_from_flattened_dict({
      "data.rl": "synthetic:chains", "mesh.data": 1, "mesh.fsdp": 8, "rl.sample_slices": 1,
      "rl.micro_batches": 1, "eval.batch_size": 64, **options,
    })  # fmt: skip
    return memory.memory(freeze(config), abstract_mesh(freeze(config).mesh, 8))["rollout"].work

  usual, wide = work(), work(**{"model.moe.expert_hidden": 2048})
  assert work(**{"model.mlp_hidden": 8192}) == usual  # no layer of this model has such an MLP
  # The gathered weights of two layers: three matrices of 2048 x 1024 more for each of 64 experts.
  more = wide["gathered weights"] - usual["gathered weights"]
  assert more == 2 * 2 * 3 * 64 * 2048 * 1024
  assert wide["activations"] > usual["activations"]


# GiB that XLA's TPU compiler (libtpu 0.0.42.1) sets aside for a program's temporaries.
COMPILED = [
  # preset, mesh, options, program, GiB
  ("v5e-8", (1, 8), {}, "rollout", 4.66),
  ("v5e-8", (1, 8), {}, "likelihood", 1.64),
  ("v5e-8", (1, 8), {}, "update", 3.66),
  ("v5p-32", (1, 16), {}, "rollout", 1.30),
  ("v5p-32", (1, 16), {}, "update", 5.34),
  ("v5e-64", (1, 64), {}, "rollout", 1.06),
  ("v5e-64", (1, 64), {}, "likelihood", 2.11),
  ("v5e-64", (1, 64), {}, "update", 5.64),
  ("h100-8", (4, 1), {"rl.prompts_per_step": 32, "rl.sample_slices": 4}, "rollout", 1.69),
  ("h100-8", (4, 1), {"rl.prompts_per_step": 32}, "likelihood", 0.89),
  ("h100-8", (4, 1), {"rl.prompts_per_step": 32}, "update", 7.36),
  ("h100-8", (4, 1), {}, "update", 11.59),
  ("h100-8-full", (1, 8), {"rl.sample_slices": 4}, "rollout", 1.76),
  ("h100-8-full", (1, 8), {}, "update", 11.21),
  ("h100-8-full", (1, 8), {"rl.micro_batches": 2}, "update", 15.41),
]


@pytest.mark.parametrize(("hardware", "mesh", "options", "program", "compiled"), COMPILED)
def test_what_a_program_works_with_is_estimated_on_the_high_side(
  hardware, mesh, options, program, compiled
):
  config = load_config_file(REPO / "configs" / "math500.py", f"data,{hardware}")
  config.mesh.slice, config.mesh.data, config.mesh.fsdp = "", *mesh
  for name in ("sample_slices", "micro_batches"):
    config.rl[name] = config.rl[name] or 1
  config.eval.batch_size = 64
  config.update_from_flattened_dict(options)
  config = freeze(config)
  work = memory.memory(config, abstract_mesh(config.mesh, mesh[0] * mesh[1]))[program].work
  assert 1.0 < sum(work.values()) / (compiled * GIB) < 2.4, work


# --- platforms --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("hardware", "machine", "complaint"),
  [
    ("gpu", Machine("cpu", "cpu", 1), "is for a gpu, and jax finds only 1 cpu device.*cuda. extra"),
    ("h100-1", Machine("tpu", "TPU v5 lite", 8), "mesh.hardware=h100 is for a gpu"),
    ("v5e-8", Machine("gpu", "NVIDIA H100", 8), "mesh.slice=v5e-8 is for a tpu"),
    ("v5e-8", Machine("tpu", "TPU v5 lite", 16), "is sized for 8 devices, and there are 16"),
    ("h100-8", Machine("gpu", "NVIDIA H100", 4), "is sized for 8 devices, and there are 4"),
  ],
)
def test_a_preset_refuses_a_machine_that_it_is_not_for(hardware, machine, complaint):
  with pytest.raises(UserError, match=complaint):
    check_machine(preset("math500", hardware).mesh, machine)


def test_a_preset_takes_the_machines_that_it_is_for():
  for hardware, kind, devices in (
    ("gpu", "NVIDIA L40S", 3), ("h100-8", "NVIDIA A100-SXM4-80GB", 8),
    ("h100-16", "NVIDIA H200", 32), ("", "cpu", 1),
  ):  # fmt: skip
    platform = "gpu" if hardware else "cpu"
    check_machine(preset("math500", hardware).mesh, Machine(platform, kind, devices))


def test_a_run_on_the_wrong_platform_ends_before_its_files_are_looked_for(tmp_path):
  with pytest.raises(UserError, match=r"mesh\.hardware=gpu is for a gpu, and jax finds only"):
    train(preset("math500", "gpu"), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_an_unknown_hardware_is_told():
  with pytest.raises(UserError, match=r"mesh\.hardware='v4' is not one of cpu, gpu, tpu, v5e"):
    resolve(tiny(**{"mesh.hardware": "v4"}), Machine("cpu", "cpu", 1))
  with pytest.raises(UserError, match="cannot be shared by 3 process"):
    modelled("h100", 8, 3)


def test_a_program_for_gpus_asks_for_nearly_all_of_their_memory():
  for hardware, given, share in (
    ("gpu", {}, "0.92"), ("h100-1", {}, "0.92"), ("v5e-8", {}, None), ("", {}, None),
    ("gpu", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, None),
  ):  # fmt: skip
    environment = dict(given)
    claim_memory(preset("math500", hardware).mesh, environment)
    assert environment.pop("XLA_CLIENT_MEM_FRACTION", None) == share
    assert environment == given


def test_this_machine_is_described():
  machine = here()
  assert (machine.platform, machine.processes) == ("cpu", 1)
  assert machine.devices == jax.device_count() and machine.memory == 0
  assert str(modelled("h200", 8, 8)) == "8 x NVIDIA H200 with 128.5 GiB each in 8 processes"
  assert set(KINDS) >= {"h100", "h200", "a100", "v5e", "v5p"}


# --- the workdir ------------------------------------------------------------------------


def test_a_run_may_be_continued_on_other_devices(tmp_path):
  """config.json keeps what was left open; what it became is written beside it."""
  config, workdir = tiny(), epath.Path(tmp_path)
  for devices in (1, 8, 4):
    machine = Machine("cpu", "cpu", devices)
    sized = resolve(config, machine)
    open_workdir(workdir, config, {"devices": str(machine), **asked(sized)})
    (workdir / "metrics.jsonl").write_text('{"stage": "init", "step": 0}\n')
    kept = json.loads((workdir / "config.json").read_text())
    assert kept["rl"]["sample_slices"] == 0 and kept["mesh"]["fsdp"] == 0
    assert kept["resolved"]["devices"].startswith(f"{devices} x cpu")
    assert kept["resolved"]["mesh.fsdp"] == devices
    assert f"rl.sample_slices={sized.rl.sample_slices}" in said(sized, machine)
