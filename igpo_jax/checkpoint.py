"""Orbax checkpoints of a stage: the latest few and the best are kept, damaged ones are found.

    DIRECTORY/STEP/...            one checkpoint, as Orbax writes it
    DIRECTORY/STEP/files.json     the size of each of its files, and a checksum of each small one
    DIRECTORY/damaged-STEP/...    a checkpoint that could not be read, moved out of the way

Orbax restores a file whose bytes have changed without an error. So checksums of all arrays, and of
the note, are saved with a checkpoint and compared when it is read.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from igpo_jax.errors import UserError
from igpo_jax.io import disk
from igpo_jax.io.amounts import in_bytes
from igpo_jax.io.jsonl import can_append, write_whole
from igpo_jax.io.text import read_object

FILES = "files.json"
SMALL_BYTES = 1 << 20  # larger files hold arrays, which have checksums of their own
STEP_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, with what we add to it
ARRAYS = "default"  # Orbax's folder of a step's arrays
UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's end of the name of what it is still writing
DISK = (*disk.FAILURES, errno.ENOENT)  # of a folder that vanished, too
_FULL = {
  os.strerror(errno.ENOSPC): "no space left on the device",
  os.strerror(errno.EDQUOT): "the disk quota is used up",
}
# Words of errors that say nothing about the files: another look may succeed.
PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "CANCELLED", "ABORTED")


class DamagedCheckpoint(UserError):
  """The files of a checkpoint are incomplete or have changed."""


def shapes_of(tree: Any) -> Any:
  """The shapes, dtypes and shardings of a tree of arrays, as `restore` takes them."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved_steps(folder: epath.Path) -> list[int]:
  """The steps of the checkpoints in a stage's folder, ascending; [] if there are none."""
  entries = folder.iterdir() if folder.is_dir() else ()
  return sorted(int(e.name) for e in entries if e.name.isdigit() and e.is_dir())


def absolute(path: epath.PathLike) -> epath.Path:
  """The absolute path. A gs:// path is returned as it is: epath's own method would spoil it."""
  path = epath.Path(path)
  return path if "://" in str(path) else path.absolute()


class _Step(ocp.path.step.Metadata):
  """A step whose time is its folder's: Orbax reads it from a file, and fails if that is damaged."""

  @property
  def commit_timestamp(self) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(self.path.stat().mtime, tz=datetime.UTC)


