"""A conversation with a model: questions and commands, line by line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.inference import draw
from igpo_jax.inference.arguments import given_options, parse_option, settings_from
from igpo_jax.inference.requests import (
  canvas_with_hints,
  check_row,
  make_request,
  parse_hint,
  parse_template,
)
from igpo_jax.inference.settings import Settings, describe, override

if TYPE_CHECKING:  # importing jax takes seconds: after the first line
  from igpo_jax.inference.session import Session

HELP = """Every line is a question. Lines that begin with / are commands:

    /template TEXT   use this answer with gaps from now on, such as "A[MASK*6] B[END]"
                     (see igpo_jax.generate); without TEXT: use none
    /hint TEXT@POSITION   add a given piece of the answer; without an argument: remove all
    /order           turn on or off a list of the tokens that each step filled in
    /history         turn on or off keeping earlier turns in the prompt
    /set NAME=VALUE  set an option of the sampler, such as /set temperature=0.7; alone: show all
    /help, /quit

A question that begins with a slash is written with two slashes."""


class Chat:
  """A conversation with a model: the settings, given parts and turns so far.

  Args:
    session: the model.
    settings: the settings to begin with.
    args: the parsed command line.
  """

  def __init__(self, session: Session, settings: Settings, args: argparse.Namespace):
    self.session, self.settings, self.args = session, settings, args
    self.given = given_options(args)
    self.template: str | None = None
    self.hints: list[str] = []
    self.turns: list[dict[str, str]] = []
    self.asked = 0
    self.show_order = self.keep_history = False
    self.commands: dict[str, Callable[[str], None]] = {
      "template": self._template, "hint": self._hint, "order": self._order,
      "history": self._history, "set": self._set, "help": lambda rest: cli.say(HELP),
    }  # fmt: skip

  def line(self, text: str) -> bool:
    """Carries out one line, a command or a question. Returns False for /quit.

    Raises:
      UserError: an unknown command, or a question that cannot be asked.
    """
    text = text.rstrip("\r\n")
    if not text.strip():
      return True
    if text.startswith("//"):
      text = text[1:]
    elif text.startswith("/"):
      name, _, rest = text[1:].partition(" ")
      if name in ("quit", "exit"):
        return False
      if name not in self.commands:
        known = ", ".join(f"/{c}" for c in [*self.commands, "quit"])
        raise UserError(f"there is no command /{name}; known: {known}")
      self.commands[name](rest)
      return True
    self.ask(text)
    return True

  def ask(self, question: str) -> None:
    """Prints the answer to a question. If parts of it are given, the canvas is shown before."""
    row = self._row(question)
    request = make_request(row, self.session.tokenizer, self.settings.prompting, self.args.raw)
    self.session.check(request)
    canvas = canvas_with_hints(request, self.settings.sampler.gen_length, self.session.tokenizer)
    if request.hints or request.end is not None:
      cli.say(f"canvas: {draw.preview(*canvas, self.session.tokenizer)}")
    # Another question draws other noise; the same session again draws the same.
    seed = (self.args.seed + self.asked) % 2**32
    (answer,) = self.session.answers([request], self.settings.sampler, seed)
    self.asked += 1
    print(answer.text, flush=True)
    if self.show_order:
      order = draw.order(answer.tokens, answer.commit_step, canvas[1], self.session.tokenizer)
      print(order, flush=True)
    if self.keep_history:
      turn = self.settings.prompting.messages(question)[-1]
      self.turns += [turn, {"role": "assistant", "content": answer.text}]

  def _row(self, question: str) -> dict[str, Any]:
    row: dict[str, Any] = {"hints": self.hints}
    if self.template is not None:
      row["template"] = self.template
    if not self.turns:
      return row | {"prompt": question}
    *system, turn = self.settings.prompting.messages(question)
    return row | {"messages": [*system, *self.turns, turn]}

  def _template(self, text: str) -> None:
    if text:
      parse_template(text)
    self.template = text or None
    self._preview()

  def _hint(self, text: str) -> None:
    if text:
      parse_hint(text)
    self.hints = [*self.hints, text] if text else []
    self._preview()

  def _preview(self) -> None:
    """Shows the canvas that the next question begins with."""
    row = self._row("") | {"prompt": ""}
    row.pop("messages", None)
    check_row(row, "next question")
    request = make_request(row, self.session.tokenizer, raw=True)
    canvas = canvas_with_hints(request, self.settings.sampler.gen_length, self.session.tokenizer)
    cli.say(f"canvas: {draw.preview(*canvas, self.session.tokenizer)}")

  def _order(self, rest: str) -> None:
    self.show_order = not self.show_order
    cli.say(f"the order of the tokens is {'shown' if self.show_order else 'not shown'}")

  def _history(self, rest: str) -> None:
    if self.args.raw:
      raise UserError("/history: with --raw there are no turns to keep")
    self.keep_history, self.turns = not self.keep_history, []
    cli.say(f"earlier turns are {'kept in' if self.keep_history else 'left out of'} the prompt")

  def _set(self, text: str) -> None:
    if text:
      name, equals, value = text.partition("=")
      if not equals:
        raise UserError(f"/set {text}: write /set NAME=VALUE, such as /set temperature=0.7")
      options = parse_option(name.strip(), value.strip())
      sampler = override(self.settings.sampler, options)
      self.settings, self.given = self.settings._replace(sampler=sampler), self.given | options
    cli.say(describe(self.settings, self.given))


def talk(args: argparse.Namespace, keep_history: bool = False) -> None:
  """Reads questions and commands from standard input until it ends, or /quit.

  Args:
    args: the parsed command line (`arguments.add_arguments`).
    keep_history: earlier turns stay in the prompt from the beginning.

  Raises:
    UserError: the model cannot be read; or, if a file or a pipe asks, a line has a mistake.
  """
  model, settings = settings_from(args)
  cli.say(f"chat: {model}: loading jax")
  from igpo_jax.inference.session import Session

  session = Session(model, args.adapter, args.dtype or "")
  session.load()
  chat = Chat(session, settings, args)
  cli.say(f"chat: {describe(settings, chat.given)}")
  if keep_history:
    chat.line("/history")
  person = sys.stdin.isatty()
  if person:
    cli.say("chat: a line is a question; /help tells more, /quit ends")
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401  gives `input` a history and arrow keys
  while True:
    try:
      text = input("> ") if person else sys.stdin.readline()
    except EOFError:
      break
    if not person and not text:
      break
    try:
      if not chat.line(text):
        break
    except UserError as error:
      if not person:
        raise
      cli.say(f"error: {error}")
