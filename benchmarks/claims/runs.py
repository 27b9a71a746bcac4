"""The runs of the claims study: an SFT stage, an arm that starts from it, the theorem."""

from __future__ import annotations

import dataclasses
import json
import shutil

from etils import epath

from benchmarks import study
from benchmarks.claims.arms import ARMS, LONG, make_config, sft_config
from benchmarks.claims.theorem import measure
from igpo_jax.config import Config, SamplerConfig
from igpo_jax.main import train
from igpo_jax.train.continued import as_json

THEOREM = "theorem"  # the run of claim 11
# Metrics of each RL step that are kept.
CURVES = ("reward", "all_wrong_before", "all_wrong_after", "extra_correct", "answer_shown",
          "grad_norm", "entropy", "hints_kept", "kl")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task(study.Task):
  """One run: an SFT stage ("sft:aligned"), an arm, or the measurement for the theorem."""

  @property
  def sft(self) -> str:
    """The SFT run that this is, or whose checkpoint it starts from."""
    stage, _, sft = self.name.partition(":")
    return sft if stage == "sft" else ARMS[self.name].sft

  @property
  def comes_first(self) -> bool:
    return self.name.startswith("sft:")

  @property
  def config(self) -> Config:
    if self.comes_first:
      return sft_config(self.sft, self.seed, self.smoke)
    return make_config("igpo" if self.name == THEOREM else self.name, self.seed, self.smoke)

  def run(self) -> dict:
    if self.comes_first:
      return run_sft(self.config, self.root / f"sft_{self.sft}", self.sft)
    if self.name == THEOREM:
      return measure(self.config, self.root / "sft_aligned", self.smoke)
    workdir = self.root / self.name
    summary = run_arm(self.config, workdir, self.root / f"sft_{self.sft}")
    return {"eval": summary["eval"], "rl": summary["rl"], **curves(workdir)}


def run_sft(config: Config, workdir: epath.Path, sft: str) -> dict:
  """Runs SFT. After SFT on verbose traces it is also evaluated on a canvas that is long enough."""
  result = {"eval": train(config, workdir)["eval"]}
  if sft == "verbose":
    longer = SamplerConfig(gen_length=LONG, block_length=config.sampler.block_length + 1,
                           steps=LONG)  # fmt: skip
    # In a copy: RL continues the run itself, and a workdir keeps only one last evaluation.
    copy = workdir.parent / f"{workdir.name}_long"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy)
    whole = train(dataclasses.replace(config, stages=("eval",), sampler=longer), copy)
    result["long"] = whole["eval"]["eval/test"]
    shutil.rmtree(copy)
  return result


def run_arm(config: Config, workdir: epath.Path, sft_workdir: epath.Path) -> dict:
  """Runs RL from a copy of the SFT run; returns the run's summary.

  These runs are made by several processes. The arms of `config.arms` are made one after another.
  """
  if not workdir.exists():
    copy = workdir.parent / f"{workdir.name}.tmp"  # renamed when complete: no half copy is used
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sft_workdir, copy)
    # The copied SFT stage belongs to this arm's config, too: only RL options differ.
    (copy / "config.json").write_text(json.dumps(as_json(config)))
    copy.rename(workdir)
  return train(config, workdir)


def curves(workdir: epath.Path) -> dict:
  """The curves of a run, read from its metrics.jsonl.

  Returns:
    "curves": metric -> a value for each RL step; "accuracy": [[step, accuracy], ...];
    "step_seconds": seconds of all RL steps.
  """
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rl = [row for row in rows if row["stage"] == "rl"]
  name = "eval/test/accuracy"
  start = [[0, row[name]] for row in rows if row["stage"] == "sft" and name in row]
  accuracy = start[-1:] + [[row["step"], row[name]] for row in rl if name in row]
  return {
    "curves": {metric: [row.get(f"rl/{metric}") for row in rl] for metric in CURVES},
    "accuracy": accuracy,
    "step_seconds": sum(row["time/step_seconds"] for row in rl),
  }
