"""The commands that ask a model: hints stay, a run is asked as it evaluates, mistakes are told."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.common import CompileCounter
from igpo_jax import chat, generate
from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import Config, ModelConfig, SamplerConfig
from igpo_jax.convert.open import open_source
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.errors import UserError
from igpo_jax.inference import draw, requests, session
from igpo_jax.inference.settings import find_model, override, settings_of
from igpo_jax.models import make_lm
from igpo_jax.outputs import output_file
from igpo_jax.train.workdir import as_json
from igpo_jax.types import Canvas
from tests.convert_helpers import copy_tiny
from tests.paths import REPO
from tests.tiny_tokenizer import make_directory

CFG = SamplerConfig(gen_length=16, block_length=8, steps=8, temperature=1.0)
SMALL = ["--gen_length=16", "--block_length=8", "--steps=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """llada_tiny with a tokenizer; its special ids come from the tokenizer's files."""
  return make_directory(copy_tiny(tmp_path_factory.mktemp("model") / "hf"))


@pytest.fixture(scope="module")
def pre(model):
  return load_pretrained(model, dtype="float32")


def make(pre, prompt, *hints):
  return requests.make_request({"prompt": prompt, "hints": hints}, pre.tokenizer)


def run(capsys, model, *options):
  capsys.readouterr()
  generate.main([f"--model={model}", *SMALL, *options])
  return capsys.readouterr().out


@pytest.mark.slow
def test_hints_are_where_they_were_put_and_never_change(pre):
  request = make(pre, "How many eggs?", "16 - 3@2", "duck@12")
  (answer,) = session.generate(pre, [request], CFG, jax.random.key(0))
  tokens, hinted = requests.canvas_with_hints(request, 16, pre.tokenizer)
  assert hinted.any() and tokens[2] == pre.tokenizer.encode("16 - 3")[0]
  np.testing.assert_array_equal(answer.tokens[hinted], tokens[hinted])
  np.testing.assert_array_equal(answer.commit_step == -1, hinted)
  assert not (answer.tokens == pre.tokenizer.mask_id).any()


@pytest.mark.slow
def test_answers_come_in_order_from_a_program_for_each_length_and_are_those_of_each_alone(pre):
  """Two queues, of six prompts and of one; a request's noise is keyed by its number."""
  asked = [make(pre, f"How many eggs, {n}?", *(["16@3"] if n % 2 else [])) for n in range(7)]
  asked[2] = make(pre, "How many eggs? " * 20)
  assert [requests.padded_length(request) for request in asked] == [64, 64, 128, 64, 64, 64, 64]
  key = jax.random.key(3)
  counter = CompileCounter()
  made = list(session.generate(pre, asked, CFG, key, batch_size=3))
  assert counter.names["jit(sample_more)"] == 2
  few = dataclasses.replace(CFG, early_stop="batch")  # in batches; no answer here ends early
  batches = list(session.generate(pre, asked, few, key, batch_size=3))
  for n, (answer, other) in enumerate(zip(made, batches, strict=True)):
    np.testing.assert_array_equal(answer.tokens, other.tokens)
    canvas, hinted = requests.canvas_with_hints(asked[n], 16, pre.tokenizer)
    np.testing.assert_array_equal(answer.tokens[hinted], canvas[hinted])
  prompt, valid, canvas, hinted = requests.batch_arrays(asked[3:4], 16, pre.tokenizer)
  arrays = ((prompt, canvas), (np.ones_like(valid), hinted), (valid, np.ones_like(hinted)))
  whole = Canvas(*(np.concatenate(pair, axis=1) for pair in arrays))
  alone = denoise(pre.lm, pre.params, whole, jax.random.fold_in(key, 3)[None], CFG)
  np.testing.assert_array_equal(made[3].tokens, alone.tokens[0, 64:])
  np.testing.assert_array_equal(made[3].commit_step, alone.commit_step[0, 64:])


