"""A Google Cloud of one TPU with two workers, for the launch scripts: a fake `gcloud`.

It records every call and carries it out on folders: a worker is a home folder, ssh is
bash there, and a pre-emption ends its processes and empties it. What runs on the workers
is the real worker.sh; only the Python environment it makes is a stub, which records the
arguments of each start and then waits or exits as the test's plan says.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from tests.paths import REPO

WORKERS = 2

GCLOUD = '''
import json, os, pathlib, shutil, signal, subprocess, sys
world = pathlib.Path(os.environ["FAKE_WORLD"])
args = sys.argv[1:]
with (world / "calls.jsonl").open("a") as file:
  print(json.dumps(args), file=file)
if (world / "forbidden").exists():
  sys.exit(99)
homes = [world / f"worker{k}" for k in range(int(os.environ["FAKE_WORKERS"]))]

def vanish():
  for home in homes:
    pid = home / "igpo_run" / "pid"
    if pid.exists():
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass
    shutil.rmtree(home, ignore_errors=True)

def next_state(name):
  """States wait in a file, one a line; the last one stays."""
  path = world / name
  if not path.exists():
    sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found.")
  first, *rest = path.read_text().split()
  if rest:
    path.write_text("\\n".join(rest))
  return first

def flag(name, default=None):
  return next((a.partition("=")[2] for a in args if a.startswith(f"--{name}=")), default)

if args[:2] == ["compute", "tpus"] and (world / "unreachable").exists():
  sys.exit("ERROR: (gcloud) There was a problem refreshing your current auth tokens")
match args:
  case ["storage", *_]:
    pass
  case ["compute", "tpus", kind, "create", *_]:
    if kind == "queued-resources":
      (world / "queue").write_text("WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE")
    (world / "node").write_text("CREATING\\nREADY")
    for home in homes:
      home.mkdir()
  case ["compute", "tpus", "queued-resources", "describe", *_]:
    print(next_state("queue"))
  case ["compute", "tpus", "tpu-vm", "describe", *_]:
    print(next_state("node"))
  case ["compute", "tpus", kind, "delete", *_]:
    vanish()
    for name in ("queue", "node"):
      (world / name).unlink(missing_ok=True)
  case ["compute", "tpus", "tpu-vm", "scp", source, target, *_]:
    for home in homes:
      shutil.copy(source, home / target.partition(":")[2])
  case ["compute", "tpus", "tpu-vm", "ssh", *_]:
    command, preempt = flag("command"), world / "preempt_at_look"
    if "worker.sh state" in command and preempt.exists():
      looks = int(preempt.read_text()) - 1
      preempt.write_text(str(looks))
      if looks == 0:
        preempt.unlink()
        vanish()
        (world / "queue").write_text("SUSPENDING\\nSUSPENDED")
        (world / "node").write_text("PREEMPTED")
        sys.exit(255)
    which = flag("worker")
    chosen = homes if which == "all" else [homes[int(which)]]
    codes = []
    for home in chosen:
      env = {**os.environ, "HOME": str(home), "FAKE_HOST": home.name}
      codes.append(subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode)
    sys.exit(max(codes))
  case _:
    sys.exit(f"fake gcloud: {args}")
'''

# Stands for every Python on a worker: `-m uv venv` makes an environment of itself,
# `-m igpo_jax.main` follows the plan.
PYTHON = """
import json, os, pathlib, shutil, signal, subprocess, sys, time
world, host = pathlib.Path(os.environ["FAKE_WORLD"]), os.environ["FAKE_HOST"]
args = sys.argv[1:]
if args[:2] == ["-m", "pip"] and (world / "no_packages").exists():
  sys.exit("no packages today")
if args[:3] == ["-m", "uv", "venv"]:
  target = pathlib.Path(args[-1]) / "bin" / "python"
  target.parent.mkdir(parents=True)
  shutil.copy(world / "bin" / "python3", target)
