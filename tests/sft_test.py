"""Fine-tuning: the loss by hand, responses of several lengths, epochs, the best checkpoint."""

from __future__ import annotations

import collections
import dataclasses
import json
import math

import jax
import numpy as np
import optax
import pytest
from etils import epath

from benchmarks.reliability.table import untimed
from igpo_jax.config import (
  CheckpointConfig,
  LoRAConfig,
  ModelConfig,
  SFTConfig,
  freeze,
  load_config_file,
)
from igpo_jax.data.pipeline import SFTStream
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.diffusion.corrupt import mask_rows
from igpo_jax.errors import UserError
from igpo_jax.main import train
from igpo_jax.models import lora, make_lm
from igpo_jax.parallel.machine import here
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewrite import __main__ as rewrite
from igpo_jax.tasks.chains import ALPHABET
from igpo_jax.train import sft
from igpo_jax.train.loop import Run
from igpo_jax.train.preflight import sft_stream
from igpo_jax.train.runlog import RunLog
from igpo_jax.train.setup import make_model
from igpo_jax.train.sft_update import make_sft_update
from igpo_jax.train.sizes import resolve
from igpo_jax.types import TrainState
from tests import tiny_config
from tests.paths import REPO
from tests.tiny_lm import tiny_model

TOKENIZER = CharTokenizer(ALPHABET)
SOURCE = "synthetic:chains?min_steps=2&max_steps=6&seed=4&n="
LENGTHS = (16, 24, 40)
BUCKETS = (16, 32)


def stream(n=103, batch=8, lengths=LENGTHS, seed=1, **options):
  records = load_records(f"{SOURCE}{n}").records
  return SFTStream(records, TOKENIZER, batch, BUCKETS, seed, lengths, **options)


# --- the loss --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_is_the_nelbo_written_out_by_hand():
  """Per row: sum over masked response positions of -log p(token) / p, by the response's length."""
  lm, params = tiny_model(TOKENIZER.vocab_size)
  optimizer, key = optax.sgd(0.1), jax.random.key(3)
  update = make_sft_update(lm, optimizer, SFTConfig(batch_size=8, micro_batches=2))
  batch = next(b for b in map(stream().batch, range(16)) if b.response[0].sum() == 24)
  zero = np.zeros((), np.int32)
  state = TrainState(zero, jax.tree.map(np.array, params), optimizer.init(params), zero, zero)
  _, metrics = update(state, {}, batch.tokens, batch.valid, batch.response, key)

  noisy, masked, p = map(
    np.asarray, mask_rows(key, batch.tokens, batch.response, TOKENIZER.mask_id, 1e-3)
  )
  prompt = ~batch.response
  assert (noisy[prompt] == batch.tokens[prompt]).all() and not masked[prompt].any()
  past_end = np.arange(masked.shape[1]) >= (prompt.sum(axis=1) + batch.length)[:, None]
  assert (masked & past_end).any() and (masked & ~past_end).any()
  logits = np.asarray(jax.jit(lm.logits)(params, noisy, batch.valid), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  total = 0.0
  for row in range(8):
    nll = [-log_p[row, at, batch.tokens[row, at]] for at in np.flatnonzero(masked[row])]
    total += sum(nll) / p[row] / 24
  assert float(metrics["loss"]) == pytest.approx(total / 8, rel=2e-5)


def updated(lm, params, batch, response, frozen=None, **options):
  """(state, metrics) of one update by plain gradient descent."""
  optimizer, zero = optax.sgd(0.1), np.zeros((), np.int32)
  update = make_sft_update(lm, optimizer, SFTConfig(batch_size=8, **options))
  own = jax.tree.map(np.array, params)
  state = TrainState(zero, own, optimizer.init(own), zero, zero)
  return update(state, frozen or {}, batch.tokens, batch.valid, response, jax.random.key(3))


@pytest.mark.slow
def test_the_head_sees_response_positions_only():
  """Which decides no number: `response` may be of the whole row, or of its last columns."""
  lm, params = tiny_model(TOKENIZER.vocab_size)
  seen = set()

  def head(params, h):
    seen.add(h.shape[1])
    return lm.head(params, h)

  batch = next(b for b in map(stream().batch, range(16)) if b.response_length == 24)
  watched = lm._replace(head=head)
  state, metrics = updated(watched, params, batch, batch.response[:, -batch.response_length :])
  assert max(seen) == 24 < batch.tokens.shape[1]
  whole, expected = updated(lm, params, batch, batch.response)
  assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
  assert float(metrics["masked"]) == float(expected["masked"])
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, state.params, whole.params)