def test_the_order_names_every_committed_position_once(pre):
  request = make(pre, "How many eggs?", "duck@4")
  (answer,) = session.generate(pre, [request], CFG, jax.random.key(0))
  hinted = requests.canvas_with_hints(request, 16, pre.tokenizer)[1]
  lines = draw.order(answer.tokens, answer.commit_step, hinted, pre.tokenizer).splitlines()
  hint = len(request.hints[0][0])
  assert lines[0].split()[0] == "hint" and "[4]" in lines[0]
  assert [line.split()[:2] for line in lines[1:]] == [["step", str(n)] for n in range(8)]
  positions = [
    word for line in lines for word in line.split() if word[0] == "[" and word[-1] == "]"
  ]
  assert sorted(int(p[1:-1]) for p in positions) == list(range(16)) and hint >= 1


@pytest.mark.slow
def test_the_command_prints_the_answer_and_the_order(model, capsys):
  options = ["--prompt=How many eggs?", "--hint=16 - 3@0"]
  plain = run(capsys, model, *options)
  assert plain == run(capsys, model, *options)  # temperature 0
  shown = run(capsys, model, *options, "--show_order")
  assert shown.startswith(plain) and "\n    hint  [0] '1" in shown and "step 7" in shown


def test_an_animation_is_the_canvas_after_every_step(model, capsys):
  options = ["--prompt=How many eggs?", "--hint=16 - 3@0"]
  plain = run(capsys, model, *options)
  drawn = run(capsys, model, *options, "--animate")
  assert drawn.endswith(plain)
  lines = drawn.removesuffix(plain).splitlines()
  starts = [line.split("  ⟦16 - 3⟧")[0].strip() for line in lines if "⟦" in line]
  assert starts == ["hints", *(f"step {n}" for n in range(8))]
  assert lines[0].count("░") > lines[1].count("░") > lines[-1].count("░") == 0
  with pytest.raises(UserError, match="--animate goes with --prompt"):
    generate.main([f"--model={model}", "--input=x.jsonl", "--animate"])


@pytest.mark.slow
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
  raw = requests.make_request({"prompt": "How many"}, pre.tokenizer, raw=True)
  chat = requests.make_request({"prompt": "How many"}, pre.tokenizer)
  assert list(raw.prompt) == pre.tokenizer.encode("How many")
  assert list(chat.prompt) == pre.tokenizer.encode_prompt([{"role": "user", "content": "How many"}])
  assert len(chat.prompt) > len(raw.prompt)


@pytest.mark.parametrize(
  "text", ["no position", "@3", "text@", "text@-1", "text@x", "text@\u0663", "text@" + "9" * 40]
)
def test_a_hint_without_a_place_is_refused(text):
  with pytest.raises(UserError, match="write TEXT@POSITION"):
    requests.parse_hint(text)


def test_the_last_at_sign_separates():
  assert requests.parse_hint("a@b.c@7") == ("a@b.c", 7)


def one_line(main, argv, capsys):
  """What a mistake in a command line prints: exactly one line of it is an error."""
  capsys.readouterr()
  try:
    main(argv)
  except UserError as error:
    return str(error)
  except SystemExit as error:
    assert error.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said
  raise AssertionError("this was accepted")


@pytest.mark.parametrize("options, message", [
  (["--prompt=x", "--hint=eggs@15", "--hint=eggs@99"], "past gen_length=16"),
  (["--prompt=x", "--hint=eggs@3", "--hint=eggs@3"], "overlaps"),
  (["--prompt=x", "--template=eggs[MASK*20]eggs"], "past gen_length=16"),
  (["--prompt=x", "--template=[MASK*20][END]"], "takes 20 tokens, but gen_length=16"),
  (["--prompt=x", "--template=[MASK*0]"], "no number of tokens"),
  (["--prompt=x", "--template=a[MASK*x]b"], "write [MASK], [MASK*N] or [END], not [MASK*x]"),
  (["--prompt=x", "--template=a[END]b"], "'b' follows [END]"),
  (["--prompt=x", "--template=eggs", "--hint=eggs@0"], "overlaps"),
  (["--prompt=x", "--steps=3"], "not a multiple"),
  (["--prompt=x", "--steps=0"], "--steps=0 must be at least 1"),
  (["--prompt=x", "--block-length=0"], "--block_length=0 must be at least 1"),
  (["--prompt=x", "--gen_length=-4"], "--gen_length=-4 must be at least 1"),
  (["--prompt=x", "--temperature=nan"], "--temperature=nan must be at least 0"),
  (["--prompt=x", "--temperature=hot"], "--temperature=hot should be a number"),
  (["--prompt=x", "--threshold=1.5"], "--threshold=1.5 must be in (0, 1]"),
  (["--prompt=x", "--cfg_scale=-1"], "--cfg_scale=-1 must be at least 0"),
  (["--prompt=x", "--seed=99999999999999999999"], "must be in [0, 4294967295]"),
  (["--prompt=x", "--seed=-1"], "must be in [0, 4294967295]"),
  (["--prompt=x", "--prompt_template=no question"], "has no {question} in it"),
  (["--prompt=x", "--output=y"], "goes with --input"),
  (["--prompt=x", "--output="], "goes with --input"),
  (["--input=nowhere.jsonl"], "no such file"),
  (["--input=."], "is a directory, not a file"),
  (["--prompt=x", "--batch_size=0"], "must be at least 1"),
  (["--prompt=x", "--model=nowhere"], "--model=nowhere: no such directory"),
  (["--prompt=x", "--model=setup.py"], "--model=setup.py is a file"),
  (["--prompt=x", "--modle=y"], "unrecognized arguments: --modle=y"),
])  # fmt: skip
def test_mistakes_are_told(model, options, message, capsys, monkeypatch):
  monkeypatch.chdir(REPO)
  assert message in one_line(generate.main, [f"--model={model}", *SMALL, *options], capsys)


