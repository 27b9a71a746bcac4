"""Policy optimization: explore with inpainting, estimate, update (docs/method.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.diffusion.completions import prompt_keys
from igpo_jax.models import lora
from igpo_jax.parallel.mesh import check_micro_batches, shard_rows
from igpo_jax.rewards.score import Scorer
from igpo_jax.rl.methods import objective_of
from igpo_jax.rl.rollout import Explorer
from igpo_jax.rl.rows import sample_rows
from igpo_jax.rl.sampling import DeviceClock
from igpo_jax.train.loop import Run, Stage, run_stage, samples_due
from igpo_jax.train.micro_batches import shardings_of
from igpo_jax.train.policy_update import PolicyPrograms, make_policy_programs
from igpo_jax.train.progress import StepClock
from igpo_jax.train.setup import (
  Model,
  compute_copy,
  make_optimizer,
  purpose_key,
  rounding_key,
  start_state,
)
from igpo_jax.train.token_stats import by_group, make_token_stats
from igpo_jax.types import Params, TrainState


def train_rl(
  run: Run,
  model: Model,
  scorer: Scorer,
  stream: PromptStream,
  make_programs: Callable[..., PolicyPrograms] = make_policy_programs,
  keep: bool = False,
) -> Params:
  """Runs the RL stage. A collective.

  Args:
    run: the run.
    model: the policy to start from, which is also the reference.
    scorer: grades completions.
    stream: prompts with their traces (`preflight.rl_stream`).
    make_programs: see `make_stage`.
    keep: do not use up the arrays of `model.params`, since another stage starts from them
      (train/arms.py).

  Returns:
    All parameters of the model after the last step.
  """
  new_clock = lambda: StepClock(run.stop, run.progress)
  stage, state = make_stage(
    run.config, run.mesh, model, scorer, stream, new_clock, make_programs=make_programs, keep=keep
  )
  return stage.all_params(run_stage(run, stage, state).params)


def make_stage(
  config: Config,
  mesh,
  model: Model,
  scorer: Scorer,
  stream: PromptStream,
  new_clock: Callable[[], DeviceClock] = DeviceClock,
  optimizer: optax.GradientTransformation | None = None,
  make_programs: Callable[..., PolicyPrograms] = make_policy_programs,
  keep: bool = False,
) -> tuple[Stage, TrainState]:
  """The RL stage for `run_stage`, and the state that it starts from.

  Args:
    config: all options.
    mesh: the device mesh.
    model, scorer, stream: see `train_rl`.
    new_clock: makes a clock for each step, which is told how far the step is.
    optimizer: an optimizer to use instead of that of `rl_optimizer`; None for no other.
    make_programs: called instead of `make_policy_programs`, with the same arguments. So several
      stages of a process can share compiled programs.
    keep: see `train_rl`.
  """
  # policy, reference, optimizer
  updates = config.rl.steps * config.rl.inner_updates
  optimizer = optimizer or make_optimizer(config.rl_optimizer, updates)
  # Parameters that are only read are kept in the dtype of the computation. Under LoRA, policy and
  # reference share the base; only the small adapters exist twice.
  readable = functools.partial(compute_copy, dtype=config.model.dtype)
  reference = readable(model.params) if objective_of(config).needs_reference else None
  # Float32 parameters of the model must not stay in memory, unused, beside state and reference.
  trained = jax.tree.leaves(lora.split(model.params)[0])
  is_cast = all(x.dtype != jnp.dtype(config.model.dtype) for x in trained)
  state, frozen = start_state(model, optimizer, mesh, donate=is_cast and not keep)
  all_params = functools.partial(lora.combine, frozen)
  prompts, micro_batches = config.rl.prompts_per_step, config.rl.micro_batches
  check_micro_batches(mesh, prompts, micro_batches, "rl.micro_batches")
  programs = make_programs(model.lm, optimizer, config, shardings_of(state))
  explorer = Explorer(model.lm, model.tokenizer, scorer, config, mesh)

  token_stats = make_token_stats(model.lm, config) if config.log.token_stats else None

  # step
  def explore(state, n, clock):
    keys = {purpose: purpose_key(config.seed, n, purpose) for purpose in ("sample", "resample")}
    policy = readable(all_params(state.params), key=rounding_key(config, n))
    # Each step has its own batches, whether it needs them or not: a resumed run gets the same ones.
    count = 1 + config.rl.refill
    batch, *further = (functools.partial(stream.batch, n * count + k) for k in range(count))
    return policy, explorer(policy, batch(), n, keys, clock, further)

  def step(state, n):
    clock, rounding = new_clock(), rounding_key(config, n)
    policy, explored = explore(state, n, clock)
    wanted = samples_due(config.log, n + 1, config.rl.steps)
    keys_of = lambda ids: prompt_keys(
      purpose_key(config.seed, n, "estimate"), shard_rows(mesh, ids)
    )
    rollout, keys = explored.update_rollout, keys_of(explored.row_id[explored.update_groups])
    full_batch = (explored.rollout, keys_of(explored.row_id))
    with clock.program("likelihood", rollout.completion.shape):
      scores = programs.score(policy, reference, rollout, keys, full_batch)
    before = None
    if wanted and token_stats:
      with clock.program("token_stats", rollout.completion.shape):
        before = token_stats(policy, rollout, keys)
    clock.dispatched()
    del policy  # updates read the parameters themselves: this frees memory for them
    for u in range(config.rl.inner_updates):
      with clock.program("update", rollout.completion.shape):
        inner = (rollout, scores, keys, jnp.int32(u), rounding)
        state, metrics = programs.update(state, frozen, *inner)
    stats = None
    if before is not None:
      after = token_stats(readable(all_params(state.params), key=rounding), rollout, keys)
      numbers = explored.numbers[explored.update_groups]
      stats = by_group(numbers, before, after, of_all=explored.tries.batches > 1)
    rows = []
    if wanted:
      rows = sample_rows(explored.tries, model.tokenizer, config.log.samples_per_step, stats)
    completions = explored.tries.own.reward.size * jax.process_count()
    cost = {
      "time/device_idle_seconds": clock.idle_seconds,
      "time/positions": clock.positions / completions,
    }
    return state, {**metrics, **explored.metrics, **cost}, rows

  shown = ("reward", "all_wrong_before", "all_wrong_after", "kl")
  stage = Stage(
    "rl", config.rl.steps, config.rl.eval_every, step, all_params, shown,
    programs=3 + bool(token_stats),
    explore=lambda state, n: explore(state, n, new_clock()),
  )  # fmt: skip
  return stage, state