@pytest.mark.slow
def test_dropout_of_the_adapters_acts_in_every_micro_batch():
  config = ModelConfig(
    d_model=16, n_layers=2, n_heads=2, mlp_hidden=32, vocab_size=TOKENIZER.vocab_size, remat="full",
    mask_id=TOKENIZER.mask_id, eos_id=TOKENIZER.eos_id, lora=LoRAConfig(rank=2, alpha=4.0),
  )  # fmt: skip
  make = lambda rate: make_lm(
    dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=rate))
  )
  adapters, frozen = lora.split(make(0.0).init(jax.random.key(0)))
  adapters = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), adapters)
  batch = stream().batch(0)
  loss = lambda rate, count: float(
    updated(make(rate), adapters, batch, batch.response, frozen, micro_batches=count)[1]["loss"]
  )
  # The masks of the corruption are the same: what differs is the dropout.
  plain, parts = loss(0.0, 1), loss(0.5, 4)
  assert loss(0.0, 4) == pytest.approx(plain, rel=1e-5)
  assert abs(parts - plain) > 1e-2 * plain and loss(0.5, 4) == parts


# --- responses of several lengths -------------------------------------------------------


def names(batches):
  return [int(i) for b in batches for i in b.row_id]


def test_every_record_comes_once_an_epoch_in_batches_of_like_length():
  n, batch = 96, 8
  one, many = stream(n, batch, (40,)), stream(n, batch, group_batches=6)
  epoch = range(n // batch)
  assert sorted(names(one.batch(k) for k in epoch)) == sorted(names(many.batch(k) for k in epoch))
  assert names(one.batch(k) for k in epoch) != names(many.batch(k) for k in epoch)
  rooms = collections.Counter()
  for k in range(40):
    b = many.batch(k)
    room = int(b.response[0].sum())
    assert (b.response.sum(axis=1) == room).all() and b.tokens.shape[1] - room in BUCKETS
    assert (b.length <= room).all()
    rooms[room] += 1
    assert b.length.max() > ([0, *LENGTHS][LENGTHS.index(room)])  # the smallest that fits
  assert set(rooms) == set(LENGTHS)
  padding = lambda s: sum(b.tokens.size for b in map(s.batch, range(40)))
  assert padding(many) < 0.85 * padding(one)


def test_a_batch_follows_from_the_seed_and_the_step_alone():
  forward, backward = stream(), stream()
  later = [names([backward.batch(k)]) for k in reversed(range(40))][::-1]
  assert [names([forward.batch(k)]) for k in range(40)] == later
  assert [names([stream(seed=2).batch(k)]) for k in range(3)] != later[:3]


def test_processes_agree_on_shapes_and_share_the_rows():
  whole, parts = stream(), [stream(process_index=i, process_count=2) for i in range(2)]
  for step in (0, 5, 17, 33):
    expected, shares = whole.batch(step), [p.batch(step) for p in parts]
    for name in ("tokens", "valid", "response", "length", "row_id"):
      joined = np.concatenate([getattr(s, name) for s in shares])
      np.testing.assert_array_equal(joined, getattr(expected, name))


def test_a_trace_longer_than_the_last_length_is_left_out_and_counted():
  s = stream(lengths=(16, 24))
  assert 0 < s.dropped["response too long"] == 103 - len(s)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 13), (0.5, 7), (3, 39)])
def test_epochs_are_steps(epochs, steps):
  assert stream(n=103).num_steps(epochs) == steps == math.ceil(epochs * 103 / 8)


# --- the stage -------------------------------------------------------------------------


def tiny(**options):
  config = tiny_config.get_config()
  config.stages = ("sft",)
  config.data.sft = f"{SOURCE}40"
  config.data.prompt_buckets = (32,)
  config.sft.response_lengths = (24, 40)
  config.sft.group_batches = 2
  config.sft.epochs = 1.0
  config.sft.steps = 999  # epochs go before
  config.eval.initial = False
  config.update_from_flattened_dict(options)
  return freeze(config)


class Killed(BaseException):
  """Ends a run as a kill would: nothing after it is done."""


def written(workdir):
  return untimed(workdir / "metrics.jsonl")


