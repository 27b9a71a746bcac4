"""A whole run: the stages of a config, one after the other, in one workdir."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath

from igpo_jax.checkpoint import shapes_of
from igpo_jax.config import Config
from igpo_jax.convert.open import open_source
from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.eval.evaluate import Evaluation
from igpo_jax.eval.protocols import plan
from igpo_jax.io.versions import versions
from igpo_jax.models import lora
from igpo_jax.parallel import distributed
from igpo_jax.parallel.machine import check_machine, here
from igpo_jax.parallel.mesh import configured_mesh
from igpo_jax.rewards.score import Scorer, make_scorer
from igpo_jax.train.arms import Arm, SharedPrograms, resolve_all, train_arm
from igpo_jax.train.inputs import check_inputs
from igpo_jax.train.lock import WorkdirLock
from igpo_jax.train.loop import Run
from igpo_jax.train.preflight import Inputs
from igpo_jax.train.progress import track
from igpo_jax.train.rl import train_rl
from igpo_jax.train.room import check_room
from igpo_jax.train.runlog import RunLog, print_once
from igpo_jax.train.setup import (
  Model,
  compute_copy,
  make_model,
  make_tokenizer,
  purpose_key,
  with_lora,
)
from igpo_jax.train.sft import handed_on, is_spent, train_sft
from igpo_jax.train.sizes import asked, said
from igpo_jax.train.stop import StopSignal
from igpo_jax.train.workdir import disk_told, hold, open_workdir
from igpo_jax.viewer.comparison import method_of, write_comparison
from igpo_jax.viewer.report import PAGE, write_page, write_report
from igpo_jax.viewer.summary import summary_table


def train(config: Config, workdir: epath.Path, command: str = "") -> dict:
  """Runs every stage of a config, or continues where an earlier run in the workdir ended.

  Every process of a run has to call it.

  Args:
    config: all options.
    workdir: the directory that the run writes to.
    command: the command line that started the run, which is noted in config.json; "" if there was
      none.

  Returns:
    The contents of summary.json on process 0; {} on others.

  Raises:
    UserError: the config, the inputs, the workdir or the machine do not allow the run; the message
      says what to change.
  """
  machine = here()
  check_machine(config.mesh, machine)
  check_inputs(config)
  if config.init_from:
    with_lora(open_source(config.init_from), config.model.lora)  # a mistake costs no workdir
  sized, arms = resolve_all(config, machine)
  with hold(workdir) as lock, disk_told(workdir):
    told = {"devices": str(machine), "versions": versions(), **asked(sized)}
    open_workdir(workdir, config, told | ({"command": command} if command else {}))
    distributed.agree("the choice of sizes", [asked(sized), *(asked(arm.config) for arm in arms)])
    print_once(said(sized, machine))
    for text in config.arms if "rl" in config.stages else ():
      if text.partition(":")[0] not in {arm.name for arm in arms}:
        print_once(f"arm {text!r} changes nothing of this run, and is left out")
    return _train(sized, arms, workdir, lock)


def _train(config: Config, arms: Sequence[Arm], workdir: epath.Path, lock: WorkdirLock) -> dict:
  mesh = configured_mesh(config.mesh)
  with jax.set_mesh(mesh), make_scorer(config.reward) as scorer:
    tokenizer = make_tokenizer(config, workdir)
    inputs = Inputs(config, tokenizer, scorer, print_once, {arm.name: arm.config for arm in arms})
    model = make_model(config, tokenizer, mesh)
    count = sum(x.size for x in jax.tree.leaves(model.params))
    print_once(f"model: {count:,} parameters on {mesh.size} device(s), {jax.devices()[0].platform}")
    check_room(config, workdir, model.params, len(arms))
    log = RunLog(workdir, config.log)
    stop = StopSignal()
    evaluation = lambda folder: make_evaluation(
      config, model, scorer, mesh, folder, inputs.records, stop
    )
    evaluate = evaluation(workdir)
    run = Run(config, workdir, log, mesh, evaluate, stop, lock)

    training = "sft" in config.stages or "rl" in config.stages
    if training and config.eval.initial and not log.has("init"):
      log.metrics("init", 0, run.evaluate(model.params, "init"))
    spent = "sft" in config.stages and is_spent(run)
    if "sft" in config.stages and not spent:
      model = dataclasses.replace(model, params=train_sft(run, model, inputs.take("sft")))
    start, make_programs = model if arms else None, SharedPrograms()
    if "rl" in config.stages:
      params = train_rl(run, model, scorer, inputs.take("rl"), make_programs, keep=bool(arms))
      model = dataclasses.replace(model, params=params)
    if "eval" in config.stages:
      if training:
        stage = config.stages[-2]
        params, label = model.params, f"{stage} {handed_on(run, stage)}"
      else:
        params, label = newest_params(run, model)
      log.rewind("rl", 10**12)
      log.metrics("eval", 0, run.evaluate(params, label))
    log.close()
    rows_of = {}
    if arms:
      model = start  # what RL ended with can be freed
      if jax.process_index() == 0:
        write_report(log.rows, workdir)  # also if an arm should break off
      for arm in arms:
        evaluate, stream = evaluation(arm.workdir(workdir)), inputs.arms[arm.name]
        rows_of[arm.name] = train_arm(
          run, arm, model, scorer, stream, evaluate, make_programs, spent
        )
  summary = {}
  if jax.process_index() == 0:
    if arms:
      summary, text = write_comparison(log.rows, rows_of, method_of(config), workdir)
    else:
      summary = write_report(log.rows, workdir)
      text = summary_table(summary)
    print(text)
    why = write_page(workdir, *(arm.workdir(workdir) for arm in arms))
    print_once(
      f"written to {workdir}: summary.json, table.md, curves.png, metrics.jsonl, samples.jsonl"
      + (f"; {why}" if why else f", and {PAGE} to look at in a browser")
    )
  return summary


def make_evaluation(
  config: Config,
  model: Model,
  scorer: Scorer,
  mesh,
  workdir: epath.Path,
  load: Callable[[str], list[Record]],
  stop: StopSignal,
):
  """Makes the function that evaluates parameters on every benchmark of `data.eval`.

  Args:
    config, model, scorer, mesh, workdir: those of the run.
    load: reads the records of a source, given its URI.
    stop: if it has received a signal, the evaluation raises `Stopped` between two batches. The rows
      made so far are on disk then.

  Returns:
    (params, label) -> {"eval/NAME/accuracy": ..., ...}.
  """

  compiled = set()

  def batches(left, description):
    name = description.partition(" (")[0]
    first = "" if name in compiled else f"{description}: the first batch compiles its program"
    compiled.add(name)
    for number in track(left, description, first):
      yield number
      stop.check()

  evaluation = Evaluation(
    config, plan(config), model.lm, model.tokenizer, scorer, mesh,
    purpose_key(config.seed, 0, "evaluate"), workdir / "evals",
    load, batches,
  )  # fmt: skip

  def evaluate_all(params, label: str) -> dict[str, float | str]:
    row = {}
    began = time.perf_counter()
    # As the rollouts do: a float32 master would be cast, and gathered whole, at every step.
    params = compute_copy(params, config.model.dtype)
    for name, result in evaluation(params, label).items():
      row |= {f"eval/{name}/{k}": v for k, v in result.items()}
      print_once(
        f"{name} ({label}): accuracy {result['accuracy']:.3f}"
        f" (95%: {result['low']:.3f} to {result['high']:.3f}), n={result['n']}"
      )
    worked, room, _ = evaluation.counts
    if room:  # else no row had to wait for a slot
      row["time/eval_slots_full"] = worked / room
    return {**row, "time/eval_seconds": time.perf_counter() - began}

  return evaluate_all


def newest_params(run: Run, model: Model):
  """(parameters, label) to evaluate: the run's newest checkpoint, or else the model of `init_from`.

  Raises:
    UserError: there is neither.
  """
  for stage in ("rl", "sft"):
    checkpoints = run.checkpoints(stage)
    step = distributed.from_first(checkpoints.latest)
    if step is not None:
      print_once(f"eval: the checkpoint of {stage} step {step}")
      trainable, frozen = lora.split(model.params)
      like = shapes_of(trainable)
      jax.tree.map(lambda x: x.delete(), trainable)  # their memory is for the trained ones
      params = checkpoints.restore_part(step, {"params": like})["params"]
      return lora.combine(frozen, params), f"{stage} {step}"
  if not run.config.init_from:
    raise UserError(
      f"nothing to evaluate: {run.workdir} has no checkpoint and config.init_from is empty; train "
      "first, or give config.init_from a model"
    )
  return model.params, "init"
