"""Collectives read from HLO text: what XLA wrote for TPU v5e, shortened, and the forms of other compilers."""

import pytest

from dynamoe.kernels.collectives import Collective, read_collectives

TPU = """\
HloModule jit_f
%condition (wide.param.3: (s32[], f32[128,256])) -> pred[] {
  %constant.5.clone.1 = s32[]{:T(128)} constant(5)
  %get-tuple-element.30 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%get-tuple-element.30, %constant.5.clone.1), direction=LT
}
%body (wide.param.0: (s32[], f32[128,256], s32[4], /*index=5*/s32[1])) -> (s32[], f32[128,256]) {
  %all-gather.7 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%convert.8), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0'}, dimensions={0}
  %all_to_all.16 = f32[256,2,128]{0,2,1:T(8,128)S(1)} all-to-all(%bitcast.19), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={1}
  %psum.9 = f32[256,256]{1,0:T(8,128)S(1)} all-reduce(%reshape.24), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%region
  %collective-permute-start = (f32[128,256]{1,0:T(8,128)S(1)}, f32[128,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.48), channel_id=3, source_target_pairs={{0,1},{2,3}}
  %collective-permute-done = f32[128,256]{1,0:T(8,128)S(1)} collective-permute-done(%collective-permute-start)
}
ENTRY %main.5_spmd (param.4: f32[256,256]) -> f32[128,256] {
  %while.9 = (s32[]{:T(128)}, f32[128,256]{1,0:T(8,128)S(1)}) while(%tuple.21), condition=%condition, body=%body
}
"""  # noqa: E501
MESH = {"data": 2, "expert": 2}


def entry(line: str) -> str:
    return f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n"


def test_a_loop_over_collectives_of_a_tpu_is_read_with_bytes_axes_and_times():
    assert read_collectives(TPU, MESH) == [
        Collective("all-gather", 256 * 256 * 2, ("expert",), 5),
        Collective("all-to-all", 256 * 2 * 128 * 4, ("expert",), 5),
        Collective("all-reduce", 256 * 256 * 4, ("data",), 5),
        Collective("collective-permute", 128 * 256 * 4, ("expert",), 5),
    ]


def test_a_loop_whose_length_the_text_does_not_say_is_not_known():
    text = TPU.replace("direction=LT", "direction=NE")
    assert {found.times for found in read_collectives(text, MESH)} == {None}


def test_a_count_that_the_compiler_wrote_is_taken():
    text = TPU.replace("direction=LT", "direction=NE").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert {found.times for found in read_collectives(text, MESH)} == {9}


def test_what_runs_in_a_called_computation_counts_and_equal_ones_are_one():
    text = (
        "%async (p: f32[8]) -> f32[8] {\n  %a = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3}}\n}\n"
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %s = ((f32[8]), f32[8], s32[]) async-start(%p), calls=%async\n"
        "  %b = f32[8]{0} all-reduce(%s), replica_groups={{0,1,2,3}}\n}\n"
    )
    assert read_collectives(text, MESH) == [Collective("all-reduce", 32, ("data", "expert"), 2)]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[2,2]<=[4]", ("expert",)),
        ("[2,2]<=[2,2]T(1,0)", ("data",)),
        ("[1,4]<=[4]", ("data", "expert")),
        ("{{0},{1},{2},{3}}", ()),
        ("{{0,3},{1,2}}", None),
        ("mesh['a'=2,'b'=2] {'b'}", ("expert",)),
        ("mesh['a'=2,'b'=2] {'a', 'b'}", ("data", "expert")),
    ],
)
def test_groups_are_told_in_three_ways(groups, axes):
    text = entry(f"%r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert read_collectives(text, MESH) == [Collective("all-reduce", 16, axes, 1)]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("(f32[4]{0}, f32[16]{0}) all-gather-start", 64),
        ("((f32[4]{0}, s8[4]{0}), (f32[16]{0}, s8[16]{0})) all-gather-start", 80),
        ("f32[16]{0} all-reduce-start", 64),
        ("((f32[16]{0}, f32[8]{0}), (f32[4]{0}, f32[2]{0})) reduce-scatter-start", 24),
        ("((f32[4,2]{1,0}), f32[4,2]{1,0}) all-to-all-start", 32),
        ("((f32[4]{0}, f32[8]{0}, s64[4]{0}, /*index=5*/s64[4]{0}), f32[8]{0}) ragged-all-to-all-start", 32),
        ("(bf16[4,2]{1,0:T(8,128)}, f8e4m3fn[8]{0}, pred[8]{0}) all-to-all", 32),
    ],
)
def test_bytes_are_those_of_the_result(result, expected):
    text = entry(f"%r = {result}(%p), replica_groups=[1,4]<=[4], to_apply=%add")
    assert [found.bytes for found in read_collectives(text, MESH)] == [expected]


IN_PIECES = """\
%fused_computation.1 (p: bf16[4,64]) -> (bf16[4,64], bf16[16,64]) {
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}
%async_collective_fusion.2 (p: bf16[4,64]) -> (f32[8], bf16[16,64]) {
  %all-gather.2 = bf16[16,64]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}
%fused_computation.3 (p: bf16[4,64]) -> bf16[16,64] {
  %all-gather.3 = bf16[16,64]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}
%all-reduce-scatter.7.clone (p: f32[8,4], q: f32[8,4]) -> (f32[4,4], f32[4,4]) {
  %all-reduce.9 = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce(%p, %q), replica_groups={{0,2},{1,3}}, to_apply=%add
}
ENTRY %main (p: bf16[4,64]) -> bf16[16,64] {
  %async-collective-start = (bf16[4,64], bf16[16,64]) fusion(%p), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = (f32[8], bf16[16,64]) fusion(%g), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done = bf16[16,64] fusion(%h), kind=kCustom, calls=%fused_computation.3
  %fusion.7 = (f32[4,4], f32[4,4]) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.7.clone
}
"""  # noqa: E501


def test_a_collective_in_pieces_beside_other_work_is_one():
    assert read_collectives(IN_PIECES, MESH)[0] == Collective("all-gather", 16 * 64 * 2, ("data", "expert"), 1)


def test_a_sum_of_which_each_device_keeps_a_slice_is_a_reduce_scatter():
    assert read_collectives(IN_PIECES, MESH)[1:] == [Collective("reduce-scatter", 2 * 4 * 4 * 4, ("data",), 1)]


@pytest.mark.parametrize(
    "exchange",
    [
        "bf16[64,8]{1,0} ragged-all-to-all(%x, %buffer, %a, %b, %c, /*index=5*/%d)",
        "((bf16[32,8]{1,0}, bf16[64,8]{1,0}, s64[4]{0}), bf16[64,8]{1,0}) ragged-all-to-all-start(%x, %buffer, %a)",
        "bf16[64,8]{1,0} ragged-all-to-all(bf16[32,8]{1,0} %x, bf16[64,8]{1,0} %buffer)",
    ],
)
def test_a_ragged_exchange_moves_no_more_than_goes_in_or_comes_out(exchange):
    text = entry(f"%x = bf16[32,8]{{1,0:T(8,128)}} fusion(%p), calls=%f\n  %r = {exchange}, replica_groups=[1,4]<=[4]")
    assert [found.bytes for found in read_collectives(text, MESH)] == [32 * 8 * 2]
    smaller = text.replace("= bf16[64,8]", "= bf16[4,8]").replace(
        ", bf16[64,8]{1,0}) ragged", ", bf16[4,8]{1,0}) ragged"
    )
    assert [found.bytes for found in read_collectives(smaller, MESH)] == [4 * 8 * 2]
