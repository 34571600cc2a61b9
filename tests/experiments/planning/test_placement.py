"""Where a mesh lies on a slice or in boxes."""

import pytest

from dynamoe.experiments.planning.placement import Side, factorizations, possible_meshes
from dynamoe.experiments.planning.target import find_target


def test_mesh_axes_take_whole_sides_of_a_slice(on):
    placed = on("v5p", "4x4x8", fsdp=16, expert=8)
    assert placed.span(("expert",)).sides == (Side(8, True, 100e9),)
    assert placed.span(("fsdp",)).sides == (Side(4, True, 100e9), Side(4, True, 100e9))
    assert placed.span(None).devices == 128


def test_short_sides_are_lines(on):
    assert [side.closed for side in on("v5e", "4x8", fsdp=4, expert=8).span(("fsdp", "expert")).sides] == [False, False]
    assert [side.closed for side in on("v5e", "16x16", fsdp=16, data=16).span(("fsdp",)).sides] == [True]


def test_the_last_axes_of_a_mesh_share_a_box(on):
    placed = on("h100", "4x8", fsdp=4, expert=8)
    assert placed.span(("expert",)).hosts == 1
    assert placed.span(("fsdp",)).hosts == 4
    assert placed.span(("fsdp", "expert"))[:1] == (32,)


def test_a_slice_that_cannot_hold_a_mesh_says_what_it_can(on):
    with pytest.raises(ValueError, match="mesh is fsdp=8, expert=8; v5p 4x4x4 cannot hold it.*1, 4, 16, 64 devices"):
        on("v5p", "4x4x4", fsdp=8, expert=8)


def test_a_mesh_of_another_size_says_how_many_devices_there_are(on):
    with pytest.raises(ValueError, match="v5p 4x4x4 has 64 devices.*--mesh.data 1 --mesh.fsdp 64"):
        on("v5p", "4x4x4", fsdp=8)


def test_every_mesh_that_fits_is_found(no_compiler):
    assert len(factorizations(8, 4)) == 20  # three twos among four axes: 6 choose 3
    found = [shape for shape, _ in possible_meshes(find_target("v5p", "4x4x4"))]
    # Three sides of 4 among four axes: 4 meshes with all on one axis, 12 with 16 and 4, 4 with 4, 4, 4.
    assert len(found) == len(set(found)) == 20
