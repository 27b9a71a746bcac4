"""Run by families_test in a process with 8 devices: families on several meshes, as JSON."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax

from igpo_jax.config import LoRAConfig, SamplerConfig, SFTConfig
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.models import FAMILIES, families, lora, make_lm
from igpo_jax.parallel.mesh import make_mesh, shard_rows
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.train.setup import make_state
from igpo_jax.train.sft_update import make_sft_update
from igpo_jax.types import Canvas

MESHES = {
  "llada_moe": ((1, 8, 1), (2, 2, 2), (4, 1, 2)),
  "llada2": ((1, 4, 2),),
  "dream": ((2, 2, 2),),
}
ROWS, PROMPT, LENGTH = 16, 4, 8


def run(name: str, shape) -> dict:
  """The loss and what an update changes, and what is decoded."""
  experts = "moe" in FAMILIES[name].reads
  config = families.model_config(
    name, FAMILIES[name].tiny, vocab_size=24, mask_id=1, eos_id=0,
    lora=LoRAConfig(rank=2, alpha=4.0, targets=".*blocks/.*"),
    **({"router_loss": 0.1} if experts else {}),
  )  # fmt: skip
  lm = make_lm(config)
  mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  first = jax.tree.map(np.asarray, jax.jit(lm.init)(jax.random.key(0)))
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 24, (ROWS, PROMPT + LENGTH)).astype(np.int32)
  valid = np.arange(PROMPT + LENGTH) >= rng.integers(0, 3, (ROWS, 1))
  response = np.ones((ROWS, LENGTH), bool)
  with jax.set_mesh(mesh):
    shardings = tree_shardings(lm.logical_axes(), mesh)
    trainable, frozen = lora.split(jax.device_put(first, shardings))
    optimizer = optax.sgd(0.1)
    state = make_state(optimizer, trainable, lora.split(shardings)[0], mesh)
    update = make_sft_update(lm, optimizer, SFTConfig(batch_size=ROWS, micro_batches=2))
    rows = shard_rows(mesh, (tokens, valid, response))
    losses = []
    for i in range(2):
      state, metrics = update(state, frozen, *rows, jax.random.key(i))
      losses.append(float(metrics["loss"]))
    params = lora.combine(frozen, state.params)
    masked = np.where(np.arange(PROMPT + LENGTH) >= PROMPT, 1, tokens)
    fixed = np.broadcast_to(np.arange(PROMPT + LENGTH) < PROMPT, tokens.shape)
    canvas = Canvas(*shard_rows(mesh, (masked, fixed, valid)))
    sampler = SamplerConfig(LENGTH, 4, 4, early_stop="none")
    out = denoise(lm, params, canvas, jax.random.key(0), sampler)
    flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(state.params)])
  return {"loss": losses, "params": flat.tolist(), "tokens": np.asarray(out.tokens).tolist()}


def main() -> None:
  jax.config.update("jax_default_matmul_precision", "highest")
  out = {}
  for name, meshes in MESHES.items():
    out[name] = {"one": run(name, (1, 1, 1))}
    out[name] |= {"x".join(map(str, shape)): run(name, shape) for shape in meshes}
  print(json.dumps(out))


if __name__ == "__main__":
  main()
