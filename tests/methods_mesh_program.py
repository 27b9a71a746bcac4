"""Run by methods_test in a process with 8 devices: updates of two methods on two meshes, JSON."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax import cli
from igpo_jax.config import default_config, freeze
from igpo_jax.diffusion.completions import prompt_keys
from igpo_jax.models import make_lm
from igpo_jax.parallel.mesh import make_mesh, shard_rows
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.setup import make_state
from igpo_jax.types import Rollout
from tests.mesh_program import MODEL, flat, sgd_with_gradient

P, G, PROMPT, LENGTH, STEPS = 8, 4, 8, 16, 8
METHODS = {"trace_sampled": "trace_ppo", "block_random": "stabledrl"}
MESHES = ((1, 1, 1), (2, 2, 2))


def make_arrays() -> tuple[dict, np.ndarray]:
  """(The arrays of a rollout with hints and ends, identities of its prompts)."""
  rng = np.random.default_rng(0)
  completion = rng.integers(2, MODEL.vocab_size, (P, G, LENGTH)).astype(np.int32)
  completion[::2, 0, 9:] = MODEL.eos_id
  hinted = rng.random(completion.shape) < 0.3
  step = rng.permuted(np.broadcast_to(np.arange(LENGTH) % STEPS, completion.shape), axis=-1)
  return {
    "prompt": rng.integers(2, MODEL.vocab_size, (P, PROMPT)).astype(np.int32),
    "prompt_valid": np.arange(PROMPT) >= rng.integers(0, 4, (P, 1)),
    "completion": completion,
    "hinted": hinted,
    "commit_step": np.where(hinted, -1, step).astype(np.int32),
    "advantages": rng.standard_normal((P, G)).astype(np.float32),
    "commit_logp": np.where(hinted, 0, rng.uniform(-3, 0, hinted.shape)).astype(np.float32),
  }, np.arange(P, dtype=np.uint32)


@functools.cache
def model():
  """(lm, parameters on the host)."""
  lm = make_lm(MODEL)
  return lm, jax.tree.map(np.asarray, jax.jit(lm.init)(jax.random.key(0)))


def run(estimator: str, shape: tuple[int, int, int]) -> dict:
  """One update: loss, gradient and the metrics."""
  config = default_config()
  config.stages = ()
  config.rl.estimator, config.rl.objective = estimator, METHODS[estimator]
  config.rl.group_size, config.rl.prompts_per_step = G, P
  config.sampler.gen_length, config.sampler.block_length = LENGTH, 8
  config.sampler.steps = STEPS
  config.estimator.trace_sampled.steps = "unsure"
  mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  lm, first = model()
  with jax.set_mesh(mesh):
    places = tree_shardings(lm.logical_axes(), mesh)
    params = jax.device_put(first, places)
    arrays, ids = shard_rows(mesh, make_arrays())
    keys = prompt_keys(jax.random.key(6), ids)
    optimizer = sgd_with_gradient(0.1)
    programs = make_policy_programs(lm, optimizer, freeze(config))
    state, rollout = make_state(optimizer, params, places, mesh), Rollout(**arrays)
    reference = jax.tree.map(lambda x: 0.9 * x, params) if estimator == "trace_sampled" else None
    scores = programs.score(params, reference, rollout, keys)
    state, metrics = programs.update(state, {}, rollout, scores, keys, jnp.int32(0))
    return {"gradient": flat(state.opt_state), "metrics": {k: float(v) for k, v in metrics.items()}}


def main() -> None:
  print(json.dumps({name: [run(name, shape) for shape in MESHES] for name in METHODS}))


if __name__ == "__main__":
  cli.run(main)
