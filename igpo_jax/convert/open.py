"""Opens model directories: of Hugging Face, of igpo_jax.convert, or a step of a training run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from igpo_jax.checkpoint import ARRAYS, absolute
from igpo_jax.config import LoRAConfig, ModelConfig, MoEConfig
from igpo_jax.config.renamed import upgraded
from igpo_jax.convert import families, peft
from igpo_jax.convert.arrays import (
  TREE_METADATA,
  Arrays,
  MergedArrays,
  OrbaxArrays,
  SafetensorsArrays,
  UnionArrays,
  check_arrays,
)
from igpo_jax.convert.entries import Entry, entries, split_entries, tied_copies
from igpo_jax.convert.safetensors_io import Reader
from igpo_jax.convert.trained import TrainedArrays
from igpo_jax.data import bpe_files
from igpo_jax.data import tokenizer as tokenizer_lib
from igpo_jax.errors import UserError
from igpo_jax.io.jsonl import resolved
from igpo_jax.io.text import read_object
from igpo_jax.models.families import find

CONFIG_FILE = "config.json"
PARAMS_DIR = "params"  # the folder of arrays in a directory that igpo_jax.convert wrote
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt",
                   ".pth", ".gguf", ".msgpack", ".h5")  # fmt: skip
MAX_EXTRA_BYTES = 256 * 2**20
# The files of a tokenizer. A broken link with such a name is reported as a mistake.
TOKENIZER_FILES = (
  tokenizer_lib.HF_FILE,
  tokenizer_lib.SENTENCEPIECE_FILE,
  tokenizer_lib.DESCRIPTION_FILE,
  bpe_files.VOCABULARY_FILE,
  bpe_files.MERGES_FILE,
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened model on disk: its headers have been read and checked, but no array.

  Attributes:
    kind: "hf", "orbax" (written by igpo_jax.convert) or "training".
    directory: the model's directory.
    hf_config: its config.json in Hugging Face terms.
    config: the same as a ModelConfig; `config.lora` describes its adapters.
    entries: all of its arrays, with their Hugging Face names.
    arrays: reads the arrays.
    files: small files that belong to the model: tokenizer, chat template, code.
    tokenizer: the directory of the tokenizer; None if there is none.
    inputs: every directory that is read, and every file elsewhere. A conversion must not write over
      them.
    base: the base model that a PEFT export of the adapters names.
    left_out: (name, reason) of files in the directory that a conversion does not copy.
    rewritten: name of one of `files` -> its new contents.
  """

  kind: str
  directory: epath.Path
  hf_config: Mapping[str, Any]
  config: ModelConfig
  entries: tuple[Entry, ...]
  arrays: Arrays
  files: tuple[epath.Path, ...]
  tokenizer: epath.Path | None
  inputs: tuple[epath.Path, ...]
  base: str
  left_out: tuple[tuple[str, str], ...] = ()
  rewritten: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

  def with_config(self, config: ModelConfig, arrays: Arrays) -> Source:
    """The same directory with another ModelConfig and other arrays."""
    return dataclasses.replace(self, config=config, entries=entries(config), arrays=arrays)

  def merged(self) -> Source:
    """The same model without adapters: each one is added to its kernel when that is read.

    The sum is rounded once, to the dtype that `arrays.read_into` is asked for.
    """
    if not self.config.lora.rank:
      return self
    config = dataclasses.replace(self.config, lora=LoRAConfig())
    arrays = MergedArrays(self.arrays, self.config.lora.alpha)
    base, _ = split_entries(self.entries)
    return dataclasses.replace(self, config=config, entries=base, arrays=arrays)


