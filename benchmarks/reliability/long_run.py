"""Long runs of the tiny config: memory, threads, open files and step times must not grow.

The process of a run is looked at from outside every `EVERY` seconds. What it uses in the last
quarter of its steps is compared with the second quarter: the first one compiles and fills caches.
Lost is growth beyond `LIMITS`. The median time of a step of both quarters is stated, and is lost
only if it doubles: other programs may be running.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from etils import epath

from benchmarks.reliability.kills import CONFIG
from benchmarks.reliability.table import Campaign
from igpo_jax.io.jsonl import Row

EVERY = 0.5
# How much more the last quarter may use than the second.
LIMITS = {"mib": 16.0, "threads": 0.0, "files": 0.0}
CASES = {
  "rl steps/300": ("rl.steps=300", "rl.eval_every=0"),
  "evaluations/200": ("rl.steps=200", "rl.eval_every=1"),
  "rl steps/3000": ("rl.steps=3000", "rl.eval_every=0"),
}
ALWAYS = ("checkpoint.every=100", "log.samples_every=100", "log.report_every=0")


def used(pid: int) -> dict[str, float]:
  """MiB of memory, threads and open files of a process."""
  at = pathlib.Path(f"/proc/{pid}")
  pages = int((at / "statm").read_text().split()[1])
  return {
    "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    "threads": len(os.listdir(at / "task")),
    "files": len(os.listdir(at / "fd")),
  }


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  workdir = pathlib.Path(folder, "run")
  options = [f"--config.{option}" for option in (*CASES[case], *ALWAYS, f"seed={seed}")]
  command = [sys.executable, "-m", "igpo_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  seen: list[tuple[int, dict[str, float]]] = []
  metrics = workdir / "metrics.jsonl"
  with (folder / "log").open("w") as log:
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    while process.poll() is None:
      time.sleep(EVERY)
      try:
        seen.append((sum(1 for _ in metrics.open()), used(process.pid)))
      except OSError:
        continue  # there is no row yet, or it has ended
  if process.returncode:
    return {"lost": [f"exit code {process.returncode}: {(folder / 'log').read_text()[-600:]}"]}
  rows = [row for row in map(json.loads, metrics.open()) if row["stage"] == "rl"]
  first = sum(1 for _ in metrics.open()) - len(rows)
  quarter = lambda k: (first + k * len(rows) / 4, first + (k + 1) * len(rows) / 4)
  found: dict[str, float] = {}
  lost = []
  for name, limit in LIMITS.items():
    middle = [
      statistics.median(use[name] for at, use in seen if low <= at < high)
      for low, high in (quarter(1), quarter(3))
    ]
    found |= {f"{name}_before": round(middle[0], 1), f"{name}_after": round(middle[1], 1)}
    if middle[1] - middle[0] > limit:
      lost.append(f"{name}: {middle[0]:.1f}, then {middle[1]:.1f}")
  seconds = [
    statistics.median(
      row["time/step_seconds"] for row in rows[k * len(rows) // 4 :][: len(rows) // 4]
    )
    for k in (1, 3)
  ]
  if seconds[1] > 2 * seconds[0]:
    lost.append(f"seconds a step: {seconds[0]:.3f}, then {seconds[1]:.3f}")
  return {"tried": len(rows), **found, "step_seconds": [round(x, 4) for x in seconds], "lost": lost}


CAMPAIGN = Campaign(
  "long", "thousands of steps, hundreds of evaluations", lambda seed: tuple(CASES), attempt
)
