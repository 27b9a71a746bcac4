"""Prompt in, text out; with hints to see inpainting at work.

    python -m igpo_jax.generate --model=DIR --prompt=TEXT [--hint=TEXT@POSITION ...]
    python -m igpo_jax.generate --model=DIR --input=IN.jsonl --output=OUT.jsonl

A hint's tokens are put at POSITION of the answer (in tokens, from 0) before the
denoising begins, and stay there. IN has on each line "prompt" (text) or "messages"
(a chat), and if you like "hints" (a list of TEXT@POSITION) and anything else; OUT
has the same lines with "completion" added.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from igpo_jax import cli
from igpo_jax.cli import UserError
from igpo_jax.config import SamplerConfig
from igpo_jax.convert.pretrained import Pretrained, fitting_mesh, load_source
from igpo_jax.convert.sources import open_source
from igpo_jax.data.records import read_messages
from igpo_jax.data.tokenizer import Tokenizer, check_ids
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.options import Dtype, check_dtype
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.textfiles import read_values
from igpo_jax.types import Canvas

LENGTH_STEP = 64  # prompts are padded to a multiple of it: one program for many lengths


@dataclasses.dataclass(frozen=True)
class Request:
  """One answer to be written.

  Attributes:
    prompt: token ids, up to where the answer begins.
    hints: (token ids, position in the answer) pairs.
  """

  prompt: tuple[int, ...]
  hints: tuple[tuple[tuple[int, ...], int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
  """What denoising made of a request.

  Attributes:
    text: up to the first stop token, without special tokens.
    tokens: i32[L], the whole canvas.
    commit_step: i32[L], when each position was committed; -1 on hints.
  """

  text: str
  tokens: np.ndarray
  commit_step: np.ndarray


def parse_hint(text: str) -> tuple[str, int]:
  """("TEXT", POSITION) from "TEXT@POSITION"; the last @ counts.

  Raises:
    UserError: no @, no text, or a position that is no number.
  """
  hint, at, position = text.rpartition("@")
  if not at or not hint or not position.isdecimal():
    raise UserError(f"hint {text!r}: write TEXT@POSITION, the position in tokens from 0")
  return hint, int(position)


def hint_canvas(request: Request, length: int, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens i32[L], hinted bool[L]): masks, with the hints in their places.

  Raises:
    UserError: a hint that ends past the canvas, or two on one position.
  """
  tokens, hinted = np.full(length, mask_id, np.int32), np.zeros(length, bool)
  for ids, position in request.hints:
    end = position + len(ids)
    if end > length:
      raise UserError(
        f"a hint of {len(ids)} tokens at {position} does not fit into gen_length={length}"
      )
    if hinted[position:end].any():
      raise UserError(f"the hint at {position} overlaps another one")
    tokens[position:end], hinted[position:end] = ids, True
  return tokens, hinted


