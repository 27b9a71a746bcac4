"""Log-likelihoods, and this package's models in the LM Evaluation Harness."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.errors import UserError
from igpo_jax.inference import likelihood
from igpo_jax.inference.likelihood import Continuation
from igpo_jax.lm_eval.__main__ import main
from tests.convert_helpers import copy_tiny
from tests.paths import REPO, run_on_devices
from tests.tiny_tokenizer import make_directory

ONES = (
  Continuation((5, 9, 200, 31), (17, 250, 90)),
  Continuation((), (40, 41, 42, 43, 44)),
  Continuation(tuple(range(10, 40)), (77,)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_directory(copy_tiny(tmp_path_factory.mktemp("model") / "hf"))


@pytest.fixture(scope="module")
def pre(model):
  return load_pretrained(model, dtype="float32")


@pytest.fixture(scope="module")
def log_p(pre):
  """ids with masks -> f32[T,V], of one row without any padding; one program serves all lengths."""
  padded = jax.jit(lambda tokens, valid: pre.lm.logits(pre.params, tokens, valid))

  def read(ids):
    tokens, valid = np.full((1, 40), pre.lm.eos_id, np.int32), np.zeros((1, 40), bool)
    tokens[0, -len(ids) :], valid[0, -len(ids) :] = ids, True
    return np.asarray(jax.nn.log_softmax(padded(tokens, valid), axis=-1))[0, -len(ids) :]

  return read


def test_numbers_of_masks_are_spread_evenly():
  for one in ONES:
    length = len(one.tokens)
    masks = likelihood.masks_of(one, 4 * length, seed=1)
    assert np.bincount(masks.sum(axis=1), minlength=length + 1)[1:].tolist() == [4] * length
    assert (likelihood.masks_of(one, 4 * length, seed=1) == masks).all()
  first, other = (likelihood.masks_of(ONES[1], 40, seed) for seed in (1, 2))
  assert (first != other).any() and set(likelihood.masks_of(ONES[0], 2, 0).sum(axis=1)) <= {1, 2, 3}


@pytest.mark.slow
def test_a_log_likelihood_is_the_sum_written_out_and_does_not_depend_on_the_batch(pre, log_p):
  found = {size: likelihood.log_likelihoods(pre, ONES, 6, 3, size) for size in (1, 3, 8)}
  for number, one in enumerate(ONES):
    length, total = len(one.tokens), 0.0
    for mask in likelihood.masks_of(one, 6, seed=3):
      noisy = [pre.lm.mask_id if m else t for t, m in zip(one.tokens, mask, strict=True)]
      logp = log_p([*one.context, *noisy])[-length:]
      inside = sum(logp[k, one.tokens[k]] for k in range(length) if mask[k])
      total += inside * length / mask.sum() / 6
    np.testing.assert_allclose([found[size][number] for size in found], total, rtol=2e-5)


def test_one_token_has_its_exact_log_probability(pre, log_p):
  one = ONES[2]
  exact = log_p([*one.context, pre.lm.mask_id])[-1, one.tokens[0]]
  (found,) = likelihood.log_likelihoods(pre, [one], draws=2)
  np.testing.assert_allclose(found, exact, rtol=1e-5)


def greedy(pre, log_p, context, length):
  """The most confident token first, one at a time; the mask is never chosen."""
  answer = [pre.lm.mask_id] * length
  for _ in range(length):
    logp = log_p([*context, *answer])[-length:]
    best = np.where(np.arange(logp.shape[1]) == pre.lm.mask_id, -np.inf, logp).argmax(axis=1)
    open_ = [k for k in range(length) if answer[k] == pre.lm.mask_id]
    at = max(open_, key=lambda k: logp[k, best[k]])
    answer[at] = int(best[at])
  return tuple(answer)


@pytest.mark.slow
def test_what_decoding_gives_is_greedy_and_nothing_else_is(pre, log_p):
  context = (5, 9, 200, 31)
  given = greedy(pre, log_p, context, 5)
  other = (*given[:-1], (given[-1] + 1) % 200)
  asked = [Continuation(context, given), Continuation(context, other), ONES[1]]
  for size in (1, 3):
    assert likelihood.are_greedy(pre, asked, size)[:2] == [True, False]


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(UserError, match=r"Harness is not here .* pip install 'igpo_jax\[lm-eval\]'"):
    main(["--help"])


# --- the harness --------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_target: answer
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  rows = [
    {"question": f"How many eggs are {n} and 3?", "choices": [" 9", " 16", " duck"], "gold": n % 3,
     "answer": f"{n + 3} eggs every day"}
    for n in range(5)
  ]  # fmt: skip
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for name, more in (("tiny_choice", CHOICE), ("tiny_answer", ANSWER), ("tiny_text", TEXT)):
    text = TASK.format(name=name, file=folder / "rows.jsonl") + more
    if name == "tiny_text":
      text = text.replace('"{{question}}"', '""')
    (folder / f"{name}.yaml").write_text(text)
  return folder


def same(left, right, path=""):
  """Equal texts and verdicts; numbers equal but for rounding."""
  if isinstance(left, dict):
    assert left.keys() == right.keys(), path
    left, right = list(left.items()), list(right.items())
  if isinstance(left, list | tuple):
    assert len(left) == len(right), path
    for one, other in zip(left, right, strict=True):
      same(one, other, f"{path}/{one}"[:200])
  elif isinstance(left, float):
    np.testing.assert_allclose(left, right, rtol=1e-4, err_msg=path)
  else:
    assert left == right, path


@pytest.mark.slow
def test_scores_depend_neither_on_the_batch_nor_on_the_devices(model, tasks):
  if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("the LM Evaluation Harness is not here: pip install -e '.[lm-eval]'")
  program = ("-m", "tests.lm_eval_program", str(model), str(tasks))
  one = json.loads(run_on_devices(1, *program, "1", "3", "8").stdout.splitlines()[-1])
  eight = json.loads(run_on_devices(8, *program, "3").stdout.splitlines()[-1])
  assert one["devices"] == 1 and eight["devices"] == 8
  first = one["by_size"]["1"]
  for other in (one["by_size"]["3"], one["by_size"]["8"], eight["by_size"]["3"]):
    same(first["samples"], other["samples"])
    same(first["results"], other["results"])
  answers = [responses[0][0] for responses, _ in first["samples"]["tiny_answer"]]
  assert any(answers) and all("\n" not in answer for answer in answers)
  config = first["config"]
  assert config["model_dtype"] == "float32" and config["sampler"]["gen_length"] == 16
  assert config["versions"]["jax"] == jax.__version__ and config["draws"] == 6


@pytest.mark.slow
def test_the_harness_command_scores_a_chat(model, tasks, tmp_path):
  if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("the LM Evaluation Harness is not here: pip install -e '.[lm-eval]'")
  args = f"pretrained={model},gen_length=16,block_length=8,steps=8,draws=2"
  command = ["-m", "igpo_jax.lm_eval", "run", "--model", "igpo_jax", "--model_args", args,
             "--tasks", "tiny_answer,tiny_choice", "--include_path", str(tasks),
             "--apply_chat_template", "--batch_size", "4", "--limit", "2"]  # fmt: skip
  assert "|exact_match|" in run_on_devices(1, *command).stdout.replace(" ", "")
  wrong = [word.replace("steps=8", "stepz=8") for word in command]
  done = subprocess.run(
    [sys.executable, *wrong], cwd=REPO, capture_output=True, text=True, check=False
  )
  assert done.returncode == 2 and "no option 'stepz'; did you mean steps" in done.stderr
