"""Run by families_test in a process with 8 devices: kinds of layout on several meshes, as JSON."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np

from igpo_jax import cli
from igpo_jax.config import LoRAConfig, SamplerConfig
from igpo_jax.diffusion.nelbo import nelbo_sum
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.models import FAMILIES, families, lora, make_lm
from igpo_jax.parallel.mesh import AXES, make_mesh, shard_rows
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.types import Canvas

# Between them they have every parameter that any family has (families_test holds that).
# Sizes are of data, fsdp, expert, tensor.
RUNS = {
  "dream": ({"tie_embeddings": True}, ((2, 2, 1, 2),)),
  "llada_moe": ({"router_loss": 0.1}, ((1, 1, 8, 1), (1, 2, 2, 2))),
  "llada2": ({"n_layers": 2}, ((2, 1, 2, 2),)),
}
ROWS, PROMPT, LENGTH = 8, 4, 4


def tiny(name: str, **more):
  return families.model_config(
    name, {**FAMILIES[name].tiny, **more}, vocab_size=24, mask_id=1, eos_id=0,
    lora=LoRAConfig(rank=2, alpha=4.0, targets=".*blocks/.*"),
  )  # fmt: skip


@functools.lru_cache
def parameters(lm):
  """(adapters, the rest), as numpy arrays: no program is compiled for them."""
  rng = np.random.default_rng(0)
  noise = lambda x: rng.normal(size=x.shape, scale=0.3).astype(x.dtype)
  return lora.split(jax.tree.map(noise, jax.eval_shape(lm.init, jax.random.key(0))))


def run(config, sizes) -> dict:
  """The loss and its gradient; of a block-causal model also what is decoded with a cache."""
  lm = make_lm(config)
  sizes = dict(zip(AXES, sizes, strict=True))
  mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 24, (ROWS, PROMPT + LENGTH)).astype(np.int32)
  valid = np.arange(PROMPT + LENGTH) >= rng.integers(0, 3, (ROWS, 1))
  masked = (np.arange(PROMPT + LENGTH) >= PROMPT) & (rng.random(tokens.shape) < 0.7)
  noisy = np.where(masked, lm.mask_id, tokens)
  response, p = np.ones((ROWS, LENGTH), bool), np.full(ROWS, 0.7, np.float32)

  def nelbo(adapters, base, *rows):
    return nelbo_sum(lm, lora.combine(base, adapters), *rows)[0]

  with jax.set_mesh(mesh):
    shardings = lora.split(tree_shardings(lm.logical_axes(), mesh))
    adapters, base = (jax.device_put(*x) for x in zip(parameters(lm), shardings, strict=True))
    rows = shard_rows(mesh, (noisy, masked, p, tokens, valid, response))
    loss, gradient = jax.jit(jax.value_and_grad(nelbo))(adapters, base, *rows)
    out = {"loss": float(loss)}
    flat = [np.asarray(x).ravel() for x in jax.tree.leaves(gradient)]
    out["gradient"] = np.concatenate(flat).tolist()
    if config.moe.experts:
      kernel = base["blocks"]["experts"]["ff_proj"]["kernel"]
      out["experts"] = kernel.addressable_shards[0].data.shape[1]
      out["share"] = kernel.addressable_shards[0].data.nbytes / kernel.nbytes
    if lm.block_length:
      fixed = np.broadcast_to(np.arange(PROMPT + LENGTH) < PROMPT, tokens.shape)
      canvas = Canvas(*shard_rows(mesh, (np.where(fixed, tokens, lm.mask_id), fixed, valid)))
      sampler = SamplerConfig(LENGTH, LENGTH, 2, cache="dual", early_stop="none")
      found = denoise(lm, lora.combine(base, adapters), canvas, jax.random.key(0), sampler)
      out["tokens"] = np.asarray(found.tokens).tolist()
  return out


def main() -> None:
  jax.config.update("jax_default_matmul_precision", "highest")
  out = {}
  for name, (more, meshes) in RUNS.items():
    config = tiny(name, **more)
    for sizes in ((1, 1, 1, 1), *meshes):
      out.setdefault(name, {})["x".join(map(str, sizes))] = run(config, sizes)
  print(json.dumps(out))


if __name__ == "__main__":
  cli.run(main)
