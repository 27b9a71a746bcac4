"""Floating-point operations that a forward pass needs, counted from its shapes.

Only matrix products count: a multiplication and an addition for each pair of elements. Norms,
softmax and RoPE count nothing. What is counted is what the mathematics needs, not what a program
happens to do, so useless work cannot raise a utilization that is computed from it.
"""

from __future__ import annotations

import re

from igpo_jax.config import ModelConfig
from igpo_jax.models.families import check
from igpo_jax.models.network import stack_sizes


def product_flops(positions: int, fan_in: int, fan_out: int) -> int:
  """FLOPs of [positions, fan_in] @ [fan_in, fan_out].

  Example: `product_flops(2, 3, 5) == 60`.
  """
  return 2 * positions * fan_in * fan_out


def copies_read(cfg: ModelConfig) -> int:
  """How many copies of a row go through the network in fine-tuning and likelihoods: 1 or 2.

  A block-causal model gets a clean copy beside the noisy one (`LM.hidden_of_two`). Each position
  still attends to no more keys than the row has positions.
  """
  return 2 if check(cfg).design(cfg).block_length else 1


def forward_flops(
  cfg: ModelConfig,
  rows: int,
  queries: int,
  keys: int,
  head_positions: int = 0,
  read: int | None = None,
) -> int:
  """FLOPs of one call of the network.

  Args:
    cfg: the model, with its adapters if any.
    rows: B.
    queries: number of positions of a row that go through the layers.
    keys: number of positions of a row that they attend to; with a cache more than `queries`.
    head_positions: number of positions of a row whose logits are computed.
    read: number of positions of a row whose final hidden state is used; None: all `queries`. The
      last layer computes keys and values of all positions, and everything else for these only.

  Returns:
    The exact number.

  Example: for D=2, H=K=1, E=2, F=3, one layer, one row, 1 query and 4 keys, the four
  projections are 4 x 8, attention 2 x 16, the three of the MLP 3 x 12: 100 in all.
  """
  read = queries if read is None else read
  heads, kv_heads = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size
  sizes, fused = stack_sizes(cfg), check(cfg).design(cfg).fused_qkv

  def linear(name: str, positions: int, fan_in: int, fan_out: int) -> int:
    total = product_flops(rows * positions, fan_in, fan_out)
    if cfg.lora.rank and re.fullmatch(cfg.lora.targets, name):
      total += product_flops(rows * positions, cfg.lora.rank, fan_in + fan_out)
    return total

  def mlp(name: str, positions: int, hidden: int) -> int:
    return (
      linear(f"{name}ff_proj", positions, cfg.d_model, hidden)
      + linear(f"{name}up_proj", positions, cfg.d_model, hidden)
      + linear(f"{name}ff_out", positions, hidden, cfg.d_model)
    )

  def experts(stack: str, outputs: int) -> int:
    return (
      product_flops(rows * outputs, cfg.d_model, cfg.moe.experts)
      + mlp(f"{stack}/experts/", outputs * cfg.moe.experts_per_token, cfg.moe.expert_hidden)
      + mlp(f"{stack}/shared_", outputs, cfg.moe.shared_hidden)
    )

  def layer(stack: str, outputs: int) -> int:
    if fused:
      projections = linear(f"{stack}/qkv_proj", queries, cfg.d_model, heads + 2 * kv_heads)
    else:
      projections = (
        linear(f"{stack}/q_proj", outputs, cfg.d_model, heads)
        + linear(f"{stack}/k_proj", queries, cfg.d_model, kv_heads)
        + linear(f"{stack}/v_proj", queries, cfg.d_model, kv_heads)
      )
    routed = cfg.moe.experts and stack == "blocks"
    return (
      projections
      + 2 * product_flops(rows * outputs, keys, heads)  # scores, and the mean of the values
      + linear(f"{stack}/attn_out", outputs, heads, cfg.d_model)
      + (experts(stack, outputs) if routed else mlp(f"{stack}/", outputs, cfg.mlp_hidden))
    )

  head = linear("head", head_positions, cfg.d_model, cfg.vocab_size)
  whole = sum((size - (name == "blocks")) * layer(name, queries) for name, size in sizes.items())
  return whole + layer("blocks", read) + head
