"""Fine-tuning and IGPO as two loops: python examples/train_loop.py [configs/quickstart.py:smoke]

python -m igpo_jax.main computes the same with the config, and adds checkpoints, evaluation, logs,
several processes and what saves memory (igpo_jax/train/rl.py).
"""

import sys

import jax
import jax.numpy as jnp

from igpo_jax.config import freeze
from igpo_jax.data.tokenizer import open_tokenizer
from igpo_jax.diffusion.completions import prompt_keys
from igpo_jax.flags import load
from igpo_jax.parallel.mesh import configured_mesh, shard_rows
from igpo_jax.rewards.score import make_scorer
from igpo_jax.rl.rollout import Explorer
from igpo_jax.train import policy_update, preflight, setup, sft_update


def train(config):
  """Yields the metrics of every step: (stage, {name: value})."""
  mesh, tokenizer = configured_mesh(config.mesh), open_tokenizer(config.data.tokenizer)
  key = lambda step, purpose: setup.purpose_key(config.seed, step, purpose)
  with jax.set_mesh(mesh), make_scorer(config.reward) as scorer:
    model = setup.make_model(config, tokenizer, mesh)
    # Fine-tuning: mask some of a trace, and learn to fill it in.
    optimizer = setup.make_optimizer(config.sft_optimizer, config.sft.steps)
    state, frozen = setup.start_state(model, optimizer, mesh)
    traces = preflight.sft_stream(config, tokenizer, setup.load_source(config.data.sft))
    fine_tune = sft_update.make_sft_update(model.lm, optimizer, config.sft)
    for n in range(config.sft.steps):
      b = traces.batch(n)
      arrays = shard_rows(mesh, (b.tokens, b.valid, b.response[:, -b.response_length :]))
      state, metrics = fine_tune(state, frozen, *arrays, key(n, "sft_mask"))
      yield "sft", metrics
    # IGPO: what fine-tuning ended with is the first policy, and stays as the reference.
    reference = state.params
    optimizer = setup.make_optimizer(config.rl_optimizer, config.rl.steps * config.rl.inner_updates)
    state = setup.make_state(optimizer, reference, model.shardings, mesh)
    prompts = preflight.rl_stream(config, tokenizer, setup.load_source(config.data.rl))
    explore = Explorer(model.lm, tokenizer, scorer, config, mesh)
    programs = policy_update.make_policy_programs(model.lm, optimizer, config)
    for n in range(config.rl.steps):
      # Sample and grade; where a whole group is wrong, again with parts of the trace in place.
      keys = {"sample": key(n, "sample"), "resample": key(n, "resample")}
      made = explore(state.params, prompts.batch(n), n, keys)
      keys = prompt_keys(key(n, "estimate"), shard_rows(mesh, made.row_id))
      scores = programs.score(state.params, reference, made.rollout, keys)  # likelihoods
      for u in range(config.rl.inner_updates):
        state, metrics = programs.update(state, frozen, made.rollout, scores, keys, jnp.int32(u))
      yield "rl", metrics | made.metrics


if __name__ == "__main__":
  name, *_ = *sys.argv[1:], "configs/quickstart.py:smoke"
  for stage, metrics in train(freeze(load(name)[0])):
    print(stage, *(f"{k}={metrics[k]:.3f}" for k in ("loss", "reward") if k in metrics))
