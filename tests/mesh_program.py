"""Run by sharding_test in a process with 8 devices: the same steps on every mesh, as JSON."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igpo_jax.config import ModelConfig, SamplerConfig, SFTConfig, default_config, freeze
from igpo_jax.models.llada import make_lm
from igpo_jax.parallel.mesh import make_mesh, shard_rows
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.rl.sampling import prompt_keys, sample_groups
from igpo_jax.train.setup import make_state
from igpo_jax.train.update import make_policy_programs, make_sft_update
from igpo_jax.types import Rollout

MESHES = {"one": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2),
          "1x2x4": (1, 2, 4)}  # fmt: skip


def run(shape, lm, first, data, config) -> dict:
  """Three SFT updates, a sampled rollout at T = 1 and a policy update on one mesh."""
  tokens, valid, response, advantages = data
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = make_mesh(*shape, devices=devices)
  with jax.set_mesh(mesh):
    shardings = tree_shardings(lm.logical_axes(), mesh)
    params = jax.device_put(first, shardings)
    sgd = optax.sgd(0.1)
    state = make_state(sgd, params, shardings, mesh)
    update = make_sft_update(lm, sgd, SFTConfig(batch_size=16, micro_batches=2))
    for i in range(3):
      state, sft = update(state, {}, *shard_rows(mesh, (tokens, valid, response)),
                          jax.random.key(i))  # fmt: skip

    canvas = np.full((8, 4, 16), lm.mask_id, np.int32)
    nothing = np.zeros_like(canvas, bool)
    ids = np.arange(8, dtype=np.uint32)
    prompt, prompt_valid, blank, hinted, ids = shard_rows(
      mesh, (tokens[:8, :8], valid[:8, :8], canvas, nothing, ids)
    )
    keys = prompt_keys(jax.random.key(5), ids)
    sampler = SamplerConfig(gen_length=16, block_length=8, steps=8, temperature=1.0)
    completion, commit_step = sample_groups(
      lm, params, prompt, prompt_valid, blank, hinted, keys, sampler
    )
    rollout = Rollout(prompt, prompt_valid, completion, hinted, commit_step,
                      shard_rows(mesh, advantages))  # fmt: skip
    programs = make_policy_programs(lm, sgd, config)
    policy = make_state(sgd, params, shardings, mesh)
    scores = programs.score(params, params, rollout, keys)
    policy, rl = programs.update(policy, {}, rollout, scores, keys, jnp.int32(0))
  flat = lambda tree: np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])
  return {
    "sft_loss": float(sft["loss"]),
    "rl_loss": float(rl["loss"]),
    "grad_norm": float(rl["grad_norm"]),
    "sft_params": flat(state.params).tolist(),
    "rl_params": flat(policy.params).tolist(),
    "completion": np.asarray(completion).ravel().tolist(),
    "kernel_spec": list(state.params["blocks"]["ff_proj"]["kernel"].sharding.spec),
    "rows_per_device": completion.sharding.shard_shape(completion.shape)[0],
  }


def main() -> None:
  lm = make_lm(ModelConfig(d_model=32, n_layers=2, n_heads=4, mlp_hidden=64, vocab_size=24,
                           mask_id=1, eos_id=0))  # fmt: skip
  first = jax.tree.map(np.asarray, lm.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 20, (16, 24)).astype(np.int32)
  valid = np.arange(24) >= rng.integers(0, 4, (16, 1))
  response = np.broadcast_to(np.arange(24) >= 8, (16, 24)).copy()
  advantages = rng.standard_normal((8, 4)).astype(np.float32)
  config = default_config()
  config.stages = ()
  config = freeze(config)
  config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, micro_batches=2))
  data = (tokens, valid, response, advantages)
  print(json.dumps({name: run(shape, lm, first, data, config) for name, shape in MESHES.items()}))


if __name__ == "__main__":
  main()
