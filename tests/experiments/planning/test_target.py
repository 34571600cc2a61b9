"""Chips and topologies as one types them."""

import pytest

from dynamoe.experiments.planning.target import find_target


@pytest.mark.parametrize(
    ("chip", "topology", "devices", "name", "count"),
    [
        ("v5e", None, None, "v5e:2x2", 4),
        ("v5p", "4x4x4", None, "v5p:4x4x4", 64),
        ("v5p", "4x4x4", 64, "v5p:4x4x4", 64),
        ("tpu7x", None, 128, "tpu7x:4x4x4", 128),
        ("v5e", None, 32, "v5e:4x8", 32),
        ("h100", None, 4, "h100:1x1x4", 4),
        ("h100", None, 32, "h100:1x4x8", 32),
        ("h200", "4x8", None, "h200:1x4x8", 32),
        ("h200", "1x4x8", None, "h200:1x4x8", 32),
    ],
)
def test_devices_are_found_by_topology_or_number(chip, topology, devices, name, count):
    target = find_target(chip, topology, devices)
    assert (target.name, target.devices) == (name, count)


@pytest.mark.parametrize(
    ("chip", "topology", "devices", "message"),
    [
        ("v5q", None, None, r"chip is 'v5q'; known are v5e, .*; did you mean v5"),
        ("v5p", "4by4", None, "topology is '4by4'; it must be numbers with x between them, as 4x4x4"),
        ("v5p", "4x4", None, "v5p has 2x2x1, .* and three sides that are multiples of 4"),
        ("v5e", "3x3", None, "v5e has 2x2, 2x4, .*16x16"),
        ("h100", "4x4", None, "hosts x devices of each, at most 8, and 8 where there are several hosts, as 4x8"),
        ("h100", None, 12, "devices is 12; of h100 it must be from 1 to 8, or a multiple of 8"),
        ("v5e", None, 7, "devices is 7; no slice of v5e has so many: near it are 4, 8, 16"),
        ("v5e", "4x4", 8, "devices is 8; v5e 4x4 has 16: give one of the two"),
    ],
)
def test_devices_that_do_not_exist_are_refused_with_those_that_do(chip, topology, devices, message):
    with pytest.raises(ValueError, match=message):
        find_target(chip, topology, devices)
