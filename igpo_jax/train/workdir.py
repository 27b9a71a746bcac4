"""The workdir of a run: made once, checked against the config, seen by all processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from igpo_jax.cli import UserError, before_leaving
from igpo_jax.config import Config
from igpo_jax.parallel.distributed import agree, from_first, share
from igpo_jax.rowfile import write_whole
from igpo_jax.train.lock import WorkdirLock

# What may differ between the run that a workdir holds and the one that continues it:
# nothing that decides the numbers.
MAY_CHANGE = ("stages", "log", "mesh", "checkpoint", "compilation_cache")
# What makes the model of a workdir that is only evaluated.
MODEL = ("model", "init_from")

SIGHT_SECONDS = 60.0  # network disks show a new file after a while


@contextlib.contextmanager
def hold(workdir: epath.Path, say: Callable[[str], None]) -> Iterator[WorkdirLock]:
  """Keeps other runs out of the workdir during the body; makes the workdir if need be.

  A collective: process 0 holds the lock for all.

  Raises:
    UserError: on every process, if another run holds it, or it cannot be written.
  """
  lock = WorkdirLock(workdir, say)

  def take() -> None:
    with _told(workdir):
      lock.take()

  from_first(take)
  try:
    with before_leaving(lock.release):
      yield lock
  finally:
    lock.release()


@contextlib.contextmanager
def _told(workdir: epath.Path) -> Iterator[None]:
  """Raises `UserError` for whatever keeps the workdir from being used."""
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

  A collective: process 0 looks and decides for all.

  Args:
    config: as it was given. A size that it leaves to the devices stays 0 in config.json, so a
      run may be continued on other devices.
    resolved: what these devices made of such sizes (train/sizes.py). It is written under
      "resolved", for people; nothing is compared with it.

  Raises:
    UserError: the workdir holds a run with other settings, cannot be used, or is not the
      same for all processes; or the processes were started with different configs.
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
  with _told(workdir):
    from_first(lambda: _open(workdir, config, current, resolved or {}))
  if jax.process_count() > 1:
    _check_shared(workdir)


def _open(
  workdir: epath.Path, config: Config, current: dict[str, Any], resolved: dict[str, Any]
) -> None:
  path = workdir / "config.json"
  only_eval = config.stages == ("eval",)
  # A mistake that ended the program before it made anything leaves the workdir free.
  begun = any((workdir / name).exists() for name in ("tokenizer", "metrics.jsonl", "checkpoints"))
  if path.exists() and begun:
    previous = _filled(json.loads(path.read_text()), as_json(Config()))
    for name in MODEL if only_eval else current:
      if name not in MAY_CHANGE and current[name] != previous.get(name):
        old, new = difference(previous.get(name), current[name])
        raise UserError(
          f"{workdir} holds a run with another config.{name}: {old} there, {new} now; "
          "choose another --workdir, or the same settings"
        )
  if only_eval and path.exists() and begun:
    return  # the run's own settings stay, so that it can be continued
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(path, json.dumps({**current, "resolved": resolved}, indent=2) + "\n")


def as_json(config: Config) -> dict[str, Any]:
  """The config as JSON gives it back."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _filled(old: Any, defaults: Any) -> Any:
  """Old settings with the defaults of options that did not exist then."""
  if not (isinstance(old, dict) and isinstance(defaults, dict)):
    return old
  return {**defaults, **{n: _filled(v, defaults.get(n)) for n, v in old.items()}}


def difference(old: Any, new: Any) -> tuple[Any, Any]:
  """The parts of two settings that differ."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return old, new
  names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
  return {n: old.get(n) for n in names}, {n: new.get(n) for n in names}


def _check_shared(workdir: epath.Path) -> None:
  """Raises `UserError` unless every process sees a file that process 0 makes there.

  Checkpoints are written by all processes into one directory: on a disk of each machine
  they would be in pieces, which shows only when a run is to be continued.
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
