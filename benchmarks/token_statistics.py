"""Memory of log-probabilities and entropies: does it grow with positions x vocabulary?

    python -m benchmarks.token_statistics [--rows=8] [--vocab=126464] [--width=64]
        [--lengths=256,512,1024] [--group=1]

Compiles `token_stats` without running it, once forward only and once with its gradient by hidden
states and head. Reports the bytes of the compiler's temporaries. For comparison it also reports
those of a program that applies the head to all positions at once, and the size of all logits.
Prints one JSON object.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import common
from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.ops.token_stats import LOGITS_AT_ONCE, token_stats


def temporaries(
  rows: int, length: int, vocab: int, width: int, group: int = 1, chunk: int = 0
) -> dict[str, int]:
  """Bytes of temporaries of the compiled programs, "forward" and "gradient".

  Args:
    rows, length: shape of the batch.
    vocab: size of the vocabulary.
    width: size of the hidden states.
    group: completions that are read from one row.
    chunk: number of positions at a time, see `token_stats`.
  """

  def forward(h, kernel, targets):
    return token_stats(lambda x: x @ kernel, h, targets, chunk)

  def loss(h, kernel, targets):
    return jnp.sum(forward(h, kernel, targets)[0])

  array = jax.ShapeDtypeStruct
  arguments = (
    array((rows, length, width), jnp.float32),
    array((width, vocab), jnp.float32),
    array((rows, group, length), jnp.int32),
  )
  programs = {"forward": forward, "gradient": jax.value_and_grad(loss, (0, 1))}
  return {
    name: jax.jit(fn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    for name, fn in programs.items()
  }


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--vocab", type=int, default=126_464)
  parser.add_argument("--width", type=int, default=64, help="of the hidden states")
  parser.add_argument("--lengths", default="256,512,1024")
  parser.add_argument("--group", type=int, default=1, help="completions read from one row")
  parser.add_argument("--output", help="also write the JSON object to this file")
  args = parser.parse_args()
  try:
    lengths = [int(length) for length in args.lengths.split(",")]
  except ValueError:
    raise UserError(f"--lengths={args.lengths}: give numbers with commas between") from None

  cases = {}
  for length in lengths:
    size = (args.rows, length, args.vocab, args.width, args.group)
    cases[str(length)] = {
      "in_chunks": temporaries(*size),
      "at_once": temporaries(*size, chunk=length),
      "logits_bytes": 4 * args.rows * length * args.vocab,
    }
  first, last = cases[str(lengths[0])], cases[str(lengths[-1])]
  common.emit(
    {
      "benchmark": "token_statistics",
      "rows": args.rows,
      "vocab": args.vocab,
      "width": args.width,
      "group": args.group,
      "chunk_bytes": 4 * LOGITS_AT_ONCE,
      "temp_bytes_by_length": cases,
      "growth_from_first_to_last": {
        way: {name: last[way][name] / first[way][name] for name in ("forward", "gradient")}
        for way in ("in_chunks", "at_once")
      },
    },
    args.output,
  )


if __name__ == "__main__":
  cli.run(main)