class _Steps(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
  """Folders that are named by their numbers."""

  def __init__(self):
    self._plain = ocp.path.step.standard_name_format()

  def build_name(self, step: int) -> str:
    return self._plain.build_name(step)

  def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
    return (_Step(found.step, found.path) for found in self._plain.find_all(base_path))

  def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
    return self._plain.find_step(base_path, step)


class Checkpoints:
  """The checkpoints of one stage, in DIRECTORY/STEP.

  Saving is synchronous: when `save` returns, the checkpoint is complete under its final name, and a
  kill cannot lose it. If several processes share the arrays, all methods are collectives except
  `note`.

  Args:
    directory: local or gs://; made if there is none.
    keep: how many of the latest checkpoints are kept.
    scores: step -> a number. The checkpoint with the highest score is kept as well; of equal scores
      the later one. The caller may add entries and then call `prune`.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    keep: int = 2,
    scores: MutableMapping[int, float] | None = None,
  ):
    self.keep, self.scores = keep, {} if scores is None else scores
    options = ocp.CheckpointManagerOptions(
      enable_async_checkpointing=False, step_name_format=_Steps()
    )
    self._manager = ocp.CheckpointManager(absolute(directory), options=options)
    self.directory = epath.Path(self._manager.directory)

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint; None where there is none."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step of the checkpoint with the highest score; None where none has one."""
    scored = [(self.scores[step], step) for step in self.steps() if step in self.scores]
    return max(scored)[1] if scored else None

  def steps(self) -> list[int]:
    """Steps of all checkpoints kept, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, note: dict[str, Any] | None = None) -> None:
    """Writes a pytree of arrays, then removes the checkpoints that are no longer kept.

    Args:
      step: the number that the checkpoint gets.
      state: the pytree.
      note: a JSON object to save with it.

    Raises:
      UserError: the disk is full, or fails.
    """
    note = note or {}
    kept = {"sums": digests(state), "note": note, "note_sum": _digest(_text_of(note))}
    with _words_of_absl() as words:
      try:
        self._manager.save(
          step,
          args=ocp.args.StandardSave(state),
          custom_metadata=kept,
          force=True,
        )
        self._manager.wait_until_finished()
      except Exception as error:
        why = _said_by_disk(error)
        if not why:
          raise
        words.clear()
        raise UserError(self._unwritten(step, state, why)) from error
    self._write_files(step)
    self.prune()

  def remove_unfinished(self) -> None:
    """Removes what killed processes left of checkpoints. No other process may be saving one."""
    for begun in self.directory.glob(f"*{UNFINISHED}"):
      begun.rmtree(missing_ok=True)

  def _unwritten(self, step: int, state: Any, why: str) -> str:
    """The message for a disk that is full or fails. It also removes the unfinished checkpoint."""
    with contextlib.suppress(OSError):
      self.remove_unfinished()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    last = self.latest()
    what = f"the checkpoint of step {step} ({in_bytes(size)})"
    if why in _FULL:
      line = f"{_FULL[why]}: {what} does not fit in {self.directory}; free some"
    else:
      line = f"{what} cannot be written to {self.directory} ({why}); see to the disk"
    return f"{line} and start the same command again, which continues from " + (
      f"step {last}" if last is not None else "the beginning of the stage"
    )

  def prune(self) -> None:
    """Removes every checkpoint but the latest few and the best."""
    steps = self.steps()
    keep = {*steps[-self.keep :], self.best()}
    for step in steps:
      if step not in keep:
        self._manager.delete(step)

  def note(self, step: int) -> dict[str, Any]:
    """The JSON object that was saved with the checkpoint; {} if there was none."""
    return self._kept(step).get("note") or {}

  def restore(self, step: int, like: Any) -> Any:
    """The pytree saved at `step`, with the dtypes and shardings of `like`.

    Args:
      step: of the checkpoint.
      like: a pytree of arrays, or of jax.ShapeDtypeStructs with a sharding.

    Raises:
      DamagedCheckpoint: its files are incomplete or have changed.
      UserError: there is no such checkpoint, or its arrays do not fit `like`.
    """
    path = self._directory(step)
    check_files(path)
    self._check_fit(path, like, whole=True)
    with _damage_told(path):
      tree = self._manager.restore(step, args=ocp.args.StandardRestore(like))
    self._check_sums(step, tree)
    return tree

  def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Some top-level entries of the pytree saved at `step`; the other entries are not read.

    Args:
      step: of the checkpoint.
      like: name of the entry -> its arrays, or jax.ShapeDtypeStructs with a sharding.

    Raises:
      DamagedCheckpoint, UserError: as `restore`.
    """
    path = self._directory(step)
    check_files(path)
    self._check_fit(path, like, whole=False)
    args = ocp.checkpoint_utils.construct_restore_args(like)
    restore = ocp.args.PyTreeRestore(item=like, restore_args=args, partial_restore=True)
    reader = ocp.PyTreeCheckpointHandler()
    try:
      with _damage_told(path):
        tree = reader.restore(path / ARRAYS, args=restore)
    finally:
      reader.close()
    self._check_sums(step, tree)
    return tree

  def discard(self, step: int) -> None:
    """Removes what there is of the checkpoint of `step`, finished or not."""
    (self.directory / str(step)).rmtree(missing_ok=True)
    self.remove_unfinished()

  def set_aside(self, step: int) -> epath.Path:
    """Renames a damaged checkpoint to damaged-STEP; returns its new path.

    Only one process calls it; afterwards all processes call `reload`.
    """
    target = self.directory / f"damaged-{step}"
    target.rmtree(missing_ok=True)
    return (self.directory / str(step)).rename(target)

  def reload(self) -> None:
    """Reads the directory again, after another process may have changed it."""
    self._manager.reload()

  def close(self) -> None:
    """Releases the manager's threads."""
    self._manager.close()

  # --- finding damage -----------------------------------------------------------------------

  def _directory(self, step: int) -> epath.Path:
    """The directory of the checkpoint of `step`.

    Raises:
      UserError: there is none.
    """
    if step not in self._manager.all_steps():
      self._manager.reload()  # another process may have written it
    if step not in self._manager.all_steps():
      known = ", ".join(map(str, self.steps())) or "none"
      raise UserError(f"no checkpoint of step {step} in {self.directory}; steps there: {known}")
    return self.directory / str(step)

  def _write_files(self, step: int) -> None:
    """Notes what each file holds, for `_check_files`. Objects on gs:// are whole or absent."""
    if jax.process_index() or not can_append(self.directory):
      return
    path = self.directory / str(step)
    write_whole(path / FILES, json.dumps(_files(path), indent=1) + "\n")

  def _check_fit(self, path: epath.Path, like: Any, whole: bool) -> None:
    """Raises `UserError` unless the checkpoint's arrays are those of `like`."""
    reader = ocp.PyTreeCheckpointHandler()
    try:
      with _damage_told(path):
        saved = _named(reader.metadata(path / ARRAYS).tree)
    finally:
      reader.close()
    wanted = _named(like)
    unfit = f"the checkpoint {path} does not fit this config: "
    if missing := sorted(wanted.keys() - saved.keys()):  # Orbax would leave them as they are
      raise UserError(f"{unfit}it has no {', '.join(missing[:3])}")
    if whole and (more := sorted(saved.keys() - wanted.keys())):
      raise UserError(
        f"{unfit}it also has {', '.join(more[:3])}, which the config has no place for"
      )
    for name, array in wanted.items():
      there, here = tuple(saved[name].shape), tuple(array.shape)
      if there != here:
        raise UserError(f"{unfit}{name} has shape {there} there, {here} here")

  def _check_sums(self, step: int, tree: Any) -> None:
    kept = self._kept(step)
    for name, sums in digests(tree).items():
      if kept["sums"].get(name) != sums:
        raise damaged(self.directory / str(step), f"{name} is not what was saved")
    note_sum = _digest(_text_of(self.note(step)))
    if kept.get("note_sum", note_sum) != note_sum:
      raise damaged(self.directory / str(step), "its note is not what was saved")

  def _kept(self, step: int) -> dict[str, Any]:
    return _kept_in(self.directory / str(step))


def check_files(path: epath.Path) -> None:
  """Compares the files of a checkpoint with what `files.json` in it says of them.

  Raises:
    DamagedCheckpoint: one is missing, or is not what was saved.
  """
  if not can_append(path) or not (path / FILES).exists():
    return  # written by an older version, or the last thing before a kill
  found = _files(path)
  try:
    for name, kept in json.loads((path / FILES).read_text()).items():
      size, digest = kept if isinstance(kept, list) else (kept, "")  # older versions: the size
      there, now = found.get(name, (None, ""))
      if there is None:
        why = "is missing"
      elif there != size:
        why = f"has {there} bytes of {size}"
      elif digest and digest != now:
        why = "is not what was saved"
      else:
        continue
      raise damaged(path, f"{name} {why}")
  except (ValueError, AttributeError, RecursionError) as error:
    if isinstance(error, UserError):
      raise
    raise damaged(path, f"{FILES} makes no sense") from error


def kept_sums(path: epath.Path) -> dict[str, str]:
  """The checksums that were saved with a checkpoint, as `digests` gives them.

  Raises:
    DamagedCheckpoint: it has none.
  """
  return _kept_in(path)["sums"]


def _kept_in(path: epath.Path) -> dict[str, Any]:
  """The metadata that `Checkpoints.save` added to Orbax's description of the step."""
  try:
    kept = read_object(path / STEP_METADATA).get("custom_metadata")
  except UserError as error:
    raise damaged(path, str(error)) from error
  if not isinstance(kept, dict) or not isinstance(kept.get("sums"), dict):
    raise damaged(path, f"{STEP_METADATA} has no checksums")
  return kept


def damaged(path: epath.Path, why: str) -> DamagedCheckpoint:
  """The error of a damaged checkpoint."""
  return DamagedCheckpoint(f"the checkpoint {path} is damaged: {why}")


def _said_by_disk(error: BaseException | None) -> str:
  """The system's words for an error that is the disk's; "" for other errors."""
  while error is not None:
    for number in DISK:
      if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
        return os.strerror(number)
    error = error.__cause__ or error.__context__
  return ""


@contextlib.contextmanager
def _words_of_absl() -> Iterator[list[logging.LogRecord]]:
  """Holds back what absl's logger says in the body; the caller may drop it before its end."""
  held: list[logging.LogRecord] = []
  logger = logging.getLogger("absl")
  hold = lambda record: bool(held.append(record))
  logger.addFilter(hold)
  try:
    yield held
  finally:
    logger.removeFilter(hold)
    for record in held:
      logger.handle(record)


@contextlib.contextmanager
def _damage_told(path: epath.Path) -> Iterator[None]:
  """Raises `DamagedCheckpoint` for what Orbax raises where files are missing or changed."""
  with _words_of_absl() as words:
    try:
      yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      words.clear()
      text = " ".join(str(error).split())
      passing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
      if passing or any(word in text for word in PASSING):
        raise UserError(f"the checkpoint {path} cannot be read: {text[:300]}") from error
      raise damaged(path, text[:150]) from error


def _files(path: epath.Path) -> dict[str, tuple[int, str]]:
  """Name -> (bytes, checksum) of every file below `path`; large ones have the checksum ""."""
  root, out = os.fspath(path), {}
  for folder, _, names in os.walk(root):
    for name in names:
      file = epath.Path(folder) / name
      size = os.path.getsize(file)
      digest = _digest(file.read_bytes()) if size <= SMALL_BYTES else ""
      out[os.path.relpath(file, root)] = (size, digest)
  out.pop(FILES, None)
  return dict(sorted(out.items()))


def _text_of(note: dict[str, Any]) -> bytes:
  return json.dumps(note, sort_keys=True).encode()


def _digest(data: bytes) -> str:
  return hashlib.blake2s(data, digest_size=8).hexdigest()


def _named(tree: Any) -> dict[str, Any]:
  """A tree's leaves by names such as "params/blocks/q_proj/kernel"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def digests(tree: Any) -> dict[str, str]:
  """A checksum of each top-level entry of a tree, as text. It does not depend on the mesh.

  Entries with different arrays have different checksums, except by an unlikely accident.
  """
  return digests_of(jax.device_get(bit_sums(_named(tree))))


def digests_of(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
  """`digests`, from the sums of each array: name, such as "params/head/kernel" -> both sums."""
  out: dict[str, Any] = {}
  for name, (total, mixed) in sorted(sums.items()):
    entry = out.setdefault(name.partition("/")[0], hashlib.blake2s(digest_size=8))
    entry.update(f"{name} {int(total)} {int(mixed)}\n".encode())
  return {name: entry.hexdigest() for name, entry in out.items()}


BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element


def mix(bits: Any) -> Any:
  """u32[...] of numpy or jax, so that a change of one bit changes about half of its element's."""
  mixed = (bits ^ (bits >> 15)) * np.uint32(0x9E3779B1)
  return mixed ^ (mixed >> 13)


@jax.jit
def bit_sums(tree: Any) -> Any:
  """For every array two sums over its bits, the second one after mixing: (u32[], u32[])."""

  def sums(x):
    bits = jax.lax.bitcast_convert_type(x, BITS[np.dtype(x.dtype).itemsize]).astype(jnp.uint32)
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(mix(bits), dtype=jnp.uint32)

  return jax.tree.map(sums, tree)
