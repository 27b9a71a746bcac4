"""Broken disks: damaged checkpoints; disks that are full, read-only, gone, slow or do not rename.

A case is a run of the loop of training (`stage`) that something happens to, and what the same
command makes of it afterwards. Lost are a result that is not the uninterrupted run's, bit for bit,
an error that is no line for a user, and files left over.

Damage is done to the newest checkpoint of a run that was killed; the run must go on from the one
before, or from this one if the damage does no harm. Disks of limited size, or with room for a
limited number of files, are tmpfs mounts, for which a process needs the right to mount; without it
those cases are skipped, and said to be. A slow disk, one that refuses a rename, and one whose quota
is used up are stand-ins: Python's own calls sleep or fail for paths of the run (not the writes of
arrays, which tensorstore makes).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import pathlib
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

from etils import epath

from benchmarks.reliability import stage
from benchmarks.reliability.table import Campaign, mixed
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import Row

COUNTS = {
  "flip": 120, "cut": 30, "zeros": 30, "missing": 30, "folder missing": 5, "leftover": 15,
  "tail": 20, "full": 30, "read-only": 15, "gone": 15, "rename": 30, "files": 20, "quota": 20,
  "slow": 10,
}  # fmt: skip
NEWEST = "4"  # of the run that is damaged
MAY_STAY = {"metrics.jsonl", "samples.jsonl", "checkpoints", "last.npy"}


@functools.cache
def peace() -> stage.Ended:
  """What an uninterrupted run ends with."""
  with tempfile.TemporaryDirectory() as folder:
    stage.run(epath.Path(folder))
    return stage.ended(epath.Path(folder))


@functools.cache
def killed(where: str) -> str:
  """A folder with a run that was killed: in the evaluation after step 4, or in step 6."""
  folder = epath.Path(tempfile.mkdtemp())

  def kill(at) -> None:
    if at in ("rl 4", 5) and isinstance(at, str) == (where == "evaluation"):
      raise stage.Killed

  with contextlib.suppress(stage.Killed):
    stage.run(folder, kill, kill)
  return str(folder)


def checked(workdir: epath.Path, said: str = "") -> list[str]:
  """What of a finished run is not as it should be."""
  lost = [f"another {name}" for name in peace().differences(stage.ended(workdir))]
  left = {path.name for path in workdir.iterdir()} - MAY_STAY
  left |= {
    path.name
    for path in (workdir / "checkpoints" / "rl").iterdir()
    if not path.name.isdigit() and f"{path.name} now" not in said
  }
  return lost + [f"left over: {name}" for name in sorted(left)]


def harmed(kind: str, draw: random.Random, newest: pathlib.Path) -> str:
  """Does the damage of a kind; returns what was done, in words."""
  files = sorted(path for path in newest.rglob("*") if path.is_file())
  # Half of the time a small file: they are few bytes of many, and decide as much.
  file = draw.choice(
    [f for f in files if f.stat().st_size < 5000] if draw.random() < 0.5 else files
  )
  data, name = bytearray(file.read_bytes()), file.relative_to(newest)
  at = draw.randrange(len(data))
  if kind == "flip":
    data[at] ^= 1 << draw.randrange(8)
  elif kind == "cut":
    del data[at:]
  elif kind == "zeros":
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
  elif kind == "missing":
    file.unlink()
    return f"without {name}"
  elif kind == "folder missing":
    folder = draw.choice([path for path in newest.rglob("*") if path.is_dir()])
    shutil.rmtree(folder)
    return f"without {folder.relative_to(newest)}"
  file.write_bytes(bytes(data))
  return f"{kind} at byte {at} of {name}"


def damage(kind: str, draw: random.Random, folder: epath.Path) -> Row:
  workdir = folder / "run"
  shutil.copytree(killed(draw.choice(("evaluation", "step"))), workdir)
  saved = pathlib.Path(workdir, "checkpoints", "rl")
  if kind == "leftover":
    what = f"{draw.randint(1, 9)}.orbax-checkpoint-tmp"
    shutil.copytree(saved / NEWEST, saved / what)
    harmed("missing", draw, saved / what)
  elif kind == "tail":  # half a last row, as a kill leaves it
    file = pathlib.Path(workdir, draw.choice(("metrics.jsonl", "samples.jsonl")))
    lines = file.read_bytes().splitlines(keepends=True)
    after = b'{"stage": "rl", "step": 6, "rl/value": -1.25, "text": "x"}\n'
    half = after[: draw.randrange(1, len(after))]
    file.write_bytes(b"".join(lines) + half)
    what = f"{file.name} ends with {half!r}"
  else:
    what = harmed(kind, draw, saved / NEWEST)
  said = stage.run(workdir)
  told = f"{NEWEST} is damaged" in said
  return {"what": what, "told": told, "lost": checked(workdir, said)}


@contextlib.contextmanager
def disk(folder: epath.Path, size: str) -> Iterator[Callable[[str], None]]:
  """A tmpfs at `folder`; yields a function that mounts it anew with other options."""
  mount = lambda *words: subprocess.run(["mount", *words, str(folder)], check=True)
  mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
  try:
    yield lambda options: mount("-o", f"remount,{options}")
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


@functools.cache
def may_mount() -> bool:
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
    return done.returncode == 0 and not subprocess.run(["umount", folder]).returncode


def on_disk(kind: str, draw: random.Random, folder: epath.Path) -> Row:
  if not may_mount():
    return {"tried": 0, "lost": [], "skipped": "no right to mount a tmpfs"}
  size = f"{draw.randrange(40, 320)}k" if kind == "full" else "64m"
  if kind == "files":
    size += f",nr_inodes={draw.randrange(8, 120)}"
  step = draw.randrange(stage.STEPS)
  workdir = folder / "disk" / "run"
  workdir.parent.mkdir()
  with disk(workdir.parent, size) as remount:

    def harm(n: int) -> None:
      if n == step and kind == "read-only":
        remount("ro")

    first, lost = attempted(workdir, harm)
    remount("rw,size=64m,nr_inodes=100k")
    if kind == "read-only" and not first:
      lost.append("nothing was noticed")
    said = stage.run(workdir)
    return {"what": f"{size}, step {step}", "first": first, "lost": lost + checked(workdir, said)}


def gone(kind: str, draw: random.Random, folder: epath.Path) -> Row:
  """The workdir is removed: as a step begins, or up to 0.2 s later, so in the middle of a save."""
  workdir, step = folder / "run", draw.randrange(stage.STEPS)
  seconds = draw.choice((0.0, draw.uniform(0, 0.2)))
  remover = threading.Timer(seconds, functools.partial(remove, workdir))

  def harm(n: int) -> None:
    if n == step:
      remover.start()
      if not seconds:
        remover.join()

  first, lost = attempted(workdir, harm)
  remover.join()
  if not seconds and not first:
    lost.append("nothing was noticed")
  said = stage.run(workdir)
  what = f"{seconds:.3f} s after step {step} began"
  return {"what": what, "first": first, "lost": lost + checked(workdir, said)}


def remove(workdir: epath.Path) -> None:
  """As `rm -rf`, and again where the run has put something there meanwhile."""
  while workdir.exists():
    shutil.rmtree(workdir, ignore_errors=True)


def attempted(workdir: epath.Path, harm: Callable[[int], None]) -> tuple[str, list[str]]:
  """The line that a run ended with, "" if it finished; and what is wrong with it."""
  try:
    stage.run(workdir, harm)
  except UserError as error:
    line = str(error).replace(str(workdir), "WORKDIR")
    return line, [] if "start the same command again" in line else [f"no advice: {line}"]
  except Exception as error:
    return repr(error), [f"a traceback: {error!r:.200}"]
  return "", []


CALLS = ("os.rename", "os.replace", "os.mkdir", "io.open", "builtins.open")


@contextlib.contextmanager
def standing_in(workdir: epath.Path, before: Callable[[str, str], None]) -> Iterator[None]:
  """Calls `before(name of the call, path)` when a path of the run is renamed, made or written."""

  def wrapped(name, real):
    def call(path, *args, **kwargs):
      mode = str(args[0] if args else kwargs.get("mode", "r")) if name.endswith("open") else "w"
      if str(path).startswith(str(workdir)) and set(mode) & set("wax+"):
        before(name, str(path))
      return real(path, *args, **kwargs)

    return call

  with contextlib.ExitStack() as stack:
    for name in CALLS:
      module, _, function = name.partition(".")
      real = getattr(importlib.import_module(module), function)
      stack.enter_context(mock.patch(name, wrapped(name, real)))
    yield


def stand_in(kind: str, draw: random.Random, folder: epath.Path) -> Row:
  """One of the renames fails, as on a network disk that was away for a moment; or a quota is used
  up at some call, for good; or each call takes up to a twentieth of a second."""
  workdir, number, count = folder / "run", draw.randrange(1, 21), 0
  told = draw.random() < 0.5  # whether the error names the file

  def before(name: str, path: str) -> None:
    nonlocal count
    if kind == "slow":
      time.sleep(draw.uniform(0, 0.05))
    elif kind == "quota" or name in ("os.rename", "os.replace"):
      count += 1
      if count == number or (kind == "quota" and count > number):
        code = errno.EDQUOT if kind == "quota" else errno.EIO
        raise OSError(code, os.strerror(code), *([path] if told or kind == "rename" else []))

  with standing_in(workdir, before):
    first, lost = attempted(workdir, lambda n: None)
  if (kind == "slow" and first) or (kind == "quota" and not first):
    lost.append(first or "nothing was noticed")
  time.sleep(0.5 if first else 0)  # writes that had begun: in life their process has gone
  said = stage.run(workdir)
  return {"what": f"{kind} {number}", "first": first, "lost": lost + checked(workdir, said)}


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  kind, draw = case.partition("/")[0], random.Random(f"{case} {seed}")
  how = {
    **dict.fromkeys(("full", "files", "read-only"), on_disk),
    "gone": gone,
    **dict.fromkeys(("rename", "quota", "slow"), stand_in),
  }.get(kind, damage)
  try:
    return how(kind, draw, folder)
  except (Exception, SystemExit) as error:
    return {"lost": [f"the next start: {type(error).__name__}: {error!s:.300}"]}


CAMPAIGN = Campaign(
  "disks",
  "damaged checkpoints; disks that are full, read-only, gone, slow or do not rename",
  functools.partial(mixed, COUNTS),
  attempt,
)