@pytest.mark.parametrize("line, message", [
  ("{", "line 2: not JSON"), ("[]", "line 2: a JSON object was expected"), ("{}", 'give "prompt"'),
  ('{"prompt": "x", "messages": []}', '"prompt" or "messages", one of them'),
  ('{"prompt": 5}', 'line 2: "prompt" should be text, not int'),
  ('{"prompt": null}', 'line 2: "prompt" should be text, not NoneType'),
  ('{"prompt": ["x"]}', 'line 2: "prompt" should be text, not list'),
  ('{"messages": ["x"]}', "line 2: a message that is no object"),
  ('{"messages": {"role": "user"}}', "line 2: messages that are no list"),
  ('{"messages": []}', "line 2: an empty list of messages"),
  ('{"messages": [{"role": "user"}]}', "line 2: a message whose content is not text"),
  ('{"messages": [{"role": "tool", "content": "x"}]}', "line 2: a message with the role 'tool'"),
  ('{"prompt": "x", "hints": "a@1"}', 'line 2: "hints" should be a list'),
  ('{"prompt": "x", "hints": [3]}', 'line 2: "hints" should be a list'),
  ('{"prompt": "x", "hints": ["a"]}', "line 2: hint 'a': write TEXT@POSITION"),
  ('{"prompt": "x", "template": 3}', 'line 2: "template" should be text, not int'),
  ('{"prompt": "x", "template": "[MASK"}', "line 2: template '[MASK': write [MASK]"),
])  # fmt: skip
def test_a_bad_row_is_named_before_anything_is_loaded(tmp_path, line, message, capsys):
  file = tmp_path / "in.jsonl"
  file.write_text('{"prompt": "x"}\n' + line + "\n")
  argv = ["--model=nowhere", f"--input={file}"]
  assert message in one_line(generate.main, argv, capsys)


def test_a_row_that_does_not_fit_is_named(model, tmp_path, capsys):
  file = tmp_path / "in.jsonl"
  rows = [{"prompt": "x"}, {"prompt": "x", "hints": ["eggs@99"]}]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  said = one_line(generate.main, [f"--model={model}", *SMALL, f"--input={file}"], capsys)
  assert "in.jsonl, line 2: a hint of" in said


def test_an_empty_file_of_prompts_is_told(tmp_path, capsys):
  for text in ("", "\n\n", "[]"):
    (tmp_path / "in.jsonl").write_text(text)
    said = one_line(generate.main, ["--model=x", f"--input={tmp_path / 'in.jsonl'}"], capsys)
    assert "has no rows" in said


@pytest.mark.slow
def test_lines_end_where_json_lines_end_and_nowhere_else(model, tmp_path, capsys):
  file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  prompts = [f"a{mark}b" for mark in "\u2028\u2029\x85\x0b\x1c"]
  text = "".join(json.dumps({"prompt": p}, ensure_ascii=False).replace("\\u000b", "\\u000b") + "\n"
                 for p in prompts)  # fmt: skip
  file.write_bytes(b"\xef\xbb\xbf" + text.encode())
  run(capsys, model, f"--input={file}", f"--output={out}")
  # What the command wrote it can read again.
  again = tmp_path / "again.jsonl"
  run(capsys, model, f"--input={out}", f"--output={again}")
  assert [row["prompt"] for _, row in requests.read_requests(again)] == prompts


