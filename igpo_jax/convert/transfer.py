"""One conversion: what will be written, then writing it under a temporary name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from igpo_jax.cli import UserError
from igpo_jax.convert import families, peft, writers
from igpo_jax.convert.sources import CONFIG_FILE, PARAMS_DIR, Source

FORMATS = ("hf", "orbax", "peft")
DTYPE_KEYS = ("torch_dtype", "dtype")  # what config.json calls the dtype of its tensors


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a conversion will write; made from headers alone.

  Attributes:
    source: the model, merged already if that was asked for.
    target: the directory to be made.
    to: "hf", "orbax" or "peft".
    entries: the arrays to be written.
    dtypes: the dtype of each by name.
    shards: safetensors files and their tensors; empty for Orbax.
  """

  source: Source
  target: epath.Path
  to: str
  entries: tuple[families.Entry, ...]
  dtypes: Mapping[str, np.dtype]
  shards: Mapping[str, list[writers.Tensor]]

  @property
  def nbytes(self) -> int:
    return sum(entry.size * self.dtypes[entry.name].itemsize for entry in self.entries)

  def lines(self) -> list[str]:
    """The plan as text: one line per tensor or array, one per other file."""
    out = []
    for name, tensors in self.shards.items():
      out.append(f"{name}  {gigabytes(sum(t.nbytes for t in tensors))}")
      out += [f"  {t.key}  {t.dtype.name}{list(t.entry.hf_shape)}" for t in tensors]
    if not self.shards:
      out.append(f"{PARAMS_DIR}/  {gigabytes(self.nbytes)}")
      out += [f"  {e.name}  {self.dtypes[e.name].name}{list(e.shape)}" for e in self.entries]
    if self.to != "peft":
      out += [CONFIG_FILE, *(f.name for f in self.source.files)]
    if self.to == "peft" or self.source.config.lora.rank:
      out.append(peft.CONFIG_FILE)
    size = sum(entry.size for entry in self.entries)
    out.append(f"{size:,} parameters, {gigabytes(self.nbytes)} -> {self.target}")
    return out


def gigabytes(nbytes: int) -> str:
  """A size for people, in powers of ten as disks are sold."""
  return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def make_plan(
  source: Source,
  target: epath.PathLike,
  to: str | None = None,
  dtype: np.dtype | None = None,
  merge_lora: bool = False,
  max_shard_bytes: int = 5 * 10**9,
  overwrite: bool = False,
) -> Plan:
  """Decides what to write; reads no tensor.

  Args:
    source: an open model.
    target: the directory to make.
    to: a format; None: Orbax from Hugging Face, Hugging Face from anything else.
    dtype: of all base parameters; None: as stored.
    merge_lora: add the adapters into their kernels.
    max_shard_bytes: of one safetensors file.
    overwrite: replace the target if it exists.

  Raises:
    UserError: the target exists or is the source, adapters where the format has no
      place for them, none where they were asked for, or too little space.
  """
  target = epath.Path(target)
  to = to or ("orbax" if source.kind == "hf" else "hf")
  has_adapters = source.config.lora.rank > 0
  if target.exists() and not overwrite:
    raise UserError(f"target {target} exists; choose another or pass --overwrite")
  for directory in {source.directory, *(f.parent for f in source.files)}:
    if _inside(directory, target) or _inside(target, directory):
      raise UserError(f"target {target} and source {directory} overlap")
  if (merge_lora or to == "peft") and not has_adapters:
    raise UserError(f"{source.directory} has no adapters; --adapter=DIR brings some")
  if to == "hf" and has_adapters and not merge_lora:
    raise UserError(
      f"{source.directory} has adapters, which a Hugging Face model has no place for: "
      "--merge_lora adds them in, --to=peft writes them alone"
    )
  source = source.merged() if merge_lora else source
  entries = source.entries
  if to == "peft":
    entries = families.split_entries(entries)[1]
  is_adapter = lambda entry: entry.path[-1].startswith("lora_")
  dtypes = {
    e.name: dtype if dtype and (to == "peft" or not is_adapter(e)) else source.arrays.dtypes[e.name]
    for e in entries
  }
  shards = {}
  if to == "hf":
    shards = writers.plan_shards(entries, dtypes, max_shard_bytes)
  elif to == "peft":
    stem = peft.WEIGHTS_FILE.removesuffix(".safetensors")
    shards = writers.plan_shards(entries, dtypes, 2**63, stem)
  plan = Plan(source, target, to, entries, dtypes, shards)
  _check_space(plan)
  return plan


