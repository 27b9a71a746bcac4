"""The workdir of a run: it is made, locked, compared with the config, and checked for sharing."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from igpo_jax.cli import before_leaving
from igpo_jax.config import Config
from igpo_jax.config.renamed import upgraded
from igpo_jax.errors import UserError
from igpo_jax.io import disk
from igpo_jax.io.jsonl import Row, write_whole
from igpo_jax.io.text import read_object
from igpo_jax.parallel.distributed import agree, from_first, share
from igpo_jax.train.continued import Reached, as_json, changes
from igpo_jax.train.lock import WorkdirLock
from igpo_jax.train.runlog import print_once, read_rows

# A line for every start with other options than the one before: when, after which row, what.
CHANGES = "changes.jsonl"

SIGHT_SECONDS = 60.0  # network disks show a new file after a while


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[WorkdirLock]:
  """Locks the workdir during the body, so that no other run uses it. Makes it if there is none.

  A collective: process 0 holds the lock for all processes.

  Raises:
    UserError: on every process, if another run holds it, or it cannot be written.
  """
  lock = WorkdirLock(workdir, print_once)

  def take() -> None:
    with _made(workdir):
      lock.take()

  from_first(take)
  try:
    with before_leaving(lock.release):
      yield lock
  finally:
    lock.release()


@contextlib.contextmanager
def disk_told(workdir: epath.Path) -> Iterator[None]:
  """Turns errors of the workdir's disk into a `UserError` that says how to go on."""
  try:
    yield
  except OSError as error:
    inside = str(error.filename or "").startswith(f"{workdir}/")
    if not inside and error.errno not in disk.FAILURES:
      raise
    raise UserError(
      f"workdir {workdir}: {error}: see to the disk, then start the same command again, which "
      "continues the run"
    ) from error


@contextlib.contextmanager
def _made(workdir: epath.Path) -> Iterator[None]:
  """Turns errors that keep the workdir from being used into `UserError`."""
  try:
    yield
  except ImportError as error:
    raise UserError(f"workdir {workdir}: {error} (pip install gcsfs)") from error
  except OSError as error:
    raise UserError(f"workdir {workdir}: {error}") from error


def open_workdir(
  workdir: epath.Path, config: Config, resolved: dict[str, Any] | None = None
) -> None:
  """Makes the workdir, or checks that the run in it is this one; writes config.json.

  A collective: process 0 looks and decides for all processes. Options that do not decide what is
  learned may differ from those of the run in the workdir (train/continued.py). The differences are
  printed in one line and noted in changes.jsonl.

  Args:
    workdir: the run's workdir.
    config: the config as it was given. A size of 0, which the devices decide, stays 0 in
      config.json, so that the run can be continued on other devices.
    resolved: the sizes that were chosen for these devices (train/sizes.py). They are written under
      "resolved" for people to read; nothing is compared with them.

  Raises:
    UserError: the workdir holds another run, cannot be used, or is not the same for all
      processes; or the processes were started with different configs.
  """
  current = as_json(config)
  for index, other in enumerate(configs := share([current])):
    for name in current:
      if other[name] != configs[0][name]:
        first, here = difference(configs[0][name], other[name])
        raise UserError(
          f"process {index} was started with another config.{name} than process 0: {here}, {first}"
        )
  agree("--workdir", str(workdir))

  def first() -> dict[str, list]:
    with _made(workdir):
      return _open(workdir, config, current, resolved or {})

  if changed := from_first(first):
    words = (f"{name}={now!r} (was {before!r})" for name, (before, now) in changed.items())
    print_once(f"the run is continued with {', '.join(words)}; noted in {CHANGES}")
  if jax.process_count() > 1:
    _check_shared(workdir)


def _open(
  workdir: epath.Path, config: Config, current: dict[str, Any], resolved: dict[str, Any]
) -> dict[str, list]:
  """Checks and writes config.json; returns what differs from the run that is continued."""
  path, changed = workdir / "config.json", {}
  rows = read_rows(workdir)
  reached = _reached(workdir, rows)
  if reached.begun:
    changed = changes(_config_of(workdir), config, reached, workdir)
    if config.stages == ("eval",):
      return {}  # the run's own settings stay, so that it can be continued
  elif not path.exists() or _differs(path, current):
    # A run that ended before it did anything leaves the workdir free, whatever it was.
    for left in (workdir / "tokenizer", workdir / "evals"):
      if left.exists():
        left.rmtree()
  workdir.mkdir(parents=True, exist_ok=True)
  if changed:
    _note_changes(workdir / CHANGES, changed, rows)
  write_whole(path, json.dumps({**current, "resolved": resolved}, indent=2) + "\n")
  return {name: list(pair) for name, pair in changed.items()}


def _reached(workdir: epath.Path, rows: list[Row]) -> Reached:
  """How far the run in a workdir has come, from its rows and checkpoints."""
  done, begun = {}, {row["stage"] for row in rows}
  for stage in ("sft", "rl"):
    folder = workdir / "checkpoints" / stage
    entries = folder.iterdir() if folder.is_dir() else ()
    names = [entry.name for entry in entries if entry.is_dir()]
    steps = [int(name) for name in names if name.isdigit()]
    if steps or any(name.startswith("damaged-") for name in names):
      begun.add(stage)
    if steps:
      done[stage] = max(steps)
  return Reached(done, frozenset(begun))


def _config_of(workdir: epath.Path) -> dict[str, Any]:
  """The config.json of a run that has begun, with options under their present names.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  path = workdir / "config.json"
  advice = "it tells which run this is: put it back, or choose another --workdir"
  if not path.exists():
    raise UserError(f"{workdir} holds a run, but no config.json; {advice}")
  return upgraded(read_object(path, advice))


def _differs(path: epath.Path, current: dict[str, Any]) -> bool:
  try:
    return {n: v for n, v in json.loads(path.read_text()).items() if n != "resolved"} != current
  except (ValueError, AttributeError):
    return True


def _note_changes(path: epath.Path, changed: dict[str, Any], rows: list[Row]) -> None:
  last = rows[-1] if rows else {}
  line = {
    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "after": {name: last.get(name) for name in ("stage", "step")},
    "changes": changed,
  }
  text = path.read_text() if path.exists() else ""
  write_whole(path, f"{text}{json.dumps(line)}\n")


def difference(old: Any, new: Any) -> tuple[Any, Any]:
  """The parts of two settings that differ."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return old, new
  names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
  return {n: old.get(n) for n in names}, {n: new.get(n) for n in names}


def _check_shared(workdir: epath.Path) -> None:
  """Raises `UserError` unless every process sees a file that process 0 makes in the workdir.

  All processes write parts of a checkpoint into one directory. If each machine had a disk of its
  own, every checkpoint would be incomplete, which would show only when a run is continued.
  """

  def mark() -> str:
    name = f".seen-{secrets.token_hex(4)}"
    (workdir / name).write_text("")
    return name

  file = workdir / from_first(mark)
  until = time.monotonic() + SIGHT_SECONDS
  while not (seen := file.exists()) and time.monotonic() < until:
    time.sleep(1)
  blind = share([] if seen else [jax.process_index()])
  if jax.process_index() == 0:
    file.unlink()
  if blind:
    raise UserError(
      f"workdir {workdir}: process {blind[0]} does not see what process 0 writes there; "
      "give a --workdir that all machines share, on a network disk or gs://"
    )
