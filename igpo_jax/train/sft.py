"""Supervised fine-tuning: the masked-diffusion NELBO on responses (METHOD 1 and 6)."""

from __future__ import annotations

import functools

import jax

from igpo_jax.data.pipeline import SFTStream
from igpo_jax.data.sources import describe
from igpo_jax.models import lora
from igpo_jax.parallel.mesh import shard_rows
from igpo_jax.train.loop import Run, Stage, run_stage
from igpo_jax.train.runlog import say
from igpo_jax.train.setup import Model, load_source, make_optimizer, purpose_key, start_state
from igpo_jax.train.update import make_sft_update
from igpo_jax.types import Params


def train_sft(run: Run, model: Model) -> Params:
  """Fine-tunes from `model.params` on `data.sft`; returns the final parameters."""
  config = run.config

  # data: the batch of a step is a function of (seed, step)
  stream = SFTStream(
    load_source(config.data.sft, say),
    model.tokenizer,
    config.sft.batch_size,
    config.data.prompt_buckets,
    config.seed,
    config.sampler.gen_length,
    jax.process_index(),
    jax.process_count(),
  )
  say(f"sft: {len(stream)} records, left out: {describe(stream.dropped)}")

  # optimizer and state: of the adapters only under LoRA
  optimizer = make_optimizer(config.sft_optimizer, config.sft.steps)
  state, frozen = start_state(model, optimizer, run.mesh)
  update = make_sft_update(model.lm, optimizer, config.sft)

  # step
  def step(state, n):
    batch = stream.batch(n)
    arrays = shard_rows(run.mesh, (batch.tokens, batch.valid, batch.response))
    state, metrics = update(state, frozen, *arrays, purpose_key(config.seed, n, "sft_mask"))
    return state, metrics, []

  whole = functools.partial(lora.combine, frozen)
  shown = ("loss", "grad_norm")
  stage = Stage("sft", config.sft.steps, config.sft.eval_every, step, whole, shown)
  return whole(run_stage(run, stage, state).params)
