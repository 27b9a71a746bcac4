"""The device programs of a config, with the shapes and layouts of their arguments.

They are the programs that the training loops run, described without data, weights or devices. So
they can be compiled for a TPU slice that is not here, and their memory and FLOPs can be counted.
With the same number of fake devices they can be lowered, but not compiled, for GPUs:

    for name, program in programs(config, configured_mesh(config.mesh)).items():
      stablehlo = program.lower("cuda").as_text()
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

from igpo_jax.config import Config, ModelConfig, arms_of
from igpo_jax.diffusion.completions import sample_rows
from igpo_jax.models import lora, make_lm
from igpo_jax.models.attention import program_for
from igpo_jax.models.flops import copies_read, forward_flops
from igpo_jax.parallel.mesh import check_micro_batches
from igpo_jax.parallel.sharding import partition_spec, replicated, tree_shardings
from igpo_jax.rl.methods import forwards_of, objective_of, rows_per_prompt, views_kept
from igpo_jax.train.micro_batches import shardings_of
from igpo_jax.train.policy_update import (
  RolloutScores,
  corruptions,
  make_policy_programs,
  scores_old,
)
from igpo_jax.train.setup import make_optimizer, new_state, rounding_key, state_shardings
from igpo_jax.train.sft_update import make_sft_update
from igpo_jax.types import Params, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
  """One jitted program of a training step.

  Attributes:
    mesh: the mesh that it runs on.
    trace: () -> jax's traced program. Call it with the mesh in context, or call `lower`.
    max_trip_counts: upper bounds of data-dependent loops, outermost first (parallel/hlo.py).
    flops: upper bound of the FLOPs of its matrix products, over all chips (models/flops.py).
    forwards: how often it reads every layer's weights, in forward and backward passes.
    rows, positions: shape of the canvases that go through the layers at one time.
    other_resident_bytes: per chip, memory held by arrays that are not arguments of this program
      (for example the optimizer state during sampling).
    shared_bytes: per chip, memory of arrays that are two of its arguments. A compiler counts it
      twice.
  """

  mesh: jax.sharding.Mesh
  trace: Callable[[], jax.stages.Traced]
  max_trip_counts: tuple[int, ...]
  flops: int
  forwards: int
  rows: int
  positions: int
  other_resident_bytes: int
  shared_bytes: int = 0

  def lower(self, platform: str = "") -> jax.stages.Lowered:
    """Lowers the program with its mesh in context.

    Args:
      platform: such as "cuda" or "tpu", to lower for devices of that kind instead of the mesh's.
        The result can be read, but not compiled here. "": for the mesh's devices.
    """
    with jax.set_mesh(self.mesh):
      if not platform:
        return self.trace().lower()
      with program_for(platform), _cudnn_assumed():
        return self.trace().lower(lowering_platforms=(platform,))


CUDNN_VERSION = 9_10_00  # of the machine that programs are lowered for, where this one has none


@contextlib.contextmanager
def _cudnn_assumed() -> Iterator[None]:
  """jax asks for cuDNN's version when fused attention is traced; without cuDNN that is an error."""
  module, name = fused_attention_stablehlo, "check_cudnn_version"
  ask = getattr(module, name)
  if module.cuda_versions is None:
    setattr(module, name, lambda: CUDNN_VERSION)
  try:
    yield
  finally:
    setattr(module, name, ask)


def bytes_per_chip(tree: Any) -> int:
  """The bytes of a tree on one device. `tree` has ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


class Copies(NamedTuple):
  """Bytes per chip of the copies that RL keeps in the dtype of the computation.

  Attributes:
    policy: copies for sampling and scores. Parameters that already have the dtype are not copied.
    reference: arrays that the KL reference does not share with the policy: the trained part, and
      those of the rest that are cast.
  """

  policy: int
  reference: int


def copies(params: Params, dtype: str) -> Copies:
  """The bytes that `compute_copy` needs for the policy and for a reference.

  Args:
    params: ShapeDtypeStructs with shardings.
    dtype: `model.dtype`.
  """
  trainable, frozen = lora.split(params)
  size = lambda tree: bytes_per_chip(_in_dtype(tree, dtype))
  cast = lambda tree: size(tree) - bytes_per_chip(_left_alone(tree, dtype))
  return Copies(cast(trainable) + cast(frozen), size(trainable) + cast(frozen))


def _in_dtype(tree: Any, dtype: str) -> Any:
  place = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
  return jax.tree.map(place, tree)


def _left_alone(tree: Any, dtype: str) -> list[Any]:
  """The arrays that `compute_copy` does not copy."""
  return [x for x in jax.tree.leaves(tree) if x.dtype == jnp.dtype(dtype)]


def _abstract(tree: Any, shardings: Any) -> Any:
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(place, tree, shardings)


def abstract_params(config: Config, mesh) -> Params:
  """The parameters of `config.model` as ShapeDtypeStructs with shardings over the mesh."""
  shapes, axes = _shapes(config.model)
  return _abstract(shapes, tree_shardings(axes, mesh))


@functools.lru_cache(maxsize=32)
def _shapes(model: ModelConfig) -> tuple[Params, Any]:
  """(shapes, logical axes) of a model's parameters. Cached, since it takes nearly a second."""
  lm = make_lm(model)
  return jax.eval_shape(lambda: lm.init(jax.random.key(0))), lm.logical_axes()


