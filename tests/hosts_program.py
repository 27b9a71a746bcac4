"""Run by hosts_test, in one process or two: checkpoints, decisions and signals, as JSON.

python -m tests.hosts_program DIR write|read
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
from etils import epath

from igpo_jax import cli
from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import ModelConfig, OptimizerConfig, default_config, freeze
from igpo_jax.errors import UserError
from igpo_jax.models import make_lm
from igpo_jax.parallel import distributed
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.parallel.sharding import tree_shardings
from igpo_jax.train.loop import Run, Stage, run_stage
from igpo_jax.train.runlog import RunLog
from igpo_jax.train.setup import make_optimizer, new_state, state_shardings
from igpo_jax.train.workdir import open_workdir

MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=4, mlp_hidden=64, vocab_size=24, mask_id=1)
STEPS = 6


def fresh(mesh, seed=0):
  """A TrainState of the tiny model with AdamW's moments, laid out over a mesh.

  Every array gets numbers of its own: fresh moments are all zero. The step is 1 + seed. numpy makes
  them, as a program that does takes long to compile on each mesh.
  """
  lm, optimizer = make_lm(MODEL), make_optimizer(OptimizerConfig(), 9)
  params = jax.eval_shape(lm.init, jax.random.key(0))
  shapes = jax.eval_shape(lambda params: new_state(optimizer, params), params)
  places = state_shardings(optimizer, params, tree_shardings(lm.logical_axes(), mesh), mesh)

  def fill(x, place):
    whole = np.arange(x.size).reshape(x.shape) + seed + x.size % 7
    return jax.make_array_from_callback(x.shape, place, whole.astype(x.dtype).__getitem__)

  return jax.tree.map(fill, shapes, places)


def numbers(tree):
  """Name -> numpy array of a tree that this process holds whole."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def is_equal(tree, whole, prefix=""):
  """Whether every shard that this process holds is, bit by bit, its part of `whole`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  same = [
    np.array_equal(np.asarray(shard.data), whole[prefix + jax.tree_util.keystr(path)][shard.index])
    for path, x in leaves
    for shard in x.addressable_shards
  ]
  return len(same) > 0 and all(same)


def params_like(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
  )


def write(folder: pathlib.Path) -> dict:
  """One process with 8 devices: writes a state, and restores it onto other meshes."""
  mesh = make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    state = fresh(mesh, seed=1)
  whole = numbers(state)
  np.savez(folder / "whole.npz", **whole)
  Checkpoints(folder / "eight").save(1, state)
  found = {}
  for name, shape in {"1": (1, 1, 1), "1x2x4": (1, 2, 4), "1x8x1": (1, 8, 1)}.items():
    other = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(other):
      like = fresh(other)
      restored = Checkpoints(folder / "eight").restore(1, like)
      part = Checkpoints(folder / "eight").restore_part(1, {"params": params_like(like)})
    found[name] = is_equal(restored, whole) and is_equal(part["params"], whole, ".params")
    layouts = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, like)
    found[name] &= all(jax.tree.leaves(layouts))
  return found


def read(folder: pathlib.Path) -> dict:
  """Two processes with 4 devices each."""
  mesh = make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    like = fresh(mesh)
    whole = dict(np.load(folder / "whole.npz"))
    restored = Checkpoints(folder / "eight").restore(1, like)
    part = Checkpoints(folder / "eight").restore_part(1, {"params": params_like(like)})
    found = {
      "restored": is_equal(restored, whole),
      "part": is_equal(part["params"], whole, ".params"),
      "spread": not all(x.is_fully_addressable for x in jax.tree.leaves(restored)),
    }
    Checkpoints(folder / "two").save(1, restored)
    found["stopped"] = stopped(folder / "run", mesh)
  return found | decisions() | mistakes(folder)


def stopped(workdir: pathlib.Path, mesh) -> list:
  """[exit code, last checkpoint, its sum] of a stage that process 1 is told to stop; then of
  the same stage, continued."""
  config = default_config()
  config.log.tensorboard, config.checkpoint.every, config.log.samples_every = False, 100, 1
  config.stages = ()
  config.log.samples_per_step = 3
  add = jax.jit(lambda s: jax.tree.map(lambda x: x + jax.numpy.ones((), x.dtype), s))

  def step(state, n):
    if n == 2 and jax.process_index() == 1:
      signal.raise_signal(signal.SIGTERM)
    index = jax.process_index()
    metrics = {"value": state.step, "skipped_in_a_row": np.int32(0)}
    return add(state), metrics, [{"process": index, "row": row} for row in range(2)]

  out = []
  for _ in range(2):
    run = Run(freeze(config), epath.Path(workdir), RunLog(epath.Path(workdir), freeze(config).log),
              mesh, lambda params, label: {})  # fmt: skip
    try:
      state = run_stage(run, Stage("rl", STEPS, 0, step, lambda p: p, ("value",)), fresh(mesh))
      out.append(["finished", int(state.step)])
    except SystemExit as stop:
      out.append([stop.code, run.checkpoints("rl").latest()])
  return out


def decisions() -> dict:
  """What `from_first`, `share` and `agree` give this process."""
  index, asked = jax.process_index(), []

  def decide():
    asked.append(index)
    return {"by": index}

  def refuse():
    raise UserError("no")

  found = {
    "decided": distributed.from_first(decide),
    "asked": asked,
    "shared": distributed.share([index] * (index + 1)),
  }
  for name, action in {
    "refused": lambda: distributed.from_first(refuse),
    "disagreed": lambda: distributed.agree("the number", index),
    "mesh": lambda: make_mesh(1, 1, 8),
  }.items():
    try:
      action()
    except UserError as error:
      found[name] = str(error)
  distributed.agree("nothing", 1)
  return found


def mistakes(folder: pathlib.Path) -> dict:
  """A workdir that is not shared, and two configs."""
  import igpo_jax.train.workdir as module

  module.SIGHT_SECONDS = 0.0
  config = default_config()
  config.stages = ()
  index, found = jax.process_index(), {}
  os.chdir(folder / f"home{index}")
  try:
    open_workdir(epath.Path("same-name"), freeze(config))
  except UserError as error:
    found["not shared"] = str(error)
  config.seed = index
  try:
    open_workdir(epath.Path(folder / "other"), freeze(config))
  except UserError as error:
    found["configs"] = str(error)
  return found


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  with distributed.joined():
    print(json.dumps({"write": write, "read": read}[sys.argv[2]](folder)), flush=True)


if __name__ == "__main__":
  cli.run(main)
