"""RL runs of one process that share what they can: programs that are compiled once, data, weights.

A small run takes less time than compiling its programs. Here runs of one method that differ in
exploration, seed and learning rate read the same compiled programs: the rate is a number in the
optimizer's state. Everything else is the trainer's own: `train.rl.make_stage` and
`train.loop.run_stage`.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath

from benchmarks import study
from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.data.tokenizer import open_tokenizer
from igpo_jax.main import train
from igpo_jax.parallel.mesh import configured_mesh
from igpo_jax.rewards.score import make_scorer
from igpo_jax.train.loop import Collapsed, NonFinite, Run, run_stage
from igpo_jax.train.policy_update import PolicyPrograms, make_policy_programs
from igpo_jax.train.preflight import rl_stream
from igpo_jax.train.rl import make_stage
from igpo_jax.train.run import make_evaluation, newest_params
from igpo_jax.train.runlog import RunLog
from igpo_jax.train.setup import load_source, make_model, make_optimizer
from igpo_jax.train.stop import StopSignal
from igpo_jax.types import Array, Params

ACCURACY = "eval/test/accuracy"
PROGRAMS_KEPT = 3  # of different configs; a process may have so many compiled programs only
# Metrics of each RL step that are kept.
CURVES = (
  "reward", "all_wrong_before", "all_wrong_after", "extra_correct", "grad_norm", "entropy",
  "entropy_floor", "repeated", "skipped", "largest_ratio", "effective_share", "hint_ratio",
  "own_ratio", "hint_logp", "own_logp", "hints_kept", "ratio", "kl", "clip_fraction",
  "answer_shown",
)  # fmt: skip


class RateState(NamedTuple):
  """The learning rate, f32[], of a run."""

  rate: Array


def at_rate(config: Config) -> optax.GradientTransformation:
  """The optimizer of `rl_optimizer`, with its learning rate in the state and not in the program.

  AdamW's update is proportional to the rate, weight decay included, so that the update at rate 1
  times the rate is the update at that rate, but for rounding.
  """
  options = dataclasses.replace(config.rl_optimizer, learning_rate=1.0)
  at_one = make_optimizer(options, config.rl.steps * config.rl.inner_updates)
  scale = optax.GradientTransformation(
    lambda _: RateState(jnp.float32(config.rl_optimizer.learning_rate)),
    lambda updates, state, _=None: (optax.tree.scale(state.rate, updates), state),
  )
  return optax.chain(at_one, scale)


def compiled_from(config: Config) -> Config:
  """A config without what likelihood and update are not compiled from.

  That is seed, data, hints, exploration, the rate, evaluation, and the sampler's cache and parallel
  commits. (jax compiles a sampling program for each sampler, once for all runs.)
  """
  sampler = dataclasses.replace(
    config.sampler, cache="none", refresh_every=0, threshold=None, factor=None, adaptive=False
  )
  return dataclasses.replace(
    config,
    seed=0,
    data=Config().data,
    sampler=sampler,
    eval=Config().eval,
    hints=Config().hints,
    rl=dataclasses.replace(config.rl, exploration="none"),
    rl_optimizer=dataclasses.replace(config.rl_optimizer, learning_rate=1.0),
  )


class SharedRuns:
  """Runs of one model and task, one after another, each from the SFT run of its seed.

  Args:
    config: of any of the runs; all have its model, mesh, tokenizer, reward and benchmark.
    sft: config of a run -> (config, workdir) of the SFT run that it starts from. This is made where
      there is none yet, and continued where it was cut.
  """

  def __init__(self, config: Config, sft: Callable[[Config], tuple[Config, epath.Path]]):
    self.config, self.sft_of = config, sft
    self.mesh = configured_mesh(config.mesh)
    self.scorer = make_scorer(config.reward)
    tokenizer = open_tokenizer(config.data.tokenizer)
    with jax.set_mesh(self.mesh):
      self.model = make_model(config, tokenizer, self.mesh)
    self._programs: dict[Config, PolicyPrograms] = {}
    self._load = functools.lru_cache(maxsize=64)(load_source)
    self._stream = functools.lru_cache(maxsize=16)(self._new_stream)
    self._params = functools.lru_cache(maxsize=16)(self._trained)

  def make_programs(self, lm, optimizer, config: Config, shardings) -> PolicyPrograms:
    """As `make_policy_programs`; the `PROGRAMS_KEPT` made last are used again where they fit."""
    key = compiled_from(config)
    if key not in self._programs:
      self._programs[key] = make_policy_programs(lm, optimizer, config, shardings)
    if len(self._programs) > PROGRAMS_KEPT:
      del self._programs[next(iter(self._programs))]
    return self._programs[key]

  def _new_stream(self, uri: str, seed: int, prompts: int) -> PromptStream:
    config = dataclasses.replace(
      self.config,
      seed=seed,
      rl=dataclasses.replace(self.config.rl, prompts_per_step=prompts, micro_batches=1),
    )
    return rl_stream(config, self.model.tokenizer, self._load(uri))

  def _trained(self, config: Config, workdir: epath.Path) -> Params:
    """The parameters that an SFT run ended with."""
    if not (workdir / "summary.json").exists():
      train(config, workdir)
    with jax.set_mesh(self.mesh):
      run = Run(config, workdir, RunLog(workdir, config.log), self.mesh, lambda *_: {})
      own = jax.tree.map(jnp.copy, self.model.params)  # they are used up
      return newest_params(run, dataclasses.replace(self.model, params=own))[0]

  def perform(self, config: Config, workdir: epath.Path) -> dict[str, Any]:
    """The RL stage of a config, from its start or its last checkpoint.

    Returns:
      "accuracy": [[step, accuracy], ...], the first that of SFT. "curves": metric -> a value for
      each step. "step_cpu_seconds": CPU seconds of a step, the median. "cpu_seconds": of the whole
      run, what it compiled included. "failed": "", or what ended it before its last step.
    """
    began, seconds, failed = time.process_time(), [], ""
    model = dataclasses.replace(self.model, params=self._params(*self.sft_of(config)))
    log, stop = RunLog(workdir, config.log), StopSignal()
    with jax.set_mesh(self.mesh):
      evaluate = make_evaluation(config, model, self.scorer, self.mesh, workdir, self._load, stop)
      if not log.has("sft"):
        log.metrics("sft", 0, evaluate(model.params, "sft"))
      stream = self._stream(config.data.rl, config.seed, config.rl.prompts_per_step)
      stage, state = make_stage(
        config, self.mesh, model, self.scorer, stream,
        optimizer=at_rate(config), make_programs=self.make_programs,
      )  # fmt: skip

      def step(state, n):
        start = time.process_time()
        out = jax.block_until_ready(stage.step(state, n))
        seconds.append(time.process_time() - start)
        return out

      try:
        run = Run(config, workdir, log, self.mesh, evaluate, stop)
        run_stage(run, dataclasses.replace(stage, step=step), state)
      except (Collapsed, NonFinite) as error:
        failed = str(error)
    log.close()
    rows = [row for row in log.rows if row["stage"] == "rl"]
    start = [[0, row[ACCURACY]] for row in log.rows if row["stage"] == "sft"]
    return {
      "accuracy": start + [[row["step"], row[ACCURACY]] for row in rows if ACCURACY in row],
      "curves": {name: [row.get(f"rl/{name}") for row in rows] for name in CURVES}
      | {"positions": [row.get("time/positions") for row in rows]},
      "step_cpu_seconds": statistics.median(seconds) if seconds else None,
      "cpu_seconds": time.process_time() - began,
      "failed": failed,
    }


def perform(task: study.Task, shared: SharedRuns) -> dict[str, Any]:
  """Makes a run of a study, or continues it, and keeps its result in place of its folder."""
  folder = task.root / task.name
  result = study.perform(task, lambda: shared.perform(task.config, folder))
  shutil.rmtree(folder)
  print(f"{task.name}, seed {task.seed}: {result['cpu_seconds']:.0f} CPU s, "
        f"{result['accuracy'][-1][1]:.3f} {result['failed']}", flush=True)  # fmt: skip
  return result