def abstract_state(optimizer, params: Params, mesh) -> TrainState:
  """A TrainState as `make_state` makes it, of ShapeDtypeStructs with shardings."""
  shapes = jax.eval_shape(lambda: new_state(optimizer, params))
  shardings = jax.tree.map(lambda x: x.sharding, params)
  return _abstract(shapes, state_shardings(optimizer, params, shardings, mesh))


def training_flops(config: Config, forward: int) -> int:
  """FLOPs of a forward and a backward pass, given the `forward` FLOPs of the forward pass.

  The backward pass computes the gradient of every product's input, and of every trained weight.
  With LoRA only adapters are trained; their FLOPs are left out (below 2% at r = 128).
  """
  return forward * (2 if config.model.lora.rank else 3)


def programs(config: Config, mesh) -> dict[str, Program]:
  """The programs of a config's stages: "sft" of SFT; "rollout", "likelihood" and "update" of RL.

  Those of an arm are called "NAME/update" and so on, where they differ from the run's own. Prompts
  have the length of the longest bucket, responses the longest response length.

  Args:
    config: with `model.vocab_size` set.
    mesh: a mesh of real devices, of fake devices, or of a topology's.
  """
  model, lm = config.model, make_lm(config.model)
  params = abstract_params(config, mesh)
  trainable, frozen = lora.split(params)
  rows = NamedSharding(mesh, partition_spec(("act_batch",)))
  on_all = replicated(mesh)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  out: dict[str, Program] = {}

  if "sft" in config.stages:
    optimizer = make_optimizer(config.sft_optimizer, 1)
    state = abstract_state(optimizer, trainable, mesh)
    batch = config.sft.batch_size
    length = (config.sft.response_lengths or (config.sampler.gen_length,))[-1]
    total = config.data.prompt_buckets[-1] + length
    tokens, flag = array(jnp.int32, batch, total), array(jnp.bool_, batch, total)
    read = copies_read(model) * total
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=on_all)
    check_micro_batches(mesh, batch, config.sft.micro_batches, "sft.micro_batches")
    update = make_sft_update(lm, optimizer, config.sft, shardings_of(state))
    out["sft"] = Program(
      mesh,
      lambda: update.trace(state, frozen, tokens, flag, array(jnp.bool_, batch, length), key),
      (),
      training_flops(config, forward_flops(model, batch, read, total, length, read=length)),
      _passes(config) * config.sft.micro_batches,
      batch // config.sft.micro_batches,
      read,
      0,
    )
  if "rl" in config.stages:
    out |= _policy_programs(config, mesh, lm, params, array)
  for arm, other in arms_of(config).items():
    if policy_options(other) != policy_options(config):
      made = _policy_programs(other, mesh, lm, params, array)
      out |= {f"{arm}/{name}": program for name, program in made.items()}
  return out


def policy_options(config: Config) -> tuple[Any, ...]:
  """The options that RL's programs depend on. Configs that agree in them share programs."""
  rl = dataclasses.replace(
    config.rl, exploration="none", steps=0, eval_every=0, advantage="mean", accuracy_low=0.0,
    accuracy_high=1.0,
  )  # fmt: skip
  return (config.model, config.mesh, config.data.prompt_buckets, config.sampler, rl,
          config.objective, config.estimator)  # fmt: skip


def _passes(config: Config) -> int:
  """How often an update reads the weights: forward, recomputed forward, backward."""
  return 2 + (config.model.remat != "none")