def make_canvas(requests: Sequence[Request], cfg: SamplerConfig, tokenizer: Tokenizer) -> Canvas:
  """Left-padded prompts, each followed by its canvas: [B, T]."""
  longest = max(len(r.prompt) for r in requests)
  prompt_length = -(-longest // LENGTH_STEP) * LENGTH_STEP
  shape = (len(requests), prompt_length + cfg.gen_length)
  tokens = np.full(shape, tokenizer.pad_id, np.int32)
  fixed, valid = np.ones(shape, bool), np.ones(shape, bool)
  for row, request in enumerate(requests):
    start = prompt_length - len(request.prompt)
    tokens[row, start:prompt_length] = request.prompt
    valid[row, :start] = False
    canvas, hinted = hint_canvas(request, cfg.gen_length, tokenizer.mask_id)
    tokens[row, prompt_length:], fixed[row, prompt_length:] = canvas, hinted
  return Canvas(tokens=tokens, fixed=fixed, valid=valid)


def generate(
  pre: Pretrained,
  requests: Sequence[Request],
  cfg: SamplerConfig,
  key: jax.Array,
  batch_size: int = 8,
) -> Iterator[Answer]:
  """Answers in the order of the requests, a batch at a time.

  A row's noise comes from its number, so an answer does not depend on its batch.
  """
  batch_size = min(batch_size, len(requests))
  for start in range(0, len(requests), batch_size):
    batch = list(requests[start : start + batch_size])
    missing = batch_size - len(batch)
    canvas = make_canvas(batch + batch[-1:] * missing, cfg, pre.tokenizer)
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(np.arange(batch_size) + start)
    out = denoise(pre.lm, pre.params, canvas, keys, cfg)
    tokens = np.asarray(out.tokens)[:, -cfg.gen_length :]
    steps = np.asarray(out.commit_step)[:, -cfg.gen_length :]
    for row in range(len(batch)):
      yield Answer(pre.tokenizer.decode(tokens[row]), tokens[row], steps[row])


def describe_order(answer: Answer, request: Request, tokenizer: Tokenizer) -> str:
  """One line for the hints, then one per step: [position] token, as committed."""
  hinted = hint_canvas(request, len(answer.tokens), tokenizer.mask_id)[1]
  lines = []
  for step in sorted(set(answer.commit_step.tolist())):
    name = "hint" if step < 0 else f"step {step}"
    where = np.flatnonzero((answer.commit_step == step) & (hinted | (step >= 0)))
    pieces = [f"[{k}] {_show(int(answer.tokens[k]), tokenizer)}" for k in where]
    if pieces:
      lines.append(f"{name:>8}  {'  '.join(pieces)}")
  return "\n".join(lines)


def _show(token: int, tokenizer: Tokenizer) -> str:
  if token in tokenizer.special_ids:
    return f"<{token}>"
  return repr(tokenizer.decode([token], stop=False))


def read_rows(file: epath.PathLike) -> list[dict[str, Any]]:
  """The objects of a JSONL file.

  Raises:
    UserError: no such file, none in it, or a line that is not as `generate` needs it.
  """
  file = epath.Path(file)
  if not file.exists():
    raise UserError(f"--input: no such file: {file}")
  rows = []
  for where, row in read_values(file):
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
      raise UserError(f'{where}: give an object with "prompt" or "messages"')
    if not isinstance(row.get("prompt", ""), str):
      raise UserError(f'{where}: "prompt" should be text, not {type(row["prompt"]).__name__}')
    if "messages" in row:
      try:
        read_messages(row["messages"])
      except ValueError as reason:
        raise UserError(f"{where}: {reason}") from reason
    rows.append(row)
  if not rows:
    raise UserError(f"--input: {file} has no rows")
  return rows


def make_request(row: dict[str, Any], tokenizer: Tokenizer, raw: bool = False) -> Request:
  """A row of the input in token ids; `raw` leaves the chat format out."""
  hints = [parse_hint(text) for text in row.get("hints", ())]
  if raw and "messages" in row:
    raise UserError('--raw has no chat format: give "prompt", not "messages"')
  if raw:
    prompt = tokenizer.encode(row["prompt"])
  else:
    chat = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.encode_prompt(read_messages(chat))
  return Request(tuple(prompt), tuple((tuple(tokenizer.encode(text)), at) for text, at in hints))


def make_parser() -> cli.ArgumentParser:
  parser = cli.ArgumentParser(
    prog="python -m igpo_jax.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", required=True, help="Hugging Face directory, one written by "
                      "igpo_jax.convert, or WORKDIR/checkpoints/STAGE/STEP")  # fmt: skip
  parser.add_argument("--adapter", help="PEFT directory to put on top")
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--prompt", help="what the user says")
  source.add_argument("--input", help="JSONL file of prompts")
  parser.add_argument("--output", help="JSONL file for --input; default: standard output")
  parser.add_argument("--hint", action="append", default=[], metavar="TEXT@POSITION",
                      help="tokens that are given, for every prompt; may be repeated")  # fmt: skip
  parser.add_argument("--show_order", action="store_true",
                      help="also tell which tokens were committed at which step")  # fmt: skip
  parser.add_argument("--raw", action="store_true", help="no chat format around the prompt")
  parser.add_argument("--gen_length", type=int, default=256)
  parser.add_argument("--block_length", type=int, default=32)
  parser.add_argument("--steps", type=int, help="default: half of gen_length")
  parser.add_argument("--temperature", type=float, default=0.0)
  parser.add_argument("--cfg_scale", type=float, default=0.0)
  parser.add_argument("--threshold", type=float, help="commit every token surer than this")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--dtype", help=f"{', '.join(typing.get_args(Dtype))}; "
                      "default: bfloat16, on a CPU float32")  # fmt: skip
  return parser


def main(argv: list[str] | None = None) -> None:
  args = make_parser().parse_args(argv)
  if args.batch_size < 1:
    raise UserError(f"--batch_size={args.batch_size} must be at least 1")
  if args.output and not args.input:
    raise UserError("--output goes with --input; a single answer goes to standard output")
  cfg = SamplerConfig(
    gen_length=args.gen_length,
    block_length=args.block_length,
    steps=args.steps or max(args.gen_length // 2, args.gen_length // args.block_length),
    temperature=args.temperature,
    cfg_scale=args.cfg_scale,
    threshold=args.threshold,
  )
  rows = read_rows(args.input) if args.input else [{"prompt": args.prompt}]
  rows = [{**row, "hints": [*row.get("hints", ()), *args.hint]} for row in rows]
  default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  dtype = check_dtype(args.dtype or default, "--dtype")
  use_cache()
  model = open_source(args.model, adapter=args.adapter)
  mesh = fitting_mesh(model)
  pre = load_source(model, dtype, mesh)
  if pre.tokenizer is None:
    raise UserError(f"{args.model} has no tokenizer")
  requests = [make_request(row, pre.tokenizer, args.raw) for row in rows]
  for request in requests:  # before the first forward, not after the hundredth
    check_ids(request.prompt, pre.lm.vocab_size, "a prompt")
    for ids, _ in request.hints:
      check_ids(ids, pre.lm.vocab_size, "a hint")
    hint_canvas(request, cfg.gen_length, pre.tokenizer.mask_id)
  with contextlib.ExitStack() as stack:
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
    out = stack.enter_context(epath.Path(args.output).open("w")) if args.output else sys.stdout
    answers = generate(pre, requests, cfg, jax.random.key(args.seed), args.batch_size)
    for row, request, answer in zip(rows, requests, answers, strict=True):
      if args.input:
        extra = {"commit_step": answer.commit_step.tolist()} if args.show_order else {}
        row = {**row, "completion": answer.text, **extra}
        print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
        continue
      print(answer.text)
      if args.show_order:
        print(describe_order(answer, request, pre.tokenizer))


if __name__ == "__main__":
  cli.run(main)