# --- output -------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, capsys):
  file = tmp_path / "in.jsonl"
  file.write_text('{"prompt": "x"}\n')
  (tmp_path / "folder").mkdir()
  for output, message in (
    (tmp_path / "no" / "out.jsonl", "there is no folder"),
    (tmp_path / "folder", "is a directory"),
    (file / "out.jsonl", "there is no folder"),
    (file, "is what is read"),
    (tmp_path / "folder" / ".." / "in.jsonl", "is what is read"),
    ("", "is a directory"),
    ("nosuch://bucket/out.jsonl", "cannot write nosuch://bucket/out.jsonl"),
  ):
    # The model is not one: opening it would fail in other words.
    argv = [f"--model={tmp_path / 'folder'}", f"--input={file}", f"--output={output}"]
    said = one_line(generate.main, argv, capsys)
    assert "--output: " in said and message in said, said
  assert file.read_text() == '{"prompt": "x"}\n'


def test_an_older_output_outlives_a_failure_and_written_lines_are_kept(tmp_path):
  out = tmp_path / "out.jsonl"
  out.write_text("old\n")
  with pytest.raises(KeyError), output_file(out) as file:
    raise KeyError
  assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
  with pytest.raises(KeyError), output_file(out) as file:
    file.write("new")
    raise KeyError
  assert out.read_text() == "old\n" and (tmp_path / "out.jsonl.partial").read_text() == "new\n"
  with output_file(out) as file:
    file.write("new")
  assert out.read_text() == "new\n" and not (tmp_path / "out.jsonl.partial").exists()


def test_a_device_is_written_to_as_it_is():
  refused = pytest.raises(UserError, match=r"--output: cannot write /dev/full: No space left")
  with refused, output_file("/dev/full") as file:
    file.write("x" * 100_000)
  with output_file("/dev/null") as file:
    file.write("x")
  assert os.path.exists("/dev/null")


# --- templates ----------------------------------------------------------------------------


@pytest.mark.parametrize("text, pieces, ends", [
  ("A [MASK*6] B", ("A ", 6, " B"), False),
  ("[MASK]a[mask*2][END]", (1, "a", 2), True),
  ("a[END]", ("a",), True),
  ("[END]", (), True),
  ("f[0] = [MASK]", ("f[0] = ", 1), False),
  (r"a \[MASK] b", ("a [MASK] b",), False),
])  # fmt: skip
def test_a_template_is_text_and_gaps(text, pieces, ends):
  if not pieces:
    with pytest.raises(UserError, match="nothing in it"):
      requests.parse_template(text)
    return
  assert requests.parse_template(text) == requests.Template(pieces, ends)


def test_what_a_template_gives_stays_and_its_end_is_the_answers_end(model, pre, capsys):
  options = ["--prompt=How many?", "--template=16 - 3[MASK*2] duck[END]", "--show_order"]
  capsys.readouterr()
  generate.main([f"--model={model}", *SMALL, *options])
  out, err = capsys.readouterr()
  given, tail = pre.tokenizer.encode("16 - 3"), pre.tokenizer.encode(" duck")
  assert out.startswith("16 - 3") and out.splitlines()[0].endswith(" duck")
  used = len(given) + 2 + len(tail)
  (canvas,) = [line for line in err.splitlines() if line.startswith("canvas: ")]
  assert canvas.startswith("canvas: [0] '16'") and canvas.endswith(f"[{used}..15] end of text")
  assert f"[{len(given)}..{len(given) + 1}] 2 masks" in canvas
  steps = [line for line in out.splitlines() if line.lstrip().startswith("step")]
  assert sum(line.count("[") for line in steps) == 2  # nothing but the gap was filled in


