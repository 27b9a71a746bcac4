"""Run by sharding_test in a process with 8 devices: the same steps on every mesh, as JSON."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igpo_jax.config import (
  LoRAConfig,
  ModelConfig,
  SamplerConfig,
  SFTConfig,
  default_config,
  freeze,
)
from igpo_jax.diffusion import network
from igpo_jax.models import lora
from igpo_jax.models.llada import make_lm
from igpo_jax.parallel.hlo import collectives
from igpo_jax.parallel.mesh import make_mesh, shard_rows
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.rl.sampling import prompt_keys, row_keys, sample_rows
from igpo_jax.train.setup import make_state
from igpo_jax.train.update import make_policy_programs, make_sft_update
from igpo_jax.types import Rollout

MODEL = ModelConfig(
  d_model=32, n_layers=2, n_heads=4, mlp_hidden=64, vocab_size=24, mask_id=1, eos_id=0
)
SEQUENCE = dataclasses.replace(MODEL, shard_sequence=True, remat="full")
LORA = dataclasses.replace(MODEL, lora=LoRAConfig(rank=4, alpha=4.0, targets="blocks/.*|head"))
FUSED = dataclasses.replace(LORA, attention="dot_product")
RUNS = {
  "one": (MODEL, (1, 1, 1)),
  "8x1x1": (MODEL, (8, 1, 1)),
  "1x8x1": (MODEL, (1, 8, 1)),
  "2x2x2": (MODEL, (2, 2, 2)),
  "1x2x4": (MODEL, (1, 2, 4)),
  "1x2x4 sequence": (SEQUENCE, (1, 2, 4)),
  "lora one": (LORA, (1, 1, 1)),
  "lora 2x2x2": (FUSED, (2, 2, 2)),
}


def sgd_with_gradient(rate: float) -> optax.GradientTransformation:
  """Plain gradient descent; its state is the last gradient."""
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  step = lambda grads, state, params=None: (jax.tree.map(lambda g: -rate * g, grads), grads)
  return optax.GradientTransformation(zeros, step)


def flat(tree) -> list[float]:
  return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)]).tolist()


def run(config: ModelConfig, shape, data) -> dict:
  """SFT updates, sampled rollouts and policy updates on one mesh."""
  tokens, valid, response, advantages = data
  mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  lm = make_lm(config)
  first = jax.tree.map(np.asarray, lm.init(jax.random.key(0)))
  with jax.set_mesh(mesh):
    shardings = tree_shardings(lm.logical_axes(), mesh)
    params = jax.device_put(first, shardings)
    trainable, frozen = lora.split(params)
    places = lora.split(shardings)[0]
    state_of = lambda optimizer: make_state(optimizer, trainable, places, mesh)
    rows = shard_rows(mesh, (tokens, valid, response))
    out = {}

    # SFT: three steps of SGD and of AdamW
    sft = SFTConfig(batch_size=16, micro_batches=2)
    optimizers = {"sgd": sgd_with_gradient(0.1), "adamw": optax.adamw(1e-3)}
    for name, optimizer in optimizers.items() if config is MODEL else [*optimizers.items()][:1]:
      state, update = state_of(optimizer), make_sft_update(lm, optimizer, sft)
      for i in range(3):
        state, metrics = update(state, frozen, *rows, jax.random.key(i))
        if name == "sgd" and i == 0:
          out["sft_gradient"], out["sft_loss"] = flat(state.opt_state), float(metrics["loss"])
      out[f"sft_{name}"] = flat(state.params)

    # rollouts: 8 prompts x 4
    canvas = np.full((8, 4, 16), lm.mask_id, np.int32)
    nothing = np.zeros_like(canvas, bool)
    ids = np.arange(8, dtype=np.uint32)
    by_row = lambda x: np.repeat(x[:8], 4, axis=0)
    sampled = shard_rows(
      mesh,
      (by_row(tokens[:, :8]), by_row(valid[:, :8]), canvas.reshape(32, 16),
       nothing.reshape(32, 16), by_row(ids), np.tile(np.arange(4), 8)),
    )  # fmt: skip
    noise = row_keys(jax.random.key(5), *sampled[-2:])
    for temperature in (0.0, 1.0) if config is MODEL else (1.0,):
      sampler = SamplerConfig(gen_length=16, block_length=8, steps=8, temperature=temperature)
      completion, commit_step = sample_rows(lm, params, *sampled[:4], noise, sampler)
      out[f"completion_{temperature}"] = np.asarray(completion).ravel().tolist()

    # policy: one update
    whole = default_config()
    whole.stages = ()
    whole.rl.micro_batches = 2 if shape[0] * shape[1] <= 4 else 1
    whole = freeze(whole)
    in_groups = lambda x: np.asarray(x).reshape(8, 4, 16)
    rollout, ids = shard_rows(
      mesh,
      (Rollout(tokens[:8, :8], valid[:8, :8], in_groups(completion), nothing,
               in_groups(commit_step), advantages), ids),
    )  # fmt: skip
    keys = prompt_keys(jax.random.key(6), ids)
    optimizer = sgd_with_gradient(0.1)
    programs, state = make_policy_programs(lm, optimizer, whole), state_of(optimizer)
    scores = programs.score(params, params, rollout, keys)
    arguments = (state, frozen, rollout, scores, keys, jnp.int32(0))
    update = programs.update.lower(*arguments).compile()
    state, metrics = update(*arguments)
    out["rl_gradient"], out["rl_sgd"] = flat(state.opt_state), flat(state.params)
    out["rl_loss"], out["grad_norm"] = float(metrics["loss"]), float(metrics["grad_norm"])

  share = lambda x: x.addressable_shards[0].data.nbytes / x.nbytes
  kernel = lora.combine(frozen, state.params)["blocks"]["ff_proj"]["kernel"]
  return out | {
    "kernel_spec": list(kernel.sharding.spec),
    "kernel_share": share(kernel),
    "largest_shares": [
      max(share(x) for x in jax.tree.leaves(tree) if x.size > 64)
      for tree in (state.params, state.opt_state)
    ],
    "rows_per_device": completion.sharding.shard_shape(completion.shape)[0] // 4,
    "collectives": [[c.kind, c.shape] for c in collectives(update.as_text(), loops=(1,) * 8)],
  }


def main() -> None:
  network.FEW_LOGITS = 0  # the head in its narrow programs, too
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 20, (16, 24)).astype(np.int32)
  valid = np.arange(24) >= rng.integers(0, 4, (16, 1))
  response = np.broadcast_to(np.arange(24) >= 8, (16, 24)).copy()
  advantages = rng.standard_normal((8, 4)).astype(np.float32)
  data = (tokens, valid, response, advantages)
  print(json.dumps({name: run(*setting, data) for name, setting in RUNS.items()}))


if __name__ == "__main__":
  main()
