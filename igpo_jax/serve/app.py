"""The HTTP side: routes, limits, and answers whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from igpo_jax.inference.session import Session
from igpo_jax.inference.settings import Settings
from igpo_jax.serve import answers
from igpo_jax.serve.engine import Engine, Update
from igpo_jax.serve.fields import Asked, parse, read_body
from igpo_jax.serve.refusal import Refusal
from igpo_jax.serve.requests import Job, make_job

BODY_SECONDS = 30  # for a client to send its request
PAGE = {  # path -> package, file and kind; what the page of a run has, too, is that page's own
  "": ("igpo_jax.serve", "page.html", "text/html"),
  "chat.js": ("igpo_jax.serve", "chat.js", "text/javascript"),
  "chat.css": ("igpo_jax.serve", "chat.css", "text/css"),
  "text.js": ("igpo_jax.viewer", "text.js", "text/javascript"),
  "page.css": ("igpo_jax.viewer", "page.css", "text/css"),
}
HEADERS = {
  "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
  "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a client may ask for.

  Attributes:
    body: bytes of a request.
    prompt: tokens of a prompt.
    seconds: from a request to its answer, the waiting included.
    hosts: names by which the server may be called (the header Host); empty: any. So a page of
      another site that has its own name point here is not answered.
    key: what clients send as "Authorization: Bearer KEY"; "" for nothing.
  """

  body: int
  prompt: int
  seconds: float
  hosts: frozenset[str]
  key: str = ""


