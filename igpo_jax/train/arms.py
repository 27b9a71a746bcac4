"""The arms of a run: RL stages with other options, which start where the run's own RL started.

    WORKDIR/arms/NAME/      as the workdir of a run: config.json, metrics.jsonl, checkpoints/rl, ...

The metrics begin with the rows of the run's SFT stage. An arm can be killed and continued like any
run, and a finished arm is not run again. So arms can also be added to a finished run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from igpo_jax.config import Config, arms_of
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.data.tokenizer import has_tokenizer
from igpo_jax.errors import UserError
from igpo_jax.io.versions import versions
from igpo_jax.parallel.distributed import from_first
from igpo_jax.parallel.machine import Machine, here
from igpo_jax.rewards.score import Scorer, make_scorer
from igpo_jax.train.ahead_of_time import policy_options
from igpo_jax.train.loop import Run
from igpo_jax.train.policy_update import PolicyPrograms, make_policy_programs
from igpo_jax.train.rl import train_rl
from igpo_jax.train.runlog import Row, RunLog, print_once
from igpo_jax.train.setup import Model
from igpo_jax.train.sizes import asked, resolve
from igpo_jax.train.workdir import open_workdir
from igpo_jax.types import LM, Params, TrainState
from igpo_jax.viewer.report import write_page, write_report

FOLDER = "arms"


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm of a run.

  Attributes:
    name: the name, also that of its folder.
    changes: what it changes, as in `config.arms`.
    given: its config, as given.
    config: the same with all sizes resolved.
  """

  name: str
  changes: str
  given: Config
  config: Config

  def workdir(self, of_run: epath.Path) -> epath.Path:
    """The arm's workdir, given that of its run."""
    return of_run / FOLDER / self.name


def resolve_all(
  config: Config, machine: Machine, strict: bool = False
) -> tuple[Config, tuple[Arm, ...]]:
  """Resolves the sizes of a config and of its arms, which all get the same mesh.

  Memory is counted with what is kept for the arms (train/sizes.py).

  Returns:
    (the config without arms, its arms).

  Raises:
    UserError: as `resolve` does.
  """
  sized, arms = resolve(config, machine, strict), []
  changes = {name: text.strip() for name, _, text in (arm.partition(":") for arm in config.arms)}
  for name, arm in arms_of(config).items():
    like = dataclasses.replace(arm, mesh=sized.mesh, arms=config.arms)
    try:
      own = resolve(like, machine, strict)
    except UserError as error:
      raise UserError(f"config: arms: {name}: {str(error).removeprefix('config: ')}") from None
    arms.append(Arm(name, changes[name], arm, dataclasses.replace(own, arms=())))
  return dataclasses.replace(sized, arms=()), tuple(arms)


class SharedPrograms:
  """A `make_policy_programs` for all RL stages of a run, which compiles equal programs once."""

  def __init__(self):
    self._made: dict[Any, PolicyPrograms] = {}

  def __call__(self, lm: LM, optimizer, config: Config, shardings: TrainState) -> PolicyPrograms:
    # A schedule of the learning rate depends on the number of steps.
    key = (policy_options(config), config.rl_optimizer, config.rl.steps)
    if key not in self._made:
      self._made[key] = make_policy_programs(lm, optimizer, config, shardings)
    return self._made[key]


def train_arm(
  run: Run,
  arm: Arm,
  model: Model,
  scorer: Scorer,
  stream: PromptStream,
  evaluate: Callable[[Params, str], dict[str, float]],
  make_programs: SharedPrograms,
  spent: bool,
) -> list[Row]:
  """Trains one arm, or continues it, and writes its report; returns its rows of metrics.

  A collective.

  Args:
    run: the finished run that the arm belongs to.
    arm: the arm.
    model: the model that the run's RL started from.
    scorer: the run's scorer; an arm with another reward makes its own.
    stream: the arm's prompts.
    evaluate: as `Run.evaluate`, with rows in the arm's folder.
    make_programs: the run's, so that compiled programs are shared.
    spent: whether the parameters that RL started from are gone (`sft.is_spent`).

  Raises:
    UserError: the folder holds another arm, or the parameters to start from are gone.
  """
  workdir, config = arm.workdir(run.workdir), arm.config
  told = {"devices": str(here()), "versions": versions(), **asked(config)}
  open_workdir(workdir, arm.given, told)
  log = RunLog(workdir, config.log)
  try:
    if log.has("rl", config.rl.steps):
      print_once(f"arm {arm.name}: finished before, in {workdir}")
    elif spent:
      raise UserError(
        f"arm {arm.name}: {run.workdir / 'checkpoints' / 'sft'} holds no checkpoint any more, and "
        "the arm has to begin with one: put them back, or leave the arm out (config.arms)"
      )
    else:
      print_once(f"arm {arm.name}: RL from the same start, with {arm.changes}")
      _begin(log, run, workdir, model)
      own = Run(config, workdir, log, run.mesh, evaluate, run.stop, run.lock)
      same = config.reward == run.config.reward
      with contextlib.nullcontext(scorer) if same else make_scorer(config.reward) as grader:
        train_rl(own, model, grader, stream, make_programs, keep=True)
  finally:
    log.close()
  if jax.process_index() == 0:
    write_report(log.rows, workdir)
    write_page(workdir)
  return log.rows


def _begin(log: RunLog, run: Run, workdir: epath.Path, model: Model) -> None:
  """Puts the tokenizer and the rows of what was before RL into an arm's workdir. A collective."""
  kept = workdir / "tokenizer"
  from_first(lambda: None if has_tokenizer(kept) else model.tokenizer.save(kept))
  if log.has("rl"):
    return
  log.rewind("init", -1)  # a kill may have left a part of them
  for row in run.log.rows:
    if row["stage"] in ("init", "sft"):
      values = {name: value for name, value in row.items() if name not in ("stage", "step")}
      log.metrics(row["stage"], row["step"], values)
