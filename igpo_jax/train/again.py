"""Repeats the rollout of any step of a run (docs/samples.md#replay).

Every step is a function of the state before it, the seed and its number. So the steps from the
nearest earlier checkpoint up to the one that is asked for are run again. Nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from igpo_jax.checkpoint import Checkpoints, saved_steps, shapes_of
from igpo_jax.config import Config, SamplerConfig
from igpo_jax.data.tokenizer import load_tokenizer
from igpo_jax.diffusion.completions import row_keys, sample_rows
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import row_file
from igpo_jax.models import lora
from igpo_jax.parallel.machine import check_machine, here
from igpo_jax.parallel.mesh import configured_mesh, local_rows, shard_rows
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rewards.score import Scorer, make_scorer
from igpo_jax.rl.methods import objective_of
from igpo_jax.rl.rollout import Exploration
from igpo_jax.rl.rows import OWN, completion_fields
from igpo_jax.rl.sampling import Samples
from igpo_jax.train.preflight import rl_stream
from igpo_jax.train.rl import make_stage
from igpo_jax.train.runlog import print_once
from igpo_jax.train.setup import Model, load_source, make_model, purpose_key
from igpo_jax.train.sizes import resolve
from igpo_jax.types import LM, Array, Params

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Replay:
  """A repeated rollout of one step.

  Attributes:
    config: the run's config.
    model: the run's model, with the parameters that RL started from.
    policy: the parameters that sampled, in the dtype of the computation.
    explored: what was sampled.
    rows: all completions, as rows of samples.jsonl.
    scorer: the run's scorer.
    step: number of the RL step, from 1 on.
  """

  config: Config
  model: Model
  policy: Params
  explored: Exploration
  rows: list[Row]
  scorer: Scorer
  step: int


@contextlib.contextmanager
def replayed(config: Config, workdir: epath.Path, step: int) -> Iterator[Replay]:
  """A context in which the rollout of an RL step is there again.

  Args:
    config: the run's config.
    workdir: the run's workdir.
    step: number of the RL step, from 1 on.

  Raises:
    UserError: the run has no RL or no such step, or there is no checkpoint to start from.
  """
  if "rl" not in config.stages or not 1 <= step <= config.rl.steps:
    what = f"{config.rl.steps} steps" if "rl" in config.stages else "no RL stage"
    raise UserError(f"--step={step}: the run in {workdir} has {what}")
  machine = here()
  check_machine(config.mesh, machine)
  quiet = dataclasses.replace(config.log, samples_every=0, token_stats=False)
  config = dataclasses.replace(resolve(config, machine), log=quiet)
  mesh = configured_mesh(config.mesh)
  with jax.set_mesh(mesh), make_scorer(config.reward) as scorer:
    tokenizer = load_tokenizer(workdir / "tokenizer")
    stream = rl_stream(config, tokenizer, load_source(config.data.rl))
    begin = _nearest(workdir / "checkpoints" / "rl", step - 1)
    model = _start(config, workdir, make_model(config, tokenizer, mesh), begin, step)
    stage, state = make_stage(config, mesh, model, scorer, stream)
    if begin:
      like = shapes_of(state)
      jax.tree.map(lambda x: x.delete(), state)  # there may be no room for two
      with contextlib.closing(Checkpoints(workdir / "checkpoints" / "rl")) as checkpoints:
        state = checkpoints.restore(begin, like)
    print_once(
      f"replay: from {f'the checkpoint of rl step {begin}' if begin else 'the beginning of RL'}"
      + (f", steps {begin + 1} to {step - 1} again" if begin < step - 1 else "")
    )
    for n in range(begin, step - 1):
      state, _, _ = stage.step(state, n)
    policy, explored = stage.explore(state, step - 1)
    yield Replay(config, model, policy, explored, explored.rows, scorer, step)


def _nearest(folder: epath.Path, done: int) -> int:
  """The step of the last checkpoint with at most `done` steps; 0 if there is none."""
  return max((step for step in saved_steps(folder) if step <= done), default=0)


def _start(config: Config, workdir: epath.Path, model: Model, begin: int, step: int) -> Model:
  """The model that RL started from: the result of SFT, if there was SFT.

  Args:
    begin: step of the RL checkpoint that is continued from; 0 if there is none.
    step: the step whose rollout is asked for.

  Raises:
    UserError: it is needed, but its checkpoint is gone.
  """
  if "sft" not in config.stages:
    return model
  folder = workdir / "checkpoints" / "sft"
  if not saved_steps(folder):
    # The state comes from RL's checkpoint; an update may still need the reference.
    if begin and (begin == step - 1 or not objective_of(config).needs_reference):
      return model
    raise UserError(f"replay: {folder} holds no checkpoint, with which the run's RL began")
  best, scores = config.sft.select == "best", {}
  if best:
    name = config.checkpoint.best_metric
    rows = row_file(workdir / "metrics.jsonl").read()
    scores = {r["step"]: r[name] for r in rows if r["stage"] == "sft" and r.get(name) is not None}
  trainable, frozen = lora.split(model.params)
  like = shapes_of(trainable)
  jax.tree.map(lambda x: x.delete(), trainable)
  with contextlib.closing(Checkpoints(folder, scores=scores)) as checkpoints:
    kept = checkpoints.best() if best else checkpoints.latest()
    if kept is None:
      raise UserError(f"replay: no checkpoint in {folder} has the metric {name}")
    params = checkpoints.restore_part(kept, {"params": like})["params"]
  return dataclasses.replace(model, params=lora.combine(frozen, params))


# --- what differs, and how it came about -----------------------------------------------------


def where_differs(logged: Row, again: Row) -> str:
  """The first difference between a logged completion and the repeated one, in words; "" if none."""
  if "tokens" not in logged:  # of version 1
    return "" if logged["completion"] == again["completion"] else "the text differs"
  for name in ("tokens", "commit_step"):
    for k, (old, new) in enumerate(zip(logged[name], again[name], strict=True)):
      if old != new:
        return f"{name} differ from position {k} on: {old} logged, {new} now"
  return ""


class Choice(NamedTuple):
  """The model's distribution at one position when it was filled in.

  Attributes:
    position: the position in the completion.
    tokens: ids of the likeliest tokens, the likeliest first.
    probabilities: their probabilities, under the softmax at temperature 1.
  """

  position: int
  tokens: list[int]
  probabilities: list[float]


def canvas_at(row: Row, step: int, mask_id: int) -> np.ndarray:
  """i32[L], the canvas after denoising step `step`. For -1 it has the hints only."""
  commit = np.array(row["commit_step"])
  return np.where(commit <= step, np.array(row["tokens"]), mask_id).astype(np.int32)


def hinted_of(row: Row) -> np.ndarray:
  """bool[L], the positions of hints."""
  hinted = np.zeros(len(row["tokens"]), bool)
  for begin, end in row["hints"]:
    hinted[begin:end] = True
  return hinted


def _on_every_device(row: np.ndarray) -> np.ndarray:
  """Repeats a row for each part that the mesh splits a batch into: one row cannot be split."""
  return np.repeat(row[None], num_shards("act_batch"), axis=0)


@functools.partial(jax.jit, static_argnames=("lm", "width", "count"))
def _likeliest(lm: LM, params: Params, tokens: Array, valid: Array, begin, width: int, count: int):
  """(probabilities, ids) [width,count] of the likeliest tokens of the first row."""
  hidden, _ = lm.hidden(params, tokens, valid)
  logits = lm.head(params, jax.lax.dynamic_slice_in_dim(hidden[0], begin, width))
  return jax.lax.top_k(jax.nn.softmax(logits.at[:, lm.mask_id].set(-jnp.inf)), count)


def choices(replay: Replay, row: Row, count: int = 3) -> Iterator[tuple[int, list[Choice]]]:
  """Yields each denoising step with the model's distributions at the positions that it filled.

  The model is called on the whole canvas. If the run sampled with a cache of keys and values
  (`sampler.cache`), what the sampler computed was only close to this. Guidance is left out.

  Args:
    replay: the repeated rollout.
    row: the completion, a row of `replay.rows`.
    count: how many of the likeliest tokens to give.
  """
  lm, width = replay.model.lm, replay.config.sampler.block_length
  prompt, valid = _prompt_of(replay, row)
  commit = np.array(row["commit_step"])
  count = min(count, lm.vocab_size - 1)
  for step in sorted(set(commit[commit >= 0].tolist())):
    where = np.flatnonzero(commit == step)
    block = int(where[0]) // width * width
    tokens = np.concatenate([prompt, canvas_at(row, step - 1, lm.mask_id)])
    seen = np.concatenate([valid, np.ones(len(commit), bool)])
    rows = shard_rows(jax.sharding.get_mesh(), tuple(map(_on_every_device, (tokens, seen))))
    shares, ids = jax.device_get(
      _likeliest(lm, replay.policy, *rows, len(prompt) + block, width, count)
    )
    inside = [int(k) for k in where if block <= k < block + width]
    yield step, [Choice(k, ids[k - block].tolist(), shares[k - block].tolist()) for k in inside]


def _prompt_of(replay: Replay, row: Row) -> tuple[np.ndarray, np.ndarray]:
  batch = replay.explored.tries.batch
  return batch.tokens[row["group"]], batch.valid[row["group"]]


def edited(
  replay: Replay, row: Row, sampler: SamplerConfig, tokens: np.ndarray, hinted: np.ndarray
) -> Row:
  """Samples a completion with other options or hints, and with the same noise.

  Args:
    replay: the repeated rollout.
    row: the completion, a row of `replay.rows`.
    sampler: options of the sampler, with the lengths of the run's.
    tokens: i32[L], masks, and hints where `hinted` is True.
    hinted: bool[L], positions that are never changed.

  Returns:
    The new completion, as a row of samples.jsonl.
  """
  tries, tokenizer = replay.explored.tries, replay.model.tokenizer
  prompt, valid = _prompt_of(replay, row)
  purpose = "sample" if row["phase"] == OWN else "resample"
  key = purpose_key(replay.config.seed, replay.step - 1, purpose)
  ids, number = tries.batch.row_id[row["group"]], np.int32(row["number"])
  *rows, ids, numbers = shard_rows(
    jax.sharding.get_mesh(),
    tuple(_on_every_device(np.asarray(x)) for x in (prompt, valid, tokens, hinted, ids, number)),
  )
  keys = row_keys(key, ids, numbers)
  out = sample_rows(replay.model.lm, replay.policy, *rows, keys, sampler)
  completion, commit_step, commit_logp, finite = (x[:1, None] for x in local_rows(out))
  record = tries.batch.records[row["group"]]
  text = tokenizer.decode(completion[0, 0])
  scores = replay.scorer([text], [record])
  made = Samples(
    completion, commit_step, commit_logp, hinted[None, None], finite, [[text]],
    scores.reward[:, None], scores.correct[:, None], [scores.status], [scores.extracted],
    [scores.reason], [[{name: float(values[0]) for name, values in scores.parts.items()}]],
  )  # fmt: skip
  kept = {name: value for name, value in row.items() if name != "token_stats"}
  return kept | completion_fields(record, made, (0, 0), tokenizer) | {"advantage": None}
