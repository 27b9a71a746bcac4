"""Time and peak memory of converting a random LLaDA model both ways.

    PYTHONPATH=. python benchmarks/convert.py [--layers=10] [--threads=4] [--workdir=DIR]

The default model has a vocabulary of 126,464 tokens, width 2048 and 10 layers: 2.1 GB in bfloat16.
Each conversion is a process of its own. Its peak memory is the kernel's `ru_maxrss`, which
/usr/bin/time -v calls maximum resident set size. Prints one JSON object. All files that were
written are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time


def write_model(directory: pathlib.Path, layers: int) -> None:
  """Writes a Hugging Face directory with random bfloat16 weights."""
  # These imports are in the child only. The kernel counts the parent's memory at the fork as the
  # child's, so the process that starts the conversions has to stay small.
  import ml_dtypes
  import numpy as np

  from igpo_jax.config import ModelConfig
  from igpo_jax.convert import families, writers
  from igpo_jax.convert.arrays import Arrays

  class Noise(Arrays):
    """Random bfloat16 arrays of any size; all are read from one block of noise."""

    def __init__(self, entries):
      self.shapes = {entry.name: entry.shape for entry in entries}
      self.dtypes = dict.fromkeys(self.shapes, np.dtype(ml_dtypes.bfloat16))
      noise = np.random.default_rng(0).standard_normal(2 * writers.BLOCK_BYTES, np.float32)
      self._noise = (0.02 * noise).astype(ml_dtypes.bfloat16)

    def read_into(self, name, indices, outs):
      for out in outs:
        out[...] = self._noise[: out.size].reshape(out.shape)

  sizes = {"d_model": 2048, "n_layers": layers, "n_heads": 16, "mlp_hidden": 5632}
  config = ModelConfig(**sizes, vocab_size=126464, mask_id=126336, eos_id=126081)
  entries = families.entries("llada", config)
  arrays = Noise(entries)
  shards = writers.plan_shards(entries, arrays.dtypes, 10**9)
  directory.mkdir()
  writers.write_safetensors(directory, shards, arrays, lambda nbytes: None)
  (directory / "config.json").write_text(json.dumps(families.hf_config(config)))


def measure(command: list[str]) -> dict[str, float]:
  """Runs a command and measures wall time in seconds and peak resident memory in MB."""
  began = time.monotonic()
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f"{' '.join(command)} failed with status {status}")
  seconds = time.monotonic() - began
  return {"seconds": round(seconds, 1), "peak_rss_mb": round(usage.ru_maxrss / 1024)}


def convert(source: pathlib.Path, target: pathlib.Path, *options: str) -> dict[str, float]:
  """Measures one conversion of `source` to `target`."""
  command = [sys.executable, "-m", "igpo_jax.convert", f"--source={source}", f"--target={target}"]
  return measure([*command, *options])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--layers", type=int, default=10)
  parser.add_argument("--threads", type=int, default=4)
  parser.add_argument("--workdir", help="where to write; default: a temporary directory")
  parser.add_argument("--write", help=argparse.SUPPRESS)  # the child that makes the model
  args = parser.parse_args()
  if args.write:
    write_model(pathlib.Path(args.write), args.layers)
    return
  workdir = pathlib.Path(tempfile.mkdtemp(dir=args.workdir))
  hf, threads = workdir / "hf", f"--threads={args.threads}"
  try:
    measure([sys.executable, __file__, f"--write={hf}", f"--layers={args.layers}"])
    results = {
      "model_bytes": sum(file.stat().st_size for file in hf.glob("*.safetensors")),
      "hf_to_orbax": convert(hf, workdir / "orbax", threads),
      "orbax_to_hf": convert(workdir / "orbax", workdir / "back", threads),
      "hf_to_orbax_float32": convert(hf, workdir / "float32", threads, "--dtype=float32"),
      "dry_run": convert(hf, workdir / "none", "--dry_run"),
    }
  finally:
    shutil.rmtree(workdir)
  machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "threads": args.threads}
  print(json.dumps({**results, **machine}))


if __name__ == "__main__":
  main()
