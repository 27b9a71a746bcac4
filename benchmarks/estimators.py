"""Published estimators and objectives, compared on one task.

    python -m benchmarks.estimators --all --workdir=runs/estimators [--seeds=5]
    python -m benchmarks.estimators --methods=mean_field,espo,spg --workdir=runs/estimators
    python -m benchmarks.estimators --all --smoke --workdir=DIR

Every method of docs/methods.md is run with GRPO's exploration (none) and with IGPO's (inpaint), on
the task of `benchmarks.claims`. All runs of a seed start from the same SFT checkpoint, that of the
claims. First a learning rate is chosen for each pair of method and exploration, on a seed that the
study does not use: the one with the largest area under the accuracy curve. Then each pair is run on
the seeds of the study. All runs are made in one process, a method after another, so that the
programs of a method are compiled once.

Methods are compared in two ways. At equal samples, all runs have the same number of RL steps. At
equal forwards, the accuracy of a run is taken where it has cost as many forward passes as the
cheapest run in total. The rate is constant after the warm-up, so a shorter run is the beginning of
a longer one. A backward pass counts as two forward passes; if views are read twice to save memory,
as three.

An interrupted command continues where it was. The result of a finished run is kept in
seedS/RUN.json. A run that was stopped by SIGTERM or Ctrl-C continues from its checkpoint; one that
was killed begins again. A run that cannot go on, because its updates are not finite, keeps its last
accuracy and is counted in the column "failed". After each method table.md, methods.png and
results.json are written to the workdir; at the end the table is printed: mean and 95% interval
(Student's t) over seeds. Seconds are CPU seconds of a step, the median. If the machine has other
work, set NPROC=1 for the process, so that its threads do not wait for each other. `--smoke` runs
everything with tiny settings, as a test; its numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from benchmarks.claims.arms import make_config, sft_config
from benchmarks.claims.runs import Task
from benchmarks.study import (
  finished,
  in_words,
  interval,
  largest_fall,
  markdown,
  read_command,
  write_results,
)
from igpo_jax import cli
from igpo_jax.config import Config
from igpo_jax.parallel.compile_cache import use_cache
from igpo_jax.rl.methods import estimator_of, forwards_of, objective_of, views_kept
from igpo_jax.train.workdir import hold

RATES = (3e-4, 1e-3, 3e-3)
PILOT_SEEDS = (100,)
EXPLORATIONS = {"none": "GRPO", "inpaint": "IGPO"}
# Of the RL stage, smaller than the claims': there are 288 runs.
STEPS, PROMPTS, EVAL_EVERY, PROBLEMS = 24, 8, 6, 256


def pair(estimator: str, objective: str, **options: Any) -> dict[str, Any]:
  """Changes of a config: `e_x` is an option x of the estimator, `o_x` of the objective."""
  places = {"e": f"estimator.{estimator}", "o": f"objective.{objective}"}
  if objective == "clipped":
    places["o"] = "objective"
  named = {f"{places[k[0]]}.{k[2:]}": v for k, v in options.items()}
  return {"rl.estimator": estimator, "rl.objective": objective} | named


TOKENS = {"o_ratio": "token", "o_normalize": "token", "o_eps_low": 0.5, "o_eps_high": 0.5}
# As published where that is known, but for the learning rate and the number of draws; two inner
# updates for all.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  "mean_field": ("mean-field, sequence ratio (IGPO)", pair("mean_field", "clipped")),
  "coupled": ("coupled, sequence ratio", pair("coupled", "clipped")),
  "diffu_grpo": (
    "diffu-GRPO",
    pair("prompt_masked", "clipped", **TOKENS, o_beta=0.04),
  ),
  "unigrpo": ("UniGRPO", pair("random_ratio", "clipped", o_ratio="token")),
  "coupled_grpo": (
    "coupled-GRPO",
    pair("coupled_grpo", "clipped", **TOKENS, o_beta=0.01)
    | {"rl.advantage": "leave_one_out"},
  ),
  "espo": (
    "ESPO",
    pair("elbo", "elbo_ratio") | {"rl.advantage": "leave_one_out", "rl.loss_region": "all"},
  ),
  "gdpo": (
    "GDPO",
    pair("elbo", "elbo_ratio", e_counts="gauss_legendre", e_draws=3, e_complement=False,
         o_scale="none", o_row_weight="length", o_eps_low=0.5, o_eps_high=0.5, o_beta=0.0),
  ),
  "ebpo": (
    "EBPO",
    pair("every_block", "elbo_ratio", o_scale="none") | {"rl.advantage": "std_sample"},
  ),
  "bgpo": (
    "BGPO, 4 draws",
    pair("elbo", "bgpo", e_counts="response", e_draws=4, e_complement=False)
    | {"rl.advantage": "std_sample"},
  ),
  "gdsd": (
    "GDSD",
    pair("elbo", "gdsd", o_psi=10.0) | {"rl.advantage": "leave_one_out", "rl.loss_region": "all"},
  ),
  "wd1": ("wd1", pair("prompt_masked", "wd1")),
  "spg": ("SPG", pair("block_random", "spg")),
  "stabledrl": ("StableDRL", pair("block_random", "stabledrl")),
  "tracerl": (
    "TraceRL, s = 4",
    pair("trace", "trace_ppo", e_shrink=4, o_kl_to="old") | {"rl.advantage": "std"},
  ),
  "cj_grpo": (
    "CJ-GRPO",
    pair("trace", "trace_ppo", e_shrink=1, o_reduce="row", o_beta=0.0, o_dual_clip=3.0)
    | {"rl.advantage": "std_sample"},
  ),
  "rldf": (
    "RLDF",
    pair("trace_sampled", "trace_ppo", e_steps="unsure", e_score="later", o_reduce="row_step",
         o_threshold=0.6) | {"rl.advantage": "std_sample"},
  ),
  "agrpo": (
    "AGRPO, 4 draws",
    pair("trace_sampled", "trace_ppo", e_draws=4, o_reduce="draws", o_beta=0.0),
  ),
  "justgrpo": (
    "JustGRPO",
    pair("autoregressive", "trace_ppo", o_reduce="valid_rows", o_beta=0.0)
    | {"rl.advantage": "std_sample", "sampler.block_length": 1},
  ),
}  # fmt: skip


def config_of(exploration: str, method: str, rate: float, seed: int, smoke: bool = False) -> Config:
  """The config of one run: that of the claims, with the method and a constant learning rate."""
  changes = {
    "rl.exploration": exploration,
    "rl_optimizer.learning_rate": rate,
    "rl_optimizer.schedule": "constant",
    "checkpoint.every": 0,
  }
  if not smoke:
    changes |= {
      "rl.steps": STEPS,
      "rl.prompts_per_step": PROMPTS,
      "rl.eval_every": EVAL_EVERY,
      "eval.limit": PROBLEMS,
    }
  return make_config("igpo", seed, smoke, METHODS[method][1] | changes)


def forwards_per_step(config: Config, all_wrong: float = 0.0) -> float:
  """Forward passes in an RL step, per completion that is learned from.

  Args:
    config: of the run.
    all_wrong: share of the groups that are all wrong, and therefore sampled again.
  """
  objective, per_view = objective_of(config), forwards_of(config)
  redrawn, updates = estimator_of(config).redrawn, config.rl.inner_updates
  reads = per_view.per_completion(config.rl.group_size)
  scored = (objective.needs_old and updates > 1) + objective.needs_reference
  again = 1 if per_view.views > views_kept(config) else 0
  extra = all_wrong if config.rl.exploration != "none" else 0.0
  sampling = config.sampler.steps * (1 + extra)
  return sampling + reads * (scored * (updates if redrawn else 1) + updates * (3 + again))


@dataclasses.dataclass(frozen=True)
class Run(Task):
  """A run of the study, named "EXPLORATION.METHOD.RATE", or its SFT stage, "sft:aligned"."""

  @property
  def sft(self) -> str:
    """The SFT run whose checkpoint it starts from."""
    return "aligned"

  @property
  def config(self) -> Config:
    """The config of the run."""
    if self.name.startswith("sft:"):
      return sft_config("aligned", self.seed, self.smoke)
    exploration, method, rate = self.name.split(".", 2)
    return config_of(exploration, method, float(rate), self.seed, self.smoke)


def name_of(exploration: str, method: str, rate: float) -> str:
  """The name of a run."""
  return f"{exploration}.{method}.{rate:g}"


def area(result: dict) -> float:
  """The mean accuracy over the RL steps of a run, by the trapezoidal rule."""
  steps, values = (np.array(x, float) for x in zip(*result["accuracy"], strict=True))
  if len(steps) < 2:
    return float(values[0])
  return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(steps)) / (steps[-1] - steps[0]))


def cost(result: dict, config: Config) -> np.ndarray:
  """f64[steps + 1]: forward passes per completion until the end of each RL step; first 0.

  A run that failed is counted as if it had gone on as before.
  """
  wrong = [float(share) for share in result["curves"]["all_wrong_before"]] or [0.0]
  wrong += [float(np.mean(wrong))] * (config.rl.steps - len(wrong))
  return np.concatenate([[0], np.cumsum([forwards_per_step(config, w) for w in wrong])])


def accuracy_at(result: dict, config: Config, budget: float) -> float:
  """The accuracy when a run has cost `budget` forward passes, interpolated between evaluations."""
  steps, values = (np.array(x) for x in zip(*result["accuracy"], strict=True))
  return float(np.interp(budget, cost(result, config)[steps.astype(int)], values))


def choose_rates(results: dict, pairs: Sequence[tuple[str, str]], rates, seeds) -> dict:
  """(exploration, method) -> the learning rate with the largest mean `area` on the pilot seeds."""
  mean = lambda pair, rate: np.mean([area(results[name_of(*pair, rate), s]) for s in seeds])
  return {pair: max(rates, key=lambda rate, pair=pair: mean(pair, rate)) for pair in pairs}


COLUMNS = ("equal samples", "equal forwards", "area", "largest fall", "forwards", "seconds")


def measure(results: dict, chosen: dict, seeds: Sequence[int], smoke: bool) -> list[dict]:
  """A row for each (exploration, method): its rate, and for each column its values by seed."""
  runs = {}
  for (exploration, method), rate in chosen.items():
    name = name_of(exploration, method, rate)
    configs = [config_of(exploration, method, rate, seed, smoke) for seed in seeds]
    runs[exploration, method] = [(results[name, s], c) for s, c in zip(seeds, configs, strict=True)]
  budget = min(cost(result, config)[-1] for pairs in runs.values() for result, config in pairs)
  rows = []
  for (exploration, method), pairs in runs.items():
    values = {
      "equal samples": [result["accuracy"][-1][1] for result, _ in pairs],
      "equal forwards": [accuracy_at(*one, budget) for one in pairs],
      "area": [area(result) for result, _ in pairs],
      "largest fall": [largest_fall(result) for result, _ in pairs],
      "forwards": [float(cost(*one)[-1] / (len(cost(*one)) - 1)) for one in pairs],
      "seconds": [result["step_cpu_seconds"] or math.nan for result, _ in pairs],
    }
    failed = [result["failed"] for result, _ in pairs]
    rows.append({"exploration": exploration, "method": method, "failed": failed,
                 "rate": chosen[exploration, method], "values": values})  # fmt: skip
  return rows


def table(rows: list[dict], seeds: Sequence[int]) -> str:
  """The rows as a Markdown table: mean and 95% interval over seeds."""
  lines = []
  for row in rows:
    cells = []
    for column in COLUMNS:
      values = [value for value in row["values"][column] if not math.isnan(value)]
      digits = 1 if column == "forwards" else 3
      cells.append(in_words(values, digits=digits) if values else "nan")
    failed = f"{sum(map(bool, row['failed']))} of {len(seeds)}"
    of = (METHODS[row["method"]][0], EXPLORATIONS[row["exploration"]], f"{row['rate']:g}")
    lines.append([*of, *cells, failed])
  head = (
    "method", "exploration", "learning rate", "accuracy at equal samples", "at equal forwards",
    "area under the curve", "largest fall", "forwards a step", "CPU seconds a step", "failed",
  )  # fmt: skip
  return markdown(head, lines)


def draw(rows: list[dict], seeds: Sequence[int], path: epath.Path) -> None:
  """Writes the picture: a line per method, a mark per exploration, a panel per comparison."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  methods = list(dict.fromkeys(row["method"] for row in rows))
  best = {m: max(np.mean(r["values"]["equal samples"]) for r in rows if r["method"] == m)
          for m in methods}  # fmt: skip
  methods.sort(key=best.get)
  figure, panels = plt.subplots(1, 2, figsize=(9.0, 1.2 + 0.32 * len(methods)), sharey=True,
                                layout="constrained")  # fmt: skip
  marks = {"none": ("s", "#b35900", -0.14), "inpaint": ("o", "#1f5fa8", 0.14)}
  for axes, column in zip(panels, COLUMNS[:2], strict=True):
    for exploration, (mark, color, shift) in marks.items():
      of = [row for row in rows if row["exploration"] == exploration]
      points = [interval(row["values"][column]) for row in of]
      axes.errorbar(
        [mean for mean, _ in points], [methods.index(row["method"]) + shift for row in of],
        xerr=[np.nan_to_num(width) for _, width in points], fmt=mark, color=color, capsize=2,
        label=EXPLORATIONS[exploration],
      )  # fmt: skip
    axes.set_title(f"at {column}", fontsize=10)
    axes.set_xlabel("held-out accuracy")
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.3)
  panels[0].set_yticks(range(len(methods)), [METHODS[m][0] for m in methods])
  panels[1].legend(fontsize=9)
  title = f"mean and 95% interval, n = {len(seeds)} seeds"
  figure.suptitle(title, fontsize=10)
  figure.savefig(path, dpi=110, metadata={"Title": title})
  plt.close(figure)


