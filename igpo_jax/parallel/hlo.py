"""The bytes that a compiled program sends between chips, read from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here a collective inside loops is counted
once for each of their iterations. Loops over layers and micro-batches compare a counter with a
constant, so their number of iterations is read from the text. The denoising loop ends when the data
says so: the caller gives the largest possible number of its iterations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "bf16": 16} | {f"{k}{n}": n for k in "suf" for n in (4, 8, 16, 32, 64)}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|branch_computations)=(%?[\w.\-]+|\{[^}]*\})")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    shape: type and shape of its largest operand or result, such as "bf16[1,4096,4096]".
    dims: the dimensions of that array.
    chips: number of chips that take part.
    times: how often one run of the program executes it.
    bytes: bytes that each chip receives each time, by the algorithm that sends least.
  """

  kind: str
  shape: str
  dims: tuple[int, ...]
  chips: int
  times: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  result: str
  opcode: str
  rest: str


Computations = dict[str, list[_Instruction]]


def _parse(text: str) -> tuple[Computations, str]:
  """Computations by name, and the name of the entry."""
  computations: Computations = {}
  current, entry = None, ""
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header.group(1), [])
      if line.startswith("ENTRY"):
        entry = header.group(1)
    elif line.rstrip() == "}":  # attributes, too, may go over several lines
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(_Instruction(*found.groups()))
  return computations, entry


def _arrays(text: str) -> list[tuple[str, tuple[int, ...], int]]:
  """(shape as text, dimensions, bytes) of every array type in a piece of HLO."""
  out = []
  for kind, dims in _ARRAY.findall(text):
    if kind in ITEM_BITS:
      sizes = tuple(int(d) for d in dims.split(",")) if dims else ()
      out.append((f"{kind}[{dims}]", sizes, math.prod(sizes) * ITEM_BITS[kind] // 8))
  return out


def group_size(attributes: str, everyone: int) -> int:
  """The number of chips of one replica group of a collective.

  Args:
    attributes: the attributes of the HLO instruction, as text.
    everyone: number of all chips: the answer where no groups are named.

  Raises:
    ValueError: the groups are written in an unknown form.
  """
  order = r"(?:, device_ids=\(\[[^\]]*\](?:T\([^)]*\))?\))?"
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\]" + order + r" \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found.group(2)))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
    return int(found.group(1))
  if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
    return len(found.group(1).split(","))
  if "replica_groups={}" in attributes:
    return everyone
  if "source_target_pairs=" in attributes:
    return 2
  groups = attributes[max(attributes.find("replica_groups"), 0) :]
  raise ValueError(f"replica groups in an unknown form: {groups[:100]}")


def _received(kind: str, largest: int, chips: int) -> int:
  """Bytes that each chip receives for an array of `largest` bytes."""
  share = largest * (chips - 1) // chips
  # A reduction has to be brought together and sent out again.
  return {"all-reduce": 2 * share, "collective-permute": largest}.get(kind, share)


def _operands(instruction: _Instruction) -> list[str]:
  """Names of an instruction's operands, in order."""
  return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])


def _called(instruction: _Instruction) -> list[str]:
  """Names of the computations an instruction runs."""
  found = _CALLED.findall(instruction.rest)
  return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


def _constant(instruction: _Instruction) -> int | None:
  """The value of an integer constant."""
  value = instruction.rest.split(")")[0]
  is_integer = instruction.result.startswith(("s32[]", "u32[]"))
  return int(value) if instruction.opcode == "constant" and is_integer else None


