"""What a directory holds: a Hugging Face model, one of ours, or a training checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from igpo_jax.checkpoint import absolute
from igpo_jax.cli import UserError
from igpo_jax.config import LoRAConfig, ModelConfig
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
from igpo_jax.convert.safetensors_io import Reader
from igpo_jax.data import tokenizer as tokenizer_lib

CONFIG_FILE = "config.json"
PARAMS_DIR = "params"  # of a directory that this package wrote
STATE_DIR = "default"  # of a training checkpoint's step
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt",
                   ".pth", ".gguf", ".msgpack", ".h5")  # fmt: skip
MAX_EXTRA_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Source:
  """A model on disk, opened: headers are read and checked, no array yet.

  Attributes:
    kind: "hf", "orbax" (written by igpo_jax.convert) or "training".
    directory: where it is.
    hf_config: its config.json in Hugging Face terms.
    config: the same in ours; `config.lora` describes the adapters it has.
    entries: every array it holds with its Hugging Face names.
    arrays: the arrays.
    files: small files that belong to the model: tokenizer, template, code.
    tokenizer: the directory that has the tokenizer, None if there is none.
  """

  kind: str
  directory: epath.Path
  hf_config: Mapping[str, Any]
  config: ModelConfig
  entries: tuple[families.Entry, ...]
  arrays: Arrays
  files: tuple[epath.Path, ...]
  tokenizer: epath.Path | None

  @property
  def family(self) -> str:
    return self.hf_config["model_type"]

  def merged(self) -> Source:
    """The same model without adapters: each is added to its kernel when that is read."""
    if not self.config.lora.rank:
      return self
    config = dataclasses.replace(self.config, lora=LoRAConfig())
    arrays = MergedArrays(self.arrays, self.config.lora.alpha)
    base, _ = families.split_entries(self.entries)
    return dataclasses.replace(self, config=config, entries=base, arrays=arrays)


def open_source(
  path: epath.PathLike,
  adapter: epath.PathLike | None = None,
  base: epath.PathLike | None = None,
) -> Source:
  """Opens a model directory of any kind.

  Args:
    path: a Hugging Face directory, one written by igpo_jax.convert, or a step of a
      training run (WORKDIR/checkpoints/STAGE/STEP).
    adapter: a PEFT directory to put on top.
    base: for a training checkpoint that holds adapters only: the model they belong
      to, if not the run's `init_from`.

  Raises:
    UserError: whatever is wrong with the files, all of it in one message.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"no such directory: {path}")
  if not path.is_dir():
    raise UserError(f"{path} is a file; give the directory of the model")
  if (path / STATE_DIR / TREE_METADATA).exists():
    source = _open_training(path, base)
  elif (path / PARAMS_DIR / TREE_METADATA).exists():
    source = _open_orbax(path)
  elif (path / peft.CONFIG_FILE).exists():
    raise UserError(f"{path} is a PEFT adapter: give its base as the source and it as the adapter")
  else:
    source = _open_hf(path)
  return _with_adapter(source, epath.Path(adapter)) if adapter else source


def read_json(file: epath.Path) -> dict[str, Any]:
  """A JSON object from a file that must exist.

  Raises:
    UserError: there is none, or it is not a JSON object.
  """
  if not file.exists():
    raise UserError(f"{file.parent} has no {file.name}; is it a model directory?")
  return tokenizer_lib.read_json(file)


def _extra_files(directory: epath.Path) -> tuple[epath.Path, ...]:
  """Files of a model directory that are no weights, config.json aside."""
  return tuple(
    file
    for file in sorted(directory.iterdir(), key=lambda f: f.name)
    if not file.is_dir()
    and file.name != CONFIG_FILE
    and not file.name.startswith(".")
    and not file.name.endswith(WEIGHT_SUFFIXES)
    and file.stat().length <= MAX_EXTRA_BYTES
  )


def _tokenizer_in(*directories: epath.Path) -> epath.Path | None:
  return next((d for d in directories if tokenizer_lib.has_tokenizer(d)), None)


