"""Makes the rollout of any RL step of a run again, and compares it with what was logged.

    python -m igpo_jax.replay --workdir=DIR --step=N [--id=ID]
    python -m igpo_jax.replay --workdir=DIR --step=N --id=ID --edit=temperature=0

The steps from the nearest checkpoint on are run again; nothing is written into the workdir. Of one
completion every intermediate canvas is drawn, with the tokens that the model thought likeliest
where it filled something in. --edit samples that completion once more, with the same noise and
another option of the sampler (NAME=VALUE), another hint (hint=TEXT@POSITION) or none (hint=none).
A run whose config file registers a verifier or a source of its own needs --plugins=FILE.py, which
may be that config file. Exit code 1: the rollout is not what was logged.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import TYPE_CHECKING, Any

from etils import epath

from igpo_jax import cli, plugins
from igpo_jax.config import Config, Natural, from_json
from igpo_jax.config.fields import Count, number
from igpo_jax.errors import UserError
from igpo_jax.inference.arguments import parse_option
from igpo_jax.inference.requests import parse_hint
from igpo_jax.inference.settings import override
from igpo_jax.outputs import output_file
from igpo_jax.train.inputs import check_inputs
from igpo_jax.viewer import files, terminal

if TYPE_CHECKING:  # importing jax takes seconds: after the mistakes that can be told without it
  from igpo_jax.train.again import Replay

LENGTHS = ("gen_length", "block_length", "steps")  # which programs and traces are made for
DIFFERS = 1  # exit code

Row = dict[str, Any]


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.replay", description=__doc__)
  add = parser.add_argument
  add("--workdir", required=True, help="of the run; not changed")
  add("--step", required=True, type=number(Count), help="RL step, from 1")
  add("--id", help="of the problem to draw; default: the first one that was logged")
  add("--number", type=number(Natural), help="of the completion in its try; default: the first")
  add("--phase", choices=("own", "hinted", "resampled"), help="which try; default: the first row's")
  add("--alternatives", type=number(Natural), default=3,
      help="of a position, so many of the likeliest tokens; 0: none (%(default)s)")  # fmt: skip
  add("--edit", action="append", default=[], metavar="NAME=VALUE",
      help="sample once more with this; may be repeated")  # fmt: skip
  add("--output", help="also write all rows of the step to this JSONL file (docs/samples.md)")
  plugins.add_argument(parser)
  return parser


def parse_edits(edits: list[str]) -> tuple[dict[str, Any], list[tuple[str, int]] | None]:
  """Parses --edit: (options of the sampler, hints to add; None if all hints are to be removed).

  Raises:
    UserError: an edit is not of this form.
  """
  options: dict[str, Any] = {}
  hints: list[tuple[str, int]] | None = []
  for edit in edits:
    name, equals, value = edit.partition("=")
    if not equals:
      raise UserError(f"--edit={edit}: write NAME=VALUE, such as temperature=0.5")
    try:
      if name == "hint":
        hints = None if value == "none" else [*(hints or ()), parse_hint(value)]
      else:
        options |= parse_option(name, value)
    except ValueError as error:
      raise UserError(f"--edit={edit}: {error}") from None
    if name in LENGTHS:
      raise UserError(f"--edit={edit}: {name} decides what the run compiled and hinted: leave it")
  return options, hints


def read_config(workdir: epath.Path) -> Config:
  """The config of a run, from its config.json.

  Raises:
    UserError: there is none, or it is of another version.
  """
  options = files.config_of(workdir)
  if not options:
    raise UserError(f"{workdir} has no config.json, which says how the run went")
  return from_json(options, workdir / "config.json")


def compare(logged: list[Row], again: list[Row], describe) -> list[str]:
  """A line for each logged completion that differs from the repeated one."""
  by_place = {files.place_of(row): row for row in again}
  lines = []
  for row in logged:
    place = files.place_of(row)
    name = f"group {place[0]} ({row['id']}), {place[1]} {place[2]}"
    other = by_place.get(place)
    reason = "it was not made again" if other is None else describe(row, other)
    if reason:
      lines.append(f"{name}: {reason}")
  return lines


def choose(rows: list[Row], logged: list[Row], args: argparse.Namespace) -> Row:
  """The completion that is drawn.

  Raises:
    UserError: the step has no such completion.
  """
  found = [
    row for row in rows
    if files.wanted(row, args.id, args.number) and args.phase in (None, row["phase"])
  ]  # fmt: skip
  if not found:
    ids = ", ".join(dict.fromkeys(str(row["id"]) for row in rows))
    raise UserError(f"step {args.step} has no such completion; ids there: {ids[:300]}")
  places = {files.place_of(row) for row in logged}
  in_log = [row for row in found if files.place_of(row) in places]
  return (in_log or found)[0]


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  options, hints = parse_edits(args.edit)
  plugins.load_files(args.plugins)
  workdir = files.open_run(args.workdir)
  config = read_config(workdir)
  override(config.sampler, options)  # a mistake is told before jax is loaded
  check_inputs(config)
  logged = files.sample_rows(workdir, lambda r: (r["stage"], r["step"]) == ("rl", args.step))
  cli.say(f"replay: {workdir}: loading jax")
  from igpo_jax.parallel.compile_cache import use_cache
  from igpo_jax.parallel.machine import claim_memory
  from igpo_jax.train import again

  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's words about what it does not read
  claim_memory(config.mesh)
  use_cache(config.compilation_cache)
  with again.replayed(config, workdir, args.step) as replay:
    rows = [{"stage": "rl", "step": args.step} | row for row in replay.rows]
    row = choose(rows, logged, args)
    differing = compare(logged, rows, again.where_differs)
    console = terminal.make_console()
    console.print(terminal.groups_table(rows))
    console.print(terminal.draw_row(row, config.sampler.block_length))
    _draw_steps(console, replay, row, args.alternatives)
    if args.edit:
      _draw_edited(console, replay, row, options, hints)
  if args.output:
    with output_file(args.output) as out:
      for row in rows:
        out.write(json.dumps({k: v for k, v in row.items() if k != "rank"}))
  for line in differing:
    cli.say(f"replay: differs from samples.jsonl: {line}")
  if not logged:
    cli.say(f"replay: samples.jsonl has no row of step {args.step} to compare with "
            "(log.samples_every)")  # fmt: skip
  elif not differing:
    cli.say(f"replay: all {len(logged)} logged completions were made again, token for token")
  return DIFFERS if differing else 0


def _draw_steps(console, replay: Replay, row: Row, count: int) -> None:
  """Every intermediate canvas, with the likeliest tokens where something was filled in."""
  from igpo_jax.train import again

  pieces, name = row["pieces"], replay.model.tokenizer.pieces
  console.print(terminal.step_line(row, -1))
  if not count:
    for step in terminal.steps_of(row):
      console.print(terminal.step_line(row, step))
    return
  for step, choices in again.choices(replay, row, count):
    console.print(terminal.step_line(row, step))
    told = [
      (c.position, pieces[c.position],
       [(name([t])[0], p) for t, p in zip(c.tokens, c.probabilities, strict=True)])
      for c in choices
    ]  # fmt: skip
    console.print(terminal.draw_alternatives(told))


def _draw_edited(
  console, replay: Replay, row: Row, options: dict[str, Any], hints: list[tuple[str, int]] | None
) -> None:
  """Draws the completion as it is sampled with other hints or options."""
  from igpo_jax.train import again

  sampler = override(replay.config.sampler, options)
  canvas, hinted = again.canvas_at(row, -1, replay.model.lm.mask_id), again.hinted_of(row)
  canvas[~hinted] = replay.model.lm.mask_id
  if hints is None:
    canvas[:], hinted[:], hints = replay.model.lm.mask_id, False, []
  for text, position in hints:
    ids = replay.model.tokenizer.encode(text)
    if position + len(ids) > len(canvas):
      raise UserError(f"--edit=hint={text}@{position}: its {len(ids)} tokens end after the canvas")
    canvas[position : position + len(ids)], hinted[position : position + len(ids)] = ids, True
  other = again.edited(replay, row, sampler, canvas, hinted)
  console.print("with the edit, and the same noise:")
  console.print(terminal.draw_row(other, sampler.block_length, order=True))


if __name__ == "__main__":
  cli.run(main)
