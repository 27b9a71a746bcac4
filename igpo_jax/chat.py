"""Asks a model many questions: it is loaded once, and parts of an answer may be given.

    python -m igpo_jax.chat --model=DIR

Answers go to standard output, all other lines to standard error. If questions come from a file or a
pipe, a mistake ends the program. The commands of a conversation are in `conversation.HELP`.
"""

from __future__ import annotations

from igpo_jax import cli
from igpo_jax.inference.arguments import add_arguments
from igpo_jax.inference.conversation import HELP, Chat, talk

__all__ = ["Chat", "main", "make_parser"]


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.chat", description=f"{__doc__}\n{HELP}")
  add_arguments(parser)
  return parser


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  talk(make_parser().parse_args(argv))


if __name__ == "__main__":
  cli.run(main)