def _inside(path: epath.Path, directory: epath.Path) -> bool:
  path, directory = (epath.Path(os.path.abspath(p)) for p in (path, directory))
  return directory == path or directory in path.parents


def _check_space(plan: Plan) -> None:
  if "://" in str(plan.target):
    return
  parent = next(p for p in plan.target.absolute().parents if p.exists())
  free = shutil.disk_usage(parent).free
  if plan.nbytes > free:
    raise UserError(
      f"no space left for {plan.target}: it needs {gigabytes(plan.nbytes)}, "
      f"{parent} has {gigabytes(free)}"
    )


def execute(
  plan: Plan, progress: Callable[[int], Any] | None = None, threads: int = writers.THREADS
) -> None:
  """Writes the plan under a temporary name beside the target, then renames it.

  Whatever happens, the target is either what it was before or complete.

  Raises:
    UserError: the file system refuses (no space left, no permission), or the source
      turns out to be damaged while it is read.
  """
  target = plan.target
  temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
  lock = threading.Lock()

  def locked(nbytes: int) -> None:
    if progress is not None:
      with lock:
        progress(nbytes)

  try:
    temporary.mkdir(parents=True)
    _write(plan, temporary, locked, threads)
    _replace(temporary, target)
  except BaseException as error:
    if temporary.exists():
      temporary.rmtree()
    reason = _file_system_error(error)
    if reason:
      raise UserError(f"cannot write {target}: {reason}") from error
    raise


def _write(plan: Plan, directory: epath.Path, progress: writers.Progress, threads: int) -> None:
  source = plan.source
  if plan.to != "peft":
    # Small files first: a problem with them should not come after the large ones.
    for file in source.files:
      (directory / file.name).write_bytes(file.read_bytes())  # they may lie in two places
    (directory / CONFIG_FILE).write_text(_config_text(plan))
  if source.config.lora.rank:
    base = str(source.directory)
    peft.write_config(directory, source.config.lora, source.family, base)
  if plan.to == "orbax":
    args = (plan.entries, plan.dtypes, source.arrays, progress, threads)
    writers.write_orbax(directory / PARAMS_DIR, *args)
  else:
    writers.write_safetensors(directory, plan.shards, source.arrays, progress, threads)


def _config_text(plan: Plan) -> str:
  """config.json as it was, but for the dtype where that changes."""
  source = plan.source
  hf_config = dict(source.hf_config)
  base, _ = families.split_entries(plan.entries)
  stored = {source.arrays.dtypes[entry.name].name for entry in base}
  written = {plan.dtypes[entry.name].name for entry in base}
  if written != stored and len(written) == 1:
    hf_config |= {key: next(iter(written)) for key in DTYPE_KEYS if key in hf_config}
  file = source.directory / CONFIG_FILE
  if source.kind != "training" and hf_config == source.hf_config:
    return file.read_text()
  return json.dumps(hf_config, indent=2, ensure_ascii=False) + "\n"


def _replace(temporary: epath.Path, target: epath.Path) -> None:
  if not target.exists():
    temporary.rename(target)
    return
  old = target.parent / f".{target.name}.{os.getpid()}.old"
  target.rename(old)
  temporary.rename(target)
  old.rmtree() if old.is_dir() else old.unlink()


def _file_system_error(error: BaseException) -> str | None:
  """What the file system said, if it was the file system; TensorStore words it its own way."""
  if isinstance(error, OSError):
    return os.strerror(error.errno).lower() if error.errno else str(error)
  text = str(error)
  known = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO)
  if isinstance(error, ValueError) and not isinstance(error, UserError):
    return next((os.strerror(n).lower() for n in known if os.strerror(n) in text), None)
  return None
