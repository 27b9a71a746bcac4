"""Memory of a run, counted for one device: what is held exactly, what a program works with roughly.

Held are parameters, optimizer moments, copies and the reference: arrays whose shapes and layouts
are known. What a program needs besides while it runs is the compiler's choice; it is estimated
from a few large terms (`_forward`, `_denoising`, `_backward`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from igpo_jax.config import Config, ModelConfig, SamplerConfig
from igpo_jax.eval.protocols import plan
from igpo_jax.models import lora
from igpo_jax.models.flops import copies_read
from igpo_jax.ops.token_stats import LOGITS_AT_ONCE
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rl.methods import objective_of, rows_per_prompt, views_kept
from igpo_jax.train.ahead_of_time import (
  abstract_params,
  abstract_state,
  bytes_per_chip,
  copies,
)
from igpo_jax.train.setup import make_optimizer

FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device while one program runs, by what they are.

  Attributes:
    held: counted from shapes and layouts.
    work: estimated.
  """

  held: dict[str, int]
  work: dict[str, int]

  @property
  def total(self) -> int:
    """All bytes per device, held and work."""
    return sum(self.held.values()) + sum(self.work.values())


def rows_per_device(rows: int, mesh) -> int:
  """Rows of a batch on each device, rounded up."""
  return -(-rows // num_shards("act_batch", mesh=mesh))


def memory(config: Config, mesh) -> dict[str, Memory]:
  """Memory of every program of a config: "sft"; "rollout", "likelihood", "update"; "evaluation".

  Args:
    config: with every size resolved (train/sizes.py) and `model.vocab_size` set.
    mesh: of devices, or abstract.
  """
  model, out = config.model, {}
  bucket = config.data.prompt_buckets[-1]
  if "sft" in config.stages:
    held = _held(model, mesh)
    length = (config.sft.response_lengths or (config.sampler.gen_length,))[-1]
    rows = rows_per_device(config.sft.batch_size // config.sft.micro_batches, mesh)
    kept = {k: held[k] for k in ("parameters", "optimizer", "base") if held[k]}
    read = copies_read(model) * (bucket + length)
    work = _backward(model, mesh, rows, read, length, config.sft.micro_batches)
    out["sft"] = Memory(kept, work)
  if "rl" in config.stages:
    out |= _of_policy(config, mesh)
  samplers = [task.setting.sampler for task in plan(config)]
  if samplers:
    held = _held(model, mesh)
    rows = rows_per_device(config.eval.batch_size, mesh)
    works = [_denoising(model, mesh, rows, bucket + s.gen_length, s) for s in samplers]
    out["evaluation"] = Memory(
      {k: v for k, v in held.items() if v}, max(works, key=lambda work: sum(work.values()))
    )
  return out


def _of_policy(config: Config, mesh) -> dict[str, Memory]:
  model, rl, sampler = config.model, config.rl, config.sampler
  held = {k: v for k, v in _held(model, mesh, objective_of(config).needs_reference).items() if v}
  if config.arms and f"copy in {model.dtype}" in held:
    held["start of the arms"] = held["parameters"]  # else what is read is kept as it is
  total = config.data.prompt_buckets[-1] + sampler.gen_length
  sampled = rows_per_device(rl.prompts_per_step // rl.sample_slices * rl.group_size, mesh)
  read = rows_per_device(rl.prompts_per_step // rl.micro_batches * rows_per_prompt(config), mesh)
  stats = _statistics(model, mesh, read, sampler.gen_length)
  read_total = copies_read(model) * total
  backward = _backward(model, mesh, read, read_total, sampler.gen_length, rl.micro_batches)
  backward["kept for the backward pass"] *= views_kept(config)
  copy = f"copy in {model.dtype}"
  # The policy's copy is gone by then; an update that rounds by chance makes its own.
  rest = {name: size for name, size in held.items() if name != copy}
  if rl.rounding == "stochastic" and copy in held:
    backward[copy] = held[copy]
  return {
    "rollout": Memory(held, _denoising(model, mesh, sampled, total, sampler)),
    "likelihood": Memory(held, _forward(model, mesh, read, read_total) | {"logits": stats}),
    "update": Memory(rest, backward),
  }


@functools.lru_cache(maxsize=64)
def _held(model: ModelConfig, mesh, reference: bool = False) -> dict[str, int]:
  """Bytes on each device of the arrays that stay there throughout a stage, by name."""
  optimizer = make_optimizer(Config().rl_optimizer, 1)
  params = abstract_params(dataclasses.replace(Config(), model=model), mesh)
  trainable, frozen = lora.split(params)
  stored, read = bytes_per_chip(trainable), copies(params, model.dtype)
  return {
    "base": bytes_per_chip(frozen),
    "parameters": stored,
    "optimizer": bytes_per_chip(abstract_state(optimizer, trainable, mesh)) - stored,
    f"copy in {model.dtype}": read.policy,
    "reference": read.reference if reference else 0,
  }


def _item(model: ModelConfig) -> int:
  return jnp.dtype(model.dtype).itemsize


def _layer_width(model: ModelConfig, mesh) -> int:
  """Bytes per token of the arrays that a layer holds at the same time, where they are most.

  In the MLP: the residual stream, its norm, two branches and their product; under LoRA the
  branches are summed with their adapters' products in float32. In attention: queries, keys, values
  and the result.
  """
  heads, kv_heads = model.n_heads * model.head_size, model.kv_heads * model.head_size
  mlp = _item(model) * 3 * model.mlp_units
  attention = _item(model) * (2 * heads + 2 * kv_heads)
  if model.lora.rank:
    mlp += FLOAT * 3 * model.mlp_units
    attention += FLOAT * heads
  # An expert gets rows of its own: each token is there once for each of its experts, in and out;
  # and those of all devices along the expert axis.
  mlp += _item(model) * 2 * model.d_model * model.moe.experts_per_token
  mlp *= mesh.shape["expert"]
  return _item(model) * 2 * model.d_model + max(mlp, attention) // mesh.shape["tensor"]


def _forward(model: ModelConfig, mesh, rows: int, total: int) -> dict[str, int]:
  """Bytes of a forward pass over `rows` rows of `total` positions on a device, by name."""
  tensor = mesh.shape["tensor"]
  work = {"activations": rows * total * _layer_width(model, mesh)}
  if model.attention == "einsum" or copies_read(model) > 1:
    # Scores and weights of all pairs, which fused attention never holds. It cannot hide keys from
    # some queries, as a block-causal model needs it.
    work["attention scores"] = 2 * FLOAT * rows * total**2 * model.n_heads // tensor
  if mesh.shape["fsdp"] > 1:
    work["gathered weights"] = _gathered(model, mesh)
  return work


def _gathered(model: ModelConfig, mesh) -> int:
  """Bytes of gathered weights: two layers, one in use and one being gathered, and the head."""
  heads, kv_heads = model.n_heads * model.head_size, model.kv_heads * model.head_size
  mlp = model.stored_mlp_units // mesh.shape["expert"]
  layer = model.d_model * (2 * heads + 2 * kv_heads + 3 * mlp)
  return _item(model) * (2 * layer + model.d_model * model.vocab_size) // mesh.shape["tensor"]


def _denoising(
  model: ModelConfig, mesh, rows: int, total: int, sampler: SamplerConfig
) -> dict[str, int]:
  """Bytes of a denoising loop over `rows` rows of a device, by name."""
  tensor = mesh.shape["tensor"]
  rows *= 2 if sampler.cfg_scale else 1
  work = _forward(model, mesh, rows, total)
  # Logits, noise and their sum.
  logits = 3 * FLOAT * rows * sampler.block_length * model.vocab_size // tensor
  work["logits"] = logits
  if sampler.cache != "none":
    kv = model.kv_heads * model.head_size // tensor
    work["cache of keys and values"] = 2 * _item(model) * model.n_layers * rows * total * kv
  return work


def _statistics(model: ModelConfig, mesh, rows: int, length: int) -> int:
  """Bytes of a chunk of logits, its softmax and its gradient (ops/token_stats.py)."""
  elements = rows * length * model.vocab_size // mesh.shape["tensor"]
  return 3 * FLOAT * min(elements, LOGITS_AT_ONCE)


def _backward(
  model: ModelConfig, mesh, rows: int, total: int, scored: int, micro_batches: int
) -> dict[str, int]:
  """Bytes of an update (forward, backward and gradients) with `rows` rows on a device, by name."""
  tensor, tokens = mesh.shape["tensor"], rows * total
  width = _layer_width(model, mesh)
  stream = _item(model) * model.d_model // (tensor if model.shard_sequence else 1)
  # What is kept of every layer, by `model.remat`: its input; also the products; or everything.
  heads, kv_heads = model.n_heads * model.head_size, model.kv_heads * model.head_size
  products = _item(model) * (heads + 2 * kv_heads + 2 * model.mlp_units) // tensor + 2 * stream
  kept = {"full": stream, "dots": stream + products, "none": stream + 2 * width}[model.remat]
  work = _forward(model, mesh, rows, total)
  work["activations"] *= 3  # recomputed, their gradients, and those of the layer before
  if model.remat == "none" and "attention scores" in work:
    work["attention scores"] *= model.n_layers
  work["kept for the backward pass"] = model.n_layers * tokens * kept
  work["logits"] = _statistics(model, mesh, rows, scored)
  trainable = _held(model, mesh)["parameters"]
  # Those of a micro-batch, their sum, and what the optimizer makes of it.
  work["gradients"] = trainable * (3 if micro_batches > 1 else 2)
  if not model.lora.rank and num_shards("act_batch", mesh=mesh) > 1:
    # The head's, whole, before it is reduced to the device's own part.
    whole = model.d_model * model.vocab_size // tensor
    work["gradients"] += (FLOAT + _item(model)) * whole
  return work


def largest(memories: dict[str, Memory]) -> tuple[str, Memory]:
  """(name, memory) of the program that needs the most."""
  return max(memories.items(), key=lambda item: item[1].total)


def checkpoint_bytes(config: Config, mesh) -> int:
  """Bytes of one checkpoint on disk: trained parameters and optimizer moments, over all devices."""
  whole = jax.sharding.AbstractMesh(
    (1,) * len(mesh.axis_names), mesh.axis_names, axis_types=mesh.axis_types
  )
  held = _held(config.model, whole)
  return held["parameters"] + held["optimizer"]


def gib(size: float) -> str:
  """Bytes as text: gib(3 * 2**30) == "3.0 GiB"."""
  unit = next((u for u in ("GiB", "MiB") if size >= {"GiB": 2**30, "MiB": 2**20}[u]), "KiB")
  return f"{size / {'GiB': 2**30, 'MiB': 2**20, 'KiB': 2**10}[unit]:.1f} {unit}"