def open_source(
  path: epath.PathLike,
  adapter: epath.PathLike | None = None,
  base: epath.PathLike | None = None,
) -> Source:
  """Opens a model directory of any kind.

  Args:
    path: a Hugging Face directory, one that igpo_jax.convert wrote, or a step of a training run
      (WORKDIR/checkpoints/STAGE/STEP).
    adapter: a directory of PEFT adapters for the model; None: no adapters.
    base: for a training checkpoint that has adapters only: the model that they belong to; None: the
      run's `init_from`.

  Raises:
    UserError: something is wrong with the files. One message has all problems.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"no such directory: {path}")
  if not path.is_dir():
    raise UserError(f"{path} is a file; give the directory of the model")
  if (path / ARRAYS / TREE_METADATA).exists():
    source = _open_training(path, base)
  elif (path / PARAMS_DIR / TREE_METADATA).exists():
    source = _open_orbax(path)
  elif (path / peft.CONFIG_FILE).exists():
    raise UserError(f"{path} is a PEFT adapter: give its base as the source and it as the adapter")
  else:
    source = _open_hf(path)
  return _with_adapter(source, epath.Path(adapter)) if adapter else source


def read_json(file: epath.Path) -> dict[str, Any]:
  """Reads a JSON object from a file that has to exist.

  Raises:
    UserError: there is no such file, or it is not a JSON object.
  """
  if not file.exists():
    raise UserError(f"{file.parent} has no {file.name}; is it a model directory?")
  return read_object(file)


def _extra_files(
  directory: epath.Path,
) -> tuple[tuple[epath.Path, ...], tuple[tuple[str, str], ...]]:
  """The files of a model directory besides weights and config.json.

  Returns:
    (files to copy; (name, reason) of files that are not copied).

  Raises:
    UserError: a file of the tokenizer is a broken link.
  """
  files, left_out = [], []
  for file in sorted(directory.iterdir(), key=lambda f: f.name):
    name = file.name
    if (
      file.is_dir() or name == CONFIG_FILE or name.startswith(".") or name.endswith(WEIGHT_SUFFIXES)
    ):
      continue
    if not file.exists() and name in TOKENIZER_FILES:
      raise UserError(f"{file} is a link to nothing; put the file there, or remove the link")
    if not file.exists():
      left_out.append((name, "a link to nothing"))
    elif file.stat().length > MAX_EXTRA_BYTES:
      left_out.append((name, f"larger than {MAX_EXTRA_BYTES // 2**20} MiB"))
    else:
      files.append(file)
  return tuple(files), tuple(left_out)


def _read_config(path: epath.Path, hf_config: Mapping[str, Any]) -> ModelConfig:
  """The ModelConfig of a directory. If config.json names no mask, the tokenizer is asked."""

  def mask_id() -> int | None:
    directory = _tokenizer_in(path)
    return tokenizer_lib.load_tokenizer(directory).mask_id if directory else None

  return families.read_config(hf_config, path / CONFIG_FILE, mask_id)


def _tokenizer_in(*directories: epath.Path) -> epath.Path | None:
  return next((d for d in directories if tokenizer_lib.has_tokenizer(d)), None)


def _open_hf(path: epath.Path) -> Source:
  hf_config = read_json(path / CONFIG_FILE)
  if "stages" in hf_config and (path / "checkpoints").is_dir():
    steps = sorted(
      str(step)
      for stage in (path / "checkpoints").iterdir()
      if stage.is_dir()
      for step in stage.iterdir()
      if step.name.isdigit()
    )
    raise UserError(f"{path} is a run, not a model: give one of {', '.join(steps) or 'no steps'}")
  return open_hf(path, hf_config)


def open_hf(path: epath.Path, hf_config: Mapping[str, Any], rows: int = 0) -> Source:
  """Opens a Hugging Face directory as if `hf_config` were its config.json.

  Args:
    path: the directory.
    hf_config: the contents of a config.json.
    rows: number of rows of the stored embedding; 0: as `hf_config` says.

  Raises:
    UserError: as `open_source`.
  """
  config = _read_config(path, hf_config)
  config = dataclasses.replace(config, vocab_size=rows) if rows else config
  reader = Reader(path)
  tied_by = find(config.family).fields["tie_embeddings"]
  arrays = SafetensorsArrays(reader, entries(config), tied_copies(config), tied_by)
  files, left_out = _extra_files(path)
  return Source(
    kind="hf",
    directory=path,
    hf_config=hf_config,
    config=config,
    entries=entries(config),
    arrays=arrays,
    files=files,
    tokenizer=_tokenizer_in(path),
    inputs=(path, path / CONFIG_FILE, *files, *{info.file for info in reader.tensors.values()}),
    base=str(absolute(path)),
    left_out=left_out,
  )


def _open_orbax(path: epath.Path) -> Source:
  hf_config = read_json(path / CONFIG_FILE)
  config, base = _read_config(path, hf_config), str(absolute(path))
  if (path / peft.CONFIG_FILE).exists():
    adapters = peft.read_config(path, config)
    config = dataclasses.replace(config, lora=adapters)
    base = peft.base_of(path) or base
  arrays = OrbaxArrays(path / PARAMS_DIR)
  check_arrays(arrays, entries(config), path)
  files, left_out = _extra_files(path)
  return Source(
    kind="orbax",
    directory=path,
    hf_config=hf_config,
    config=config,
    entries=entries(config),
    arrays=arrays,
    files=tuple(f for f in files if f.name != peft.CONFIG_FILE),
    tokenizer=_tokenizer_in(path),
    inputs=(path, path / PARAMS_DIR, *files),
    base=base,
    left_out=left_out,
  )


def _with_adapter(source: Source, adapter: epath.Path) -> Source:
  if source.config.lora.rank:
    raise UserError(f"{source.directory} has adapters already; merge them first")
  cfg, reader = peft.open_adapter(adapter, source.config)
  config = dataclasses.replace(source.config, lora=cfg)
  _, added = split_entries(entries(config))
  arrays = UnionArrays(source.arrays, SafetensorsArrays(reader, added))
  return dataclasses.replace(
    source,
    config=config,
    entries=entries(config),
    arrays=arrays,
    inputs=(*source.inputs, adapter, adapter / peft.CONFIG_FILE, adapter / peft.WEIGHTS_FILE),
    # Only a Hugging Face directory is of use to PEFT.
    base=source.base if source.kind == "hf" else peft.base_of(adapter) or source.base,
  )


def _open_training(path: epath.Path, base: epath.PathLike | None) -> Source:
  """Opens a step of a run: the parameters of its TrainState, with the base if they are adapters."""
  workdir = next(
    (d for d in resolved(path).parents if (d / CONFIG_FILE).exists() and
     "stages" in read_object(d / CONFIG_FILE, missing={})), None,
  )  # fmt: skip
  if workdir is None:
    raise UserError(f"{path}: no config.json of a run above this checkpoint")
  run = upgraded(read_json(workdir / CONFIG_FILE))
  model = _run_model(run, workdir / CONFIG_FILE)
  state = TrainedArrays(path)
  tokenizer = _tokenizer_in(workdir / "tokenizer")
  origin = _origin(path, base, run.get("init_from"))
  if origin is not None:
    hf_config, files, left_out = origin.hf_config, origin.files, origin.left_out
    tokenizer = tokenizer or origin.tokenizer
    # A run that continues with adapters may change only their dropout.
    lora = origin.config.lora if origin.config.lora.rank else model.lora
    lora = dataclasses.replace(lora, dropout=model.lora.dropout)
    config = dataclasses.replace(origin.config, lora=lora)
  else:
    config = _own_config(model, state, tokenizer, workdir)
    hf_config = families.hf_config(config)
    files, left_out = _extra_files(tokenizer) if tokenizer else ((), ())
  arrays: Arrays = state
  if origin is not None and "wte/embedding" not in state.shapes:
    arrays = UnionArrays(origin.arrays, state)
  elif not any(name.endswith("lora_a") for name in state.shapes):
    config = dataclasses.replace(config, lora=LoRAConfig())
  check_arrays(arrays, entries(config), path)
  inputs = (path, workdir / CONFIG_FILE, *files, *([tokenizer] if tokenizer else []))
  return Source(
    kind="training",
    directory=path,
    hf_config=hf_config,
    config=config,
    entries=entries(config),
    arrays=arrays,
    files=files,
    tokenizer=tokenizer,
    inputs=(*inputs, *(origin.inputs if origin else ())),
    base=origin.base if origin and config.lora.rank else str(absolute(path)),
    left_out=left_out,
  )


def _origin(path: epath.Path, base: epath.PathLike | None, init_from: str | None) -> Source | None:
  """The model that a run started from: `base`, else its `init_from`; None for random weights.

  Raises:
    UserError: as `open_source`.
  """
  if not base and init_from and not epath.Path(init_from).exists():
    raise UserError(
      f"{path}: the run began with init_from={init_from}, and there is no such directory"
      + ("" if epath.Path(init_from).is_absolute() else f" in {os.getcwd()}")
      + "; put the model there, or give igpo_jax.convert the option --base"
    )
  return open_source(base or init_from) if base or init_from else None


def _run_model(run: Mapping[str, Any], file: epath.Path) -> ModelConfig:
  """The section "model" of a run's config.json.

  Raises:
    UserError: it is not as this version writes it.
  """
  try:
    model = {k: tuple(v) if isinstance(v, list) else v for k, v in run["model"].items()}
    model["lora"] = LoRAConfig(**model.get("lora", {}))
    model["moe"] = MoEConfig(**model.get("moe", {}))
    return ModelConfig(**model)
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{file}: its model is damaged or of another version: {error}") from error


def _own_config(
  model: ModelConfig, state: Arrays, tokenizer: epath.Path | None, workdir: epath.Path
) -> ModelConfig:
  """The ModelConfig of a run that started from random weights."""
  if "wte/embedding" not in state.shapes:
    raise UserError(f"{workdir}: the checkpoint holds adapters only and config.json names no base")
  if tokenizer is None:
    raise UserError(f"{workdir}: no tokenizer, so the mask token is unknown")
  known = tokenizer_lib.load_tokenizer(tokenizer)
  facts = {
    "vocab_size": state.shapes["wte/embedding"][0],
    "mask_id": known.mask_id,
    "eos_id": known.eos_id,
    "stop_ids": tuple(known.stop_ids),
  }
  return dataclasses.replace(model, **facts, dtype="float32", param_dtype="float32")