class Service:
  """Answers requests with a model.

  Args:
    engine: makes the answers.
    session, settings: the model, and how it is asked.
    name: of the model, for clients.
    limits: see `Limits`.
    seed: of requests that state none; None: each gets one that is drawn.
  """

  def __init__(
    self,
    engine: Engine,
    session: Session,
    settings: Settings,
    name: str,
    limits: Limits,
    seed: int | None = None,
  ):
    self.engine, self.session, self.settings = engine, session, settings
    self._seed = lambda: secrets.randbelow(2**32) if seed is None else seed
    self.name, self.limits, self.began = name, limits, int(time.time())
    self.closing = False

  def app(self, lifespan: Any = None) -> Starlette:
    """The ASGI application."""
    page = [Route(f"/{name}", self._page) for name in PAGE]
    return Starlette(
      routes=[
        *page,
        Route("/health", self._health),
        Route("/v1/models", self._models),
        Route("/v1/models/{name:path}", self._models),
        Route("/v1/chat/completions", self._chat, methods=["POST"]),
        Route("/v1/completions", self._text, methods=["POST"]),
      ],
      exception_handlers={
        Refusal: _refused,
        HTTPException: _no_route,
        ClientDisconnect: _left,
        Exception: _bug,
      },
      lifespan=lifespan,
    )

  # --- routes ------------------------------------------------------------------------------

  async def _page(self, request: Request) -> Response:
    self._check_host(request)
    package, name, kind = PAGE[request.url.path[1:]]
    text = importlib.resources.files(package).joinpath("page", name).read_bytes()
    return Response(text, media_type=kind, headers=HEADERS)

  async def _health(self, request: Request) -> Response:
    self._check_host(request)
    status = "ending" if self.closing else "ok"
    body = {"status": status, "model": self.name, **self.engine.counts()}
    return _json(body, 503 if self.closing else 200)

  async def _models(self, request: Request) -> Response:
    self._admit(request)
    asked = request.path_params.get("name")
    self._check_model(asked)
    model = {"id": self.name, "object": "model", "created": self.began, "owned_by": "igpo_jax"}
    return _json(model if asked is not None else {"object": "list", "data": [model]})

  async def _chat(self, request: Request) -> Response:
    return await self._answer(request, chat=True)

  async def _text(self, request: Request) -> Response:
    return await self._answer(request, chat=False)

  # --- who may ask -------------------------------------------------------------------------

  def _check_host(self, request: Request) -> None:
    host = request.headers.get("host", "")
    host = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if self.limits.hosts and host.strip("[]").lower() not in self.limits.hosts:
      raise Refusal(421, "this server has another name (see --host)", code="wrong_host")

  def _admit(self, request: Request) -> None:
    self._check_host(request)
    if not self.limits.key:
      return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), self.limits.key.encode())
    if kind.lower() != "bearer" or not same:
      raise Refusal(401, "no API key, or a wrong one", code="invalid_api_key")

  def _check_model(self, name: str | None) -> None:
    if name is not None and name != self.name:
      raise Refusal(
        404, f"there is no model {name[:100]!r} here; there is {self.name!r}", "model",
        "model_not_found",
      )  # fmt: skip

  async def _body(self, request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
      raise Refusal(415, "send the header Content-Type: application/json")
    most = self.limits.body
    too_large = Refusal(413, f"the body is larger than {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
      raise too_large
    parts, size = [], 0
    try:
      async with asyncio.timeout(BODY_SECONDS):
        async for part in request.stream():
          size += len(part)
          if size > most:
            raise too_large
          parts.append(part)
    except TimeoutError:
      raise Refusal(408, f"the body took longer than {BODY_SECONDS} s") from None
    return b"".join(parts)

  # --- answers -----------------------------------------------------------------------------

  async def _answer(self, request: Request, chat: bool) -> Response:
    self._admit(request)
    asked = parse(read_body(await self._body(request)), chat)
    self._check_model(asked.model)
    events: asyncio.Queue = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(index: int, update: Any) -> None:  # in the engine's thread
      with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client
        loop.call_soon_threadsafe(events.put_nowait, (index, update))

    if asked.seed is None:
      asked = dataclasses.replace(asked, seed=self._seed())
    job = make_job(asked, chat, self.session, self.settings, self.limits.prompt, deliver)
    self.engine.submit(job.rows)
    answer = _Answer(self, asked, chat, job, events)
    if asked.stream:
      return _Events(answer.stream(), lambda: self.engine.give_up(job.rows))
    try:
      done = await _unless_gone(answer.whole(), request.receive)
    finally:
      self.engine.give_up(job.rows)
    return _json(done) if done is not None else await _left(request)


class _Answer:
  """One request's answer while it is made."""

  def __init__(self, service: Service, asked: Asked, chat: bool, job: Job, events: asyncio.Queue):
    self.service, self.asked, self.chat, self.job, self.events = service, asked, chat, job, events
    self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    self.kind = "chat.completion" if chat else "text_completion"
    self.counts = [0] * len(job.rows)

  async def _updates(self) -> AsyncIterator[tuple[int, Update]]:
    """(number of the choice, its newest state) until all choices are done, or their text is."""
    left = set(range(len(self.job.rows)))
    seconds = self.service.limits.seconds
    ends = time.monotonic() + seconds
    while left:
      try:
        index, update = await asyncio.wait_for(self.events.get(), ends - time.monotonic())
      except TimeoutError:
        raise Refusal(504, f"no answer within {seconds:g} s", code="timeout") from None
      if isinstance(update, Exception):
        raise update
      if index not in left:
        continue  # its text was settled before it was done
      if not update.done and not self.asked.order:
        beginning = self.job.reader.final(update.tokens)
        if self.job.reader.is_settled(beginning):
          self.service.engine.give_up([self.job.rows[index]])
          update = Update(beginning, update.commit_step, True)
      if update.done:
        left.remove(index)
      yield index, update

  def _object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
    return {
      "id": self.id, "object": kind, "created": int(time.time()), "model": self.service.name,
      "seed": self.job.seed, "choices": choices, **more,
    }  # fmt: skip

  def _choice(self, index: int, update: Update, text: str, streamed: bool) -> dict[str, Any]:
    """The last piece of a choice, which says why it ended."""
    read = self.job.reader.read(update.tokens)
    self.counts[index] = read.count
    out = answers.choice(index, text, "stop" if read.ended else "length", self.chat, streamed)
    if self.asked.order:
      hinted, tokenizer = self.job.rows[index].hinted, self.service.session.tokenizer
      out["order"] = answers.order(update.tokens, update.commit_step, hinted, tokenizer)
    return out

  def _usage(self) -> dict[str, int]:
    return answers.usage(self.job.prompt_tokens, self.counts)

  async def whole(self) -> dict[str, Any]:
    """The answer as one object."""
    choices: dict[int, Any] = {}
    async for index, update in self._updates():
      if update.done:
        text = self.job.reader.read(update.tokens).text
        choices[index] = self._choice(index, update, text, streamed=False)
    return self._object(self.kind, [choices[k] for k in sorted(choices)], usage=self._usage())

  async def stream(self) -> AsyncIterator[dict[str, Any]]:
    """The answer as objects whose texts, joined, are the whole answer's."""
    kind = f"{self.kind}.chunk" if self.chat else self.kind
    sent, shown = [""] * len(self.job.rows), [np.zeros(0, np.int32)] * len(self.job.rows)
    if self.chat:
      for index in range(len(sent)):
        first = answers.choice(index, "", None, True, True)
        yield self._object(kind, [first | {"delta": {"role": "assistant", "content": ""}}])
    async for index, update in self._updates():
      reader = self.job.reader
      if update.done:
        text = reader.read(update.tokens).text
      else:
        text = reader.safe(reader.read(reader.final(update.tokens)))
      new = text[len(sent[index]) :] if text.startswith(sent[index]) else ""
      sent[index] += new
      if update.done:
        if new:
          yield self._object(kind, [answers.choice(index, new, None, self.chat, True)])
        last = self._choice(index, update, "", streamed=True)
      else:
        last = answers.choice(index, new, None, self.chat, True)
      changed = not np.array_equal(shown[index], update.tokens)
      if self.asked.denoising and changed:
        shown[index] = update.tokens
        last["canvas"] = answers.canvas(update.tokens, self.service.session.tokenizer)
      if new or update.done or "canvas" in last:
        yield self._object(kind, [last])
    if self.asked.usage:
      yield self._object(kind, [], usage=self._usage())


class _Events(Response):
  """Server-sent events; `leave` is called at the end, and when the client is gone."""

  media_type = "text/event-stream"

  def __init__(self, objects: AsyncIterator[dict[str, Any]], leave: Callable[[], None]):
    self.status_code, self.background = 200, None
    self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
    self._objects, self._leave = objects, leave

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    try:
      await _unless_gone(self._send(send), receive)
    finally:
      self._leave()

  async def _send(self, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
    event = lambda text: {
      "type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True
    }  # fmt: skip
    try:
      async for part in self._objects:
        await send(event(json.dumps(part)))
      await send(event("[DONE]"))
    except Refusal as refusal:
      await send(event(json.dumps(refusal.as_json())))
    await send({"type": "http.response.body", "body": b""})


async def _unless_gone(work: Awaitable[Any], receive: Any) -> Any:
  """The result of `work`; None, and `work` is cancelled, if the client goes away before that."""

  async def gone() -> None:
    while (await receive())["type"] != "http.disconnect":
      pass

  working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone())
  try:
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    return working.result() if working.done() else None
  finally:
    for task in (working, waiting):
      task.cancel()
    await asyncio.gather(working, waiting, return_exceptions=True)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  """JSON in ASCII: a text of a model or of a client may have what cannot be UTF-8."""
  return Response(json.dumps(value), status, headers, "application/json")


async def _refused(request: Request, refusal: Any) -> Response:
  headers = {"retry-after": "1"} if refusal.status in (429, 503) else None
  headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else headers
  # What the client still sends of a body that is not read would be taken for its next request.
  close = {"connection": "close"} if refusal.status in (408, 413, 415) else {}
  return _json(refusal.as_json(), refusal.status, {**(headers or {}), **close})


async def _no_route(request: Request, error: Any) -> Response:
  told = f"{request.method} {request.url.path[:100]}: {error.detail}"
  return _json(Refusal(error.status_code, told).as_json(), error.status_code)


async def _left(request: Request, error: Any = None) -> Response:
  return Response(status_code=499)  # the client is gone, nobody reads this


async def _bug(request: Request, error: Exception) -> Response:
  return _json(Refusal(500, f"a mistake of this server's: {type(error).__name__}").as_json(), 500)
