"""Run by sharding_test in a process with 8 devices: the same steps on every mesh, as JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igpo_jax import cli
from igpo_jax.config import (
  Config,
  DataConfig,
  LoRAConfig,
  ModelConfig,
  RLConfig,
  SamplerConfig,
  SFTConfig,
  default_config,
  freeze,
)
from igpo_jax.data.pipeline import PromptBatch
from igpo_jax.diffusion import network
from igpo_jax.diffusion.completions import RowQueue, Rows, prompt_keys
from igpo_jax.models import lora, make_lm
from igpo_jax.parallel.hlo import collectives
from igpo_jax.parallel.mesh import make_mesh, shard_rows
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.rewards.score import PendingScores, Scores
from igpo_jax.rl.sampling import DeviceClock, GroupSampler
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.setup import compute_copy, make_state
from igpo_jax.train.sft_update import make_sft_update
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
QUEUED = ("one", "8x1x1", "2x2x2")  # where a queue with an uneven tail is sampled as well
# Each slice's length is a program to compile, so only where rows lie on 8 and on 4 devices.
SLICED = ((1, 8, 1), (2, 2, 2))


def sgd_with_gradient(rate: float) -> optax.GradientTransformation:
  """Plain gradient descent; its state is the last gradient."""
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  step = lambda grads, state, params=None: (jax.tree.map(lambda g: -rate * g, grads), grads)
  return optax.GradientTransformation(zeros, step)


def adamw_beside(sgd: optax.GradientTransformation) -> optax.GradientTransformation:
  """`sgd`, whose gradients AdamW follows with a copy of the parameters: one program for both.

  The state is (state of `sgd`, state of AdamW, its copy).
  """
  adamw = optax.adamw(1e-3)

  def init(params):
    return sgd.init(params), adamw.init(params), jax.tree.map(lambda x: x, params)

  def update(grads, state, params):
    updates, first = sgd.update(grads, state[0], params)
    moves, second = adamw.update(grads, state[1], state[2])
    return updates, (first, second, optax.apply_updates(state[2], moves))

  return optax.GradientTransformation(init, update)


class Silent:
  """A tokenizer that reads nothing and a grader that calls everything wrong."""

  def decode(self, tokens):
    del tokens
    return ""

  def submit(self, texts, records):
    del records
    n = len(texts)
    scores = Scores(np.zeros(n, np.float32), np.zeros(n, bool), ["ok"] * n, texts, {})
    return PendingScores(lambda: scores)


def sampling_config(model: ModelConfig, sampler: SamplerConfig, sliced: bool) -> Config:
  """In two slices with the smallest bucket that fits each, or in one piece and one bucket."""
  buckets, slices = ((6, 8), 2) if sliced else ((8,), 1)
  rl = RLConfig(prompts_per_step=8, group_size=4, sample_slices=slices)
  data = DataConfig(prompt_buckets=buckets)
  return Config(stages=(), model=model, data=data, sampler=sampler, rl=rl)


def flat(tree) -> list[float]:
  return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)]).tolist()


@functools.lru_cache
def fresh(config: ModelConfig):
  """Parameters of a model, the same for all meshes, as numpy arrays."""
  return jax.tree.map(np.asarray, jax.jit(make_lm(config).init)(jax.random.key(0)))


def run(name: str, config: ModelConfig, shape, data) -> dict:
  """SFT updates, sampled rollouts and policy updates on one mesh."""
  tokens, valid, response, advantages = data
  mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  lm = make_lm(config)
  first = fresh(config)
  with jax.set_mesh(mesh):
    shardings = tree_shardings(lm.logical_axes(), mesh)
    params = jax.device_put(first, shardings)
    trainable, frozen = lora.split(params)
    places = lora.split(shardings)[0]
    state_of = lambda optimizer: make_state(optimizer, trainable, places, mesh)
    rows = shard_rows(mesh, (tokens, valid, response))
    out = {}

    # SFT: three steps of SGD, and of AdamW where it is looked at
    sgd = sgd_with_gradient(0.1)
    optimizer = adamw_beside(sgd) if config is MODEL else sgd
    update = make_sft_update(lm, optimizer, SFTConfig(batch_size=16, micro_batches=2))
    state = state_of(optimizer)
    for i in range(3):
      state, metrics = update(state, frozen, *rows, jax.random.key(i))
      if i == 0:
        gradient = state.opt_state[0] if config is MODEL else state.opt_state
        out["sft_gradient"], out["sft_loss"] = flat(gradient), float(metrics["loss"])
    out["sft_sgd"] = flat(state.params)
    if config is MODEL:
      out["sft_adamw"] = flat(state.opt_state[2])

    # rollouts: 8 prompts x 4, all at once; on some meshes also in slices of like length
    prompts = PromptBatch(
      tokens=tokens[:8, :8], valid=valid[:8, :8], records=[None] * 8, traces=[], answer_spans=[],
      row_id=np.arange(8, dtype=np.uint32), real=np.ones(8, bool),
    )  # fmt: skip
    canvas = np.full((8, 4, 16), lm.mask_id, np.int32)
    nothing = np.zeros_like(canvas, bool)
    sampler = SamplerConfig(gen_length=16, block_length=8, steps=8, temperature=1.0)
    setting = sampling_config(config, sampler, shape in SLICED)
    sample = GroupSampler(lm, Silent(), Silent(), setting, mesh)
    samples = sample(
      params, prompts, np.arange(8), canvas, nothing, jax.random.key(5), DeviceClock()
    )
    out["completion"] = samples.completion.ravel().tolist()
    if name in QUEUED:
      out["completion_queue"] = uneven_queue(lm, params, mesh, tokens, valid)
    copy = compute_copy(params, "bfloat16", jax.random.key(7))
    bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(copy))
    out["rounded by chance"] = hashlib.sha256(bits).hexdigest()
    out["cuts"] = sample.cuts(prompts, np.arange(8), nothing)[1]

    # policy: one update
    whole = default_config()
    whole.stages = ()
    whole.rl.micro_batches = 2 if shape[0] * shape[1] <= 4 else 1
    whole = freeze(whole)
    rollout, ids = shard_rows(
      mesh,
      (Rollout(tokens[:8, :8], valid[:8, :8], samples.completion, nothing,
               samples.commit_step, advantages), prompts.row_id),
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
    "rows_per_device": rollout.prompt.sharding.shard_shape(rollout.prompt.shape)[0],
    "collectives": [[c.kind, c.shape] for c in collectives(update.as_text(), loops=(1,) * 8)],
  }


def uneven_queue(lm, params, mesh, tokens, valid) -> list[int]:
  """The completions of 13 rows with 4 to 16 masks through 8 slots, greedy, with the dual cache."""
  at, masks = np.arange(13) % 8, 4 + np.arange(13) * 5 % 13
  hinted = np.arange(16) >= masks[:, None]
  canvas = np.where(hinted, 5, lm.mask_id).astype(np.int32)
  rows = Rows(tokens[at, :8], valid[at, :8], canvas, hinted, at.astype(np.uint32), at)
  cfg = SamplerConfig(gen_length=16, block_length=8, steps=16, cache="dual")
  made = list(RowQueue(lm, params, mesh, cfg, rows, jax.random.key(8), 8))
  assert sum(len(some.rows) for some in made) == 13 and len(made) == 2
  order = np.argsort(np.concatenate([some.rows for some in made]))
  return np.concatenate([some.completion for some in made])[order].ravel().tolist()


def main() -> None:
  network.FEW_LOGITS = 0  # the head in a narrow program, too; more of them take long to compile
  network.HEAD_PROGRAMS = 2
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 20, (16, 24)).astype(np.int32)
  valid = np.arange(24) >= rng.integers(0, 4, (16, 1))
  response = np.broadcast_to(np.arange(24) >= 8, (16, 24)).copy()
  advantages = rng.standard_normal((8, 4)).astype(np.float32)
  data = (tokens, valid, response, advantages)
  print(json.dumps({name: run(name, *setting, data) for name, setting in RUNS.items()}))


if __name__ == "__main__":
  cli.run(main)
