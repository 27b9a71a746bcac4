"""Programs compiled ahead of time: the real ones, at the real sizes, counted by hand."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from igpo_jax import aot
from igpo_jax.config import default_config, freeze, load_config_file
from igpo_jax.errors import UserError
from igpo_jax.models.flops import forward_flops
from igpo_jax.parallel.hlo import Collective
from igpo_jax.parallel.mesh import abstract_mesh, make_mesh
from igpo_jax.parallel.sharding import layout_table
from igpo_jax.parallel.tpu import CHIPS, SLICES
from igpo_jax.train import memory
from igpo_jax.train.ahead_of_time import abstract_params, bytes_per_chip, programs
from tests.paths import REPO

CHIP = CHIPS["TPU v5 lite"]
LAYOUT = REPO / "docs" / "math500_layout.md"


def tiny(**options):
  config = default_config()
  config.update_from_flattened_dict({
    "data.sft": "a", "data.rl": "b", "data.prompt_buckets": (8, 16), "model.d_model": 16,
    "model.n_layers": 2, "model.n_heads": 2, "model.mlp_hidden": 32, "model.vocab_size": 64,
    "model.mask_id": 63, "sampler.gen_length": 16, "sampler.block_length": 8, "sampler.steps": 8,
    "rl.prompts_per_step": 4, "rl.group_size": 2, "sft.batch_size": 4, **options,
  })  # fmt: skip
  return freeze(config)


def inspected(config, chip=CHIP):
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return {n: aot.inspect(p, config, mesh, chip) for n, p in programs(config, mesh).items()}


@pytest.fixture(scope="module")
def report():
  return inspected(tiny())


@pytest.mark.slow
def test_the_programs_of_both_stages_compile_and_are_counted(report):
  assert list(report) == ["sft", "rollout", "likelihood", "update"]
  for facts in report.values():
    assert facts["fits"] and 0.99 < facts["headroom"] < 1
    assert facts["bytes"] >= facts["arguments"] + facts["temporaries"] + facts["resident"]
    assert not facts["moves_logits"] and facts["bytes_received"] == 0
    assert facts["seconds"]["least"] == max(facts["seconds"].values())
  json.dumps(report)


def test_flops_are_those_of_the_passes_that_the_method_needs(report):
  model = tiny().model
  # 4 prompts x 2 completions of 32 positions, of which a block of 8 is read, in 8 steps
  assert report["rollout"]["flops"] == 8 * forward_flops(model, 8, 32, 32, 8, read=8)
  # mean field: one canvas a prompt, for the policy and for the reference
  assert report["likelihood"]["flops"] == 2 * forward_flops(model, 4, 32, 32, 16, read=16)
  assert report["update"]["flops"] == 3 * forward_flops(model, 4, 32, 32, 16, read=16)


def test_memory_includes_what_lies_beside_a_programs_arguments():
  config = tiny(**{"model.dtype": "bfloat16"})
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  made = programs(config, mesh)
  count = sum(x.size for x in jax.tree.leaves(abstract_params(config, mesh)))
  # a float32 master with two moments; a bfloat16 reference and policy
  state = 3 * 4 * count
  assert made["rollout"].other_resident_bytes == pytest.approx(state + 2 * count, abs=64)
  assert made["likelihood"].other_resident_bytes == pytest.approx(state, abs=64)
  assert made["update"].other_resident_bytes == 2 * count  # the policy's copy is gone by then
  same = programs(dataclasses.replace(config, model=tiny().model), mesh)
  # nothing is cast: the policy that is read is the state's own parameters
  assert same["update"].other_resident_bytes == 4 * count


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {"model.lora.rank": 2},
    {"model.lora.rank": 2, "model.dtype": "bfloat16", "model.param_dtype": "bfloat16"},
    {"model.lora.rank": 2, "model.dtype": "bfloat16"},
    {"model.dtype": "bfloat16"},
    {},
  ],
)
def test_what_is_held_is_counted_once_and_as_the_memory_model_counts_it(options):
  """Under LoRA policy and reference are two arguments that share the base."""
  config = tiny(**options)
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  counted = memory.memory(config, mesh)
  for name, program in programs(config, mesh).items():
    with jax.set_mesh(mesh):
      arguments = jax.tree.leaves(program.trace().in_avals)
    given = sum(x.size * x.dtype.itemsize for x in arguments)
    # The rest is the batch: tokens, flags, commit steps and their log-probabilities, advantages,
    # keys, scores.
    batch = (
      given - program.shared_bytes + program.other_resident_bytes - sum(counted[name].held.values())
    )
    assert 500 < batch < 3800, name


def test_lora_trains_and_keeps_little():
  config = tiny(**{"model.lora.rank": 2})
  made = programs(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
  full = programs(tiny(), make_mesh(1, 1, 1, devices=jax.devices()[:1]))
  assert made["likelihood"].other_resident_bytes < full["likelihood"].other_resident_bytes / 3


def test_slices_of_prompts_make_the_rollout_smaller():
  whole, sliced = (tiny(**{"rl.sample_slices": n}) for n in (1, 2))
  mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
  assert programs(sliced, mesh)["rollout"].flops * 2 == programs(whole, mesh)["rollout"].flops


@pytest.mark.slow
def test_a_program_that_is_too_large_is_reported_and_no_error():
  small = dataclasses.replace(CHIP, hbm_bytes=1000)
  assert not any(facts["fits"] for facts in inspected(tiny(), small).values())


@pytest.mark.parametrize(
  ("kind", "dims", "moves"),
  [
    ("all-gather", (64, 8, 126464), True),
    ("all-to-all", (64, 256, 126464), True),
    ("all-gather", (4096, 126464), False),  # the head's weights
    ("collective-permute", (1, 256, 126464), False),  # a sixteenth of them
    ("all-gather", (512, 768, 4096), False),
  ],
)
def test_logits_are_told_from_weights(kind, dims, moves):
  config = freeze(load_config_file(REPO / "configs" / "math500.py"))
  collective = Collective(kind, "", dims, 16, 1, 1)
  assert aot.moves_logits(collective, config, 1) == moves


@pytest.mark.parametrize("hardware", SLICES)
def test_the_layout_of_math500_is_as_documented(hardware):
  config = freeze(load_config_file(REPO / "configs" / "math500.py", f"data,{hardware}"))
  chips = aot.chips_of(SLICES[hardware].topology)
  assert chips == np.prod(SLICES[hardware].mesh)
  params = abstract_params(config, abstract_mesh(config.mesh, chips))
  assert f"## {hardware}\n\n{layout_table(params)}\n" in LAYOUT.read_text()
  # Nothing that is large lies whole on a chip.
  whole = [x for x in jax.tree.leaves(params) if bytes_per_chip(x) == x.size * x.dtype.itemsize]
  assert all(x.size <= 32 * 4096 for x in whole)


def test_micro_batches_smaller_than_the_mesh_are_refused():
  mesh = abstract_mesh(dataclasses.replace(tiny().mesh, data=1, fsdp=4), 4)
  with pytest.raises(UserError, match=r"rl\.micro_batches=2 leaves 2 of 4 rows.* 4 devices"):
    programs(tiny(stages=("rl",), **{"rl.micro_batches": 2}), mesh)


def test_mistakes_are_told():
  with pytest.raises(UserError, match="names look like v5e:8x8"):
    aot.chips_of("v5e-64")
  with pytest.raises(UserError, match=r"--topology=v5e:2x2: .*libtpu"):
    aot.topology_devices("v5e:2x2")
  with pytest.raises(UserError, match=r"model\.vocab_size is needed"):
    aot.with_vocabulary(tiny(**{"model.vocab_size": 0, "data.tokenizer": "sentencepiece:100"}))
  with pytest.raises(UserError, match="hardware 'v4-8' is not one of"):
    load_config_file(REPO / "configs" / "math500.py", "data,v4-8")
