"""python -m igpo_jax.main --config=configs/X.py [--workdir=DIR] [--config.a.b=value]

Flags, config, then one stage after the other. Kept short: everything it calls can be
imported and called from a notebook.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from igpo_jax import cli
from igpo_jax.cli import UserError
from igpo_jax.config import Config, freeze
from igpo_jax.data.sources import check_files
from igpo_jax.eval.evaluate import Evaluation
from igpo_jax.eval.protocols import plan
from igpo_jax.models import lora
from igpo_jax.parallel import distributed
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import Scorer
from igpo_jax.train.loop import Run
from igpo_jax.train.report import table, write_report
from igpo_jax.train.rl import train_rl
from igpo_jax.train.runlog import RunLog, say
from igpo_jax.train.setup import (
  Model,
  load_source,
  make_model,
  make_optimizer,
  make_state,
  make_tokenizer,
  purpose_key,
)
from igpo_jax.train.sft import train_sft

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "Path of a config file.", flag_values=FLAGS)
flags.DEFINE_string(
  "workdir", "", "Where the run writes; default runs/<config>.", flag_values=FLAGS
)
flags.DEFINE_bool(
  "distributed", False, "Join the processes of a TPU pod or cluster.", flag_values=FLAGS
)

# What may differ between the run that a workdir holds and the one that continues it:
# nothing that decides the numbers.
MAY_CHANGE = ("stages", "log", "mesh", "checkpoint")
# What makes the model of a workdir that is only evaluated.
MODEL = ("model", "init_from")


def parse_flags(argv: list[str]) -> tuple[Config, epath.Path]:
  """The frozen config and the workdir of a command line.

  Raises:
    UserError: an unknown flag, option or file, or a value of the wrong type.
  """
  if "--help" in argv or "-h" in argv:
    print(__doc__)
    raise SystemExit(0)
  file = _config_file(argv)
  try:
    rest = FLAGS(argv)
  except (AttributeError, KeyError) as error:
    reason = error
    while isinstance(reason, Exception):  # one wraps the other
      reason = reason.args[0]
    raise UserError(f"command line: the config has no such option: {reason}") from None
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f"command line: {error}") from None
  if len(rest) > 1:
    raise UserError(f"command line: unexpected argument {rest[1]!r}")
  return freeze(FLAGS.config), epath.Path(FLAGS.workdir or f"runs/{file.stem}")


def _config_file(argv: list[str]) -> epath.Path:
  """The file that --config names; the flag would tell by a traceback that it is missing."""
  values = [a.partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
  values += [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
  if not values:
    raise UserError("command line: --config=configs/X.py is missing")
  # "configs/X.py:ARGUMENT": what follows the colon goes to get_config(ARGUMENT).
  path = epath.Path(values[-1].partition(":")[0])
  if not path.is_file():
    raise UserError(f"--config={path}: no such file")
  return path


def open_workdir(workdir: epath.Path, config: Config) -> None:
  """Makes the workdir, or checks that the run in it is this one; writes config.json.

  Raises:
    UserError: the workdir holds a run with other settings.
  """
  path = workdir / "config.json"
  current = json.loads(json.dumps(dataclasses.asdict(config)))
  only_eval = config.stages == ("eval",)
  # A mistake that ended the program before it made anything leaves the workdir free.
  begun = any((workdir / name).exists() for name in ("tokenizer", "metrics.jsonl", "checkpoints"))
  if path.exists() and begun:
    previous = json.loads(path.read_text())
    for name in MODEL if only_eval else current:
      if name not in MAY_CHANGE and current[name] != previous.get(name):
        old, new = _difference(previous.get(name), current[name])
        raise UserError(
          f"{workdir} holds a run with another config.{name}: {old} there, {new} now; "
          "choose another --workdir, or the same settings"
        )
  if only_eval and path.exists() and begun:
    return  # the run's own settings stay, so that it can be continued
  workdir.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    partial = workdir / ".config.json.partial"
    partial.write_text(json.dumps(current, indent=2) + "\n")
    partial.replace(path)  # at once: other processes may be reading it


def _difference(old, new):
  """The parts of two settings that differ."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return old, new
  names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
  return {n: old.get(n) for n in names}, {n: new.get(n) for n in names}