def _open_hf(path: epath.Path) -> Source:
  hf_config = read_json(path / CONFIG_FILE)
  if "stages" in hf_config and (path / "checkpoints").is_dir():
    steps = sorted(
      str(step)
      for stage in (path / "checkpoints").iterdir()
      for step in stage.iterdir()
      if step.name.isdigit()
    )
    raise UserError(f"{path} is a run, not a model: give one of {', '.join(steps) or 'no steps'}")
  config = families.model_config(hf_config, path / CONFIG_FILE)
  entries = families.entries(hf_config["model_type"], config)
  ignored = families.tied_keys(hf_config["model_type"], config)
  arrays = SafetensorsArrays(Reader(path), entries, ignored)
  files, tokenizer = _extra_files(path), _tokenizer_in(path)
  return Source("hf", path, hf_config, config, entries, arrays, files, tokenizer)


def _open_orbax(path: epath.Path) -> Source:
  hf_config = read_json(path / CONFIG_FILE)
  config = families.model_config(hf_config, path / CONFIG_FILE)
  if (path / peft.CONFIG_FILE).exists():
    config = dataclasses.replace(config, lora=peft.read_config(path, hf_config["model_type"]))
  entries = families.entries(hf_config["model_type"], config)
  arrays = OrbaxArrays(path / PARAMS_DIR)
  check_arrays(arrays, entries, path)
  files = tuple(f for f in _extra_files(path) if f.name != peft.CONFIG_FILE)
  return Source("orbax", path, hf_config, config, entries, arrays, files, _tokenizer_in(path))


def _with_adapter(source: Source, adapter: epath.Path) -> Source:
  if source.config.lora.rank:
    raise UserError(f"{source.directory} has adapters already; merge them first")
  cfg, reader = peft.open_adapter(adapter, source.family)
  config = dataclasses.replace(source.config, lora=cfg)
  entries = families.entries(source.family, config)
  _, added = families.split_entries(entries)
  arrays = UnionArrays(source.arrays, SafetensorsArrays(reader, added))
  return dataclasses.replace(source, config=config, entries=entries, arrays=arrays)


def _open_training(path: epath.Path, base: epath.PathLike | None) -> Source:
  """A step of a run: the parameters of its TrainState, on the base if they are adapters."""
  workdir = next(
    (d for d in absolute(path).parents if (d / CONFIG_FILE).exists() and
     "stages" in tokenizer_lib.read_json(d / CONFIG_FILE)), None,
  )  # fmt: skip
  if workdir is None:
    raise UserError(f"{path}: no config.json of a run above this checkpoint")
  run = read_json(workdir / CONFIG_FILE)
  model = {k: tuple(v) if isinstance(v, list) else v for k, v in run["model"].items()}
  model["lora"] = LoRAConfig(**model.get("lora", {}))
  state = OrbaxArrays(path / STATE_DIR, ("params",))
  base = base or run.get("init_from")
  tokenizer = _tokenizer_in(workdir / "tokenizer")
  if base:
    origin = open_source(base)
    config = dataclasses.replace(origin.config, lora=model["lora"])
    hf_config, files = origin.hf_config, origin.files
    tokenizer = tokenizer or origin.tokenizer
  else:
    config = _own_config(model, state, tokenizer, workdir)
    hf_config, files = families.hf_config(config), _extra_files(tokenizer) if tokenizer else ()
  arrays: Arrays = state
  if base and "wte/embedding" not in state.shapes:
    arrays = UnionArrays(origin.arrays, state)
  elif not any(name.endswith("lora_a") for name in state.shapes):
    config = dataclasses.replace(config, lora=LoRAConfig())
  entries = families.entries(hf_config["model_type"], config)
  check_arrays(arrays, entries, path)
  return Source("training", path, hf_config, config, entries, arrays, files, tokenizer)


def _own_config(
  model: dict[str, Any], state: Arrays, tokenizer: epath.Path | None, workdir: epath.Path
) -> ModelConfig:
  """The ModelConfig of a run that began with random weights."""
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
  return ModelConfig(**{**model, **facts, "dtype": "float32", "param_dtype": "float32"})
