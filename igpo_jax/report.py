"""Makes one HTML file of one or several runs, to look at in any browser, without a network.

    python -m igpo_jax.report --workdir=DIR [--workdir=OTHER ...] [--output=report.html]

It shows what the run is, the headline table, curves (several runs over each other, runs that differ
by their seed as a band), a viewer of rollouts through their denoising steps, and the items of the
evaluations. A run writes report.html into its workdir, too: every log.report_every steps and at its
end. The run may still be going on.
"""

from __future__ import annotations

from etils import epath

from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.io.amounts import in_bytes
from igpo_jax.outputs import output_file
from igpo_jax.viewer.files import open_run
from igpo_jax.viewer.page import make_page
from igpo_jax.viewer.report import PAGE


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.report", description=__doc__)
  parser.add_argument("--workdir", action="append", required=True, metavar="DIR",
                      help="of a run; several are laid over each other")  # fmt: skip
  parser.add_argument("--output", help=f"the file; default: {PAGE} in the workdir, if it is one")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  args = make_parser().parse_args(argv)
  runs = [open_run(name) for name in args.workdir]
  if len({str(run) for run in runs}) < len(runs):
    raise UserError("--workdir: a run is there twice")
  if args.output is None and len(runs) > 1:
    raise UserError(f"--output is missing: with {len(runs)} runs, say where the page goes")
  path = epath.Path(args.output) if args.output is not None else runs[0] / PAGE
  with output_file(path) as out:
    page = make_page(runs)
    out.write(page)
  cli.say(f"written: {path} ({in_bytes(len(page))}); open it in a browser")


if __name__ == "__main__":
  cli.run(main)
