"""What a compiled program moves between chips, read from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here every collective is counted
as often as the loops around it turn: loops over layers and micro-batches compare a counter
with a constant and say so in their condition; those that end when the data says (the
denoising loop) are told from outside, at their worst case.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "bf16": 16} | {f"{k}{n}": n for k in "suf" for n in (4, 8, 16, 32, 64)}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|branch_computations)=(%?[\w.\-]+|\{[^}]*\})")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    shape: the largest array it takes or gives, such as "bf16[1,4096,4096]".
    dims: that array's dimensions.
    chips: how many take part.
    times: how often a run of the program executes it.
    bytes: what each chip receives each time, by the algorithms that move least.
  """

  kind: str
  shape: str
  dims: tuple[int, ...]
  chips: int
  times: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  result: str
  opcode: str
  rest: str


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Computations by name, and the name of the entry."""
  computations: dict[str, list[_Instruction]] = {}
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


def group_size(attributes: str) -> int:
  """How many chips a collective spans, from its replica groups.

  Raises:
    ValueError: they are written in no form that is known here.
  """
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found.group(2)))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
    return int(found.group(1))
  if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
    return len(found.group(1).split(","))
  if found := re.search(r"source_target_pairs=", attributes):
    return 2
  raise ValueError(f"replica groups in an unknown form: {attributes[:200]}")


def _received(kind: str, largest: int, chips: int) -> int:
  """Bytes that each chip receives for an array of `largest` bytes."""
  share = largest * (chips - 1) // chips
  # A reduction has to be brought together and sent out again.
  return {"all-reduce": 2 * share, "collective-permute": largest}.get(kind, share)


def _trips(condition: Sequence[_Instruction]) -> int | None:
  """How often a loop turns whose condition is `counter < constant` and nothing else."""
  constants = {
    int(i.rest.split(")")[0])
    for i in condition
    if i.opcode == "constant" and i.result.startswith(("s32[]", "u32[]"))
  }
  plain = {"constant", "parameter", "get-tuple-element", "compare", "bitcast", "copy"}
  less = any(i.opcode == "compare" and "direction=LT" in i.rest for i in condition)
  if less and len(constants) == 1 and {i.opcode for i in condition} <= plain:
    return constants.pop()
  return None


def collectives(text: str, loops: Sequence[int] = ()) -> list[Collective]:
  """Every collective of a compiled program.

  Args:
    text: `compiled.as_text()`.
    loops: turns of the loops that end when the data says, by how many such loops they
      are nested in: (blocks, steps of a block) for the denoising loop.

  Raises:
    ValueError: such a loop is nested deeper than `loops` tells.
  """
  computations, entry = _parse(text)
  found: list[Collective] = []

  def visit(name: str, times: int, depth: int, seen: set[str]) -> None:
    for instruction in computations.get(name, ()):
      opcode, rest = instruction.opcode, instruction.rest
      called = [c for names in _CALLED.findall(rest) for c in re.findall(r"[\w.\-]+", names)]
      if opcode == "while":
        condition = re.search(r"condition=%?([\w.\-]+)", rest).group(1)
        turns, deeper = _trips(computations[condition]), depth
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
        found.append(_collective(kind, instruction, times))
      for computation in called:
        visit(computation, times, depth, seen)

  visit(entry, 1, 0, set())
  return found


def _collective(kind: str, instruction: _Instruction, times: int) -> Collective:
  chips = group_size(instruction.rest)
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
