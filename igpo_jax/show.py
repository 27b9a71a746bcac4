"""Shows the rollouts of a run in the terminal: hints, the order of the rest, verdicts.

    python -m igpo_jax.show DIR [--step=N] [--id=ID] [--order] [--watch]

Without options: the last step that was logged. Hints stand in ⟦ ⟧ on yellow; of the others, blue
ones were filled in early and red ones late. --order draws the canvas after every denoising step.
--watch follows a run that is going on, until Ctrl-C. For a browser: python -m igpo_jax.report.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator

from etils import epath
from rich.console import Console
from rich.text import Text

from igpo_jax import cli
from igpo_jax.config.fields import Count, Natural, number
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import Row
from igpo_jax.viewer import files, terminal
from igpo_jax.viewer.text import visible

WATCH_SECONDS = 2.0
HEADLINE = ("rl/reward", "rl/all_wrong_before", "rl/all_wrong_after", "rl/kl", "sft/loss")


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.show", description=__doc__)
  add = parser.add_argument
  add("workdir", help="of a run", metavar="DIR")
  add("--step", type=number(Count), help="RL step; default: the last one that was logged")
  add("--id", help="only completions of this problem")
  add("--number", type=number(Natural), help="only the completions with this number in their try")
  add("--limit", type=number(Natural), default=8, help="completions drawn; 0: all (%(default)s)")
  add("--order", action="store_true", help="draw the canvas after every denoising step")
  add("--watch", action="store_true", help="follow a run that is going on")
  return parser


def polls(seconds: float = WATCH_SECONDS) -> Iterator[None]:
  """Yields for ever, with a pause between two."""
  while True:
    yield
    time.sleep(seconds)


def show(workdir: epath.Path, args: argparse.Namespace, console: Console) -> None:
  """Draws one step.

  Raises:
    UserError: nothing that was asked for was logged.
  """
  at = None if args.step is None else ("rl", args.step)
  seen: set[int] = set()
  rows: list[Row] = []

  def keep(row: Row) -> bool:
    seen.add(row["step"])
    return files.wanted(row, args.id, args.number) and (
      at is None or (row["stage"], row["step"]) == at
    )

  for row in files.sample_rows(workdir, keep):
    if rows and rows[-1]["step"] != row["step"]:
      rows = []  # only the last step's rows stay
    rows.append(row)
  if not rows:
    if not seen:
      raise UserError(f"{workdir}/samples.jsonl has no row yet (log.samples_every)")
    steps = sorted(seen)
    some = ", ".join(map(str, steps if len(steps) < 12 else [*steps[:5], "...", *steps[-5:]]))
    raise UserError(f"no completion fits; steps in {workdir}/samples.jsonl: {some}")
  draw(rows, workdir, args, console)


def draw(rows: list[Row], workdir: epath.Path, args: argparse.Namespace, console: Console) -> None:
  """Draws rows of one step: a line per group, then completions."""
  block = files.config_of(workdir).get("sampler", {}).get("block_length", 0)
  console.print(terminal.groups_table(rows))
  shown = rows[: args.limit or None]
  for row in shown:
    console.print(terminal.draw_row(row, block, args.order))
  if len(shown) < len(rows):
    console.print(Text(f"{len(rows) - len(shown)} more completions: --limit=0 draws all"))


def watch(
  workdir: epath.Path, args: argparse.Namespace, console: Console, when: Iterable[None]
) -> None:
  """Prints a line for each new row of metrics, and draws new samples, at each item of `when`."""
  metrics, samples = (
    files.Follower(workdir / "metrics.jsonl"),
    files.Follower(workdir / "samples.jsonl"),
  )
  for _ in when:
    for row in metrics.new_rows():
      values = [f"{name} {row[name]:.4g}" for name in HEADLINE if row.get(name) is not None]
      values += [f"{k} {v:.4g}" for k, v in row.items() if k.endswith("/accuracy") and v is not None
                 and k.startswith("eval/")]  # fmt: skip
      console.print(Text(visible(f"{row['stage']} {row['step']}: {', '.join(values)}")))
    rows = [
      files.upgraded(row) for row in samples.new_rows() if files.wanted(row, args.id, args.number)
    ]
    if rows:  # of several new steps, the last
      draw([row for row in rows if row["step"] == rows[-1]["step"]], workdir, args, console)


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  workdir, console = files.open_run(args.workdir, ""), terminal.make_console()
  if args.watch:
    watch(workdir, args, console, polls())
  else:
    show(workdir, args, console)


if __name__ == "__main__":
  cli.run(main)