@pytest.mark.slow
def test_a_stage_with_lengths_and_epochs_that_was_killed_ends_as_if_it_had_not_been(
  tmp_path, monkeypatch
):
  config = tiny(**{"data.eval": ()})
  train(config, epath.Path(tmp_path / "peace"))
  rows = written(tmp_path / "peace")
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert all(np.isfinite(row["sft/loss"]) for row in rows)
  make = SFTStream.batch

  def batch(self, step):
    if step == 3:
      raise Killed
    return make(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(SFTStream, "batch", batch)
    with pytest.raises(Killed):
      train(config, epath.Path(tmp_path / "war"))
  assert [row["step"] for row in written(tmp_path / "war")] == [1, 2, 3]
  train(config, epath.Path(tmp_path / "war"))
  assert written(tmp_path / "war") == rows


@pytest.mark.slow
def test_the_next_stage_gets_the_best_parameters_where_it_should(tmp_path):
  """Accuracy is highest at step 2 here."""
  best = "eval/test/accuracy"
  options = {"sft.eval_every": 1, "sft.response_lengths": (40,)}
  config = tiny(**{**options, "sft.select": "best", "checkpoint.best_metric": best})
  config = resolve(config, here())  # as `train` does before a stage: micro_batches=0 is no number
  accuracy = iter([0.1, 0.9, 0.2, 0.3, 0.1])
  kept = []

  def evaluate(params, label):
    kept.append(jax.tree.map(np.array, params))
    return {best: next(accuracy)}

  workdir, mesh = epath.Path(tmp_path), make_mesh()
  run = Run(config, workdir, RunLog(workdir, config.log), mesh, evaluate)
  with jax.set_mesh(mesh):
    stream = sft_stream(config, TOKENIZER, load_records(config.data.sft).records)
    model = make_model(config, TOKENIZER, mesh)
    params = sft.train_sft(run, model, stream)
  assert all(x.is_deleted() for x in jax.tree.leaves(model.params))  # room for a stage's state
  assert len(kept) == 5 and sft.handed_on(run, "sft") == 2
  jax.tree.map(np.testing.assert_array_equal, params, kept[1])
  last = dataclasses.replace(config, sft=dataclasses.replace(config.sft, select="last"))
  assert sft.handed_on(dataclasses.replace(run, config=last), "sft") == 5


def test_a_best_that_was_never_measured_is_told(tmp_path):
  config = tiny(**{"sft.select": "best", "checkpoint.best_metric": "eval/test/accuracy"})
  config = dataclasses.replace(config, checkpoint=CheckpointConfig(best_metric="eval/test/x"))
  workdir = epath.Path(tmp_path)
  run = Run(config, workdir, RunLog(workdir, config.log), None, None)
  with pytest.raises(UserError, match=r"has the metric checkpoint.best_metric='eval/test/x'"):
    sft.handed_on(run, "sft")
  with pytest.raises(UserError, match=r"sft.select='best' needs checkpoint.best_metric"):
    tiny(**{"sft.select": "best"})


@pytest.mark.slow
def test_traces_are_aligned_fine_tuned_on_and_rl_goes_on_from_there(tmp_path, monkeypatch):
  """configs/sft_tiny.py, as its caption says."""
  aligned = tmp_path / "aligned.jsonl"
  argv = ["--mode=trim", "--rules=chains", "--verifier=exact", "--tokenizer=char", "--window=24",
          "--source=synthetic:chains?min_steps=2&max_steps=4&detours=1&n=200",
          f"--output={aligned}", "--max-tokens=24"]  # fmt: skip
  monkeypatch.setattr("sys.argv", ["rewrite", *argv])
  assert rewrite.main() == 0
  lengths = json.loads((tmp_path / "aligned.report.json").read_text())["lengths"]
  assert lengths["before"]["within"]["24"] < 0.3 and lengths["after"]["within"]["24"] == 1
  rows = [json.loads(line) for line in aligned.read_text().splitlines()]
  assert {row["made_by"] for row in rows} == {"rule-based trim (chains), no language model"}

  config = load_config_file(REPO / "configs" / "sft_tiny.py", str(aligned))
  summary = train(freeze(config), epath.Path(tmp_path / "sft"))
  assert summary["steps"]["sft"] == 13 and summary["eval"]["sft/test"]["n"] == 32
  steps = [int(p.name) for p in (tmp_path / "sft" / "checkpoints" / "sft").iterdir()]
  assert set(steps) <= {10, 13}
  config.stages = ("rl",)
  config.init_from = str(tmp_path / "sft" / "checkpoints" / "sft" / str(min(steps)))
  summary = train(freeze(config), epath.Path(tmp_path / "rl"))
  assert summary["steps"]["rl"] == 2 and summary["eval"]["rl/test"]["n"] == 32
  assert (tmp_path / "rl" / "samples.jsonl").exists()
