"""Collectives read from compiled text: kinds, axes, bytes, and how often loops run them."""

from types import SimpleNamespace

import pytest

from polygpt.sharding import bytes_by_axes, collectives

MESH = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2, "expert": 1})

# Each way of writing the groups of 8 devices, and the axes that they are.
GROUPS = {
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ("fsdp", "tensor"),
    "replica_groups={}": ("data", "fsdp", "tensor"),
    "replica_groups=[4,2]<=[8]": ("tensor",),
    "replica_groups=[4,2]<=[4,2]T(1,0)": ("fsdp",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ("fsdp",),
    "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": ("data", "tensor"),
    "replica_groups=mesh['a'=2,'b'=4] {'a'}": ("data",),
    "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}": ("tensor",),
    "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}": ("fsdp",),
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": ("tensor",),
    "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}": ("data", "fsdp"),
    "replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}": ("tensor",),
}


def entry(*lines: str) -> str:
    return "\n".join(["ENTRY %main (p: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])


def only(line: str):
    (found,) = collectives(entry(line), MESH)
    return found


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups_are_axes_of_the_mesh(groups):
    assert only(f"%x = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add").axes == GROUPS[groups]


def test_permutes_move_along_the_axes_in_which_their_pairs_differ():
    moved = only("%x = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0},{1,4},{4,1},{5,5}}")
    assert (moved.kind, moved.axes, moved.sent) == ("collective-permute", ("data", "tensor"), 32)


@pytest.mark.parametrize(
    ("line", "size", "sent"),
    [
        ("bf16[8,4]{1,0} all-gather(%p)", 64, 32),
        ("(bf16[4,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%p)", 64, 32),
        ("f32[8,4]{1,0} all-reduce(%p)", 128, 128),
        ("(f32[8]{0}, pred[8]{0}, /*index=2*/s4[8]{0}) all-reduce-start(%p, %q)", 44, 44),
        ("f32[8,4]{1,0} reduce-scatter(%p)", 256, 128),
        ("(u8[16]{0:T(8)(128)}, u8[16]{0:T(8)(128)}) all-to-all(%p, %q)", 32, 16),
        ("f32[] all-reduce(%p)", 4, 4),
    ],
)
def test_bytes_are_of_the_whole_array_and_sent_bytes_those_of_a_ring(line, size, sent):
    found = only(f"ROOT %x = {line}, replica_groups=[4,2]<=[8], use_global_device_ids=true")
    assert (found.bytes, found.sent, found.group) == (size, sent, 2)


def test_an_asynchronous_permute_counts_its_output_alone():
    line = "%x = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}"
    assert only(line).bytes == 32


def test_what_stays_on_a_device_is_not_listed():
    assert collectives(entry("%x = f32[8]{0} all-reduce(%p), replica_groups=[8,1]<=[8]"), MESH) == []
    assert collectives(entry("%x = f32[8]{0} all-gather-done(%p)", "%y = f32[8]{0} fusion(%all-reduce.1)"), MESH) == []


def test_loops_multiply_and_nested_ones_once_more():
    gather = '%g = f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], metadata={op_name="jit(f)/while/dot"}'
    text = "\n".join(
        [
            "%inner.1 (p: f32[8]) -> f32[8] {",
            f"  {gather}",
            "}",
            "%outer (p: f32[8]) -> f32[8] {",
            f"  {gather}",
            '  %w = f32[8]{0} while(%p), condition=%c, body=%inner.1, backend_config={"known_trip_count":{"n":"3"}}',
            "}",
            entry('%w = f32[8]{0} while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}'),
        ]
    )
    found = collectives(text, MESH)
    assert sorted(each.times for each in found) == [5, 15]
    assert bytes_by_axes(found) == {"tensor": {"all-gather": 20 * 32}}
    assert {each.op_name for each in found} == {"jit(f)/while/dot"}
    assert {each.shape for each in found} == {"f32[8]"}


def test_branches_and_calls_count_as_taken():
    body = "  %r = f32[8]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add"
    text = "\n".join(
        [
            *("%a (p: f32[8]) -> f32[8] {", body, "}"),
            *("%b (p: f32[8]) -> f32[8] {", body, "}"),
            *("%c (p: f32[8]) -> f32[8] {", body, "}"),
            entry(
                "%x = f32[8]{0} conditional(%i, %p, %p), branch_computations={%a, %b}", "%y = f32[8] call(%p), calls=%c"
            ),
        ]
    )
    assert len(collectives(text, MESH)) == 3


def test_an_all_reduce_of_which_a_slice_is_used_is_a_reduce_scatter_if_asked():
    reduce = "%r = f32[8,4]{1,0} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add"
    sliced = "%s = f32[4,4]{1,0} dynamic-slice(%c, %i, %zero), dynamic_slice_sizes={4,4}"
    text = entry(reduce, "%c = f32[8,4]{0,1} copy(%r)", sliced)
    assert [each.kind for each in collectives(text, MESH)] == ["all-reduce"]
    (found,) = collectives(text, MESH, scatters=True)
    assert (found.kind, found.bytes, found.sent) == ("reduce-scatter", 128, 64)
    (whole,) = collectives(entry(reduce, sliced.replace("%c", "%r"), "%t = f32[] fusion(%i, %r)"), MESH, scatters=True)
    assert whole.kind == "all-reduce"