def test_a_preview_counts_every_position_once(pre):
  request = requests.make_request(
    {"prompt": "x", "template": "16[MASK]16[MASK*3]", "hints": ["16@9"]}, pre.tokenizer
  )
  tokens, hinted = requests.canvas_with_hints(request, 16, pre.tokenizer)
  assert draw.preview(tokens, hinted, pre.tokenizer) == (
    "[0] '16'  [1] mask  [2] '16'  [3..8] 6 masks  [9] '16'  [10..15] 6 masks"
  )


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("given, lengths", [
  ({}, (256, 32, 128)),
  ({"gen_length": 64}, (64, 32, 32)),
  ({"gen_length": 15, "block_length": 5}, (15, 5, 6)),
  ({"gen_length": 100}, (100, 25, 48)),
  ({"gen_length": 7}, (7, 7, 3)),
  ({"gen_length": 1}, (1, 1, 1)),
  ({"block_length": 48}, (288, 48, 144)),
  ({"block_length": 1}, (256, 1, 256)),
  ({"block_length": 300}, (300, 300, 150)),
  ({"steps": 256}, (256, 32, 256)),
  ({"steps": 100}, (256, 64, 100)),
  ({"steps": 1}, (256, 256, 1)),
  ({"steps": 7, "gen_length": 16}, (16, 16, 7)),
  ({"temperature": 0.7}, (256, 32, 128)),
])  # fmt: skip
def test_lengths_that_are_not_given_fit_those_that_are(given, lengths):
  sampler = override(SamplerConfig(), given)
  assert (sampler.gen_length, sampler.block_length, sampler.steps) == lengths
  assert sampler.temperature == given.get("temperature", 0.0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """The workdir of a run with checkpoints of both stages, and a stray file beside them."""
  workdir = tmp_path_factory.mktemp("runs") / "mine"
  tokenizer = CharTokenizer("0123456789=> eggs?".replace("gg", "g"))
  tokenizer.save(workdir / "tokenizer")
  model = ModelConfig(
    d_model=16, n_layers=1, n_heads=2, mlp_hidden=32, vocab_size=tokenizer.vocab_size,
    mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id, stop_ids=tokenizer.stop_ids,
  )  # fmt: skip
  config = as_json(Config())
  config["model"] = as_json_section(model)
  config["sampler"] |= {"gen_length": 24, "block_length": 8, "steps": 12, "temperature": 1.2}
  config["data"]["rl"] = "jsonl:x?template=%7Bquestion%7D+%3D%3E&system=0"
  (workdir / "config.json").write_text(json.dumps(config))
  for stage, steps in (("sft", (9, 40)), ("rl", (8, 10))):
    checkpoints = Checkpoints(workdir / "checkpoints" / stage, keep=5)
    for step in steps:
      params = make_lm(model).init(jax.random.key(step))
      checkpoints.save(step, {"params": params})
    checkpoints.close()
  (workdir / "checkpoints" / "rl" / "notes.txt").touch()
  return workdir


def as_json_section(section):
  return json.loads(json.dumps(section.__dict__, default=lambda x: x.__dict__))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "checkpoints/rl/10", "checkpoints/sft/9"])
def test_a_run_is_asked_as_it_evaluates(run_folder, where, capsys):
  model = find_model(str(run_folder / where))
  assert str(model).endswith(where or "checkpoints/rl/10")
  settings = settings_of(model)
  assert settings.sampler == SamplerConfig(24, 8, 12, temperature=0.0)
  assert settings.origin == run_folder
  assert settings.prompting.template == "{question} =>" and settings.prompting.system == "0"
  capsys.readouterr()
  generate.main([f"--model={run_folder / where}", "--prompt=0", "--show_order"])
  out, err = capsys.readouterr()
  assert f"gen_length=24 block_length=8 steps=12 temperature=0.0 (as {run_folder} evaluates)" in err
  order = [line for line in out.splitlines() if line.lstrip().startswith("step ")]
  assert sum(line.count("[") for line in order) == 24


