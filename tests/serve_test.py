"""The endpoint: what clients get is what generate gives, whoever else asks, leaves or errs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from igpo_jax.config import SamplerConfig
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.data.sources import Prompting
from igpo_jax.data.tokenizer import load_tokenizer
from igpo_jax.errors import UserError
from igpo_jax.inference import session
from igpo_jax.inference.requests import make_request
from igpo_jax.serve import __main__ as command
from igpo_jax.serve import answers, engine, fields
from igpo_jax.serve.refusal import Refusal
from igpo_jax.serve.requests import with_prompting
from tests.browser_test import browser  # noqa: F401  a fixture
from tests.convert_helpers import copy_tiny
from tests.paths import REPO
from tests.tiny_tokenizer import make_directory

CFG = SamplerConfig(gen_length=16, block_length=8, steps=8, temperature=1.0)
SMALL = ["--gen_length=16", "--block_length=8", "--steps=8", "--temperature=1.0"]
KEY = "sk-of-the-test"
QUEUE = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_directory(copy_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def tokenizer(model):
  return load_tokenizer(model)


@pytest.fixture(scope="module")
def expected(model):
  """What igpo_jax.generate gives: (row, seed, number of the row, other options) -> `Answer`."""
  pre, known = load_pretrained(model, dtype="float32"), {}

  def answer(row, seed=0, number=0, cfg=CFG, raw=False):
    name = json.dumps([row, seed, number, dataclasses.asdict(cfg), raw])
    if name not in known:
      request = make_request(row, pre.tokenizer, raw=raw)
      made = session.generate(pre, [request] * (number + 1), cfg, jax.random.key(seed), 1)
      known[name] = list(made)[-1]
    return known[name]

  return answer


# --- reading a request and an answer: no server, no model -----------------------------------

HELLO = [{"role": "user", "content": "Hello"}]
BAD_FIELDS = {
  "no messages": ({}, "messages is missing"),
  "empty messages": ({"messages": []}, "empty list of messages"),
  "messages are text": ({"messages": "Hello"}, "messages that are no list"),
  "role": ({"messages": [{"role": "wizard", "content": ""}]}, "role 'wizard'"),
  "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not text"),
  "typo": ({"messages": HELLO, "temprature": 1}, "did you mean temperature"),
  "of text": ({"messages": HELLO, "prompt": "x"}, "unknown field 'prompt'"),
  "top_p": ({"messages": HELLO, "top_p": 0.5}, "top_p is not offered"),
  "tools": ({"messages": HELLO, "tools": [{}]}, "tools is not offered"),
  "true": ({"messages": HELLO, "max_tokens": True}, "max_tokens should be a whole number"),
  "fraction": ({"messages": HELLO, "n": 1.5}, "n should be a whole number, not a fraction"),
  "none of them": ({"messages": HELLO, "n": 0}, "n should be between 1 and 64"),
  "hot": ({"messages": HELLO, "temperature": 3}, "temperature should be between 0 and 2"),
  "infinite": ({"messages": HELLO, "temperature": float("inf")}, "between 0 and 2"),
  "not a number": ({"messages": HELLO, "temperature": float("nan")}, "between 0 and 2"),
  "seed": ({"messages": HELLO, "seed": -1}, "seed should be between"),
  "two lengths": ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "differ"),
  "stop": ({"messages": HELLO, "stop": [1]}, "stop should be text or a list of texts"),
  "empty stop": ({"messages": HELLO, "stop": ""}, "none of them empty"),
  "stream": ({"messages": HELLO, "stream": "yes"}, "stream should be true or false, not text"),
  "no stream": ({"messages": HELLO, "stream_options": {"denoising": True}}, "goes with stream"),
  "of stream": ({"messages": HELLO, "stream": True, "stream_options": {"x": 1}}, "options.x"),
  "hints": ({"messages": HELLO, "hints": ["a@1"]}, r"hints\[0\] should be"),
  "hint": ({"messages": HELLO, "hints": [{"text": "", "start": 0}]}, "not empty"),
  "place": ({"messages": HELLO, "hints": [{"text": "a", "start": -1}]}, "start should be between"),
  "ids": ({"messages": HELLO, "hints": [{"tokens": ["a"], "start": 0}]}, "a whole number"),
  "template": ({"messages": HELLO, "template": "[MASK*0]"}, "no number of tokens"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_field_that_cannot_be_meant_is_refused_and_named(name):
  body, told = BAD_FIELDS[name]
  with pytest.raises(Refusal, match=told) as refused:
    fields.parse(json.loads(json.dumps(body)), chat=True)
  assert refused.value.status == 400 and refused.value.param


def test_fields_without_effect_are_taken_and_null_is_not_given():
  body = {"messages": HELLO, "top_p": 1.0, "user": "me", "stop": None, "max_completion_tokens": 7}
  asked = fields.parse(body, chat=True)
  assert asked.max_tokens == 7 and asked.stop == () and asked.seed is None
  assert fields.parse({"prompt": ["a", "b\ud800"]}, chat=False).prompts == ("a", "b\ufffd")


@pytest.mark.parametrize(
  "body", [b"", b"{", b"[1]", b"\xff", b'{"a": ' + b"[" * 100_000, b"7" * 9999]
)
def test_a_body_that_is_no_object_is_refused(body):
  with pytest.raises(Refusal, match="the body"):
    fields.read_body(body)


def test_a_run_s_template_stands_around_every_question():
  prompting = Prompting(system="Be brief.", template="Q: {question}")
  chat = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}]
  texts = [message["content"] for message in with_prompting(chat, prompting)]
  assert texts == ["Be brief.", "Q: Hello", "Hi", "Q: Why?"]
  own = [{"role": "system", "content": "Sing."}, *HELLO]
  assert [m["content"] for m in with_prompting(own, prompting)] == ["Sing.", "Q: Hello"]


@pytest.mark.parametrize("stop", [(), ("ducks",), ("s a", "zz"), ("é 🙂",)])
@pytest.mark.parametrize("most", [5, 100])
@pytest.mark.parametrize("block", [1, 8])
def test_the_pieces_of_a_stream_are_the_answer(tokenizer, stop, most, block):
  text = "She sells ducks a day. é 🙂 é"  # the bytes of a character are tokens of their own
  ids = np.array([*tokenizer.encode(text), tokenizer.eos_id, *tokenizer.encode("no more")])
  reader = answers.Reader(tokenizer, most, stop, block)
  whole = reader.read(ids)
  plain = tokenizer.decode(ids[: min(most, len(tokenizer.encode(text)))])
  assert whole.text == min((plain.partition(s)[0] for s in stop), key=len, default=plain)
  rng = np.random.default_rng(0)
  tokens, sent = np.full_like(ids, tokenizer.mask_id), ""
  for at in [*rng.permutation(len(ids))]:
    tokens[at] = ids[at]
    beginning = reader.final(tokens)
    now = reader.safe(reader.read(beginning))
    assert now.startswith(sent) and whole.text.startswith(now)
    if reader.is_settled(beginning):
      assert reader.read(beginning) == whole
      return
    sent = now
  assert reader.read(tokens) == whole


# --- the engine: a device that does what the test says --------------------------------------


class Device:
  """Stands in for the compiled program: a row is done after `slices` of them."""

  def __init__(self, monkeypatch, slices=2):
    self.slices, self.seen, self.go = slices, [], threading.Semaphore(0)
    self.broken = None
    self.forgot = 0
    for name, function in (("empty_places", lambda *shape: {}), ("advance", self.advance)):
      called = lambda *arguments, function=function: function(*arguments)
      called.clear_cache = self.forget
      monkeypatch.setattr(engine, name, called)
    tokenizer = types.SimpleNamespace(pad_id=0)
    self.pre = types.SimpleNamespace(lm=None, params=None, tokenizer=tokenizer)

  def loaded(self):
    return contextlib.nullcontext(self.pre)

  def forget(self):
    self.forgot += 1

  def advance(self, lm, params, state, cfg, arrivals, calls):
    assert self.go.acquire(timeout=30)
    if self.broken:
      raise self.broken
    assert not (arrivals.new & np.array([p in state for p in range(len(arrivals.new))])
                & ~arrivals.gone).any(), "a row was put onto another one"  # fmt: skip
    for place in np.flatnonzero(arrivals.gone):
      state.pop(place, None)
    for place in np.flatnonzero(arrivals.new):
      state[place] = [self.slices, int(arrivals.seeds[place])]
    self.seen.append((cfg.temperature, sorted(seed for _, seed in state.values())))
    done = np.ones(len(arrivals.new), bool)
    for place, row in list(state.items()):
      row[0] -= 1
      done[place] = row[0] <= 0
      if done[place]:
        del state[place]
    tokens = np.zeros((len(done), cfg.gen_length), np.int32)
    return state, (tokens, tokens, done, np.ones_like(done))


def make_rows(got, seeds, cfg=CFG):
  arrays = (np.ones(1, np.int32), np.ones(1, bool), np.zeros(16, np.int32), np.zeros(16, bool))
  return [
    engine.Row(*arrays, cfg, seed, 0, lambda update, seed=seed: got.append((seed, update)))
    for seed in seeds
  ]


def until(condition, seconds=60):
  ends = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < ends, "it never came"
    time.sleep(0.001)


def ended(made, seconds=20):
  made.close()
  assert made.join(seconds)


def test_a_row_given_up_leaves_the_queue_at_once_and_its_slot_after_a_slice(monkeypatch):
  device, got = Device(monkeypatch, slices=3), []
  made = engine.Engine(device, slots=2, most_waiting=10)
  rows = make_rows(got, range(5))
  made.submit(rows)
  made.give_up([rows[2]])
  assert made.counts()["waiting"] == 4
  made.start()
  device.go.release()
  until(lambda: len(device.seen) >= 1)
  made.give_up([rows[0]])
  device.go.release(20)
  until(lambda: len(got) >= 3)
  ended(made)
  at_work = [seeds for _, seeds in device.seen]
  assert at_work[0] == [0, 1] and [1, 3] in at_work[1:3] and [0, 1] not in at_work[2:]
  assert [seed for seed, _ in got] == [1, 3, 4] and made.counts()["working"] == 0


def test_rows_of_another_shape_get_their_turn_while_the_first_keep_coming(monkeypatch):
  device, got = Device(monkeypatch, slices=1), []
  monkeypatch.setattr(engine, "PROGRAMS", 1)
  made = engine.Engine(device, slots=2, most_waiting=20)
  cold = dataclasses.replace(CFG, temperature=0.0)
  for k in range(3):  # in turns: gathered by shape all the same
    made.submit([*make_rows(got, [k]), *make_rows(got, [10 + k], cold)])
  made.start()
  device.go.release()
  until(lambda: len(device.seen) >= 1)
  made.submit(make_rows(got, range(3, 6)))
  device.go.release(20)
  until(lambda: len(got) >= 9)
  ended(made)
  kinds = [temperature for temperature, _ in device.seen]
  first = kinds.index(0.0)
  assert device.seen[0] == (1.0, [0, 1]) and first <= 2, "not after those that came later"
  assert sorted(seed for seed, _ in got) == [0, 1, 2, 3, 4, 5, 10, 11, 12]
  turns = 1 + sum(a != b for a, b in itertools.pairwise(kinds))
  assert device.forgot == 2 * (turns - 1), "compiled programs are kept up to a number"


def test_a_full_queue_refuses_and_an_end_refuses_those_that_wait(monkeypatch):
  device, got = Device(monkeypatch), []
  made = engine.Engine(device, slots=1, most_waiting=2)
  made.submit(make_rows(got, [0, 1]))
  with pytest.raises(Refusal, match="2 answers wait already, of 2 at most") as refused:
    made.submit(make_rows(got, [2]))
  assert refused.value.status == 429
  made.start()
  until(lambda: made.counts()["working"] >= 1)
  made.close()
  device.go.release(20)
  assert made.join(20)
  told = dict(got)
  assert told[0].done and told[1].status == 503
  with pytest.raises(Refusal, match="about to end"):
    made.submit(make_rows(got, [3]))


def test_a_device_that_fails_fails_its_rows_and_answers_the_next(monkeypatch, capsys):
  device, got = Device(monkeypatch, slices=1), []
  made = engine.Engine(device, slots=1, most_waiting=9)
  device.broken = RuntimeError("RESOURCE_EXHAUSTED: out of memory")
  made.submit(make_rows(got, [0]))
  made.start()
  device.go.release()
  until(lambda: got)
  assert got[0][1].status == 500 and "RESOURCE_EXHAUSTED" in got[0][1].message
  device.broken = None
  made.submit(make_rows(got, [1]))
  device.go.release()
  until(lambda: len(got) >= 2)
  assert got[1][1].done
  ended(made)
  assert "out of memory" in capsys.readouterr().err


# --- the program, with rows that come and go ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dual"])
def test_rows_that_come_late_or_beside_others_are_filled_in_as_alone(model, cache):
  """With a cache, slots wait for calls of several kinds, so rows meet in other calls than alone."""
  from igpo_jax.diffusion.arrivals import Arrivals, advance, empty_places
  from igpo_jax.inference.requests import batch_arrays

  pre, places = load_pretrained(model, dtype="float32"), 3
  cfg = dataclasses.replace(CFG, cache=cache)
  asked = [
    make_request({"prompt": f"How many, {k}?", "hints": ["16@3"] * (k % 2)}, pre.tokenizer)
    for k in range(7)
  ]
  wanted = list(session.generate(pre, asked, cfg, jax.random.key(4), 1))
  prompt, valid, canvas, hinted = batch_arrays(asked, 16, pre.tokenizer)
  given, free = np.ones_like(valid), np.ones_like(hinted)
  parts = ((prompt, canvas), (given, hinted), (valid, free))
  rows = [np.concatenate(pair, axis=1) for pair in parts]
  length = rows[0].shape[1]
  state = empty_places(pre.lm, pre.params, cfg, places, length)
  held, todo, found = [-1] * places, list(range(7)), {}
  while todo or max(held) >= 0:
    given = Arrivals(*(np.zeros((places, *x.shape[1:]), x.dtype) for x in rows),
                     np.full(places, 4, np.uint32), np.zeros(places, np.int32),
                     np.zeros(places, bool), np.zeros(places, bool))  # fmt: skip
    for place, row in enumerate(held):
      if row == 1 and 0 in found:  # its client has left
        given.gone[place], held[place], found[1] = True, -1, None
      if held[place] < 0 and todo:
        row = held[place] = todo.pop(0)
        for to, x in zip(given[:3], rows, strict=True):
          to[place] = x[row]
        given.numbers[place], given.new[place] = row, True
    state, progress = advance(pre.lm, pre.params, state, cfg, given, 3)
    tokens, steps, done, finite = jax.device_get(progress)
    for place, row in enumerate(held):
      if row >= 0 and done[place]:
        found[row], held[place] = (tokens[place], steps[place], finite[place]), -1
  assert len(found) == 7 and all(row is None or row[2] for row in found.values())
  for row, answer in enumerate(wanted):
    if found[row] is not None:
      np.testing.assert_array_equal(found[row][0], answer.tokens)
      np.testing.assert_array_equal(found[row][1], answer.commit_step)


# --- the application, called without a network ----------------------------------------------


class Idle:
  """An engine that never answers."""

  def __init__(self):
    self.left = []

  def submit(self, rows):
    self.rows = rows

  def give_up(self, rows):
    self.left.extend(rows)


@pytest.mark.parametrize(
  "case", ["no answer", "no answer, streamed", "no body", "half a body", "gone while it waits"]
)
def test_what_takes_too_long_or_leaves_is_given_up(tokenizer, monkeypatch, case):
  pytest.importorskip("starlette")
  from igpo_jax.inference.settings import Settings
  from igpo_jax.serve import app

  monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
  idle = Idle()
  asked = types.SimpleNamespace(tokenizer=tokenizer, check=lambda request: None)
  limits = app.Limits(1000, 50, 0.05 if case.startswith("no answer") else 60, frozenset())
  service = app.Service(idle, asked, Settings(CFG, Prompting(), None), "tiny", limits)
  sent, body = [], {"prompt": "eggs", "n": 3, "stream": case.endswith("streamed")}
  whole = {"type": "http.request", "body": json.dumps(body).encode()}
  left = {"type": "http.disconnect"}
  messages = {"no body": [], "half a body": [{**whole, "more_body": True}, left],
              "gone while it waits": [whole, left]}.get(case, [whole])  # fmt: skip

  async def call():
    async def receive():
      return messages.pop(0) if messages else await asyncio.sleep(60)

    async def send(message):
      sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
             "headers": [(b"content-type", b"application/json")]}  # fmt: skip
    await service.app()(scope, receive, send)

  asyncio.run(call())
  status, text = sent[0]["status"], b"".join(message.get("body", b"") for message in sent)
  wanted = {"no answer": 504, "no answer, streamed": 200, "no body": 408}.get(case, 499)
  assert status == wanted
  if case.startswith("no answer"):
    assert b"no answer within 0.05 s" in text and b"[DONE]" not in text
  if "body" not in case:
    assert set(idle.left) == set(idle.rows) and len(idle.rows) == 3


# --- the command's mistakes -----------------------------------------------------------------


def test_mistakes_are_told_before_the_model_is_read(model, tmp_path):
  pytest.importorskip("uvicorn")
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    for options, told in (
      ([f"--model={model}", f"--port={port}"], "Address already in use"),
      ([f"--model={model}", "--port=x"], "--port=x should be a number"),
      ([f"--model={model}", "--port=70000"], "--port=70000 should be"),
      ([f"--model={model}", "--host=no.such.host.invalid"], "--host=no.such.host.invalid"),
      ([f"--model={tmp_path / 'none'}"], "no such directory"),
      ([f"--model={model / 'config.json'}"], "is a file"),
      ([f"--model={model}", "--slots=0"], "--slots=0 must be at least 1"),
      ([f"--model={model}", "--early_stop=batch"], "--early_stop=batch"),
      ([f"--model={model}", "--raw"], "--raw"),
    ):
      with pytest.raises(UserError, match=told):
        command.main(options)
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="empty"):
    command.main([f"--model={tmp_path / 'empty'}", "--port=0"])


def test_without_the_server_library_one_line_says_what_to_install(model, monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name)
  )
  with pytest.raises(UserError, match=r"pip install 'igpo_jax\[serve\]'"):
    command.main([f"--model={model}"])


def test_only_a_server_on_loopback_knows_its_names():
  assert "localhost" in command.names_of("127.0.0.1") and "::1" in command.names_of("localhost")
  assert command.names_of("0.0.0.0") == command.names_of("some.host") == frozenset()


# --- the server -----------------------------------------------------------------------------


class Server:
  """The command in a process of its own."""

  def __init__(self, model, folder):
    self.log = folder / "stderr"
    with self.log.open("w") as log:
      self.process = subprocess.Popen(
        [sys.executable, "-m", "igpo_jax.serve", f"--model={model}", *SMALL, "--port=0",
         f"--queue={QUEUE}", "--max_prompt=60", "--max_body=20000"],
        cwd=REPO, env=os.environ | {"JAX_PLATFORMS": "cpu", "IGPO_API_KEY": KEY}, stderr=log,
      )  # fmt: skip
    ends = time.monotonic() + 300
    while "answers as" not in self.said():
      assert self.process.poll() is None and time.monotonic() < ends, self.said()
      time.sleep(0.1)
    url = next(word for word in self.said().split() if word.startswith("http://"))
    self.host, self.port = url.removeprefix("http://").split(":")

  def said(self):
    return self.log.read_text()

  def connect(self):
    return http.client.HTTPConnection(self.host, int(self.port), timeout=120)

  def call(self, path, body=None, connection=None, headers=(), method=None):
    """(status, the object) of an answer; `body` is bytes or an object."""
    own = connection or self.connect()
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    plain = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    own.request(method or ("GET" if body is None else "POST"), path, data, plain | dict(headers))
    answer = own.getresponse()
    found = answer.status, json.loads(answer.read())
    if connection is None:
      own.close()
    return found

  def chat(self, text, **options):
    messages = [{"role": "user", "content": text}]
    return self.call("/v1/chat/completions", {"messages": messages, **options})

  def stream(self, path, body):
    """The objects of a stream."""
    own = self.connect()
    own.request("POST", path, json.dumps({**body, "stream": True}),
                {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})  # fmt: skip
    answer = own.getresponse()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    events = answer.read().decode().split("\n\n")
    own.close()
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
  pytest.importorskip("uvicorn")
  pytest.importorskip("starlette")
  server = Server(model, tmp_path_factory.mktemp("server"))
  yield server
  if server.process.poll() is None:
    server.process.kill()
  server.process.wait()


def test_an_answer_is_what_generate_gives(server, expected, tokenizer):
  status, made = server.chat("How many eggs?", seed=5, order=True)
  wanted = expected({"prompt": "How many eggs?"}, seed=5)
  (choice,) = made["choices"]
  assert status == 200 and made["object"] == "chat.completion" and made["seed"] == 5
  assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
  assert choice["order"]["tokens"] == wanted.tokens.tolist()
  assert choice["order"]["commit_step"] == wanted.commit_step.tolist()
  prompt = len(tokenizer.encode_prompt([{"role": "user", "content": "How many eggs?"}]))
  ended = np.isin(wanted.tokens, tokenizer.stop_ids)
  count = int(ended.argmax()) if ended.any() else 16
  assert made["usage"] == {"prompt_tokens": prompt, "completion_tokens": count,
                           "total_tokens": prompt + count}  # fmt: skip
  assert choice["finish_reason"] == ("stop" if ended.any() else "length")


def test_hints_and_templates_are_generate_s(server, expected, tokenizer):
  row = {"prompt": "How many eggs?", "hints": ["16 - 3@2"], "template": "[MASK*9] duck[END]"}
  wanted = expected(row, seed=2**32 - 1)
  hint = {"text": "16 - 3", "start": 2}
  options = {"seed": 2**32 - 1, "order": True, "template": row["template"]}
  for given in (hint, {"tokens": tokenizer.encode("16 - 3"), "start": 2}):
    _, made = server.chat(row["prompt"], hints=[given], **options)
    assert made["choices"][0]["order"]["tokens"] == wanted.tokens.tolist()
    assert made["choices"][0]["message"]["content"] == wanted.text
  assert made["choices"][0]["order"]["hints"][0][0] == 2


@pytest.mark.slow
def test_choices_are_generate_s_rows_and_prompts_have_no_chat_format(server, expected):
  status, made = server.call("/v1/completions", {"prompt": ["a", "eggs"], "n": 2, "seed": 3})
  assert status == 200 and [choice["index"] for choice in made["choices"]] == [0, 1, 2, 3]
  for choice, (prompt, number) in zip(
    made["choices"], [("a", 0), ("a", 1), ("eggs", 0), ("eggs", 1)], strict=True
  ):
    assert choice["text"] == expected({"prompt": prompt}, 3, number, raw=True).text
  _, two = server.call("/v1/completions", {"prompt": "a"})
  _, one = server.call("/v1/completions", {"prompt": "a", "seed": two["seed"]})
  assert one["choices"] == two["choices"], "a seed that was drawn is told"


@pytest.mark.slow
def test_other_options_are_other_programs(server, expected):
  cold = SamplerConfig(gen_length=8, block_length=8, steps=4)
  _, made = server.chat("How many?", temperature=0, max_tokens=5, order=True)
  wanted = expected({"prompt": "How many?"}, cfg=cold)
  assert made["choices"][0]["order"]["tokens"] == wanted.tokens.tolist()
  assert made["usage"]["completion_tokens"] <= 5


def test_a_text_ends_before_a_stop(server, expected):
  text = expected({"prompt": "How many eggs?"}, seed=5).text
  stop = text[4:6]
  _, made = server.chat("How many eggs?", seed=5, stop=["\0never", stop])
  assert made["choices"][0]["message"]["content"] == text.partition(stop)[0]
  assert made["choices"][0]["finish_reason"] == "stop"


def test_the_pieces_of_a_stream_make_generate_s_answer(server, expected, tokenizer):
  body = {"messages": [{"role": "user", "content": "How many?"}], "n": 2, "seed": 8}
  options = {"include_usage": True, "denoising": True}
  parts = server.stream("/v1/chat/completions", {**body, "stream_options": options, "order": True})
  assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] > 0
  assert len({part["id"] for part in parts}) == 1
  for number in (0, 1):
    wanted = expected({"prompt": "How many?"}, 8, number)
    own = [c for part in parts for c in part["choices"] if c["index"] == number]
    assert own[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in own) == wanted.text
    assert [c["finish_reason"] is None for c in own] == [True] * (len(own) - 1) + [False]
    canvases = [c["canvas"] for c in own if "canvas" in c]
    assert canvases[-1] == tokenizer.pieces(wanted.tokens) and len(canvases) >= 2
    for early in canvases:
      assert all(a in (None, b) for a, b in zip(early, canvases[-1], strict=True))
    assert None in canvases[0]
  plain = server.stream("/v1/completions", {"prompt": "eggs", "seed": 3})
  text = "".join(part["choices"][0]["text"] for part in plain)
  assert text == expected({"prompt": "eggs"}, 3, raw=True).text


def test_requests_of_many_clients_are_all_answered_as_if_alone(server, expected):
  requests, clients = int(os.environ.get("IGPO_SERVE_REQUESTS", "200")), 50
  asked = [(f"How many, {k}?", k) for k in range(8)]

  def client(number):
    connection, wrong = server.connect(), []
    for k in range(number, requests, clients):
      text, seed = asked[k % len(asked)]
      body = {"messages": [{"role": "user", "content": text}], "seed": seed}
      status, made = server.call("/v1/chat/completions", body, connection)
      if status != 200 or made["choices"][0]["message"]["content"] != wanted[seed]:
        wrong.append((text, status, made))
    connection.close()
    return wrong

  wanted = [expected({"prompt": text}, seed).text for text, seed in asked]
  before = server.call("/health")[1]["done"]
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    wrong = [item for found in pool.map(client, range(clients)) for item in found]
  assert not wrong and server.call("/health")[1]["done"] - before == requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_killed_frees_its_places(server, stream):
  rows = 48
  body = json.dumps({"prompt": "eggs", "n": rows, "stream": stream}).encode()
  head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
          f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
  health = lambda: server.call("/health")[1]
  made = rows
  for _ in range(5):  # on a busy machine all may be done before the client is killed
    before = health()["done"]
    with socket.create_connection((server.host, int(server.port))) as client:
      client.sendall(head.encode() + body)
      if stream:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
      else:
        until(lambda before=before: (now := health())["working"] or now["done"] > before)
    until(lambda: not (now := health())["working"] and not now["waiting"])
    made = health()["done"] - before
    if made < rows:
      break
  assert made < rows


LONG = "eggs " * 100
BAD_REQUESTS = {
  "no json": ("/v1/completions", b"{'a': 1}", 400, "not JSON"),
  "not utf-8": ("/v1/completions", b'{"prompt": "\xff"}', 400, "not JSON"),
  "too deep": ("/v1/completions", b"[" * 15_000, 400, "not JSON"),
  "a list": ("/v1/completions", [], 400, "should be a JSON object"),
  "unknown": ("/v1/completions", {"prompt": "a", "mask": 1}, 400, "unknown field 'mask'"),
  "huge": ("/v1/completions", {"prompt": "x" * 30_000}, 413, "larger than 20000 bytes"),
  "long": ("/v1/completions", {"prompt": LONG}, 400, "this server takes 60"),
  "long chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, 400,
                "this server takes 60"),
  "answer": ("/v1/completions", {"prompt": "a", "max_tokens": 17}, 400, "at most 16"),
  "hint": ("/v1/completions", {"prompt": "a", "hints": [{"text": "egg", "start": 16}]}, 400,
           "past gen_length=16"),
  "id": ("/v1/completions", {"prompt": "a", "hints": [{"tokens": [10**6], "start": 0}]}, 400,
         "1000000"),
  "model": ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "there is 'tiny'"),
  "full": ("/v1/completions", {"prompt": "a", "n": QUEUE + 1}, 429, "try again"),
  "path": ("/v2/x", {}, 404, "Not Found"),
  "method": ("/v1/models", {}, 405, "Method Not Allowed"),
  "no model": ("/v1/models/gpt", None, 404, "no model 'gpt'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_one_line(server, name):
  path, body, wanted, told = BAD_REQUESTS[name]
  status, made = server.call(path, body)
  assert status == wanted and told in made["error"]["message"]
  assert set(made["error"]) == {"message", "type", "param", "code"}


def test_who_may_ask(server):
  assert server.call("/v1/models")[1]["data"][0]["id"] == "tiny"
  for headers, status in (
    ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": ""}, 401),
    ({"Authorization": f"Basic {KEY}"}, 401), ({"Host": "attacker.example"}, 421),
  ):  # fmt: skip
    assert server.call("/v1/models", headers=headers)[0] == status
  # A form of another site needs no permission of the browser's to send its body as text.
  body = {"prompt": "a"}
  assert server.call("/v1/completions", body, headers={"Content-Type": "text/plain"})[0] == 415


def test_the_official_client_works(server, expected):
  openai = pytest.importorskip("openai")
  client = openai.OpenAI(base_url=f"http://{server.host}:{server.port}/v1", api_key=KEY,
                         max_retries=0)  # fmt: skip
  wanted = expected({"prompt": "How many eggs?"}, seed=5).text
  asked = {"model": "tiny", "messages": [{"role": "user", "content": "How many eggs?"}], "seed": 5}
  made = client.chat.completions.create(**asked)
  assert made.choices[0].message.content == wanted and made.usage.total_tokens > 0
  parts = list(client.chat.completions.create(**asked, stream=True,
                                              stream_options={"include_usage": True}))  # fmt: skip
  assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == wanted
  assert parts[-1].usage == made.usage
  hinted = client.chat.completions.create(
    **asked, extra_body={"hints": [{"text": "duck", "start": 0}]}
  )
  assert hinted.choices[0].message.content.startswith("duck")
  text = client.completions.create(model="tiny", prompt="eggs", seed=3)
  assert text.choices[0].text == expected({"prompt": "eggs"}, 3, raw=True).text
  assert [model.id for model in client.models.list()] == ["tiny"]
  with pytest.raises(openai.BadRequestError, match="temperature should be between"):
    client.chat.completions.create(**asked, temperature=9)
  with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
    client.completions.create(model="gpt", prompt="a")


@pytest.mark.slow
def test_the_page_chats_and_pins_tokens(server, browser, expected):  # noqa: F811
  context, said = browser.new_context(), []
  page = context.new_page()
  page.on("pageerror", lambda error: said.append(str(error)))
  page.on("console", lambda message: said.append(message.text))
  page.goto(f"http://{server.host}:{server.port}/")
  page.wait_for_selector("html[data-ready=true]", timeout=20_000)
  hostile = "<img src=x onerror=alert(1)>"
  page.locator("#question").fill(hostile)
  page.locator("#send").click()
  page.locator("#message", has_text="no API key").wait_for(timeout=20_000)
  said.clear()  # Chromium notes the 401
  page.locator("#key").fill(KEY)
  page.locator("#seed").fill("5")
  page.locator("#question").fill("How many eggs?")
  page.locator("#send").click()
  done = lambda: page.wait_for_selector("#again:enabled", timeout=20_000)
  done()
  tokens = lambda: page.locator("#canvas .token").all_text_contents()
  wanted = expected({"prompt": "How many eggs?"}, seed=5)
  first = tokens()
  assert len(first) == 16 and "How many eggs?" in page.locator("#turns").inner_text()
  page.locator("#canvas [data-at='9']").click()
  page.locator("#pin-text").fill(hostile[:4])
  page.locator("#pin-start").fill("1")
  page.locator("#pin").locator("button", has_text="Pin text").click()
  page.locator("#seed").fill("6")
  page.locator("#again").click()
  done()
  again = tokens()
  assert again[9] == first[9] and "".join(again[1:5]).startswith("<img") and again != first
  assert page.locator("#canvas .token.hint").count() >= 2
  assert page.locator("#turns .turn").count() == 2 and wanted.text is not None
  assert page.locator("#turns img, #canvas img").count() == 0 and said == []
  if folder := os.environ.get("IGPO_SCREENSHOTS"):
    os.makedirs(folder, exist_ok=True)
    page.screenshot(path=f"{folder}/serve.png")
  context.close()


def test_a_termination_ends_it_after_what_is_at_work(server):
  """The last test of this server."""
  found = []
  ask = lambda: found.append(server.call("/v1/completions", {"prompt": "eggs", "n": 48}))
  client = threading.Thread(target=ask)
  client.start()
  until(lambda: server.call("/health")[1]["working"] or found)
  server.process.send_signal(signal.SIGTERM)
  client.join(60)
  assert server.process.wait(60) == 128 + signal.SIGTERM
  ((status, made),) = found
  assert status == 200 or (status == 503 and "about to end" in made["error"]["message"])
  said = server.said()
  assert said.endswith("terminated\n") and "Traceback" not in said and KEY not in said
