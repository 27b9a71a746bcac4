"""python -m igpo_jax.main --config=configs/X.py [--workdir=DIR] [--dry-run] [--config.a.b=value]

Runs the stages of a config one after the other: sft, rl, eval (train/run.py). Mistakes in the
command line, the config and the input files are reported before jax is loaded, which takes seconds.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

from absl import flags
from etils import epath

from igpo_jax import cli
from igpo_jax.config import Config
from igpo_jax.flags import config_flag, parse
from igpo_jax.train.inputs import check_inputs

FLAGS = config_flag()
flags.DEFINE_string(
  "workdir",
  "",
  "Where the run writes; default runs/NAME or runs/NAME_ARGUMENT for --config=NAME.py[:ARGUMENT].",
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "dry_run",
  False,
  "Read and check everything, print the plan (options, data, sizes, memory, time), and stop.",
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "distributed", False, "Join the processes of a TPU pod or cluster.", flag_values=FLAGS
)


def parse_flags(argv: list[str]) -> tuple[Config, epath.Path]:
  """The frozen config and the workdir that a command line asks for.

  Args:
    argv: the program's name and the words after it.

  Raises:
    UserError: see `flags.parse`.
  """
  config, name = parse(FLAGS, argv, __doc__)
  return config, epath.Path(FLAGS.workdir or f"runs/{name}")


@cli.few_searches()
def train(config: Config, workdir: epath.Path, command: str = "") -> dict[str, Any]:
  """Runs every stage of a config (`train.run.train`); returns the contents of summary.json."""
  from igpo_jax.train import run

  return run.train(config, workdir, command)


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  words = sys.argv[1:] if argv is None else argv
  config, workdir = parse_flags(["main", *words])
  if not (config.mesh.hardware or config.mesh.slice):  # else the devices are looked at first
    check_inputs(config)
  if os.environ.get("JAX_PROCESS_ID", "0") == "0":
    print(f"igpo_jax: {workdir}: loading jax", file=sys.stderr, flush=True)
  from igpo_jax.parallel import distributed
  from igpo_jax.parallel.compile_cache import use_cache
  from igpo_jax.parallel.machine import claim_memory

  claim_memory(config.mesh)
  with distributed.joined(detect=FLAGS.distributed):
    use_cache(config.compilation_cache)
    if FLAGS.dry_run:
      from igpo_jax.train.dry_run import dry_run

      dry_run(config, workdir)
      return
    train(config, workdir, shlex.join(["python", "-m", "igpo_jax.main", *words]))


if __name__ == "__main__":
  cli.run(main)
