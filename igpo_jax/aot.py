"""python -m igpo_jax.aot --config=configs/X.py --topology=v5e:8x8 [--config.a.b=value]

Compiles a config's programs for a TPU slice, on a machine without one. It needs libtpu (pip install
-e '.[tpu]', best in an environment of its own), but no data, tokenizer or weights. For every
program it reports the memory of a chip and whether the program fits, FLOPs, bytes read and written,
bytes sent between chips, and a lower bound of the time.

  --topology   such as v5e:1x1, v5e:2x4, v5e:8x8, v5p:2x2x4; default: that of config.mesh.slice
  --programs   compile only these, separated by commas: sft, rollout, likelihood, update
  --layout     instead of compiling, print the sharding of every parameter; needs no libtpu

A table goes to stderr, and the last line of stdout is one JSON object. The exit code is 0 even if a
program does not fit: the object says so ("fits": false).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from igpo_jax import cli
from igpo_jax.config import Config
from igpo_jax.data.tokenizer import open_tokenizer
from igpo_jax.errors import UserError
from igpo_jax.flags import config_flag, parse
from igpo_jax.parallel.hlo import KINDS, Collective, collectives
from igpo_jax.parallel.tpu import GIB, Chip, find_chip, find_slice

if TYPE_CHECKING:  # importing jax takes seconds: after the first line
  from igpo_jax.train.ahead_of_time import Program

FLAGS = config_flag()
flags.DEFINE_string("topology", "", "Of the slice, such as v5e:8x8.", flag_values=FLAGS)
flags.DEFINE_list("programs", [], "Only these programs.", flag_values=FLAGS)
flags.DEFINE_bool("layout", False, "Print the layout of the parameters.", flag_values=FLAGS)


def topology_devices(name: str) -> list[Any]:
  """Descriptions of the devices of a TPU topology, such as "v5e:8x8", for the compiler.

  Raises:
    UserError: libtpu is not installed, or it does not know the topology.
  """
  from jax.experimental import topologies

  # A host has four chips or more, unless it is told that it has one.
  alone = {"chips_per_host_bounds": (1, 1, 1)} if chips_of(name) == 1 else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices
  except Exception as error:  # whatever libtpu says: RuntimeError, ValueError, NotImplementedError
    reason = str(error).strip().splitlines()
    raise UserError(
      f"--topology={name}: {reason[0] if reason else type(error).__name__}; names look like "
      "v5e:8x8 or v5p:2x2x4, and the libtpu package has to be installed: pip install -e '.[tpu]'"
    ) from error


def chips_of(topology: str) -> int:
  """The number of chips of a topology: chips_of("v5e:8x8") == 64.

  Raises:
    UserError: the name is not of this form.
  """
  if not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
    raise UserError(f"--topology={topology}: names look like v5e:8x8 or v5p:2x2x4")
  return math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def estimate_bytes(program: Program, config: Config, chips: int, tensor: int) -> int:
  """A lower bound of the bytes that a chip reads and writes: weights, and results of products.

  Every pass reads the chip's share of each layer's gathered weights, and writes and reads the
  result of each product once. Attention scores are not counted, as if they never left the chip.

  Args:
    program: the program.
    config: with `model.vocab_size`.
    chips: number of chips.
    tensor: size of the tensor axis.
  """
  from jax.numpy import dtype

  model = config.model
  item = dtype(model.dtype).itemsize
  heads = (model.n_heads + model.kv_heads) * model.head_size
  mlp = model.stored_mlp_units // config.mesh.expert  # a chip reads its own experts only
  weights = model.n_layers * model.d_model * (2 * heads + 3 * mlp)
  weights += 2 * model.d_model * model.vocab_size
  tokens = program.rows * program.positions * tensor / chips
  passing = model.n_layers * (4 * model.d_model + (2 * heads + 3 * model.mlp_units) / tensor)
  return int(program.forwards * item * (weights / tensor + 2 * tokens * passing))


def moves_logits(collective: Collective, config: Config, chips_tensor: int) -> bool:
  """Whether a collective moves logits (values of the vocabulary) and not rows of a weight."""
  model = config.model
  vocab = {model.vocab_size, model.vocab_size // chips_tensor}
  if collective.kind == "all-reduce" or not vocab & set(collective.dims):
    return False
  rest = [d for d in collective.dims if d not in vocab and d != 1]
  weights = {model.d_model // n for n in range(1, model.d_model + 1) if model.d_model % n == 0}
  return not (len(rest) == 1 and rest[0] in weights | {model.lora.rank})


def inspect(program: Program, config: Config, mesh, chip: Chip) -> dict[str, Any]:
  """Compiles a program and reports on it.

  Args:
    program: the program.
    config: with `model.vocab_size`.
    mesh: the mesh of the topology's devices.
    chip: their facts.

  Returns:
    The program's entry of the JSON object.
  """
  import jax

  chips, tensor = mesh.size, mesh.shape["tensor"]
  began = time.perf_counter()
  lowered = program.lower()
  facts: dict[str, Any] = {"flops": program.flops, "resident": program.other_resident_bytes}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    used = re.search(r"[Uu]sed ([0-9.]+)([GM]) of|temporaries \(([0-9.]+)([GM])\)", str(error))
    number, unit = [g for g in used.groups() if g] if used else ("inf", "G")
    size = float(number) * (GIB if unit == "G" else GIB / 1024)
    return facts | {"bytes": size, "fits": False, "headroom": 1 - size / chip.hbm_bytes}
  seconds = time.perf_counter() - began

  memory = compiled.memory_analysis()
  allocated = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  total = allocated - program.shared_bytes + program.other_resident_bytes
  moved: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
  found = collectives(compiled.as_text(), program.max_trip_counts)
  for one in found:
    moved[one.kind]["count"] += one.times
    moved[one.kind]["bytes"] += one.times * one.bytes
  received = sum(entry["bytes"] for entry in moved.values())
  largest = max(found, key=lambda c: c.bytes, default=None)
  accessed = estimate_bytes(program, config, chips, tensor)
  times = {
    "compute": program.flops / chips / chip.flops,
    "memory": accessed / chip.hbm_bandwidth,
    "network": received / chip.ici_bandwidth,
  }
  return facts | {
    "bytes": total,
    "arguments": memory.argument_size_in_bytes - program.shared_bytes,
    "outputs": memory.output_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
    "fits": total <= chip.hbm_bytes,
    "headroom": 1 - total / chip.hbm_bytes,
    "bytes_accessed": accessed,
    "collectives": {kind: moved[kind] for kind in KINDS if kind in moved},
    "bytes_received": received,
    "largest_collective": largest and f"{largest.kind} {largest.shape}",
    "moves_logits": any(moves_logits(c, config, tensor) for c in found),
    "seconds": times | {"least": max(times.values())},
    "compile_seconds": round(seconds, 1),
  }


def report_table(report: dict[str, Any]) -> str:
  """The report as a Markdown table."""
  columns = ("program", "memory, GiB a chip", "of it arguments", "temporaries", "beside it",
             "to spare", "PFLOP", "received, GiB a chip", "least seconds (bound by)")  # fmt: skip
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  gib = lambda facts, name: f"{facts[name] / GIB:.2f}" if name in facts else "-"
  for name, facts in report["programs"].items():
    times = facts.get("seconds")
    bound = max((k for k in times if k != "least"), key=times.get) if times else ""
    cells = (
      name, gib(facts, "bytes"), gib(facts, "arguments"), gib(facts, "temporaries"),
      gib(facts, "resident"), f"{facts['headroom']:.0%}" if facts["fits"] else "does not fit",
      f"{facts['flops'] / 1e15:.3g}", gib(facts, "bytes_received"),
      f"{times['least']:.3g} ({bound})" if times else "-",
    )  # fmt: skip
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def report_on(config: Config, topology: str, names: list[str], out=sys.stderr) -> dict[str, Any]:
  """Compiles programs of a config for a topology, and prints a line before each of them.

  Args:
    config: with `model.vocab_size`; sizes of 0 are chosen for the topology.
    topology: such as "v5e:8x8".
    names: the programs to compile; []: all.
    out: the file that lines are printed to.

  Returns:
    The JSON object.

  Raises:
    UserError: an unknown topology or program, or a config that does not fit the topology.
  """
  import jax

  from igpo_jax.parallel.machine import Machine
  from igpo_jax.parallel.mesh import configured_mesh
  from igpo_jax.train.ahead_of_time import programs
  from igpo_jax.train.sizes import asked, resolve

  devices = topology_devices(topology)
  chip = find_chip(devices[0].device_kind)
  if 0 in asked(config).values():  # left to the devices
    machine = Machine(chip.platform, devices[0].device_kind, len(devices), 1, chip.hbm_bytes)
    config = resolve(config, machine)
  mesh = configured_mesh(config.mesh, devices=devices)
  all_programs = programs(config, mesh)
  unknown = sorted(set(names) - set(all_programs))
  if unknown:
    raise UserError(f"--programs: {unknown[0]!r} is not one of {', '.join(all_programs)}")
  report = {
    "topology": topology,
    "device": devices[0].device_kind,
    "chips": len(devices),
    "mesh": dict(mesh.shape),
    "hbm_bytes": chip.hbm_bytes,
    "jax": jax.__version__,
    "programs": {},
  }
  for name in names or all_programs:
    print(f"aot: compiling {name} for {topology} ...", file=out, flush=True)
    report["programs"][name] = inspect(all_programs[name], config, mesh, chip)
  report["fits"] = all(facts["fits"] for facts in report["programs"].values())
  return report


def with_vocabulary(config: Config) -> Config:
  """The config with `model.vocab_size`, which a run takes from its tokenizer.

  Raises:
    UserError: the config loads weights and does not give the size of their vocabulary.
  """
  if config.model.vocab_size:
    return config
  spec = config.data.tokenizer
  if config.init_from or spec.partition(":")[0] not in ("char", "words"):
    raise UserError("config: model.vocab_size is needed to compile without the tokenizer")
  tokenizer = open_tokenizer(spec)  # of a generated task: no file is read
  model = dataclasses.replace(
    config.model, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id
  )
  return dataclasses.replace(config, model=model)


def main(argv: list[str] | None = None) -> None:
  """Runs a command line; `argv` is what follows the program's name, default the process's."""
  config, _ = parse(FLAGS, sys.argv if argv is None else ["aot", *argv], __doc__)
  config = with_vocabulary(config)
  topology = FLAGS.topology or (find_slice(config.mesh.slice).topology if config.mesh.slice else "")
  if not topology:
    raise UserError("command line: --topology=v5e:8x8 is missing, and config.mesh.slice is empty")
  chips = chips_of(topology)
  cli.say(f"aot: {topology}: loading jax")
  import jax

  jax.config.update("jax_platforms", "cpu")  # what little runs here needs no accelerator
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # off Google Cloud there is nobody to ask
  if FLAGS.layout:
    from igpo_jax.parallel.mesh import abstract_mesh
    from igpo_jax.parallel.sharding import layout_table
    from igpo_jax.train.ahead_of_time import abstract_params

    print(layout_table(abstract_params(config, abstract_mesh(config.mesh, chips))))
    return
  report = report_on(config, topology, FLAGS.programs)
  print(report_table(report), file=sys.stderr)
  print(json.dumps(report))


if __name__ == "__main__":
  cli.run(main)