if args[:2] != ["-m", "igpo_jax.main"]:
  sys.exit(0)
with (world / f"starts_{host}.jsonl").open("a") as file:
  print(json.dumps(args[2:]), file=file)
if (world / "commit_at_start").exists():
  commit = "git -c user.name=x -c user.email=x commit -q --allow-empty -m later".split()
  subprocess.run(commit, cwd=world / "repo", check=True)
number = len((world / f"starts_{host}.jsonl").read_text().splitlines())
plan = json.loads((world / "plan.json").read_text())
what = plan[min(number, len(plan)) - 1]
if what == "wait":
  def end(*_):
    (world / f"saved_{host}").touch()
    sys.exit(143)
  signal.signal(signal.SIGTERM, end)
  (world / f"waiting_{host}").touch()
  time.sleep(120)
  sys.exit("nobody ended this")
sys.exit(what)
"""


class World:
  """The fake cloud, and a small repository with the launch scripts in it.

  Args:
    folder: an empty one.
    plan: what each start of the program does, in order: an exit code, or "wait" to run
      until SIGTERM (and then exit with 143); the last one repeats.
  """

  def __init__(self, folder: pathlib.Path, plan=("wait",)):
    self.folder, self.repo, self.bin = folder, folder / "repo", folder / "bin"
    shutil.copytree(REPO / "launch", self.repo / "launch")
    git = ["git", "-C", str(self.repo), "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
      subprocess.run([*git, *words], check=True)
    self.bin.mkdir()
    self.program("gcloud", f"#!{sys.executable} -I\n{GCLOUD}")
    self.program("python3", f"#!{sys.executable} -I\n{PYTHON}")
    self.program("hostname", '#!/bin/sh\necho "$FAKE_HOST"\n')
    self.program("pkill", "#!/bin/sh\nexit 127\n")  # a bare image lacks procps
    (folder / "plan.json").write_text(json.dumps(list(plan)))

  def program(self, name: str, text: str) -> None:
    path = self.bin / name
    path.write_text(text)
    path.chmod(0o755)

  def tell(self, name: str, text: str = "") -> None:
    """Sets a knob of the fake: forbidden, unreachable, no_packages, preempt_at_look,
    commit_at_start (somebody works on the repository meanwhile), queue."""
    (self.folder / name).write_text(text)

  def launch(self, script: str, *args: str, path: str | None = None, **settings: str):
    """Runs a script of launch/ as a user would; the environment has nothing of ours."""
    env = {
      "PATH": path or f"{self.bin}:/usr/bin:/bin",
      "HOME": str(self.folder),
      "TMPDIR": str(self.folder),
      "FAKE_WORLD": str(self.folder),
      "FAKE_WORKERS": str(WORKERS),
      "IGPO_POLL": "0.05",
      **settings,
    }
    command = ["bash", str(self.repo / "launch" / script), *args]
    return subprocess.run(
      command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )

  def calls(self) -> list[list[str]]:
    """The arguments of every call of gcloud so far."""
    return self._read("calls.jsonl")

  def actions(self) -> list[str]:
    """What the calls did, in two words each; looking at states left out."""
    words = []
    for call in self.calls():
      if call[0] == "storage":
        words.append(f"storage {call[1]}")
      elif call[3] == "ssh":
        command = next(a for a in call if a.startswith("--command="))
        words.append("ssh " + command.rpartition("worker.sh ")[2].split()[0].rstrip(";"))
      elif call[3] != "describe":
        words.append(f"{call[2]} {call[3]}")
    return [word for word in words if word != "ssh state"]

  def starts(self, worker: int) -> list[list[str]]:
    """The arguments of every start of the program on a worker."""
    return self._read(f"starts_worker{worker}.jsonl")

  def _read(self, name: str) -> list[list[str]]:
    path = self.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def close(self) -> None:
    """Ends what still runs on the workers."""
    for pid in self.folder.glob("worker*/igpo_run/pid"):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)
