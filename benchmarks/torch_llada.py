"""Times published PyTorch code for LLaDA. `benchmarks.accelerator --torch=DIR` starts it.

Copy these files to DIR before:

    generate.py                                          with generate(model, prompt, steps=, ...)
    modeling_llada.py, configuration_llada.py            beside it or in a folder below

They are in LLaDA's repository (generate.py) and on the model's Hugging Face page (the other two),
or in the folder llada/ of Fast-dLLM, whose generate_with_dual_cache is timed as well. Only this
process runs that code. torch and the packages that the code imports have to be installed. The
weights are random.

A call is timed with 2 and with 4 steps per block. The difference is the time of 2 steps, from which
the time of all steps is extrapolated. If the code refuses the number of rows or has no memory for
them, it is timed with fewer rows, down to one.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from igpo_jax.errors import UserError

PACKAGE = "torch_llada_code"  # the name that the model's files are imported under
CASES = {"PyTorch, no cache": "generate", "PyTorch, dual cache": "generate_with_dual_cache"}


def find_code(directory: str) -> tuple[pathlib.Path, pathlib.Path]:
  """The paths of generate.py and modeling_llada.py in a directory.

  Raises:
    UserError: one of them is missing.
  """
  root = pathlib.Path(directory).resolve()
  models = sorted(root.rglob("modeling_llada.py"), key=lambda path: len(path.parts))
  for name, found in (("generate.py", (root / "generate.py").exists()),
                      ("modeling_llada.py", bool(models))):  # fmt: skip
    if not found:
      raise UserError(
        f"--torch={directory}: no {name} there; benchmarks/torch_llada.py says which files it needs"
      )
  return root / "generate.py", models[0]


@contextlib.contextmanager
def without_initialisation(torch) -> Iterator[None]:
  """Layers that are made inside are not initialized: to draw 8B numbers takes minutes."""
  layers = (torch.nn.Linear, torch.nn.Embedding)
  before = [layer.reset_parameters for layer in layers]
  for layer in layers:
    layer.reset_parameters = lambda self: None
  try:
    yield
  finally:
    for layer, method in zip(layers, before, strict=True):
      layer.reset_parameters = method


def make_model(torch, path: pathlib.Path, config: dict[str, Any], dtype: str, device: str):
  """The model of `modeling_llada.py` with random weights, in `dtype` on `device`."""
  package = types.ModuleType(PACKAGE)
  package.__path__ = [str(path.parent)]
  sys.modules[PACKAGE] = package
  classes = importlib.import_module(f"{PACKAGE}.configuration_llada")
  modeling = importlib.import_module(f"{PACKAGE}.modeling_llada")
  torch.set_default_dtype(getattr(torch, dtype))
  with without_initialisation(torch):
    model = modeling.LLaDAModelLM(classes.LLaDAConfig(**config | {"init_device": "cpu"}))
  model = model.to(device).eval()
  torch.set_default_dtype(torch.float32)
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.fill_(1.0)
      else:
        parameter.normal_(std=0.02)
  return model


def time_case(torch, generate: Callable, model, setting: dict[str, Any], device: str) -> dict:
  """One line of the table: times a generate function.

  Raises:
    RuntimeError: the function fails even with one row.
  """
  length, block = setting["gen_length"], setting["block_length"]
  blocks = length // block
  known = inspect.signature(generate).parameters
  options = {"gen_length": length, "block_length": block, "temperature": 0.0,
             "mask_id": setting["mask_id"]}  # fmt: skip
  options = {k: v for k, v in options.items() if k in known}

  def seconds(rows: int, per_block: int) -> float:
    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(
      1, setting["config"]["vocab_size"] - 1, (rows, setting["prompt"]), generator=generator,
      device=device,
    )  # fmt: skip
    began = time.perf_counter()
    with torch.no_grad():
      out = generate(model, prompt, steps=per_block * blocks, **options)
    tokens = out[0] if isinstance(out, tuple) else out
    if tokens.shape != (rows, setting["prompt"] + length):
      raise RuntimeError(f"{rows} rows gave {tuple(tokens.shape)}")
    if device != "cpu":
      torch.cuda.synchronize()
    return time.perf_counter() - began

  reasons = []
  for rows in sorted({setting["rows"], min(setting["rows"], 8), 1}, reverse=True):
    try:
      seconds(rows, 2)  # warm
      two, four = seconds(rows, 2), seconds(rows, 4)
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
      reasons.append(f"{rows} rows: {' '.join(str(error).split())[:120]}")
      if device != "cpu":
        torch.cuda.empty_cache()
      continue
    per_block = setting["steps"] // blocks
    return {
      "seconds": four + (per_block - 4) * max(four - two, 0.0) / 2,
      "tokens": rows * length,
      "measured": f"{rows} row(s), from 2 and 4 of {per_block} steps a block",
    }
  raise RuntimeError("; ".join(reasons))


def main() -> None:
  directory, setting = sys.argv[1], json.loads(sys.argv[2])
  began = time.monotonic()
  path, model_path = find_code(directory)
  import torch  # not a requirement of this project

  device = "cuda" if torch.cuda.is_available() else "cpu"
  sys.path.insert(0, str(path.parent))
  code = importlib.import_module("generate")
  model = make_model(torch, model_path, setting["config"], setting["dtype"], device)
  lines = []
  for name, function in CASES.items():
    if not hasattr(code, function):
      continue
    if time.monotonic() - began > setting["seconds"] * 0.7:
      lines.append({"name": name, "problem": "left out: no time left (see --seconds)"})
      continue
    try:
      lines.append(
        {"name": name} | time_case(torch, getattr(code, function), model, setting, device)
      )
    except Exception as error:
      text = " ".join(str(error).split())
      lines.append({"name": name, "problem": f"failed: {type(error).__name__}: {text[:300]}"})
  print(json.dumps(lines))


if __name__ == "__main__":
  main()