def _policy_programs(config: Config, mesh, lm, params: Params, array) -> dict[str, Program]:
  model, rl, sampler = config.model, config.rl, config.sampler
  p, g, length = rl.prompts_per_step, rl.group_size, sampler.gen_length
  bucket = config.data.prompt_buckets[-1]
  total = bucket + length
  trainable, frozen = lora.split(params)
  readable = _in_dtype(params, model.dtype)
  optimizer = make_optimizer(config.rl_optimizer, 1)
  state = abstract_state(optimizer, trainable, mesh)
  reference = readable if objective_of(config).needs_reference else None

  rollout = Rollout(
    prompt=array(jnp.int32, p, bucket),
    prompt_valid=array(jnp.bool_, p, bucket),
    completion=array(jnp.int32, p, g, length),
    hinted=array(jnp.bool_, p, g, length),
    commit_step=array(jnp.int32, p, g, length),
    commit_logp=array(jnp.float32, p, g, length),
    advantages=array(jnp.float32, p, g),
  )

  def keys(prompts: int):
    typed = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
    return array(typed.dtype, prompts)

  check_micro_batches(mesh, p, rl.micro_batches, "rl.micro_batches")
  policy = make_policy_programs(lm, optimizer, config, shardings_of(state))
  sampled = p // rl.sample_slices * g
  forwards = forwards_of(config)
  read_rows = p * (forwards.shared + g * forwards.own)
  rows_at_once = p * rows_per_prompt(config) * views_kept(config) // rl.micro_batches
  by_prompt = NamedSharding(mesh, PartitionSpec(None, *partition_spec(("act_batch",))))
  on_all = replicated(mesh)
  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=on_all)
  draws, has_old = corruptions(config), scores_old(config)
  of_views = lambda draws: jax.ShapeDtypeStruct(
    (draws, p, forwards.views, g, length), jnp.float32, sharding=by_prompt
  )
  old_draws = 1 if objective_of(config).old_has_own_masks else draws
  old = of_views(old_draws) if has_old else None
  one = jax.ShapeDtypeStruct(of_views(1).shape[1:], jnp.float32)
  totals = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((draws, *x.shape), x.dtype, sharding=on_all),
    jax.eval_shape(policy.totals, rollout, keys(p), number, (one, one)),
  )
  scores = RolloutScores(old, of_views(draws) if reference is not None else None, old, totals)
  rounding = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_all),
    jax.eval_shape(lambda: rounding_key(config, 0)),
  )
  read_total = copies_read(model) * total
  read = forward_flops(model, read_rows, read_total, total, length, read=length)
  width = sampler.block_length
  step = forward_flops(model, sampled, total, total, width, read=width)

  # Memory besides a program's own arguments: the state, what was cast for the policy, and the
  # reference's own parameters.
  held_reference = copies(params, model.dtype).reference if reference is not None else 0
  elsewhere = bytes_per_chip(state) - bytes_per_chip(_left_alone(trainable, model.dtype))
  elsewhere += bytes_per_chip(frozen) - bytes_per_chip(_left_alone(frozen, model.dtype))
  shared = 0 if reference is None else bytes_per_chip(_left_alone(frozen, model.dtype))
  guidance = 2 if sampler.cfg_scale else 1
  scored = (old_draws if has_old else 0) + (0 if reference is None else draws)
  return {
    "rollout": Program(
      mesh,
      lambda: sample_rows.trace(
        lm, readable,
        array(jnp.int32, sampled, bucket), array(jnp.bool_, sampled, bucket),
        array(jnp.int32, sampled, length), array(jnp.bool_, sampled, length),
        keys(sampled), sampler,
      ),
      # All steps in one turn of the loops over turns and, with a cache, over kinds of calls.
      (*(1,) * (1 + (sampler.cache != "none")), sampler.steps),
      step * sampler.steps * guidance,
      sampler.steps,
      sampled * guidance,
      total,
      elsewhere + held_reference,
    ),
    "likelihood": Program(
      mesh,
      lambda: policy.score.trace(readable, reference, rollout, keys(p)),
      (),
      read * scored,
      scored * forwards.views * rl.micro_batches,
      rows_at_once,
      read_total,
      elsewhere,
      shared,
    ),
    "update": Program(
      mesh,
      lambda: policy.update.trace(state, frozen, rollout, scores, keys(p), number, rounding),
      (),
      training_flops(config, read),
      _passes(config) * forwards.views * rl.micro_batches,
      rows_at_once,
      read_total,
      held_reference,
    ),
  }  # fmt: skip
