"""Serves a model to OpenAI's clients, and a page on which parts of answers are pinned by hand.

    python -m igpo_jax.serve --model=DIR [--port=8000]

POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /, the page. Answers are
those of igpo_jax.generate. It listens on 127.0.0.1, where this machine alone can reach it, unless
--host says otherwise. With the environment variable IGPO_API_KEY clients have to send that key.
docs/serve.md tells more. Needs the extra "serve": pip install 'igpo_jax[serve]'.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import ipaddress
import os
import pathlib
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

from igpo_jax import cli
from igpo_jax.config.fields import Count, Positive, number
from igpo_jax.errors import UserError
from igpo_jax.inference.arguments import add_arguments, given_options, settings_from
from igpo_jax.inference.settings import Settings, describe

KEY = "IGPO_API_KEY"
GRACE = 30  # seconds for answers that are at work when the server is told to end


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.serve", description=__doc__)
  add = parser.add_argument
  add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
  add("--port", default="8000", help="0: any that is free (%(default)s)")
  add("--name", help="of the model, for clients; default: the name of its directory")
  add("--slots", type=number(Count), default=8, help="answers made at a time (%(default)s)")
  add("--queue", type=number(Count), default=1024, help="answers that may wait (%(default)s)")
  add("--max_prompt", type=number(Count), default=4096, help="tokens of a prompt (%(default)s)")
  add("--max_body", type=number(Count), default=1 << 20, help="bytes of a request (%(default)s)")
  add("--timeout", type=number(Positive), default=600.0,
      help="seconds from a request to its answer (%(default)s)")  # fmt: skip
  add_arguments(parser, seed=None)
  return parser


def check(args: argparse.Namespace) -> None:
  """Raises `UserError` for what can be told before the model is looked at."""
  for package in ("starlette", "uvicorn"):
    if importlib.util.find_spec(package) is None:
      raise UserError(f"{package} is not installed: pip install 'igpo_jax[serve]'")
  if args.raw:
    raise UserError("--raw: /v1/completions takes prompts without the chat format")


def listen(host: str, port: str) -> socket.socket:
  """A socket that listens.

  Raises:
    UserError: no such address or port, or it is in use.
  """
  if not port.isdecimal() or int(port) > 65535:
    raise UserError(f"--port={port} should be a number from 0 to 65535")
  try:
    family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    sock.listen(2048)
  except (OSError, UnicodeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"--host={host} --port={port}: {reason}; choose another") from error
  return sock


def names_of(host: str) -> frozenset[str]:
  """The names by which clients may call a server that listens on `host`; empty: any name."""
  try:
    alone = ipaddress.ip_address(host).is_loopback
  except ValueError:
    alone = host == "localhost"
  return frozenset({"localhost", "127.0.0.1", "::1", host.lower()} if alone else ())


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  check(args)
  model, settings = settings_from(args)
  if settings.sampler.early_stop == "batch":
    raise UserError("--early_stop=batch: an answer would depend on those beside it; use row")
  with listen(args.host, args.port) as sock:
    cli.say(f"serve: {model}: loading jax")
    serve(args, model, settings, sock)


def serve(args: argparse.Namespace, model: Any, settings: Settings, sock: socket.socket) -> None:
  """Loads the model, compiles its first program, and answers until the process is told to end.

  Raises:
    UserError: the model cannot be read, or its options cannot be served.
  """
  import uvicorn

  from igpo_jax.inference.session import Session
  from igpo_jax.serve.app import Limits, Service
  from igpo_jax.serve.engine import Engine

  session = Session(model, args.adapter, args.dtype or "")
  session.load()
  engine = Engine(session, args.slots, args.queue)
  limits = Limits(
    args.max_body, args.max_prompt, args.timeout, names_of(args.host), os.environ.get(KEY, "")
  )
  name = args.name or pathlib.Path(args.model).resolve().name
  service = Service(engine, session, settings, name, limits, args.seed)
  engine.start()
  cli.say(f"serve: {describe(settings, given_options(args))}")
  cli.say("serve: compiling")
  warm_up(engine, session, settings)

  @contextlib.asynccontextmanager
  async def lifespan(app: Any) -> AsyncIterator[None]:
    watch = asyncio.create_task(_close_soon(server, service))
    host, port, *_ = sock.getsockname()
    shown = f"[{host}]" if ":" in host else host
    if not names_of(args.host):
      told = f"clients need the key in {KEY}" if limits.key else f"without a key (see {KEY})"
      cli.say(f"serve: other machines can reach this server, {told}")
    cli.say(f"serve: http://{shown}:{port} answers as {name!r}; Ctrl-C ends it")
    yield
    watch.cancel()

  config = uvicorn.Config(
    service.app(lifespan), log_config=None, access_log=False, server_header=False, lifespan="on",
    ws="none", http="h11", timeout_graceful_shutdown=GRACE,
  )  # fmt: skip
  server = uvicorn.Server(config)
  try:
    server.run(sockets=[sock])
  finally:
    engine.close()
    if not engine.join(1.0):  # it is compiling, or at work for a client that was cut off
      cli.say("serve: the program on the devices is left")


async def _close_soon(server: Any, service: Any) -> None:
  """Once the server is told to end: waiting rows are refused, those at work are finished."""
  while not server.should_exit:
    await asyncio.sleep(0.05)
  service.closing = True
  service.engine.close()


def warm_up(engine: Any, session: Any, settings: Settings) -> None:
  """Answers a short prompt with the server's own options, so that its program is compiled.

  Raises:
    UserError: it cannot be answered.
  """
  from igpo_jax.inference.requests import Request, batch_arrays
  from igpo_jax.serve.engine import Row

  done, got = threading.Event(), []

  def deliver(update: Any) -> None:
    got.append(update)
    done.set()

  request = Request((session.tokenizer.eos_id,))
  arrays = batch_arrays([request], settings.sampler.gen_length, session.tokenizer)
  engine.submit([Row(*(x[0] for x in arrays), settings.sampler, 0, 0, deliver)])
  done.wait()
  if isinstance(got[0], Exception):
    raise UserError(f"serve: {got[0]}") from got[0]


if __name__ == "__main__":
  cli.run(main)