def _trips(computations: Computations, condition: str, body: str) -> int | None:
  """How often a loop turns whose condition is `counter < constant` and nothing else."""
  tests = _flat(computations, condition)
  plain = {"constant", "parameter", "get-tuple-element", "compare", "bitcast", "copy", "fusion"}
  compares = [i for i in tests if i.opcode == "compare"]
  limits = [_constant(i) for i in tests if i.opcode == "constant"]
  if len(compares) != 1 or "direction=LT" not in compares[0].rest or len(limits) != 1:
    return None
  if not {i.opcode for i in tests} <= plain or limits[0] is None:
    return None
  counter = next(i for i in tests if i.opcode == "get-tuple-element")
  index = int(re.search(r"index=(\d+)", counter.rest).group(1))
  return -(-limits[0] // _increment(computations, body, index))


def _flat(computations: Computations, name: str) -> list[_Instruction]:
  """A computation's instructions with those of the computations it calls."""
  own = computations[name]
  return [*own, *(i for one in own for c in _called(one) for i in _flat(computations, c))]


def _increment(computations: Computations, body: str, index: int) -> int:
  """What a turn adds to the counter, element `index` of the carry; 1 where it is not plain."""
  by_name = {i.name: i for i in computations[body]}
  root = next((i for i in reversed(computations[body]) if i.opcode == "tuple"), None)
  operands = _operands(root) if root else []
  updated = by_name.get(operands[index]) if index < len(operands) else None
  if updated is None:
    return 1
  inside = [i for name in _called(updated) for i in _flat(computations, name)]
  if not {updated.opcode, *(i.opcode for i in inside)} <= {
    "add",
    "fusion",
    "parameter",
    "constant",
  }:
    return 1
  beside = [by_name[name] for name in _operands(updated) if name in by_name]
  return next((step for i in (*beside, *inside) if (step := _constant(i))), 1)


def collectives(text: str, loops: Sequence[int] = ()) -> list[Collective]:
  """All collectives of a compiled program.

  Args:
    text: `compiled.as_text()`.
    loops: the largest number of iterations of loops that end when the data says so, outermost
      first: (blocks, steps of a block) for the denoising loop.

  Raises:
    ValueError: such loops are nested deeper than `loops` is long.
  """
  computations, entry = _parse(text)
  found: list[Collective] = []

  def visit(name: str, times: int, depth: int, seen: set[str]) -> None:
    for instruction in computations.get(name, ()):
      opcode, rest = instruction.opcode, instruction.rest
      called = _called(instruction)
      if opcode == "while":
        condition = re.search(r"condition=%?([\w.\-]+)", rest).group(1)
        body = re.search(r"body=%?([\w.\-]+)", rest).group(1)
        turns, deeper = _trips(computations, condition, body), depth
        if turns is None:
          if depth >= len(loops):
            raise ValueError(f"the turns of loop {condition} of the program are not known")
          turns, deeper = loops[depth], depth + 1
        inside: set[str] = set()
        for computation in called:
          visit(computation, times * turns, deeper, inside)
        continue
      kind = opcode.removesuffix("-start")
      if kind in KINDS:
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel and channel.group(1) in seen:
          continue  # one collective, fused piecewise into several computations
        seen.add(channel.group(1) if channel else "")
        if name.startswith("all-reduce-scatter"):
          kind = "reduce-scatter"  # how the TPU compiler writes one
        found.append(_collective(kind, instruction, times, everyone))
      for computation in called:
        visit(computation, times, depth, seen)

  everyone = int(re.search(r"num_partitions=(\d+)|$", text.split("\n", 1)[0]).group(1) or 1)
  visit(entry, 1, 0, set())
  return found


def _collective(kind: str, instruction: _Instruction, times: int, everyone: int) -> Collective:
  chips = group_size(instruction.rest, everyone)
  arrays = _arrays(instruction.result)
  shape, dims, _ = max(arrays, key=lambda a: a[2])
  # Several arrays in one collective add up; most starts give (operands, results).
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    arrays = [a for a in arrays if a[1]]  # without the flags
    arrays = arrays[len(arrays) // 2 :]
  total = sum(a[2] for a in arrays)
  if instruction.opcode.startswith("reduce-scatter"):
    total *= chips
  return Collective(kind, shape, dims, chips, times, _received(kind, total, chips))
