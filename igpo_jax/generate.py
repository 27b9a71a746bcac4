"""Answers prompts with a model; hints in the answer show inpainting at work.

    python -m igpo_jax.generate --model=DIR --prompt=TEXT [--hint=TEXT@POSITION ...]
    python -m igpo_jax.generate --model=DIR --prompt=TEXT --template="A[MASK*6] B"
    python -m igpo_jax.generate --model=DIR --prompt=TEXT --animate
    python -m igpo_jax.generate --model=DIR --chat
    python -m igpo_jax.generate --model=DIR --input=IN.jsonl --output=OUT.jsonl

A hint's tokens are placed at POSITION of the answer (in tokens, from 0) before denoising begins,
and stay there. A template is the answer with gaps: given text, [MASK*N] for N tokens to fill in,
and [END] where the answer ends. Without [END] the rest of the canvas is filled in, too.
Each line of IN has "prompt" (text) or "messages" (a chat), optionally "hints" (a list of
TEXT@POSITION) and "template", and any other fields. OUT has the same lines with "completion" added.
--animate draws how the answer is filled in. --chat asks on standard input, turn by turn, with the
model's own chat format; python -m igpo_jax.chat is the same without earlier turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from igpo_jax import cli
from igpo_jax.config.fields import Count, number
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.errors import UserError
from igpo_jax.hints.leak import segments
from igpo_jax.inference import draw
from igpo_jax.inference.arguments import add_arguments, given_options, settings_from
from igpo_jax.inference.conversation import talk
from igpo_jax.inference.requests import (
  canvas_with_hints,
  check_row,
  make_request,
  read_requests,
)
from igpo_jax.inference.settings import describe
from igpo_jax.outputs import output_file
from igpo_jax.viewer import terminal

if TYPE_CHECKING:  # importing jax takes seconds: after the first line
  from igpo_jax.inference.session import Answer

ONE_ANSWER = ("hint", "template", "show_order", "animate", "output")  # options without --chat


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.generate", description=__doc__)
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--prompt", help="what the user says")
  source.add_argument("--input", help="JSONL file of prompts")
  source.add_argument("--chat", action="store_true", help="several turns, on standard input")
  parser.add_argument("--output", help="JSONL file for --input; default: standard output")
  parser.add_argument("--hint", action="append", default=[], metavar="TEXT@POSITION",
                      help="tokens that are given, for every prompt; may be repeated")  # fmt: skip
  parser.add_argument("--template", help="the answer with gaps, for every prompt")
  parser.add_argument("--show_order", action="store_true",
                      help="also tell which tokens were committed at which step")  # fmt: skip
  parser.add_argument("--animate", action="store_true",
                      help="draw the canvas after every denoising step")  # fmt: skip
  parser.add_argument("--batch_size", type=number(Count), default=8,
                      help="prompts that are answered at a time (%(default)s)")  # fmt: skip
  add_arguments(parser)
  return parser


def rows_of(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
  """(position for messages, row) of every request, checked as far as that needs no tokenizer.

  Raises:
    UserError: a row is not a request; the message says which.
  """
  if args.animate and args.input:
    raise UserError("--animate goes with --prompt: it draws a single answer")
  if args.output is not None and not args.input:
    raise UserError("--output goes with --input; a single answer goes to standard output")
  given: dict[str, Any] = {} if args.template is None else {"template": args.template}
  check_row({"prompt": "", "hints": args.hint, **given}, "command line")
  rows = read_requests(args.input) if args.input else [("command line", {"prompt": args.prompt})]
  return [
    (where, {**row, **given, "hints": [*row.get("hints", ()), *args.hint]}) for where, row in rows
  ]


def drawn(answer: Answer, hinted: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
  """What `viewer.terminal` draws of an answer: pieces, hints and commit steps."""
  return {
    "pieces": tokenizer.pieces(answer.tokens),
    "hints": segments(hinted),
    "commit_step": answer.commit_step.tolist(),
  }


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  if args.chat:
    if given := [name for name in ONE_ANSWER if getattr(args, name)]:
      raise UserError(f"--{given[0]} is of a single answer; within --chat see /help")
    talk(args, keep_history=not args.raw)
    return
  rows = rows_of(args)
  model, settings = settings_from(args)
  with contextlib.ExitStack() as stack:
    out = None
    if args.output is not None:
      out = stack.enter_context(output_file(args.output, source=args.input))
    cli.say(f"generate: {model}: loading jax")
    # Importing jax takes seconds: after the mistakes that can be told without it.
    from igpo_jax.inference.session import Session

    session = Session(model, args.adapter, args.dtype or "")
    length, tokenizer = settings.sampler.gen_length, session.tokenizer
    requests, canvases = [], []
    for where, row in rows:  # before the first forward, not after the hundredth
      try:
        request = make_request(row, tokenizer, settings.prompting, args.raw)
        session.check(request)
        requests.append(request)
        canvases.append(canvas_with_hints(request, length, tokenizer))
      except UserError as error:
        raise UserError(f"{where}: {error}") from error
    cli.say(f"generate: {describe(settings, given_options(args))}")
    if not args.input and requests[0].hints:
      cli.say(f"canvas: {draw.preview(*canvases[0], tokenizer)}")
    answers = session.answers(requests, settings.sampler, args.seed, args.batch_size)
    for (_, row), (_, hinted), answer in zip(rows, canvases, answers, strict=True):
      if args.input:
        extra = {"commit_step": answer.commit_step.tolist()} if args.show_order else {}
        line = json.dumps({**row, "completion": answer.text, **extra}, ensure_ascii=False)
        print(line, flush=True) if out is None else out.write(line)
        continue
      if args.animate:
        terminal.animate(drawn(answer, hinted, tokenizer), settings.sampler.block_length)
      print(answer.text)
      if args.show_order:
        print(draw.order(answer.tokens, answer.commit_step, hinted, tokenizer))


if __name__ == "__main__":
  cli.run(main)
