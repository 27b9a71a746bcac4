"""A client of the OpenAI-compatible chat protocol that survives failing endpoints.

It calls `POST ENDPOINT/chat/completions`, without streaming. Errors that may pass by themselves are
tried again with exponential back-off and jitter: rate limits, server errors, time-outs, resets,
broken JSON. Errors that only the user can mend (a key, an address, a model's name) raise
`UserError` at once.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
from typing import Any, NamedTuple

import httpx2

from igpo_jax.data.records import Message
from igpo_jax.errors import UserError

RETRIED = frozenset((408, 409, 425, 429))  # and every 5xx
REFUSED = frozenset((400, 413, 422))  # may be about this one request
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 3600.0  # seconds that an endpoint may ask for
CONNECT_TIMEOUT = 20.0  # seconds
# A 400 that is about the text and not about how it is asked for.
_ABOUT_TEXT = re.compile(r"context.?(length|window)|too long|content.?(filter|policy)|max.{0,9}len",
                         re.IGNORECASE)  # fmt: skip


class Failed(Exception):
  """One request failed, and so did all retries. The error's text says how it failed last."""


class Refused(Exception):
  """The endpoint will never answer this request. It may answer others."""


class Stopped(Exception):
  """The program is stopping: no further request is made."""


class Reply(NamedTuple):
  """An answer.

  Attributes:
    text: the stripped text, without a reasoning model's <think> part.
    cut_off: whether the endpoint stopped it at its limit of tokens.
    prompt_tokens, completion_tokens: as the endpoint counts them; 0 if it does not say.
  """

  text: str
  cut_off: bool = False
  prompt_tokens: int = 0
  completion_tokens: int = 0


class _Transient(Exception):
  """An error that is worth another try, after `wait` seconds if the endpoint asked for them."""

  def __init__(self, message: str, wait: float | None = None):
    super().__init__(message)
    self.wait = wait


class ChatClient:
  """Chat completions with retries; use it as an async context manager.

  Args:
    endpoint: base address, such as http://localhost:8000/v1.
    model: the model's name at the endpoint.
    key: sent as a bearer token, and shown nowhere; "" for none.
    options: further fields of every request; a field with the value None is left out.
    concurrency: number of connections that are kept open.
    timeout: the longest time of one request, in seconds, from its first byte to its last.
    retries: how often one request is tried again.
    backoff: seconds before the first retry; they double with each retry, up to a minute.
    proven: whether an earlier run got answers. A response 400 is then about its own request.
  """

  def __init__(
    self,
    endpoint: str,
    model: str,
    key: str = "",
    *,
    options: dict[str, Any] | None = None,
    concurrency: int = 16,
    timeout: float = 300.0,
    retries: int = 8,
    backoff: float = 1.0,
    proven: bool = False,
  ):
    self.url = completions_url(endpoint)
    self.model, self.timeout, self.retries, self.backoff = model, timeout, retries, backoff
    self.requests = 0  # how many were made
    self.stop = asyncio.Event()
    self._key, self._proven = key, proven
    self._options = {k: v for k, v in (options or {}).items() if v is not None}
    self._not_before = 0.0  # by the monotonic clock: the rate limit is everyone's
    self._http = httpx2.AsyncClient(
      headers={"Authorization": f"Bearer {key}"} if key else {},
      limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
      timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT, pool=None),
    )

  async def __aenter__(self) -> ChatClient:
    return self

  async def __aexit__(self, *exc_info: object) -> None:
    await self._http.aclose()

  async def complete(self, messages: list[Message]) -> Reply:
    """One answer.

    Raises:
      UserError: nothing will work until the user mends something.
      Refused: this request is not answered, for example because it is too long.
      Failed: every retry failed.
      Stopped: `stop` was set before an answer was under way.
    """
    for attempt in range(self.retries + 1):
      await self._turn()
      try:
        return await self._once(messages)
      except _Transient as error:
        last = error
      except (httpx2.TransportError, httpx2.DecodingError, TimeoutError) as error:
        last = _Transient(f"{type(error).__name__} {error}".strip())
      if last.wait:
        self._not_before = max(self._not_before, time.monotonic() + last.wait)
      elif attempt < self.retries:
        await self._sleep(min(self.backoff * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.5, 1))
    raise Failed(self._scrubbed(str(last)))

  async def _turn(self) -> None:
    """Waits as long as the endpoint asked everyone to."""
    while (left := self._not_before - time.monotonic()) > 0:
      # Spread, or all would be back in the same millisecond.
      await self._sleep(left + random.uniform(0, min(self.backoff, 0.1 * left + 0.05)))
    if self.stop.is_set():
      raise Stopped

  async def _sleep(self, seconds: float) -> None:
    try:
      async with asyncio.timeout(seconds):
        await self.stop.wait()
    except TimeoutError:
      return
    raise Stopped

  async def _once(self, messages: list[Message]) -> Reply:
    body = {"model": self.model, "messages": messages, "stream": False, **self._options}
    self.requests += 1
    async with asyncio.timeout(self.timeout):
      response = await self._http.post(self.url, json=body)
    if response.status_code == 200:
      reply = read_reply(response.content)
      self._proven = True
      return reply
    said = self._scrubbed(_said(response))
    told = f"HTTP {response.status_code} from {self.url}: {said}"
    if response.status_code == 429 and "insufficient_quota" in response.text:
      raise UserError(f"{told}; the account's quota is used up")
    if response.status_code in RETRIED or response.status_code >= 500:
      wait = retry_after(response.headers.get("retry-after"))
      if wait is not None and wait > LONGEST_WAIT:
        raise UserError(f"{told}; it asks to come back in {wait:.0f} seconds: try again then")
      raise _Transient(f"HTTP {response.status_code}: {said}", wait)
    if response.status_code in REFUSED and (
      self._proven or response.status_code == 413 or _ABOUT_TEXT.search(said)
    ):
      raise Refused(f"HTTP {response.status_code}: {said}")
    raise UserError(f"{told}; {_advice(response)}")

  def _scrubbed(self, text: str) -> str:
    return text.replace(self._key, "[key]") if self._key else text