def test_the_runs_template_stands_around_a_prompt_and_flags_override_it(run_folder):
  settings = settings_of(find_model(str(run_folder)))
  tokenizer = session.Session(find_model(str(run_folder))).tokenizer
  ask = lambda **kw: requests.make_request({"prompt": "3"}, tokenizer, **kw).prompt
  assert list(ask(prompting=settings.prompting)) == tokenizer.encode_prompt(
    [{"role": "system", "content": "0"}, {"role": "user", "content": "3 =>"}]
  )
  assert list(ask()) == tokenizer.encode_prompt([{"role": "user", "content": "3"}])
  args = generate.make_parser().parse_args(
    [f"--model={run_folder}", "--prompt=3", "--system=", "--prompt-template={question}?",
     "--gen_length=32", "--temperature=0.5"]
  )  # fmt: skip
  _, settings = generate.settings_from(args)
  assert (settings.prompting.system, settings.prompting.template) == ("", "{question}?")
  assert settings.sampler == SamplerConfig(32, 8, 16, temperature=0.5)


@pytest.mark.parametrize("section, value, message", [
  ("sampler", 3, "sampler should be an object"),
  ("sampler", {"gen_length": 0}, "sampler.gen_length=0 must be at least 1"),
  ("sampler", {"gen_length": "many"}, "sampler.gen_length='many' should be a whole number"),
  ("sampler", {"speed": 2}, "sampler.speed is no option of this version"),
  ("eval", {"temperature": -1.0}, "eval.temperature=-1.0 must be at least 0"),
])  # fmt: skip
def test_a_runs_config_that_cannot_be_is_told(run_folder, tmp_path, section, value, message):
  config = json.loads((run_folder / "config.json").read_text()) | {section: value}
  (tmp_path / "checkpoints" / "rl" / "1").mkdir(parents=True)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=message) as info:
    settings_of(find_model(str(tmp_path)))
  assert str(tmp_path / "config.json") in str(info.value)


