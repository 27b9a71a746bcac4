"""Programs for GPUs, lowered on a machine without one: fused attention wherever it is due."""

from __future__ import annotations

import collections
import json
import re

import jax
import jax.numpy as jnp
import pytest

from igpo_jax.config import freeze, load_config_file
from igpo_jax.models import attention
from igpo_jax.parallel.mesh import configured_mesh, make_mesh
from igpo_jax.train.ahead_of_time import programs
from tests.paths import REPO, run_on_devices

# The names under which jax calls cuDNN's attention. With a bias they would be longer.
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def llada(**options):
  """The preset of LLaDA-8B with two layers."""
  config = load_config_file(REPO / "configs" / "llada_8b.py")
  config.data.rl = config.data.sft = "none"
  config.stages = ("sft", "rl")
  config.update_from_flattened_dict({"model.n_layers": 2, **options})
  if config.model.lora.rank == 0:
    config.model.param_dtype = "float32"
  return freeze(config)


def fused_calls(config, name):
  """How often a program's StableHLO calls cuDNN's attention: (forward, backward)."""
  program = programs(config, configured_mesh(config.mesh))[name]
  text = program.lower("cuda").as_text()
  found = collections.Counter(re.findall(r"custom_call @(__cudnn\$\w+)\(", text))
  assert set(found) <= {FORWARD, BACKWARD}
  return found[FORWARD], found[BACKWARD]


@pytest.mark.slow
@pytest.mark.parametrize(("attend", "rank"), [("auto", 128), ("dot_product", 0)])
@pytest.mark.parametrize(
  ("cache", "calls"),
  # With a cache a call that fills it and one that reads it; "prefix" has that in four widths, each
  # for all rows and for some.
  [("none", 1), ("prefix", 1 + 4 * 2), ("dual", 2)],
)
def test_every_call_of_a_rollout_has_fused_attention(cache, calls, attend, rank):
  options = {"sampler.cache": cache, "model.lora.rank": rank, "model.attention": attend}
  # In the loop over all layers but the last, and in the last.
  assert fused_calls(llada(**options), "rollout") == (calls * 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 128])
@pytest.mark.parametrize(
  ("name", "calls"),
  # policy and reference; forward, and again for the backward pass (remat)
  [("likelihood", (2, 0)), ("update", (2, 1)), ("sft", (2, 1))],
)
def test_likelihoods_and_updates_have_fused_attention(name, calls, rank):
  assert fused_calls(llada(**{"model.lora.rank": rank}), name) == calls


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {"model.attention": "einsum"},
    {"model.dtype": "float32"},  # no such kernel
    {"model.n_heads": 16, "model.n_kv_heads": 16},  # heads of 256: too large for it
  ],
)
def test_without_a_kernel_it_is_plain_attention(options):
  assert fused_calls(llada(**options), "rollout") == (0, 0)


@pytest.mark.slow
def test_a_program_for_this_machine_is_not_taken_for_the_other():
  """Nothing that was traced for one platform is used again for another."""
  config = llada(**{"model.lora.rank": 0})
  program = programs(config, configured_mesh(config.mesh))["rollout"]
  here = lambda: "__cudnn" in program.lower().as_text()
  assert [here(), "__cudnn" in program.lower("cuda").as_text(), here()] == [False, True, False]


def eight_devices() -> dict:
  """What `test_every_device_attends_to_its_own_rows` needs of a process with 8 devices."""
  sizes = lambda data, fsdp, tensor: {
    "mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "rl.prompts_per_step": 8,
  }  # fmt: skip
  counts = [
    fused_calls(llada(**sizes(*mesh), **{"model.lora.rank": rank}), name)
    for mesh, rank in (((1, 8, 1), 128), ((2, 2, 2), 0))
    for name in ("rollout", "update")
  ]
  errors = []
  for rows in (4, 3):  # over two devices, or too few: whole on both
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (rows, 6, 4, 8)) for key in keys)
    valid = jax.random.uniform(jax.random.key(1), (rows, 6)) < 0.6

    def gradients(q, k, v, valid=valid, weight=weight):
      loss = lambda *args: jnp.sum(attention.dot_product(*args, valid) * weight)
      return jax.grad(loss, (0, 1, 2))(q, k, v)

    expected = gradients(q, k, v)
    with jax.set_mesh(make_mesh(1, 2, 2, devices=jax.devices()[:4])):
      found = jax.jit(gradients)(q, k, v)
    errors += [float(jnp.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
  return {"counts": counts, "errors": errors}


@pytest.mark.slow
def test_every_device_attends_to_its_own_rows():
  script = (
    "import json; from igpo_jax import cli; from tests import cuda_programs_test as t; "
    "cli.run(lambda: print(json.dumps(t.eight_devices())))"
  )
  results = json.loads(run_on_devices(8, "-c", script).stdout.splitlines()[-1])
  assert results["counts"] == [[2, 0], [2, 1]] * 2
  assert max(results["errors"]) < 1e-5
