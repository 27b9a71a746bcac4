"""Padding of prompts: how many positions a row of the rollout has, for numbers of slices.

    python -m benchmarks.padding --source=URI [--source=URI ...] [--tokenizer=DIR]
        [--prompts=64] [--buckets=128,256,512] [--slices=1,2,4,8,16] [--processes=1]
        [--completion=256] [--batches=200]

Simulates the batches of a run, without a model. Prompts of each source, and of all sources in equal
shares, are drawn by the trainer's own stream and cut into slices by the trainer's own rule. A row
has as many positions as the bucket of its slice plus the completion. The cost of a denoising step,
except attention, is proportional to them. Prints one JSON object with the mean positions and with
the share that is saved compared with one slice. With --processes each process sorts its own
prompts, as in a run. Without --tokenizer a SentencePiece model of 8,000 pieces is trained on the
sources.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from igpo_jax import cli
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.data.records import Record
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import Tokenizer, open_tokenizer, train_sentencepiece
from igpo_jax.errors import UserError
from igpo_jax.rl.sampling import cut_by_length

PIECES = 8000


def numbers(option: str, text: str) -> tuple[int, ...]:
  """The numbers of an option such as --slices=1,2,4.

  Raises:
    UserError: not numbers separated by commas, or one below 1.
  """
  try:
    values = tuple(map(int, text.split(",")))
  except ValueError:
    raise UserError(f"--{option}={text}: give numbers with commas between") from None
  if min(values) < 1:
    raise UserError(f"--{option}={text}: numbers start at 1")
  return values


def mean_positions(
  lengths: np.ndarray, slices: int, processes: int, buckets: Sequence[int], completion: int
) -> float:
  """The mean number of positions of a row, over all slices of one batch.

  Args:
    lengths: i64[P], tokens of each prompt.
    slices: number of slices in each process.
    processes: number of processes. Each has P / processes of the prompts.
    buckets: the lengths to which prompts are padded, ascending.
    completion: positions of the completion.
  """
  falling = -np.sort(-lengths.reshape(processes, -1), axis=1)
  longest = falling.max(axis=0)
  needed = next(bucket for bucket in buckets if bucket >= longest[0])
  cuts = cut_by_length(
    longest.tolist(), len(longest) // slices, [b for b in buckets if b <= needed], completion
  )
  return float(np.mean([cut.positions + completion for cut in cuts]))


def simulate(records: list[Record], tokenizer: Tokenizer, args: argparse.Namespace) -> dict:
  """The numbers for one source."""
  stream = PromptStream(records, tokenizer, args.prompts, args.buckets, seed=0)
  batches = [stream.batch(step).valid.sum(axis=1) for step in range(args.batches)]
  lengths = np.concatenate(batches)
  found = {
    slices: np.mean([
      mean_positions(batch, slices, args.processes, args.buckets, args.completion)
      for batch in batches
    ])
    for slices in (1, *args.slices)
  }  # fmt: skip
  return {
    "prompts": len(stream),
    "left_out": stream.dropped,
    "tokens": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90, 99)},
    "without_padding": round(1 - (lengths.mean() + args.completion) / found[1], 3),
    "positions": {slices: round(found[slices], 1) for slices in args.slices},
    "saved": {slices: round(1 - found[slices] / found[1], 3) for slices in args.slices},
  }


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--source", action="append", required=True, help="as config.data.rl")
  parser.add_argument("--tokenizer", help="a directory; default: made from the sources")
  parser.add_argument("--prompts", type=int, default=64, help="of a step, over all processes")
  parser.add_argument("--buckets", default="128,256,512", help="config.data.prompt_buckets")
  parser.add_argument("--slices", default="1,2,4,8,16", help="config.rl.sample_slices")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--completion", type=int, default=256)
  parser.add_argument("--batches", type=int, default=200)
  args = parser.parse_args()
  args.buckets, args.slices = numbers("buckets", args.buckets), numbers("slices", args.slices)
  for slices in args.slices:
    if args.prompts % (slices * args.processes):
      raise UserError(
        f"--prompts={args.prompts} is not a multiple of {slices} slices x "
        f"{args.processes} process(es)"
      )

  sources = {uri: load_records(uri).records for uri in args.source}
  if args.tokenizer:
    tokenizer = open_tokenizer(args.tokenizer)
  else:
    every = [record for records in sources.values() for record in records]
    tokenizer = train_sentencepiece(
      [text for r in every for text in (r.prompt[-1]["content"], r.trace)], PIECES
    )
  if len(sources) > 1:
    share = min(map(len, sources.values()))
    sources["all"] = [record for records in sources.values() for record in records[:share]]
  results = {name: simulate(records, tokenizer, args) for name, records in sources.items()}
  settings = {k: v for k, v in vars(args).items() if k not in ("source", "slices")}
  print(json.dumps({"benchmark": "padding", **settings, "sources": results}, indent=2))


if __name__ == "__main__":
  cli.run(main)
