"""Tries what should not break a run, many times, and counts what was lost.

    python -m benchmarks.reliability --all [--seed=0] [--minutes=60]
    python -m benchmarks.reliability --only=kills,graders --seed=1
    python -m benchmarks.reliability --only=disks --case=flip/3    one case again

Rows go to OUT/CAMPAIGN.jsonl, a table of all of them to OUT/table.md and to standard output. The
same command goes on where it was; with the same seed the cases are the same. It exits with 1 if
anything was lost. docs/reliability.md says what each campaign does and has found.
"""

from __future__ import annotations

import time

from etils import epath

from benchmarks.reliability import disks, dtypes, graders, hosts, inputs, kills, long_run, nonfinite
from benchmarks.reliability.table import Campaign, carry_out, table
from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import write_whole

CAMPAIGNS: dict[str, Campaign] = {
  module.CAMPAIGN.name: module.CAMPAIGN
  for module in (graders, disks, inputs, nonfinite, kills, hosts, long_run, dtypes)
}


def main() -> int:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--all", action="store_true")
  parser.add_argument("--only", default="", help=f"some of {', '.join(CAMPAIGNS)}")
  parser.add_argument("--case", default="", help="only this case, whether it has a row or not")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--minutes", type=float, default=60.0,
    help="begin no case after so long; a campaign has an equal share of what those before it left",
  )  # fmt: skip
  parser.add_argument("--out", type=epath.Path, default=epath.Path("runs/reliability"))
  args = parser.parse_args()
  names = list(CAMPAIGNS) if args.all else [name for name in args.only.split(",") if name]
  if not names or not set(names) <= set(CAMPAIGNS):
    raise UserError(f"give --all, or --only with some of {', '.join(CAMPAIGNS)}")
  if args.case:
    folder = args.out / "work" / "case"
    if folder.exists():
      folder.rmtree()
    folder.mkdir(parents=True)
    print(CAMPAIGNS[names[0]].attempt(args.case, args.seed, folder))
    return 0
  end = time.monotonic() + 60 * args.minutes
  print(f"seed {args.seed}, rows in {args.out}", flush=True)
  rows = {}
  for number, name in enumerate(names):
    now = time.monotonic()
    until = now + (end - now) / (len(names) - number)
    rows[name] = carry_out(CAMPAIGNS[name], args.seed, args.out, until)
  totals = {name: sum(1 for _ in CAMPAIGNS[name].cases(args.seed)) for name in names}
  text = table(rows, totals)
  write_whole(args.out / "table.md", text + "\n")
  print(text)
  return int(any(row["lost"] for found in rows.values() for row in found))


if __name__ == "__main__":
  cli.run(main)
