"""An OpenAI-compatible endpoint on the loopback that misbehaves as it is told.

A request is about record k, which its problem names ("Problem 17: ..."). The server does what
`plan[k]` lists, one item a request; then, and without a plan, it answers well.

    ok          a concise trace with the right answer      wrong     another answer
    long        right, of 400 words                        unboxed   right, without a box
    cut         stopped by the limit of tokens             empty     no text
    slow        right, after `patience` seconds            500, 429  such an error
    429:WAIT    with Retry-After: WAIT                     truncated half a body
    reset       the connection is reset                    garbage   200 and no JSON
    400 ...     any other status
"""

from __future__ import annotations

import collections
import contextlib
import http.server
import json
import re
import socket
import struct
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
  """One connection; the server object has the state."""

  protocol_version = "HTTP/1.1"

  def do_POST(self):
    state = self.server.state
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    user = body["messages"][1]["content"]
    record = int(re.search(r"Problem (\d+):", user).group(1))
    answer = re.search(r"Final answer: (.*)\n", user).group(1)
    with state.arrival(self, record, body) as kind:
      self.answer(kind, answer)

  def answer(self, kind, answer):
    good = f"Adding both gives \\boxed{{{answer}}}"
    time.sleep(self.server.state.delay)
    if kind == "slow":
      time.sleep(self.server.state.patience)
    texts = {
      "ok": good,
      "slow": good,
      "wrong": r"It is \boxed{-17}",
      "long": "word " * 400 + good,
      "unboxed": f"The answer is {answer}",
      "cut": good,
      "empty": "",
    }
    if kind in texts:
      finish = "length" if kind == "cut" else "stop"
      self.send(200, texts[kind], finish)
    elif kind == "truncated":
      self.raw(200, json.dumps({"choices": [{"message": {"content": good}}]}).encode()[:30])
    elif kind == "garbage":
      self.raw(200, b"<html>busy</html>")
    elif kind == "reset":
      # Closing with a linger of zero sends a reset instead of an orderly end.
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      self.close_connection = True
      self.connection.close()
    else:
      status, _, wait = kind.partition(":")
      headers = {"Retry-After": wait} if wait else {}
      key = self.headers.get("Authorization", "").removeprefix("Bearer ")
      error = {"error": {"message": f"no luck today, {key}", "type": "t", "code": status}}
      self.raw(int(status), json.dumps(error).encode(), headers)

  def send(self, status, text, finish):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    body = {"choices": [choice | {"finish_reason": finish}], "usage": usage}
    self.raw(status, json.dumps(body).encode())

  def raw(self, status, content, headers=None):
    with contextlib.suppress(ConnectionError):  # a client that was killed or gave up
      self.send_response(status)
      for name, value in (headers or {}).items():
        self.send_header(name, value)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content)

  def finish(self):
    with contextlib.suppress(OSError):  # reset by us
      super().finish()

  def log_message(self, *args):
    pass


class State:
  """What the server is told to do, and what it saw.

  Attributes:
    plan: record -> kinds of answers to its requests, in order.
    seen: record -> the bodies of its requests.
    times: (seconds, record) of every arrival.
    keys: Authorization headers.
    in_flight, most_in_flight: requests at the same time.
    delay, patience: seconds that every answer, and a slow one, takes.
    gather: hold answers back until so many requests are in flight (at most 5 seconds).
  """

  def __init__(self):
    self.plan: dict[int, list[str]] = {}
    self.seen: dict[int, list[dict]] = collections.defaultdict(list)
    self.times: list[tuple[float, int]] = []
    self.keys: set[str | None] = set()
    self.paths: set[str] = set()
    self.in_flight = self.most_in_flight = 0
    self.delay, self.patience, self.gather = 0.0, 0.0, 0
    self._change = threading.Condition()

  @contextlib.contextmanager
  def arrival(self, handler, record, body):
    with self._change:
      self.in_flight += 1
      self.most_in_flight = max(self.most_in_flight, self.in_flight)
      number = len(self.seen[record])
      self.seen[record].append(body)
      self.times.append((time.monotonic(), record))
      self.keys.add(handler.headers.get("Authorization"))
      self.paths.add(handler.path)
      self._change.notify_all()
      self._change.wait_for(lambda: self.most_in_flight >= self.gather, timeout=5)
    try:
      plan = self.plan.get(record, [])
      yield plan[number] if number < len(plan) else "ok"
    finally:
      with self._change:
        self.in_flight -= 1

  @property
  def requests(self):
    return len(self.times)


class Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 256

  def handle_error(self, request, client_address):
    pass  # a connection that the test reset or killed


@contextlib.contextmanager
def chat_server():
  """(base address, State) of a server that ends with the block."""
  with Server(("127.0.0.1", 0), Handler) as server:
    server.state = State()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}/v1", server.state
    finally:
      server.shutdown()
      thread.join()
