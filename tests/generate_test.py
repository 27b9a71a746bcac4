"""The command that writes text: hints stay, batches do not matter, mistakes are told."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from igpo_jax import generate
from igpo_jax.cli import UserError
from igpo_jax.config import SamplerConfig
from igpo_jax.convert.pretrained import load_pretrained
from tests.convert_helpers import copy_tiny
from tests.tiny_tokenizer import make_directory

CFG = SamplerConfig(gen_length=16, block_length=8, steps=8, temperature=1.0)
SMALL = ["--gen_length=16", "--block_length=8", "--steps=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """llada_tiny with a tokenizer; its special ids come from the tokenizer's files."""
  directory = copy_tiny(tmp_path_factory.mktemp("model") / "hf")
  make_directory(directory)
  return directory


@pytest.fixture(scope="module")
def pre(model):
  return load_pretrained(model, dtype="float32")


def make(pre, prompt, *hints):
  return generate.make_request({"prompt": prompt, "hints": hints}, pre.tokenizer)


def run(capsys, model, *options):
  capsys.readouterr()
  generate.main([f"--model={model}", *SMALL, *options])
  return capsys.readouterr().out


def test_hints_are_where_they_were_put_and_never_change(pre):
  request = make(pre, "How many eggs?", "16 - 3@2", "duck@12")
  (answer,) = generate.generate(pre, [request], CFG, jax.random.key(0))
  tokens, hinted = generate.hint_canvas(request, 16, pre.tokenizer.mask_id)
  assert hinted.any() and tokens[2] == pre.tokenizer.encode("16 - 3")[0]
  np.testing.assert_array_equal(answer.tokens[hinted], tokens[hinted])
  np.testing.assert_array_equal(answer.commit_step == -1, hinted)
  assert not (answer.tokens == pre.tokenizer.mask_id).any()


def test_an_answer_does_not_depend_on_its_batch(pre):
  # One padded length for all: padding is part of the positions the model sees.
  requests = [make(pre, f"How many eggs, {n}?", *(["16@3"] if n % 2 else [])) for n in range(5)]
  key = jax.random.key(3)
  one = list(generate.generate(pre, requests, CFG, key, batch_size=1))
  three = list(generate.generate(pre, requests, CFG, key, batch_size=3))
  assert len(three) == 5
  for a, b in zip(one, three, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.commit_step, b.commit_step)


def test_the_order_names_every_committed_position_once(pre):
  request = make(pre, "How many eggs?", "duck@4")
  (answer,) = generate.generate(pre, [request], CFG, jax.random.key(0))
  lines = generate.describe_order(answer, request, pre.tokenizer).splitlines()
  hint = len(request.hints[0][0])
  assert lines[0].split()[0] == "hint" and "[4]" in lines[0]
  assert [line.split()[:2] for line in lines[1:]] == [["step", str(n)] for n in range(8)]
  positions = [
    word for line in lines for word in line.split() if word[0] == "[" and word[-1] == "]"
  ]
  assert sorted(int(p[1:-1]) for p in positions) == list(range(16)) and hint >= 1


def test_the_command_prints_the_answer_and_the_order(model, capsys):
  options = ["--prompt=How many eggs?", "--hint=16 - 3@0"]
  plain = run(capsys, model, *options)
  assert plain == run(capsys, model, *options)  # temperature 0
  shown = run(capsys, model, *options, "--show_order")
  assert shown.startswith(plain) and "\n    hint  [0] '1" in shown and "step 7" in shown


def test_a_file_of_prompts_comes_back_line_by_line(model, tmp_path, capsys):
  rows = [
    {"id": 1, "prompt": "How many eggs?"},
    {"id": 2, "messages": [{"role": "user", "content": "How many?"}], "hints": ["duck@3"]},
    {"id": 3, "prompt": "How many eggs?"},
  ]
  (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
  options = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
  run(capsys, model, *options, "--show_order", "--batch_size=2")
  out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [row["id"] for row in out] == [1, 2, 3]
  assert out[0]["completion"] == out[2]["completion"]
  assert out[1]["commit_step"][3] == -1 and len(out[1]["commit_step"]) == 16
  printed = run(capsys, model, options[0])
  assert [json.loads(line)["id"] for line in printed.splitlines()] == [1, 2, 3]


def test_raw_prompts_have_no_chat_format(pre):
  raw = generate.make_request({"prompt": "How many"}, pre.tokenizer, raw=True)
  chat = generate.make_request({"prompt": "How many"}, pre.tokenizer)
  assert list(raw.prompt) == pre.tokenizer.encode("How many")
  assert list(chat.prompt) == pre.tokenizer.encode_prompt([{"role": "user", "content": "How many"}])
  assert len(chat.prompt) > len(raw.prompt)


@pytest.mark.parametrize("text", ["no position", "@3", "text@", "text@-1", "text@x"])
def test_a_hint_without_a_place_is_refused(text):
  with pytest.raises(UserError, match="write TEXT@POSITION"):
    generate.parse_hint(text)


def test_the_last_at_sign_separates():
  assert generate.parse_hint("a@b.c@7") == ("a@b.c", 7)


@pytest.mark.parametrize("options, message", [
  (["--prompt=x", "--hint=eggs@15", "--hint=eggs@99"], "does not fit into gen_length=16"),
  (["--prompt=x", "--hint=eggs@3", "--hint=eggs@3"], "overlaps"),
  (["--prompt=x", "--steps=3"], "not a multiple"),
  (["--prompt=x", "--output=y"], "goes with --input"),
  (["--input=nowhere.jsonl"], "no such file"),
  (["--prompt=x", "--batch_size=0"], "at least 1"),
])  # fmt: skip
def test_mistakes_are_told(model, options, message):
  with pytest.raises(UserError, match=message):
    generate.main([f"--model={model}", *SMALL, *options])


@pytest.mark.parametrize("line, message", [
  ("{", "line 2: not JSON"), ("[]", "line 2: give an object"), ("{}", 'with "prompt"'),
  ('{"prompt": "x", "messages": []}', 'with "prompt" or "messages"'),
  ('{"prompt": 5}', 'line 2: "prompt" should be text, not int'),
  ('{"prompt": null}', 'line 2: "prompt" should be text, not NoneType'),
  ('{"messages": ["x"]}', "line 2: a message that is no object"),
  ('{"messages": "x"}', "line 2: messages that are no list"),
  ('{"messages": [{"role": "user", "content": 5}]}', "line 2: a message whose content is not text"),
  ('{"messages": [{"role": 5, "content": "x"}]}', "line 2: a message with the role 5"),
  ('{"messages": []}', "line 2: an empty list of messages"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, message):
  file = tmp_path / "in.jsonl"
  file.write_text('{"prompt": "x"}\n' + line + "\n")
  with pytest.raises(UserError, match=message):
    generate.read_rows(file)


def test_a_model_without_tokenizer_is_refused(tmp_path):
  directory = copy_tiny(tmp_path / "hf")
  with pytest.raises(UserError, match="has no tokenizer"):
    generate.main([f"--model={directory}", "--prompt=x"])
