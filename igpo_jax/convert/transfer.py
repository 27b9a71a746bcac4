"""One conversion: a plan of what will be written, and then writing it under a temporary name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from igpo_jax.checkpoint import ARRAYS
from igpo_jax.convert import THREADS, peft, writers
from igpo_jax.convert.entries import Entry, split_entries
from igpo_jax.convert.open import CONFIG_FILE, PARAMS_DIR, Source
from igpo_jax.errors import UserError
from igpo_jax.models.families import FAMILIES, find

DTYPE_KEYS = ("torch_dtype", "dtype")  # what config.json calls the dtype of its tensors


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a conversion will write. It is made from headers; no array has been read.

  Attributes:
    source: the model, with adapters already merged if that was asked for.
    target: the directory to make.
    to: the format, "hf", "orbax" or "peft".
    entries: the arrays to write.
    dtypes: name of an entry -> its dtype.
    shards: name of a safetensors file -> its tensors; {} for Orbax.
  """

  source: Source
  target: epath.Path
  to: str
  entries: tuple[Entry, ...]
  dtypes: Mapping[str, np.dtype]
  shards: Mapping[str, list[writers.Tensor]]

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays that are written."""
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
    out += [f"note: {note}" for note in self.notes()]
    size = sum(entry.size for entry in self.entries)
    out.append(f"{size:,} parameters, {gigabytes(self.nbytes)} -> {self.target}")
    return out

  def notes(self) -> list[str]:
    """Remarks for the user about what the result does not show by itself."""
    out = [f"{name} is left out: {why}" for name, why in self.source.left_out if self.to != "peft"]
    base = epath.Path(self.source.base)
    if self.to == "peft" and any((base / n).exists() for n in (PARAMS_DIR, ARRAYS)):
      out.append(
        f"{peft.CONFIG_FILE} names {base} as the base, which PEFT cannot load: convert that with "
        "--to=hf and write its path there"
      )
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
  code: epath.PathLike | None = None,
) -> Plan:
  """Decides what to write; reads no tensor.

  Args:
    source: an open model.
    target: the directory to make.
    to: a format; None: Orbax from Hugging Face, Hugging Face from anything else.
    dtype: dtype of all base parameters; None: as stored.
    merge_lora: add the adapters to their kernels.
    max_shard_bytes: the largest size of a safetensors file.
    overwrite: replace the target if it exists.
    code: a directory with the released PyTorch code, which is copied and named in config.json. Only
      for families whose code is known (`Family.code_files`).

  Raises:
    UserError: the target exists or overlaps the source; the model has adapters, but the format has
      no place for them; it has none, but they were asked for; or there is too little space.
  """
  # If the target is a link, the directory that it leads to is made or replaced, and the link stays.
  target = _real(epath.Path(target))
  to = to or ("orbax" if source.kind == "hf" else "hf")
  has_adapters = source.config.lora.rank > 0
  source = _with_code(source, epath.Path(code)) if code else source
  if target.exists() and not overwrite:
    raise UserError(f"target {target} exists; choose another or pass --overwrite")
  for path in source.inputs:
    if _inside(path, target) or _inside(target, path):
      raise UserError(f"target {target} and source {path} overlap")
  _check_replaceable(target)
  # A run that merged its adapters at the start has none, and nothing is left to merge.
  nothing_to_merge = merge_lora and not (source.kind == "training" and to == "hf")
  if (nothing_to_merge or to == "peft") and not has_adapters:
    raise UserError(f"{source.directory} has no adapters; --adapter=DIR brings some")
  if to == "hf" and has_adapters and not merge_lora:
    raise UserError(
      f"{source.directory} has adapters, which a Hugging Face model has no place for: "
      "--merge_lora adds them in, --to=peft writes them alone"
    )
  source = source.merged() if merge_lora else source
  entries = source.entries
  if to == "peft":
    entries = split_entries(entries)[1]
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


def _with_code(source: Source, code: epath.Path) -> Source:
  """The source with the released code among its files, and `auto_map` in its config.json."""
  family = find(source.config.family)
  if not family.code_files:
    raise UserError(
      f"--code: {source.directory} is of the family {family.name!r}, whose released code this "
      f"program does not know; of {', '.join(f.name for f in FAMILIES.values() if f.code_files)} "
      "it does"
    )
  missing = [name for name in family.code_files if not (code / name).exists()]
  if missing:
    raise UserError(f"--code={code} has no {' and no '.join(missing)}")
  kept = [f for f in source.files if f.name not in family.code_files]
  return dataclasses.replace(
    source,
    hf_config={**source.hf_config, "auto_map": dict(family.auto_map)},
    files=(*kept, *(code / name for name in family.code_files)),
    inputs=(*source.inputs, code),
  )


def _check_replaceable(target: epath.Path) -> None:
  """Raises `UserError` for a target that no conversion has made: a file, or any other folder."""
  if not target.exists():
    return
  if not target.is_dir():
    raise UserError(f"target {target} is a file; give a directory")
  names = sorted(f.name for f in target.iterdir())
  if names and not {CONFIG_FILE, peft.CONFIG_FILE} & set(names):
    raise UserError(
      f"target {target} is no model directory, and --overwrite would delete what is in it "
      f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); choose another"
    )


def _real(path: epath.Path) -> epath.Path:
  """The absolute path with links resolved; a remote path as it is."""
  return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _inside(path: epath.Path, directory: epath.Path) -> bool:
  """Whether `path` is `directory` or is inside it, even if they have several names."""
  path, directory = _real(path), _real(directory)
  if directory == path or directory in path.parents:
    return True
  if "://" in f"{path}{directory}" or not directory.exists():
    return False
  # One place may have two names without a link: a mount, or a disk that ignores case.
  return any(p.exists() and os.path.samefile(p, directory) for p in (path, *path.parents))


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
  plan: Plan, progress: Callable[[int], Any] | None = None, threads: int = THREADS
) -> None:
  """Writes the plan under a temporary name beside the target, then renames it.

  Whatever happens, the target is either unchanged or complete.

  Raises:
    UserError: the file system refuses (no space left, no permission), or the source
      turns out to be damaged while it is read.
  """
  target = plan.target
  # No process id: machines and containers that share a disk have the same ones.
  temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
  lock = threading.Lock()

  def locked(nbytes: int) -> None:
    if progress is not None:
      with lock:
        progress(nbytes)

  plan.source.arrays.check()
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
      data = source.rewritten.get(file.name) or file.read_bytes()
      (directory / file.name).write_bytes(data)  # files may come from two directories
    (directory / CONFIG_FILE).write_bytes(_config_bytes(plan))
  if source.config.lora.rank:
    peft.write_config(directory, source.config, source.base)
  if plan.to == "orbax":
    args = (plan.entries, plan.dtypes, source.arrays, progress, threads)
    writers.write_orbax(directory / PARAMS_DIR, *args)
  else:
    writers.write_safetensors(directory, plan.shards, source.arrays, progress, threads)


def _config_bytes(plan: Plan) -> bytes:
  """The bytes of config.json: unchanged, except for the dtype if it changes."""
  source = plan.source
  hf_config = dict(source.hf_config)
  base, _ = split_entries(plan.entries)
  stored = {source.arrays.dtypes[entry.name].name for entry in base}
  written = {plan.dtypes[entry.name].name for entry in base}
  if written != stored and len(written) == 1:
    hf_config |= {key: next(iter(written)) for key in DTYPE_KEYS if key in hf_config}
  file = source.directory / CONFIG_FILE
  if source.kind != "training" and hf_config == json.loads(file.read_bytes()):
    return file.read_bytes()
  return (json.dumps(hf_config, indent=2, ensure_ascii=False) + "\n").encode()


def _replace(temporary: epath.Path, target: epath.Path) -> None:
  if not target.exists():
    temporary.rename(target)
    return
  old = temporary.with_suffix(".old")
  target.rename(old)
  try:
    temporary.rename(target)
  except BaseException:
    old.rename(target)
    raise
  old.rmtree()


def _file_system_error(error: BaseException) -> str | None:
  """The message of a file system's error; None for other errors. TensorStore has its own texts."""
  if isinstance(error, OSError):
    return os.strerror(error.errno).lower() if error.errno else str(error)
  text = str(error)
  known = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO)
  if isinstance(error, ValueError) and not isinstance(error, UserError):
    return next((os.strerror(n).lower() for n in known if os.strerror(n) in text), None)
  return None