def test_a_run_from_before_options_were_renamed_is_asked_as_it_was(
  run_folder, tmp_path, monkeypatch
):
  before = {"sampler.canvas": "sampler.gen_length", "model.width": "model.d_model"}
  monkeypatch.setattr("igpo_jax.config.renamed.RENAMED", before)
  run = shutil.copytree(run_folder, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["sampler"]["canvas"] = config["sampler"].pop("gen_length")
  config["model"]["width"] = config["model"].pop("d_model")
  (run / "config.json").write_text(json.dumps(config))
  model = find_model(str(run))
  assert settings_of(model).sampler == SamplerConfig(24, 8, 12, temperature=0.0)
  assert open_source(model).config.d_model == 16


def test_a_run_without_a_checkpoint_is_told(run_folder, tmp_path):
  (tmp_path / "checkpoints" / "rl").mkdir(parents=True)
  (tmp_path / "config.json").write_text((run_folder / "config.json").read_text())
  with pytest.raises(UserError, match="is a run without a checkpoint"):
    find_model(str(tmp_path))


@pytest.mark.slow
def test_the_librarys_example_in_the_readme_runs(model, capsys):
  text = (REPO / "README.md").read_text()
  code = text.partition("<!-- library -->\n```python\n")[2].partition("```")[0]
  code = code.replace("path/to/LLaDA-8B-Instruct", str(model)).replace("bfloat16", "float32")
  scope = {}
  capsys.readouterr()
  exec(code, scope)
  assert capsys.readouterr().out.strip()
  tokens, hint = np.asarray(scope["result"].tokens)[0, -128:], scope["hint"]
  assert tokens[4 : 4 + len(hint)].tolist() == hint
  assert not (tokens == scope["pre"].tokenizer.mask_id).any()


# --- chat ---------------------------------------------------------------------------------


def converse(monkeypatch, capsys, model, *lines, options=()):
  """(answers, all else) of a session that reads these lines from a pipe."""
  capsys.readouterr()
  monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
  chat.main([f"--model={model}", *options])
  return capsys.readouterr()


def test_a_session_answers_what_the_command_answers(model, monkeypatch, capsys):
  out, _ = converse(monkeypatch, capsys, model, "How many?", "", "Who?", options=SMALL)
  expected = "".join(run(capsys, model, f"--prompt={p}") for p in ("How many?", "Who?"))
  assert out == expected


def test_a_session_keeps_its_template_and_hints_until_they_are_taken_back(
  model, monkeypatch, capsys
):
  lines = (
    "/template 16[MASK*3] duck",
    "How?",
    "/hint eggs@12",
    "How?",
    "/template",
    "/hint",
    "How?",
  )
  out, err = converse(monkeypatch, capsys, model, *lines, options=SMALL)
  with_template = run(capsys, model, "--prompt=How?", "--template=16[MASK*3] duck")
  with_hint = run(capsys, model, "--prompt=How?", "--template=16[MASK*3] duck", "--hint=eggs@12")
  assert out == with_template + with_hint + run(capsys, model, "--prompt=How?")
  canvases = [line for line in err.splitlines() if line.startswith("canvas: ")]
  assert len(canvases) == 6 and canvases[-1] == "canvas: [0..15] 16 masks"


def test_a_session_changes_its_sampler_and_remembers_turns(run_folder, monkeypatch, capsys):
  lines = ("/set gen-length=16", "0", "/order", "/history", "1", "2", "/set")
  with pytest.raises(UserError, match="no option 'gen-length'; did you mean gen_length"):
    converse(monkeypatch, capsys, run_folder, *lines)
  lines = (
    "/set gen_length=16",
    "0",
    "/order",
    "/history",
    "1",
    "2",
    "/set allow_mask=true",
    "/quit",
    "x",
  )
  out, err = converse(monkeypatch, capsys, run_folder, *lines)
  assert "gen_length=16 block_length=8 steps=8" in err and "allow_mask=True" in err
  assert out.count("\n    step 0") == 2 or out.count("step 0 ") == 2


def test_generate_can_be_a_session_that_remembers_turns(run_folder, monkeypatch, capsys):
  expected, _ = converse(monkeypatch, capsys, run_folder, "/history", "1", "2")
  monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
  generate.main([f"--model={run_folder}", "--chat"])
  assert capsys.readouterr().out == expected
  with pytest.raises(UserError, match="--template is of a single answer"):
    generate.main([f"--model={run_folder}", "--chat", "--template=x"])


def test_history_is_what_was_said(run_folder):
  opened = session.Session(find_model(str(run_folder)))
  args = chat.make_parser().parse_args([f"--model={run_folder}"])
  talk = chat.Chat(opened, settings_of(find_model(str(run_folder))), args)
  talk.line("/history")
  with contextlib.redirect_stdout(io.StringIO()) as said:
    talk.line("1")
  assert talk._row("2")["messages"] == [
    {"role": "system", "content": "0"},
    {"role": "user", "content": "1 =>"},
    {"role": "assistant", "content": said.getvalue().rstrip("\n")},
    {"role": "user", "content": "2 =>"},
  ]


@pytest.mark.parametrize("line, message", [
  ("/tmplate x", "no command /tmplate; known: /template"),
  ("/template [MASK*]", "write [MASK]"),
  ("/template [MASK*99]eggs", "past gen_length=16"),
  ("/hint eggs", "write TEXT@POSITION"),
  ("/set temperature", "write /set NAME=VALUE"),
  ("/set temperature=hot", "temperature=hot should be a number"),
  ("/set steps=0", "steps=0 must be at least 1"),
  ("/set cache=big", "cache=big is not one of none, prefix, dual"),
  ("/set allow_mask=1", "allow_mask=1 is not one of true, false"),
])  # fmt: skip
def test_a_mistake_in_a_session_is_told(model, line, message, monkeypatch, capsys):
  with pytest.raises(UserError) as info:
    converse(monkeypatch, capsys, model, line, options=SMALL)
  assert message in str(info.value)


# --- processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_here_is_one_line(platform, model):
  done = subprocess.run(
    [sys.executable, "-m", "igpo_jax.generate", f"--model={model}", "--prompt=x"],
    cwd=REPO, text=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": platform},
  )  # fmt: skip
  errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
  assert f"JAX_PLATFORMS={platform}: jax finds no such device here" in errors[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_session_ends_with_the_signals_code(number, code, model):
  running = subprocess.Popen(
    [sys.executable, "-m", "igpo_jax.chat", f"--model={model}", *SMALL],
    cwd=REPO, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert running.stderr.readline() == f"chat: {model}: loading jax\n"
  running.send_signal(number)
  _, err = running.communicate(timeout=60)
  assert running.returncode == code and err.splitlines()[-1] in ("interrupted", "terminated")


def test_a_model_without_tokenizer_is_refused(tmp_path):
  directory = copy_tiny(tmp_path / "hf")
  with pytest.raises(UserError, match="has no tokenizer"):
    generate.main([f"--model={directory}", "--prompt=x"])
