"""What the tests of conversions share: tiny model directories, adapters, runs, comparing bits."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import Config, LoRAConfig, ModelConfig
from igpo_jax.convert.__main__ import main
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.models import lora
from igpo_jax.types import TrainState
from tests.paths import REPO

GOLDENS = REPO / "tests" / "goldens"
MODELS = ("llada_tiny", "llada_tiny_gqa")


def load(directory):
  """All tensors of a directory, read by the safetensors library, as unsigned integers."""
  tensors = {}
  for file in directory.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
  return {key: value.view(f"u{value.dtype.itemsize}") for key, value in tensors.items()}


def assert_same_bits(left, right):
  assert left.keys() == right.keys()
  for key in left:
    np.testing.assert_array_equal(left[key], right[key], strict=True)


def convert(source, target, *options):
  main([f"--source={source}", f"--target={target}", *options])
  return target


def copy_tiny(directory):
  """A Hugging Face directory that a test may damage."""
  directory.mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(GOLDENS / "llada_tiny" / name, directory)
  return directory


def edit_tensors(directory, change):
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **options):
  config = json.loads((directory / "config.json").read_text()) | options
  (directory / "config.json").write_text(json.dumps(config))


# PEFT's names of what is adapted, and the shapes of A [r, in] and B [out, r].
SHAPES = {
  "model.transformer.blocks.{}.q_proj": (64, 64),
  "model.transformer.blocks.{}.v_proj": (64, 32),  # of llada_tiny_gqa
  "model.transformer.blocks.{}.ff_out": (192, 64),
}


def write_peft(directory, dtype=np.float32, shapes=SHAPES, **options):
  """An adapter directory as PEFT writes it, with random numbers small enough for logits."""
  directory.mkdir()
  rng, tensors = np.random.default_rng(0), {}
  for module, (fan_in, fan_out) in shapes.items():
    for n in range(3 if "{}" in module else 1):
      name = f"base_model.model.{module.format(n)}"
      a, b = rng.normal(size=(4, fan_in)), rng.normal(size=(fan_out, 4))
      tensors[f"{name}.lora_A.weight"] = (0.02 * a).astype(dtype)
      tensors[f"{name}.lora_B.weight"] = (0.02 * b).astype(dtype)
  safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
  config = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": r"model\.transformer\.blocks\.\d+\.(q_proj|v_proj|ff_out)",
    "use_rslora": False,
    "modules_to_save": None,
    "base_model_name_or_path": "x",
  }
  (directory / "adapter_config.json").write_text(json.dumps(config | options))
  return directory


def save_run(workdir, config, params, tokenizer=None):
  """What a run leaves behind: config.json, tokenizer, one checkpoint of a TrainState."""
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
  if tokenizer is not None:
    tokenizer.save(workdir / "tokenizer")
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, params, optax.adamw(1e-3).init(params), zero, zero)
  checkpoints = Checkpoints(workdir / "checkpoints" / "rl")
  checkpoints.save(7, state)
  checkpoints.close()
  return workdir / "checkpoints" / "rl" / "7"


ADAPTERS = LoRAConfig(rank=2, alpha=4.0, targets="blocks/q_proj")


def save_adapters(workdir, base, cfg=ADAPTERS):
  """A step of a run that trained adapters on the model in the directory `base`."""
  params = load_pretrained(base, dtype="float32").params
  adapters = jax.tree.map(lambda x: x + 0.01, lora.init(params, jax.random.key(0), cfg))
  return save_run(workdir, Config(init_from=str(base), model=ModelConfig(lora=cfg)), adapters)
