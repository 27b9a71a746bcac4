"""Collectives read from HLO text: kinds, bytes, and the turns of the loops around them."""

from __future__ import annotations

import pytest

from igpo_jax.parallel.hlo import collectives, group_size

PROGRAM = """HloModule jit_f, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p: bf16[4,16]) -> bf16[32,16] {
  %p = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%again (p: bf16[4,16]) -> bf16[32,16] {
  %p = bf16[4,16]{1,0} parameter(0)
  ROOT %ag.2 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%layer (t: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %t = (s32[], bf16[4,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = bf16[4,16]{1,0} get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %more = s32[] add(%n, %two)
  %g = bf16[32,16]{1,0} fusion(%x), kind=kCustom, calls=%fused, frontend_attributes={text="
}}
"}
  %h = bf16[32,16]{1,0} fusion(%x), kind=kCustom, calls=%again
  ROOT %out = (s32[], /*index=1*/bf16[4,16]{1,0}) tuple(%more, %x)
}

%layers_left (t: (s32[], bf16[4,16])) -> pred[] {
  %t = (s32[], bf16[4,16]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(10)
  %n = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%n, %limit), direction=LT
}

%step (t: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %t = (s32[], bf16[4,16]{1,0}) parameter(0)
  ROOT %inner = (s32[], bf16[4,16]{1,0}) while(%t), condition=%layers_left, body=%layer
}

%unfinished (t: (s32[], bf16[4,16])) -> pred[] {
  %t = (s32[], bf16[4,16]{1,0}) parameter(0)
  %x = bf16[4,16]{1,0} get-tuple-element(%t), index=1
  %any = pred[] fusion(%x), kind=kLoop, calls=%sum
  ROOT %all = pred[] all-reduce(%any), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%sum
}

ENTRY %main (t: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %t = (s32[], bf16[4,16]{1,0}) parameter(0)
  %r = f32[8]{0} parameter(1)
  %s = f32[1]{0} reduce-scatter(%r), channel_id=2, replica_groups={}, dimensions={0}, to_apply=%sum
  %p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%r), channel_id=3, source_target_pairs={{0,1}}
  %two = (f32[8]{0}, f32[2]{0}) all-reduce(%r, %r), channel_id=4, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%sum
  ROOT %outer = (s32[], bf16[4,16]{1,0}) while(%t), condition=%unfinished, body=%step
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def found():
  return {(c.kind, c.shape): c for c in collectives(PROGRAM, loops=(3,))}


def test_a_collective_in_loops_counts_once_for_every_turn(found):
  gather = found["all-gather", "bf16[32,16]"]
  # 3 turns of the loop that the data ends, 10 / 2 of the counted one inside it; the
  # two pieces of channel 7 are one collective.
  assert gather.times == 3 * 5 and gather.chips == 8
  assert found["all-reduce", "pred[]"].times == 3


def test_bytes_are_what_a_chip_receives(found):
  assert found["all-gather", "bf16[32,16]"].bytes == 32 * 16 * 2 * 7 // 8
  assert found["reduce-scatter", "f32[1]"].bytes == 8 * 4 * 7 // 8
  assert found["collective-permute", "f32[8]"].bytes == 8 * 4
  assert found["all-reduce", "f32[8]"].bytes == 2 * (8 + 2) * 4 // 2


def test_a_loop_of_unknown_turns_has_to_be_told():
  with pytest.raises(ValueError, match="turns of loop unfinished"):
    collectives(PROGRAM)


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("replica_groups=mesh['x'=4,'y'=2] {'x'}, to_apply", 4),
    ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", 8),
    ("replica_groups=mesh['x'=2,'y'=2,'z'=2], device_ids=([2,2,2]T(2,1,0)) {'y'}, u", 2),
    ("replica_groups=[2,4]<=[8]", 4),
    ("replica_groups={{0,1,2},{3,4,5}}", 3),
    ("replica_groups={}, dimensions={0}", 8),
  ],
)
def test_group_sizes(text, size):
  assert group_size(text, everyone=8) == size
  with pytest.raises(ValueError, match="unknown form"):
    group_size("replica_groups=elsewhere", 8)
