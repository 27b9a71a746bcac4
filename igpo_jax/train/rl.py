"""Policy optimization: explore with inpainting, estimate, update (docs/method.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.models import lora
from igpo_jax.parallel.mesh import check_micro_batches, shard_rows
from igpo_jax.rewards.score import Scorer
from igpo_jax.rl.rollout import Explorer
from igpo_jax.rl.sampling import DeviceClock, prompt_keys
from igpo_jax.train.loop import Run, Stage, run_stage
from igpo_jax.train.progress import StepClock
from igpo_jax.train.setup import (
  Model,
  compute_copy,
  make_optimizer,
  purpose_key,
  start_state,
)
from igpo_jax.train.update import make_policy_programs, shardings_of
from igpo_jax.types import Params, TrainState


def train_rl(run: Run, model: Model, scorer: Scorer, stream: PromptStream) -> Params:
  """Trains the policy from `model.params`, which stay as the KL reference."""
  stage, state = make_stage(
    run.config, run.mesh, model, scorer, stream, lambda: StepClock(run.stop, run.progress)
  )
  return stage.all_params(run_stage(run, stage, state).params)


def make_stage(
  config: Config,
  mesh,
  model: Model,
  scorer: Scorer,
  stream: PromptStream,
  new_clock: Callable[[], DeviceClock] = DeviceClock,
) -> tuple[Stage, TrainState]:
  """The stage's steps, and the state they start from.

  Args:
    stream: prompts with their traces (`preflight.rl_stream`).
    new_clock: makes what is told how far a step is.
  """
  # policy, reference, optimizer
  optimizer = make_optimizer(config.rl_optimizer, config.rl.steps * config.rl.inner_updates)
  # What is only read is kept in the compute dtype. Under LoRA policy and reference share
  # the base; only the small adapters exist twice.
  readable = functools.partial(compute_copy, dtype=config.model.dtype)
  reference = readable(model.params) if config.objective.beta > 0 else None
  # A float32 master must not stay around unused beside the state and the reference.
  trained = jax.tree.leaves(lora.split(model.params)[0])
  is_cast = all(x.dtype != jnp.dtype(config.model.dtype) for x in trained)
  state, frozen = start_state(model, optimizer, mesh, donate=is_cast)
  whole = functools.partial(lora.combine, frozen)
  prompts, micro_batches = config.rl.prompts_per_step, config.rl.micro_batches
  check_micro_batches(mesh, prompts, micro_batches, "rl.micro_batches")
  programs = make_policy_programs(model.lm, optimizer, config, shardings_of(state))
  explorer = Explorer(model.lm, model.tokenizer, scorer, config, mesh)

  # step
  def step(state, n):
    clock = new_clock()
    key = lambda purpose: purpose_key(config.seed, n, purpose)
    policy, batch = readable(whole(state.params)), stream.batch(n)
    explored = explorer(policy, batch, n, {p: key(p) for p in ("sample", "resample")}, clock)
    keys_of = lambda ids: prompt_keys(key("estimate"), shard_rows(mesh, ids))
    learnt, keys = explored.learnt, keys_of(batch.row_id[explored.groups])
    whole_batch = (explored.rollout, keys_of(batch.row_id))
    with clock.program("likelihood", learnt.completion.shape):
      scores = programs.score(policy, reference, learnt, keys, whole_batch)
    clock.dispatched()
    for u in range(config.rl.inner_updates):
      with clock.program("update", learnt.completion.shape):
        state, metrics = programs.update(state, frozen, learnt, scores, keys, jnp.int32(u))
    idle = {"time/device_idle_seconds": clock.idle_seconds}
    return state, {**metrics, **explored.metrics, **idle}, explored.rows

  shown = ("reward", "all_wrong_before", "all_wrong_after", "kl")
  stage = Stage("rl", config.rl.steps, config.rl.eval_every, step, whole, shown, programs=3)
  return stage, state
