"""GRPO, sample-matched GRPO and IGPO side by side from one SFT checkpoint.

    python -m benchmarks.explorations --workdir=runs/explorations [--seed=0]
        [--config=configs/quickstart.py] [--explorations=none,resample,inpaint]

One run whose arms (docs/arms.md) are the explorations: the config's SFT stage runs once, and each
exploration starts from it, with the same prompts and the same noise for the policy's own samples.
An interrupted command continues where it was. It writes results.json and explorations.md to the
workdir and prints the table.
"""

from __future__ import annotations

import argparse
import json

from etils import epath

from benchmarks.study import markdown
from igpo_jax import cli
from igpo_jax.config import Config, freeze, load_config_file
from igpo_jax.errors import UserError
from igpo_jax.main import train

LABELS = {
  "none": "none (GRPO)",
  "resample": "resample (GRPO, as many samples as IGPO)",
  "inpaint": "inpaint (IGPO)",
}


def load_config(path: epath.Path, seed: int, names: list[str], overrides: list[str]) -> Config:
  """The config of a run with the last of the explorations, and the others as its arms.

  Args:
    path: the config file.
    seed: replaces the config's seed.
    names: values of `rl.exploration`.
    overrides: options as "a.b=value", where the value is JSON.

  Raises:
    UserError: no such file or option, or a value that is not JSON.
  """
  if not path.exists():
    raise UserError(f"--config: no such file: {path}")
  config = load_config_file(path)
  config.seed = seed
  config.rl.exploration = names[-1]
  config.arms = tuple(f"{name}: rl.exploration={name}" for name in names[:-1])
  for item in overrides:
    name, _, value = item.partition("=")
    try:
      config.update_from_flattened_dict({name: json.loads(value)})
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"--set {item}: {error}") from None
  return freeze(config)


def result_of(workdir: epath.Path) -> dict:
  """The summary of a run or an arm, with the seconds of its RL and all-wrong groups by quarters."""
  summary = json.loads((workdir / "summary.json").read_text())
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rl = [row for row in rows if row["stage"] == "rl"]
  values, part = [row["rl/all_wrong_before"] for row in rl], max(len(rl) // 4, 1)
  summary["all_wrong_quarters"] = sum(values[:part]) / part, sum(values[-part:]) / part
  summary["seconds"] = sum(row["time/step_seconds"] for row in rl)
  return summary


def table(results: dict[str, dict], benchmark: str) -> str:
  """The Markdown table, one row per exploration; `benchmark` is the name of the evaluation."""
  rows = []
  for name, result in results.items():
    sft, rl = (result["eval"][f"{stage}/{benchmark}"] for stage in ("sft", "rl"))
    means, (first, last) = result["rl"], result["all_wrong_quarters"]
    rows.append([
      LABELS[name],
      f"{sft['accuracy']:.3f} ± {sft['stderr']:.3f}",
      f"{rl['accuracy']:.3f} ± {rl['stderr']:.3f}",
      f"{means['all_wrong_before']:.2f} → {means['all_wrong_after']:.2f}",
      f"{first:.2f} → {last:.2f}",
      f"{means['extra_correct']:.3f}",
      f"{result['seconds']:.0f}",
    ])  # fmt: skip
  head = (
    "exploration", "accuracy after SFT", "after RL", "all wrong before → after",
    "all wrong, first → last quarter", "extra samples correct", "RL seconds",
  )  # fmt: skip
  return markdown(head, rows)


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

  config = load_config(args.config, args.seed, names, args.set)
  train(config, args.workdir)
  folders = {name: args.workdir / "arms" / name for name in names[:-1]} | {names[-1]: args.workdir}
  results = {name: result_of(folder) for name, folder in folders.items()}
  benchmark = config.data.eval[0].partition("=")[0]
  text = table(results, benchmark)
  (args.workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  (args.workdir / "explorations.md").write_text(text + "\n")
  print(text)


if __name__ == "__main__":
  cli.run(main)