def completions_url(endpoint: str) -> str:
  """The address that requests go to, made from a base address.

  Raises:
    UserError: it is not an address, or has a user name, a password or a query in it.
  """
  try:
    url = httpx2.URL(endpoint)
  except httpx2.InvalidURL as error:
    raise UserError(f"--endpoint: not an address ({error}); expected http://HOST:PORT/v1") from None
  if url.userinfo or url.query:
    raise UserError(
      "--endpoint: keys do not belong into an address; put the key into an environment variable"
    )
  if url.scheme not in ("http", "https") or not url.host:
    raise UserError(f"--endpoint={endpoint}: expected an address such as http://HOST:PORT/v1")
  path = str(url).rstrip("/")
  return path if path.endswith("/chat/completions") else f"{path}/chat/completions"


def retry_after(value: str | None) -> float | None:
  """The seconds to wait by a Retry-After header, a number or a date; None if it has neither."""
  if value is None:
    return None
  try:
    seconds = float(value)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
      return None
  return max(seconds, 0.0) if seconds == seconds else None


def read_reply(content: bytes) -> Reply:
  """Reads the answer from a response's body. A body without one counts as a failed request."""
  try:
    body = json.loads(content)
    choice = body["choices"][0]
    text = choice["message"]["content"]
  except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
    raise _Transient(f"a response that is no completion ({type(error).__name__})") from None
  if isinstance(text, list):  # parts
    text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
  text = (text if isinstance(text, str) else "").rpartition("</think>")[2].strip()
  usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
  count = lambda name: value if isinstance(value := usage.get(name), int) else 0
  cut_off = choice.get("finish_reason") == "length"
  return Reply(text, cut_off, count("prompt_tokens"), count("completion_tokens"))


def _said(response: httpx2.Response) -> str:
  """The endpoint's own words, in one line of a readable length."""
  try:
    error = response.json()["error"]
    text = error["message"] if isinstance(error, dict) else str(error)
  except (ValueError, KeyError, TypeError):
    text = response.text
  return " ".join(str(text).split())[:300] or response.reason_phrase


def _advice(response: httpx2.Response) -> str:
  match response.status_code:
    case 401 | 403:
      return "put a valid key into the environment variable that --key_env names"
    case 404:
      return "check --endpoint (usually it ends in /v1) and --model"
    case status if 300 <= status < 400:
      return f"give the address it points to as --endpoint ({response.headers.get('location')})"
  return "check --model, --endpoint and --extra"
