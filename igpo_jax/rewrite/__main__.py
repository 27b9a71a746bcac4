"""Rewrites long reasoning traces into concise ones with the same answer (docs/method.md#sft).

    OPENAI_API_KEY=... python -m igpo_jax.rewrite --source=URI --output=OUT.jsonl
        --endpoint=http://HOST:PORT/v1 --model=NAME --tokenizer=DIR
    python -m igpo_jax.rewrite --mode=trim --source=URI --output=OUT.jsonl --tokenizer=DIR

Accepted are traces whose answer equals the gold one by the grader and that have few enough
tokens; the others go to OUT.rejected.jsonl with their reasons. Stopped or killed, the same
command goes on where it was. docs/length_aligned_sft.md has the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import signal
import sys
from typing import Annotated, Any

from tqdm import tqdm

from igpo_jax import cli, plugins
from igpo_jax.config.fields import Count, Natural, NonNegative, Positive, Range, number
from igpo_jax.data import sources
from igpo_jax.data.tokenizer import CharTokenizer, Tokenizer, WordTokenizer, open_tokenizer
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers, registry
from igpo_jax.rewards.score import Scorer
from igpo_jax.rewrite import lengths, prompts, trim
from igpo_jax.rewrite.client import ChatClient, completions_url
from igpo_jax.rewrite.engine import Engine, Rewriter, Trimmer
from igpo_jax.rewrite.journal import Journal
from igpo_jax.rewrite.judge import Judge

AtLeastTwo = Annotated[int, Range(2)]  # a token, and the end of the text
DEFAULT_KEY = "OPENAI_API_KEY"
GRACE = 20.0  # seconds that requests under way are given when the program is asked to stop
SHOWN = 3  # prompts of a dry run
PROBE = "If $x^2 = 16$ and x > 0, then x = 4.\n\\boxed{4} é 0123456789"


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.rewrite", description=__doc__)
  add = parser.add_argument
  add(
    "--mode",
    choices=("rewrite", "trim"),
    default="rewrite",
    help="rewrite: by a language model; trim: by rules, without one",
  )
  add("--source", help="records with traces, by URI (docs/data.md)")
  add("--output", type=pathlib.Path, help="JSONL of accepted traces; a data source of its own")
  add("--tokenizer", help="directory of the model that is to be trained, or char:TASK")
  add(
    "--max_tokens", type=number(AtLeastTwo), default=1500, help="of an accepted trace (%(default)s)"
  )
  add(
    "--window",
    type=number(Count),
    action="append",
    metavar="L",
    help="canvas lengths that the report asks about; may be repeated (256)",
  )
  add("--limit", type=number(Count), help="look at no more than the first so many records")
  add("--dry_run", action="store_true", help="show what would be asked, ask nothing")
  add("--report", action="store_true", help="only write the report of an output that exists")
  add(
    "--verifier",
    metavar="NAME",
    default="math",
    help=f"how answers are compared: {', '.join(registry.verifier_names())}, one that a plug-in"
    f" registers, or {registry.BY_TASK}: each record by the verifier of its task (%(default)s)",
  )
  plugins.add_argument(parser)
  add("--workers", type=number(Count), help="grading processes (one per core)")
  add("--concurrency", type=number(Count), default=16, help="requests in flight (%(default)s)")
  group = parser.add_argument_group("rewrite")
  add = group.add_argument
  add("--endpoint", help="OpenAI-compatible base address, such as http://localhost:8000/v1")
  add("--model", help="the model's name at the endpoint")
  add(
    "--key_env",
    default=DEFAULT_KEY,
    metavar="NAME",
    help="environment variable with the key (%(default)s)",
  )
  add("--temperature", type=number(NonNegative), default=0.3, help="(%(default)s)")
  add(
    "--extra",
    default="{}",
    metavar="JSON",
    help="further fields of each request; null leaves one out",
  )
  add(
    "--timeout", type=number(Positive), default=300.0, help="seconds for one request (%(default)s)"
  )
  add("--retries", type=number(Natural), default=8, help="of one request (%(default)s)")
  add(
    "--backoff",
    type=number(NonNegative),
    default=1.0,
    help="seconds before the first retry (%(default)s)",
  )
  add(
    "--max_failures",
    type=number(Count),
    default=10,
    help="stop when so many records in a row get no answer at all (%(default)s)",
  )
  add(
    "--price_in", type=number(NonNegative), default=0.0, help="per million tokens, to show the cost"
  )
  add("--price_out", type=number(NonNegative), default=0.0, help="per million tokens")
  group = parser.add_argument_group("trim")
  group.add_argument(
    "--rules",
    default="english",
    help=f"whose notation to trim by: {', '.join(trim.rule_names())}, or one that a plug-in"
    " registers (%(default)s)",
  )
  return parser


def check(args: argparse.Namespace) -> None:
  """Raises `UserError` for options that are missing or do not fit."""
  remote = args.mode == "rewrite" and not args.report
  needed = ["output"] if args.report else ["source"]
  if not args.report and not args.dry_run:
    needed += ["output", "tokenizer", *(["endpoint", "model"] if remote else [])]
  for name in needed:
    if getattr(args, name) is None:
      raise UserError(f"--{name} is missing (see --help)")
  args.window = args.window or [256]
  try:
    args.extra = json.loads(args.extra)
  except ValueError as error:
    raise UserError(f"--extra: not JSON ({error})") from error
  if not isinstance(args.extra, dict):
    raise UserError("--extra: expected a JSON object, such as '{\"top_p\": 0.9}'")
  if args.endpoint is not None:
    completions_url(args.endpoint)
  trim.rules(args.rules)
  if args.verifier not in (registry.POOLED, registry.BY_TASK):
    registry.verifier(args.verifier)


def read_key(name: str) -> str:
  """The key in an environment variable; "" where there is none and none was asked for."""
  key = os.environ.get(name, "").strip()
  if not key and name != DEFAULT_KEY:
    raise UserError(f"--key_env={name}: there is no such environment variable, or it is empty")
  if not (key.isascii() and key.isprintable()):
    raise UserError(f"the environment variable {name} does not hold a key: odd characters in it")
  return key


def request_options(args: argparse.Namespace) -> dict[str, Any]:
  """Fields of a request; twice the tokens that are allowed, for the endpoint counts its own."""
  fields = {"temperature": args.temperature, "max_tokens": 2 * args.max_tokens + 256}
  return fields | args.extra


def settings_of(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
  """What decides the rows of an output."""
  probe = PROBE
  if isinstance(tokenizer, CharTokenizer):
    probe = tokenizer.alphabet
  elif isinstance(tokenizer, WordTokenizer):
    probe = " ".join(tokenizer.words)
  ids = hashlib.blake2s(repr(tokenizer.encode(probe)).encode(), digest_size=4).hexdigest()
  settings = {
    "mode": args.mode,
    "source": args.source,
    "max_tokens": args.max_tokens,
    "tokenizer": f"{tokenizer.vocab_size} tokens, {ids}",
    "verifier": args.verifier,
  }
  if args.mode == "trim":
    return settings | {"rules": args.rules}
  options = request_options(args)
  return settings | {"model": args.model, "wording": prompts.digest(), "options": options}


def dry_run(args: argparse.Namespace) -> None:
  """Prints what would be asked of the first records, or how trimming changes them."""
  tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else None
  count = (lambda text: len(tokenizer.encode(text)) + 1) if tokenizer else len
  unit = "tokens" if tokenizer else "characters"
  for record in itertools.islice(sources.stream_records(args.source), args.limit or SHOWN):
    print(f"=== {record.id} ({count(record.trace)} {unit})")
    if args.mode == "trim":
      trimmed = Trimmer(args.rules, count, args.max_tokens)
      text = trimmed.rules(record.trace, record.answer, count, args.max_tokens)
      print(f"--- trace\n{record.trace}\n--- trimmed ({count(text)} {unit})\n{text}\n")
      continue
    for message in prompts.messages(record, args.max_tokens):
      print(f"--- {message['role']}\n{message['content']}\n")


class Bar:
  """The progress bar: decided records, tokens, and what they cost."""

  def __init__(self, journal: Journal, args: argparse.Namespace):
    self.journal, self.prices = journal, (args.price_in, args.price_out)
    self.bar = tqdm(
      total=args.limit, initial=len(journal), desc=args.mode, unit="trace", file=sys.stderr,
      dynamic_ncols=True, mininterval=0.5, disable=None,
    )  # fmt: skip

  def cost(self) -> str:
    """Tokens that the endpoint counted, and their price if one was given; "" without any."""
    used = [self.journal.usage[f"{kind}_tokens"] for kind in ("prompt", "completion")]
    if not any(used):
      return ""
    text = f"{used[0]:,} tokens in, {used[1]:,} out"
    if any(self.prices):
      text += f", cost {sum(u * p for u, p in zip(used, self.prices, strict=True)) / 1e6:.2f}"
    return text

  def __call__(self) -> None:
    text = f"accepted {self.journal.accepted}, rejected {self.journal.rejected}"
    cost = self.cost()
    self.bar.set_postfix_str(f"{text}, {cost}" if cost else text, refresh=False)
    self.bar.update()


async def align(
  args: argparse.Namespace,
  key: str,
  source: sources.Stream,
  journal: Journal,
  tokenizer: Tokenizer,
  bar: Bar,
) -> int:
  """Decides every record; returns the number of the signal that ended it early, else 0."""
  rules = ("boxed",) if args.mode == "rewrite" else answers.DEFAULT_RULES
  loop, received = asyncio.get_running_loop(), []
  async with contextlib.AsyncExitStack() as stack:
    scorer = stack.enter_context(Scorer(args.verifier, workers=args.workers, rules=rules))
    judge = Judge(scorer, tokenizer, args.max_tokens)
    if args.mode == "trim":
      write = Trimmer(args.rules, judge.count, args.max_tokens)
    else:
      client = ChatClient(
        args.endpoint, args.model, key, options=request_options(args),
        concurrency=args.concurrency, timeout=args.timeout, retries=args.retries,
        backoff=args.backoff, proven=journal.accepted > 0,
      )  # fmt: skip
      write = Rewriter(await stack.enter_async_context(client), args.max_tokens)
    engine = Engine(write, judge, journal, args.concurrency, args.max_failures, bar)

    def asked_to_stop(number: int) -> None:
      received.append(number)
      if len(received) > 1:
        return engine.cancel()
      tqdm.write("stopping: requests under way are finished (again: at once)", file=sys.stderr)
      engine.stop()
      loop.call_later(GRACE, engine.cancel)

    for number in (signal.SIGINT, signal.SIGTERM):
      loop.add_signal_handler(number, asked_to_stop, number)
    await engine.run(source, args.limit)
    if not len(journal) and not received:
      raise UserError(
        f"{args.source}: no record that can be used ({sources.describe(source.dropped)})"
      )
    if source.dropped:
      tqdm.write(f"of the source left out: {sources.describe(source.dropped)}", file=sys.stderr)
  return received[0] if received else 0


def write_report(output: pathlib.Path, windows: list[int]) -> None:
  """Writes the report on trace lengths beside `output` and prints its table."""
  report = lengths.make_report(output, windows)
  print(lengths.table(report))


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  plugins.load_files(args.plugins)
  check(args)
  if args.report:
    write_report(args.output, args.window)
    return 0
  sources.check_files(args.source)
  if args.dry_run:
    dry_run(args)
    return 0
  key = read_key(args.key_env) if args.mode == "rewrite" else ""
  tokenizer = open_tokenizer(args.tokenizer)
  source = sources.stream_records(args.source)
  notes = {"endpoint": args.endpoint} if args.mode == "rewrite" else {}
  with Journal(args.output, settings_of(args, tokenizer), notes) as journal:
    bar = Bar(journal, args)
    with bar.bar:
      stopped = asyncio.run(align(args, key, source, journal, tokenizer, bar))
  decided = len(journal)
  counts = f" ({sources.describe(journal.reasons)})" if journal.rejected else ""
  print(f"accepted {journal.accepted} of {decided}, rejected {journal.rejected}{counts}")
  if cost := bar.cost():
    print(cost)
  if stopped:
    print(f"stopped; {decided} records are decided: the same command goes on from here")
    return 128 + stopped
  write_report(args.output, args.window)
  return 0


if __name__ == "__main__":
  cli.run(main)