def make_evaluation(config: Config, model: Model, scorer: Scorer, mesh, workdir: epath.Path):
  """params, label -> {"eval/<name>/accuracy": ...} on every benchmark of `data.eval`."""
  evaluation = Evaluation(
    config, plan(config), model.lm, model.tokenizer, scorer, mesh,
    purpose_key(config.seed, 0, "evaluate"), workdir / "evals",
    functools.partial(load_source, log=say), _bar,
  )  # fmt: skip

  def evaluate_all(params, label: str) -> dict[str, float | str]:
    row = {}
    began = time.perf_counter()
    for name, result in evaluation(params, label).items():
      row |= {f"eval/{name}/{k}": v for k, v in result.items()}
      say(
        f"{name} ({label}): accuracy {result['accuracy']:.3f}"
        f" (95%: {result['low']:.3f} to {result['high']:.3f}), n={result['n']}"
      )
    return {**row, "time/eval_seconds": time.perf_counter() - began}

  return evaluate_all


def _bar(batches, description):
  return tqdm(
    batches, desc=description, unit="batch", file=sys.stderr, leave=False,
    disable=jax.process_index() != 0, dynamic_ncols=True, mininterval=1.0,
  )  # fmt: skip


def newest_params(run: Run, model: Model):
  """(parameters, label): the run's newest checkpoint, else what `init_from` holds.

  Raises:
    UserError: there is neither.
  """
  for stage in ("rl", "sft"):
    checkpoints = run.checkpoints(stage)
    step = checkpoints.latest()
    if step is not None:
      optimizer = make_optimizer(getattr(run.config, f"{stage}_optimizer"), 1)
      trainable, frozen = lora.split(model.params)
      like = make_state(optimizer, trainable, lora.split(model.shardings)[0], run.mesh)
      say(f"eval: the checkpoint of {stage} step {step}")
      return lora.combine(frozen, checkpoints.restore(step, like).params), f"{stage} {step}"
  if not run.config.init_from:
    raise UserError(
      f"nothing to evaluate: {run.workdir} has no checkpoint and config.init_from is empty"
    )
  return model.params, "init"


def check_inputs(config: Config) -> None:
  """Plans the evaluations and looks for every file: mistakes show before any work is done.

  Raises:
    UserError: an evaluation that cannot be, or a missing file; says where to get it.
  """
  tasks = plan(config)
  uris = [getattr(config.data, stage) for stage in config.stages if stage != "eval"]
  for uri in [*uris, *(u for task in tasks for u in (task.uri, task.examples) if u)]:
    check_files(uri)
  if config.init_from and not epath.Path(config.init_from).exists():
    raise UserError(
      f"config.init_from={config.init_from}: no such directory; get a model, for example all "
      "files of GSAI-ML/LLaDA-8B-Instruct from Hugging Face, and put it there"
    )


def train(config: Config, workdir: epath.Path) -> dict:
  """Runs every stage of a config; returns the summary that summary.json holds."""
  check_inputs(config)
  open_workdir(workdir, config)
  mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  with (
    jax.set_mesh(mesh),
    Scorer(
      config.reward.verifier,
      dict(config.reward.parts),
      config.reward.workers,
      config.reward.timeout,
    ) as scorer,
  ):
    tokenizer = make_tokenizer(config, workdir)
    model = make_model(config, tokenizer, mesh)
    count = sum(x.size for x in jax.tree.leaves(model.params))
    say(f"model: {count:,} parameters on {mesh.size} device(s), {jax.devices()[0].platform}")
    log = RunLog(workdir, config.log)
    run = Run(config, workdir, log, mesh, make_evaluation(config, model, scorer, mesh, workdir))

    training = "sft" in config.stages or "rl" in config.stages
    if training and config.eval.initial and not any(r["stage"] == "init" for r in log.rows):
      log.metrics("init", 0, run.evaluate(model.params, "init"))
    if "sft" in config.stages:
      model = dataclasses.replace(model, params=train_sft(run, model))
    if "rl" in config.stages:
      model = dataclasses.replace(model, params=train_rl(run, model, scorer))
    if "eval" in config.stages:
      if training:
        stage = config.stages[-2]
        params, label = model.params, f"{stage} {getattr(config, stage).steps}"
      else:
        params, label = newest_params(run, model)
      log.rewind("rl", 10**12)
      log.metrics("eval", 0, run.evaluate(params, label))
    log.close()
  summary = {}
  if jax.process_index() == 0:
    summary = write_report(log.rows, workdir)
    print(table(summary))
    say(f"written to {workdir}: summary.json, table.md, curves.png, metrics.jsonl, samples.jsonl")
  return summary


def main() -> None:
  config, workdir = parse_flags(sys.argv)
  distributed.start(detect=FLAGS.distributed)
  train(config, workdir)


if __name__ == "__main__":
  cli.run(main)
