"""Supervised fine-tuning: the masked-diffusion NELBO on responses (docs/method.md#sft)."""

from __future__ import annotations

import contextlib
import functools

from igpo_jax.checkpoint import shapes_of
from igpo_jax.data.pipeline import SFTStream
from igpo_jax.errors import UserError
from igpo_jax.models import lora
from igpo_jax.parallel.distributed import from_first
from igpo_jax.parallel.mesh import check_micro_batches, shard_rows
from igpo_jax.rl.methods import objective_of
from igpo_jax.train.loop import Run, Stage, run_stage
from igpo_jax.train.micro_batches import shardings_of
from igpo_jax.train.preflight import sft_steps
from igpo_jax.train.runlog import print_once
from igpo_jax.train.setup import Model, make_optimizer, purpose_key, start_state
from igpo_jax.train.sft_update import make_sft_update
from igpo_jax.types import Params


def train_sft(run: Run, model: Model, stream: SFTStream) -> Params:
  """Runs the SFT stage. A collective.

  The trained arrays of `model.params` are used up: under full fine-tuning they may not fit into
  memory beside the state.

  Args:
    run: the run.
    model: the model to start from.
    stream: the batches (`preflight.sft_stream`). A step's batch is a function of (seed, step).

  Returns:
    All parameters of the model, those that `sft.select` asks for.
  """
  config = run.config
  steps = sft_steps(config, stream)

  # optimizer and state: of the adapters only under LoRA
  optimizer = make_optimizer(config.sft_optimizer, steps)
  state, frozen = start_state(model, optimizer, run.mesh, donate=True)
  check_micro_batches(
    run.mesh, config.sft.batch_size, config.sft.micro_batches, "sft.micro_batches"
  )
  update = make_sft_update(model.lm, optimizer, config.sft, shardings_of(state))

  # step
  def step(state, n):
    batch = stream.batch(n)
    response = batch.response[:, -batch.response_length :]
    arrays = shard_rows(run.mesh, (batch.tokens, batch.valid, response))
    with run.progress.program("update", (*arrays[0].shape, batch.response_length)):
      state, metrics = update(state, frozen, *arrays, purpose_key(config.seed, n, "sft_mask"))
    return state, metrics, []

  all_params = functools.partial(lora.combine, frozen)
  shown = ("loss", "grad_norm")
  stage = Stage("sft", steps, config.sft.eval_every, step, all_params, shown)
  state = run_stage(run, stage, state)
  if config.sft.select == "last":
    return all_params(state.params)
  best = handed_on(run, "sft")
  print_once(f"sft: goes on with the best by {config.checkpoint.best_metric}, of step {best}")
  like = shapes_of(state)
  del state  # there may be no room for two
  return all_params(run.checkpoints("sft").restore(best, like).params)


def is_spent(run: Run) -> bool:
  """Whether SFT's checkpoints are gone and RL can continue from its own. A collective.

  A user may have deleted them to free the disk.

  Raises:
    UserError: they are gone, and RL needs them.
  """
  config = run.config
  with (
    contextlib.closing(run.checkpoints("sft")) as sft,
    contextlib.closing(run.checkpoints("rl")) as rl,
  ):
    kept, step = from_first(lambda: [sft.latest(), rl.latest()])
    directory = sft.directory
  if "rl" not in config.stages or kept is not None or step is None:
    return False
  objective = objective_of(config)
  if step < config.rl.steps and objective.needs_reference:
    raise UserError(
      f"sft: {directory} holds no checkpoint any more, and RL, which is at step {step} of "
      f"{config.rl.steps}, needs what SFT ended with as its reference policy "
      f"(rl.objective={objective.name!r}{objective.without_reference}): put them back, or choose "
      "another --workdir"
    )
  print_once(f"sft: {directory} holds no checkpoint any more; RL goes on from its own")
  return True


def handed_on(run: Run, stage: str) -> int:
  """The step of a finished stage whose parameters the next stage gets. A collective.

  Raises:
    UserError: `sft.select` is "best", and `checkpoint.best_metric` was never measured.
  """
  checkpoints = run.checkpoints(stage)
  best = stage == "sft" and run.config.sft.select == "best"
  step = from_first(checkpoints.best if best else checkpoints.latest)
  if step is None:
    raise UserError(
      f"no checkpoint of {stage} in {run.workdir} has the metric"
      f" checkpoint.best_metric={run.config.checkpoint.best_metric!r}: name one that its rows of"
      " metrics.jsonl have, or set sft.select='last'"
    )
  return step
