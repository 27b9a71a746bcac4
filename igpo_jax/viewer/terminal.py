"""Completions drawn in a terminal: hints, the order of the rest, verdicts (with rich)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from igpo_jax.io.jsonl import Row
from igpo_jax.viewer.text import LONGEST_PIECE, shortened, visible

MASK = "░"
HINT, NEW, FADED = "bold black on yellow", "bold black on bright_green", "dim"
LONGEST_PAUSE, WHOLE_ANIMATION = 0.2, 8.0  # seconds of a step, of all of them
OPEN, CLOSE = "⟦", "⟧"  # around hints, for eyes and terminals without colors


def make_console(file: IO[str] | None = None) -> Console:
  """A console on standard output; without a terminal it writes plain text, 100 wide."""
  console = Console(file=file, highlight=False, markup=False, emoji=False)
  if not console.is_terminal:
    console.width = 100
  return console


def hinted_positions(row: Row) -> set[int]:
  """The positions of hints."""
  return {k for begin, end in row["hints"] for k in range(begin, end)}


def last_step(row: Row) -> int:
  """The last denoising step that filled a position in; -1 if none did."""
  return max(row["commit_step"], default=-1)


def pieces_of(row: Row) -> list[str] | None:
  """The text of each token; None for a row of version 1, which has no tokens."""
  return row.get("pieces")


def _shade(step: int, last: int) -> str:
  """A color between blue (filled in early) and red (filled in late)."""
  share = step / last if last > 0 else 0.0
  red, blue = int(80 + 175 * share), int(255 - 175 * share)
  return f"rgb({red},120,{blue})"


def canvas(row: Row, at: int | None = None, block_length: int = 0) -> Text:
  """Draws the tokens of a completion. Hints are in ⟦ ⟧, masks are ░.

  Args:
    row: a row of samples.jsonl.
    at: draw the canvas after this denoising step, and highlight what the step filled in. None: draw
      the finished canvas, colored from blue (filled in early) to red (filled in late).
    block_length: draw "|" between blocks of this many tokens; 0: do not.
  """
  pieces = pieces_of(row)
  if pieces is None:
    return Text(visible(shortened(row["completion"])))
  hints, last, out = hinted_positions(row), last_step(row), Text()
  for k, (piece, step) in enumerate(zip(pieces, row["commit_step"], strict=True)):
    if block_length and k and k % block_length == 0:
      out.append("|", FADED)
    if k in hints and k - 1 not in hints:
      out.append(OPEN, FADED)
    shown = visible(shortened(piece, LONGEST_PIECE))
    if k in hints:
      out.append(shown, HINT)
    elif at is not None and step > at:
      out.append(MASK, FADED)
    elif at is not None:
      out.append(shown, NEW if step == at else "")
    else:
      out.append(shown, FADED if _is_end(piece) else _shade(step, last))
    if k in hints and k + 1 not in hints:
      out.append(CLOSE, FADED)
  return out


def _is_end(piece: str) -> bool:
  return len(piece) > 2 and piece.startswith("<") and piece.endswith(">")


def steps_of(row: Row) -> list[int]:
  """The denoising steps that filled in at least one position, in order."""
  return sorted({step for step in row["commit_step"] if step >= 0})


def verdict(row: Row) -> Text:
  """One line: right or wrong, what the verifier read, why, and what became of the completion."""
  right = bool(row.get("correct"))
  out = Text()
  out.append("right" if right else "wrong", "bold green" if right else "bold red")
  if row.get("extracted") is not None:
    out.append(f"  answer {visible(shortened(row['extracted'], 200))!r}")
  if "answer" in row:
    out.append(f"  gold {visible(shortened(str(row['answer']), 200))!r}")
  if row.get("reason"):
    out.append(f"  ({visible(shortened(row['reason'], 200))})")
  if row.get("reward") is not None:
    out.append(f"  reward {row['reward']:g}")
  if row.get("advantage") is not None:
    out.append(f"  advantage {row['advantage']:+.3g}")
  return out


def fate(row: Row) -> str:
  """What a completion was and what became of it, in a few words.

  Example: "hinted 3, inserted for own 1".
  """
  words = f"{row['phase']} {row['number']}, {row['used']}"
  if row.get("partner") is None:
    return words
  whose = "for own" if row["used"] == "inserted" else "by number"
  return f"{words} {whose} {row['partner']}"


def step_line(row: Row, step: int) -> Text:
  """One line: the canvas after a denoising step. Step -1 is the canvas before the first step."""
  return Text(f"{'hints' if step < 0 else f'step {step}':>8}  ", FADED) + canvas(row, step)


def animate(row: Row, block_length: int = 0, console: Console | None = None) -> None:
  """Draws the canvas after every denoising step: in its place on a terminal, else line by line."""
  console = console or make_console()
  steps = [-1, *steps_of(row)]
  if not console.is_terminal:
    for step in steps:
      console.print(step_line(row, step))
    return
  pause = min(LONGEST_PAUSE, WHOLE_ANIMATION / len(steps))
  with Live(console=console, refresh_per_second=30) as live:
    for step in steps:
      live.update(canvas(row, step, block_length), refresh=True)
      time.sleep(pause)
    live.update(canvas(row, None, block_length), refresh=True)


def draw_row(row: Row, block_length: int = 0, order: bool = False) -> Panel:
  """Draws a completion in a frame: question, canvas and verdict.

  Args:
    row: a row of samples.jsonl.
    block_length: see `canvas`.
    order: also draw the canvas after every denoising step.
  """
  lines = [Text(visible(shortened(row["prompt"])), "italic")] if row.get("prompt") else []
  if order and pieces_of(row) is not None:
    lines += [step_line(row, step) for step in (-1, *steps_of(row))]
  lines += [canvas(row, block_length=block_length), verdict(row)]
  title = f"step {row['step']}, group {row['group']}: {fate(row)}" if "phase" in row else ""
  return Panel(Text("\n").join(lines), title=Text(visible(title)), title_align="left")


def groups_table(rows: Sequence[Row]) -> Table:
  """One line for each group of a step: how many were right, with hints and without."""
  table = Table("group", "id", "question", "gold", "own right", "hinted right", "inserted")
  groups: dict[Any, list[Row]] = {}
  for row in rows:
    groups.setdefault(row["group"], []).append(row)
  for group, members in groups.items():
    own = [row for row in members if row["phase"] == "own"]
    again = [row for row in members if row["phase"] != "own"]
    count = lambda some: f"{sum(r['correct'] for r in some)} of {len(some)}" if some else "-"
    first = members[0]
    table.add_row(*(Text(text) for text in (
      str(group), visible(shortened(str(first["id"]), 60)), visible(shortened(first["prompt"], 60)),
      visible(shortened(str(first["answer"]), 30)), count(own), count(again),
      str(sum(row["used"] == "inserted" for row in members)),
    )))  # fmt: skip
  return table


def draw_alternatives(choices: Iterable[tuple[int, str, Sequence[tuple[str, float]]]]) -> Text:
  """A line per (position, token, likeliest tokens with their probabilities)."""
  lines = []
  for position, chosen, likeliest in choices:
    others = ", ".join(f"{visible(piece)!r} {share:.2f}" for piece, share in likeliest)
    lines.append(Text(f"{'':10}[{position}] {visible(chosen)!r}  likeliest: {others}"))
  return Text("\n").join(lines)
