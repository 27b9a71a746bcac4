"""Floating-point operations that a forward pass needs, counted from its shapes.

Products only: a multiplication and an addition for each element that a matrix product
reads, and nothing for norms, softmax or RoPE. What is counted is what the mathematics
needs, not what some program happens to do, so that a utilisation made from it cannot
be raised by doing useless work.
"""

from __future__ import annotations

import re

from igpo_jax.config import ModelConfig


def product_flops(positions: int, fan_in: int, fan_out: int) -> int:
  """FLOPs of [positions, fan_in] @ [fan_in, fan_out].

  Example: `product_flops(2, 3, 5) == 60`.
  """
  return 2 * positions * fan_in * fan_out


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
    cfg: the model; adapters are counted where they are.
    rows: B.
    queries: positions of a row that go through the layers.
    keys: positions of a row that they attend to; with a cache more than `queries`.
    head_positions: positions of a row whose logits are made.
    read: positions of a row whose final hidden state is used; None for all `queries`.
      The last layer needs the keys and values of all, the rest of these only.

  Returns:
    The number, as an integer: it is exact.

  Example: for D=2, H=K=1, E=2, F=3, one layer, one row, 1 query and 4 keys, the four
  projections are 4 x 8, attention 2 x 16, the three of the MLP 3 x 12: 100 in all.
  """
  read = queries if read is None else read
  heads, kv_heads = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size

  def linear(name: str, positions: int, fan_in: int, fan_out: int) -> int:
    total = product_flops(rows * positions, fan_in, fan_out)
    if cfg.lora.rank and re.fullmatch(cfg.lora.targets, name):
      total += product_flops(rows * positions, cfg.lora.rank, fan_in + fan_out)
    return total

  def layer(outputs: int) -> int:
    return (
      linear("blocks/q_proj", outputs, cfg.d_model, heads)
      + linear("blocks/k_proj", queries, cfg.d_model, kv_heads)
      + linear("blocks/v_proj", queries, cfg.d_model, kv_heads)
      + 2 * product_flops(rows * outputs, keys, heads)  # scores, and the mean of the values
      + linear("blocks/attn_out", outputs, heads, cfg.d_model)
      + linear("blocks/ff_proj", outputs, cfg.d_model, cfg.mlp_hidden)
      + linear("blocks/up_proj", outputs, cfg.d_model, cfg.mlp_hidden)
      + linear("blocks/ff_out", outputs, cfg.mlp_hidden, cfg.d_model)
    )

  head = linear("head", head_positions, cfg.d_model, cfg.vocab_size)
  return (cfg.n_layers - 1) * layer(queries) + layer(read) + head
