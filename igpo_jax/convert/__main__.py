"""The command: `python -m igpo_jax.convert --source=DIR --target=DIR`.

From a Hugging Face directory to an Orbax checkpoint, and from an Orbax checkpoint
or a step of a training run back to Hugging Face; --to says otherwise. With --as-diffusion
from an autoregressive Llama or Qwen to a Hugging Face directory of this program's own.
"""

from __future__ import annotations

import re
import sys
import time
import typing

import tqdm
from etils import epath

from igpo_jax import cli
from igpo_jax.config import Dtype, check_dtype
from igpo_jax.config.fields import Count, number
from igpo_jax.convert import FORMATS, THREADS
from igpo_jax.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
  """Bytes from "5GB", "500MB", "2GiB" or a plain number.

  Raises:
    UserError: it is none of these, or zero.
  """
  match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
  unit = match and UNITS.get(match[2].upper().removesuffix("B") + ("B" if match[2] else ""))
  size = int(float(match[1]) * unit) if unit else 0
  if size < 1:
    raise UserError(f"--max_shard_size={text!r} is no size; write for example 5GB or 500MB")
  return size


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.convert", description=__doc__)
  parser.add_argument("--source", required=True, help="Hugging Face directory, Orbax directory, "
                      "or WORKDIR/checkpoints/STAGE/STEP; local or gs://")  # fmt: skip
  parser.add_argument("--target", required=True, help="directory to make")
  parser.add_argument("--to", choices=FORMATS,
                      help="format; default: orbax from Hugging Face, else hf")  # fmt: skip
  parser.add_argument("--dtype", help=f"{', '.join(typing.get_args(Dtype))}; default: as stored")
  parser.add_argument("--max_shard_size", default="5GB", help="of a safetensors file (5GB)")
  parser.add_argument("--adapter", help="PEFT directory to put on top of the source")
  parser.add_argument("--base", help="model that a checkpoint of adapters belongs to; "
                      "default: the run's init_from")  # fmt: skip
  parser.add_argument("--code", help="directory with the PyTorch code of LLaDA "
                      "(modeling_llada.py): copied along, and named in config.json")  # fmt: skip
  parser.add_argument("--as-diffusion", action="store_true",
                      help="make of an autoregressive Llama or Qwen a diffusion model, to be "
                      "fine-tuned: attention both ways, and a mask token")  # fmt: skip
  parser.add_argument("--mask_token", help="with --as-diffusion: a token that the vocabulary has "
                      "and no text uses, or a new one (<|mask|>)")  # fmt: skip
  parser.add_argument("--shift_logits", choices=("true", "false"),
                      help="with --as-diffusion: whether the model goes on predicting one "
                      "position ahead (true)")  # fmt: skip
  parser.add_argument("--merge_lora", action="store_true", help="add adapters into their kernels")
  parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
  parser.add_argument("--dry_run", action="store_true",
                      help="list what would be written; reads no tensor data")  # fmt: skip
  parser.add_argument("--threads", type=number(Count), default=THREADS,
                      help=f"blocks in flight ({THREADS})")  # fmt: skip
  return parser


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  shard_bytes = parse_size(args.max_shard_size)
  dtype = check_dtype(args.dtype, "--dtype") if args.dtype else None
  if not args.as_diffusion and (args.mask_token or args.shift_logits):
    raise UserError("--mask_token and --shift_logits go with --as-diffusion")
  if args.as_diffusion and (args.adapter or args.base):
    raise UserError("--as-diffusion takes a whole model: merge adapters first")
  if not epath.Path(args.source).exists():
    raise UserError(f"no such directory: {args.source}")
  cli.say(f"convert: {args.source}: loading jax")
  # Importing jax takes seconds: after the mistakes that can be told without it.
  import jax
  import numpy as np

  from igpo_jax.convert import as_diffusion, open, transfer

  jax.config.update("jax_platforms", "cpu")  # nothing here computes on an accelerator
  if args.as_diffusion:
    source = as_diffusion.open_as_diffusion(
      args.source, args.mask_token or "", args.shift_logits != "false"
    )
  else:
    source = open.open_source(args.source, adapter=args.adapter, base=args.base)
  plan = transfer.make_plan(
    source,
    args.target,
    to=args.to or ("hf" if args.as_diffusion else None),
    dtype=np.dtype(dtype) if dtype else None,
    merge_lora=args.merge_lora,
    max_shard_bytes=shard_bytes,
    overwrite=args.overwrite,
    code=args.code,
  )
  if args.dry_run:
    print("\n".join(plan.lines()))
    return
  began = time.monotonic()
  bar = tqdm.tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=None, file=sys.stderr)
  with bar:
    transfer.execute(plan, bar.update, args.threads)
  for note in plan.notes():
    print(f"note: {note}", file=sys.stderr)
  seconds = time.monotonic() - began
  print(f"{plan.lines()[-1]} in {seconds:.1f} s")


if __name__ == "__main__":
  cli.run(main)
