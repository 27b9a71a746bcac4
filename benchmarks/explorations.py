"""GRPO, sample-matched GRPO and IGPO side by side from one SFT checkpoint.

    python -m benchmarks.explorations --workdir=runs/explorations [--seed=0]
        [--config=configs/quickstart.py] [--explorations=none,resample,inpaint]

The config's SFT stage runs once. Each exploration then starts from a copy of its run, with the same
prompts and the same noise for the policy's own samples. An interrupted command continues where it
was. It writes results.json and table.md to the workdir and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil

from etils import epath

from igpo_jax import cli
from igpo_jax.config import Config, freeze, load_config_file
from igpo_jax.errors import UserError
from igpo_jax.main import train
from igpo_jax.train.continued import as_json

LABELS = {
  "none": "none (GRPO)",
  "resample": "resample (GRPO, as many samples as IGPO)",
  "inpaint": "inpaint (IGPO)",
}


def load_config(path: epath.Path, seed: int, exploration: str, overrides: list[str]) -> Config:
  """The config of one arm.

  Args:
    path: the config file.
    seed: replaces the config's seed.
    exploration: value of `rl.exploration`.
    overrides: options as "a.b=value", where the value is JSON.

  Raises:
    UserError: no such file or option, or a value that is not JSON.
  """
  if not path.exists():
    raise UserError(f"--config: no such file: {path}")
  config = load_config_file(path)
  config.seed = seed
  config.rl.exploration = exploration
  for item in overrides:
    name, _, value = item.partition("=")
    try:
      config.update_from_flattened_dict({name: json.loads(value)})
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"--set {item}: {error}") from None
  return freeze(config)


def quarters(rows: list[dict], name: str) -> tuple[float, float]:
  """The means of a metric over the first and over the last quarter of the RL steps."""
  values = [row[f"rl/{name}"] for row in rows if row["stage"] == "rl"]
  part = max(len(values) // 4, 1)
  return sum(values[:part]) / part, sum(values[-part:]) / part


def run_arm(config: Config, workdir: epath.Path, sft_workdir: epath.Path) -> dict:
  """Runs RL from a copy of the SFT run.

  Returns:
    The summary of the run, with "seconds", those of its RL steps, and "all_wrong_quarters".
  """
  if not workdir.exists():
    copy = workdir.parent / f"{workdir.name}.tmp"  # renamed when complete: no half copy is used
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sft_workdir, copy)
    # The copied SFT stage belongs to this arm's config, too: only RL options differ.
    (copy / "config.json").write_text(json.dumps(as_json(config)))
    copy.rename(workdir)
  summary = train(config, workdir)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rl = [row for row in rows if row["stage"] == "rl"]
  summary["seconds"] = sum(row["time/step_seconds"] for row in rl)
  summary["all_wrong_quarters"] = quarters(rows, "all_wrong_before")
  return summary


def table(results: dict[str, dict], benchmark: str) -> str:
  """The Markdown table, one row per exploration; `benchmark` is the name of the evaluation."""
  lines = [
    "| exploration | accuracy after SFT | after RL | all wrong before → after | "
    "all wrong, first → last quarter | extra samples correct | RL seconds |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, result in results.items():
    sft, rl = (result["eval"][f"{stage}/{benchmark}"] for stage in ("sft", "rl"))
    means, (first, last) = result["rl"], result["all_wrong_quarters"]
    lines.append(
      f"| {LABELS[name]} | {sft['accuracy']:.3f} ± {sft['stderr']:.3f} "
      f"| {rl['accuracy']:.3f} ± {rl['stderr']:.3f} "
      f"| {means['all_wrong_before']:.2f} → {means['all_wrong_after']:.2f} "
      f"| {first:.2f} → {last:.2f} | {means['extra_correct']:.3f} | {result['seconds']:.0f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--config", type=epath.Path, default=epath.Path("configs/quickstart.py"))
  parser.add_argument("--workdir", type=epath.Path, required=True)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--explorations", default="none,resample,inpaint")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=JSON")
  args = parser.parse_args()
  names = args.explorations.split(",")
  for name in names:
    if name not in LABELS:
      raise UserError(f"--explorations: {name!r} is not one of {', '.join(LABELS)}")

  configs = {name: load_config(args.config, args.seed, name, args.set) for name in names}
  sft_workdir = args.workdir / "sft"
  first = configs[names[0]]
  # All arms share the SFT stage. Its config does not depend on which arms are asked for.
  rl = dataclasses.replace(first.rl, exploration="inpaint")
  train(dataclasses.replace(first, stages=("sft",), rl=rl), sft_workdir)
  results = {n: run_arm(c, args.workdir / n, sft_workdir) for n, c in configs.items()}
  benchmark = configs[names[0]].data.eval[0].partition("=")[0]
  text = table(results, benchmark)
  (args.workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  (args.workdir / "table.md").write_text(text + "\n")
  print(text)


if __name__ == "__main__":
  cli.run(main)
