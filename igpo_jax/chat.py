"""Asks a model many questions: it is loaded once, and parts of an answer may be given.

    python -m igpo_jax.chat --model=DIR

Every line is a question. Lines that begin with / are commands:

    /template TEXT   use this answer with gaps from now on, such as "A[MASK*6] B[END]"
                     (see igpo_jax.generate); without TEXT: use none
    /hint TEXT@POSITION   add a given piece of the answer; without an argument: remove all
    /order           turn on or off a list of the tokens that each step filled in
    /history         turn on or off keeping earlier turns in the prompt
    /set NAME=VALUE  set an option of the sampler, such as /set temperature=0.7; alone: show all
    /help, /quit

A question that begins with a slash is written with two slashes. Answers go to standard output, all
other lines to standard error. If questions come from a file or a pipe, a mistake ends the program.
"""

from __future__ import annotations

import argparse

from igpo_jax import cli
from igpo_jax.inference.arguments import add_arguments
from igpo_jax.inference.conversation import Chat, talk

__all__ = ["Chat", "main", "make_parser"]


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(
    prog="python -m igpo_jax.chat",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add_arguments(parser)
  return parser


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  talk(make_parser().parse_args(argv))


if __name__ == "__main__":
  cli.run(main)
