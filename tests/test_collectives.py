"""The collectives of a program, read from its text: kinds, bytes, groups, loops."""

import pytest

from tosa_jax.performance.collectives import Collective, collectives, totals

HLO = """HloModule jit_step, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %gathered = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %out = (s32[], bf16[8,16]) tuple(%i, %x)
}

%counter (state: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%tpu_body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %mean = f32[8]{0} all-reduce(%x), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (s32[], f32[8]) tuple(%i, %mean)
}

%all-reduce-scatter.1 (x: f32[64]) -> f32[16] {
  %whole = f32[64]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[16]{0} dynamic-slice(%whole, %place), dynamic_slice_sizes={16}
}

%start (x: f32[4]) -> f32[8] {
  ROOT %same = f32[8]{0} all-gather(%x), channel_id=5, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

%done (x: f32[4]) -> f32[8] {
  ROOT %same = f32[8]{0} all-gather(%x), channel_id=5, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

ENTRY %main (p: f32[64]) -> f32[16] {
  %loop = (s32[], bf16[8,16]) while(%init), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %counted = (s32[], f32[8]) while(%begin), condition=%counter, body=%tpu_body
  %scattered = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %a = f32[8]{0} fusion(%p), kind=kCustom, calls=%start
  %b = f32[8]{0} fusion(%p), kind=kCustom, calls=%done
  %pair = (f32[4]{0}, f32[16]{0}) all-gather-start(%q), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  %wait = f32[16]{0} all-gather-done(%pair)
  %sums = (f32[3]{0}, pred[5]{0}) all-reduce(%q, %r), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
  %kept = f32[2]{0} reduce-scatter(%q), channel_id=6, replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}
  %moved = f32[4]{0} collective-permute(%q), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %result = f32[16]{0} copy(%scattered), metadata={op_name="all-reduce(x)"}
}
"""

FOUND = [
    Collective("all-gather", 32 * 16 * 2, ((0, 1, 2, 3),), 3),  # the loop runs three times
    Collective("all-reduce", 8 * 4, ((0, 1, 2, 3),), 5),  # a TPU's loop: its counter goes to five
    Collective("reduce-scatter", 64 * 4, ((0, 1, 2, 3),), 1),  # a TPU's fusion, numbered for itself
    Collective("all-gather", 8 * 4, ((0, 2), (1, 3)), 1),  # one channel in two computations
    Collective("all-gather", 16 * 4, ((0, 1, 2, 3),), 1),  # the result, not the operand beside it
    Collective("all-reduce", 3 * 4 + 5, ((0, 1), (2, 3)), 1),
    Collective("reduce-scatter", 2 * 2 * 4, ((0, 1), (2, 3)), 1),  # what goes in
    Collective("collective-permute", 4 * 4, ((0, 1), (1, 0)), 1),
]


def test_each_collective_is_found_once():
    assert collectives(HLO) == FOUND


def test_totals_count_runs():
    table = totals(FOUND)
    assert table["all-gather"] == {"count": 5, "bytes": 3 * 1024 + 32 + 64}
    assert table["reduce-scatter"] == {"count": 2, "bytes": 256 + 16}
    assert "all-to-all" not in table


def test_groups_in_an_unknown_notation_are_not_guessed():
    unknown = HLO.replace("{'x'}", "{'x':(1)2}")
    with pytest.raises(ValueError, match="unknown notation"):
        collectives(unknown)