def main() -> None:
  args = read_command(__doc__, "methods", METHODS)
  seeds = args.seeds
  pilots, rates = (PILOT_SEEDS[:1], RATES[:1]) if args.smoke else (PILOT_SEEDS, RATES)
  use_cache()
  chosen: dict[tuple[str, str], float] = {}
  results: dict[tuple[str, int], dict] = {}
  args.workdir.mkdir(parents=True, exist_ok=True)
  with hold(args.workdir):
    shared = shared_runs(args.workdir, args.smoke)

    def run(pair: tuple[str, str], rates: Sequence[float], seeds: Sequence[int]) -> None:
      for seed in seeds:
        for rate in rates:
          task = Run(name_of(*pair, rate), seed, args.workdir, args.smoke)
          results[task.name, seed] = finished(task) or perform(task, shared)

    for method in args.names:
      pairs = [(exploration, method) for exploration in EXPLORATIONS]
      for pair in pairs:
        run(pair, rates, pilots)
      chosen |= choose_rates(results, pairs, rates, pilots)
      for pair in pairs:
        run(pair, (chosen[pair],), seeds)
      text = write(args.workdir, results, chosen, seeds, args.smoke)
  print(text)


def shared_runs(workdir: epath.Path, smoke: bool) -> Any:
  """What runs of the study share (`benchmarks.shared_runs`)."""
  from benchmarks.shared_runs import SharedRuns

  def sft(config: Config) -> tuple[Config, epath.Path]:
    task = Run("sft:aligned", config.seed, workdir, smoke)
    return task.config, task.root / "sft_aligned"

  return SharedRuns(config_of("inpaint", "mean_field", RATES[0], 0, smoke), sft)


def perform(task: Run, shared: Any) -> dict:
  """Makes a run, or continues it, and keeps its result in place of its folder."""
  from benchmarks.shared_runs import perform as perform_shared

  return perform_shared(task, shared)


def write(workdir: epath.Path, results: dict, chosen: dict, seeds, smoke: bool) -> str:
  """Writes table, picture and numbers of the methods that are done; returns what to print."""
  rows = measure(results, chosen, seeds, smoke)
  settings = {"seeds": list(seeds), "pilot_seeds": list(PILOT_SEEDS), "rates": list(RATES)}
  text = write_results(workdir, table(rows, seeds), rows, results, settings)
  draw(rows, seeds, workdir / "methods.png")
  return text


if __name__ == "__main__":
  cli.run(main)
