"""Times of collectives, against examples computed by hand."""

import pytest

from dynamoe.experiments.planning.network import seconds, wire_bytes
from dynamoe.experiments.planning.placement import Side, Span
from dynamoe.kernels.chips import Boxes

MB, LINK = 1e6, 1e9
RING, LINE = Span(4, (Side(4, True, LINK),)), Span(4, (Side(4, False, LINK),))
TORUS = Span(16, (Side(4, True, LINK), Side(4, True, LINK)))
BOXES = Boxes(switch=10e9, network=1e9, devices=4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 3 / 4),
        ("reduce-scatter", 3),  # of a result that is a quarter of what comes in
        ("all-reduce", 2 * 3 / 4),
        ("all-to-all", 3 / 4),
        ("collective-permute", 1),
    ],
)
def test_a_device_takes_in_what_the_others_have(kind, expected):
    assert wire_bytes(kind, MB, 4) == pytest.approx(expected * MB)
    assert wire_bytes(kind, MB, 1) == 0


@pytest.mark.parametrize(
    ("kind", "span", "expected"),
    [
        ("all-gather", LINE, 0.75e-3),  # the last of a line has one link: 0.75 MB over 1 GB/s
        ("all-gather", RING, 0.375e-3),  # of a ring two
        ("all-gather", TORUS, 15 / 16 * 1e-3 / 4),  # of two rings four
        ("all-reduce", RING, 0.75e-3),
        # 2 devices on each side of the middle of a line send half of their 1 MB over one link.
        ("all-to-all", LINE, 1e-3),
        ("all-to-all", RING, 0.5e-3),
        ("all-to-all", TORUS, 0.5e-3),  # four rings in parallel carry four times as much
        ("collective-permute", RING, 1e-3),
    ],
)
def test_a_slice_moves_bytes_over_all_links_of_the_sides(kind, span, expected):
    assert seconds(kind, MB, span) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "devices", "hosts", "expected"),
    [
        ("all-gather", 4, 1, 0.75e-3 / 10),
        # A box of 4 takes in the other's half, 0.5 MB, over four adapters: more than 7/8 MB through the switch.
        ("all-gather", 8, 2, 0.125e-3),
        # Each device takes in half of its 1 MB from the other box over its own adapter.
        ("all-to-all", 8, 2, 0.5e-3),
    ],
)
def test_boxes_move_bytes_through_switch_and_network(kind, devices, hosts, expected):
    assert seconds(kind, MB, Span(devices, hosts=hosts, boxes=BOXES)) == pytest.approx(expected)
