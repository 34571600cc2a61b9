"""Which devices a plan is for: a chip and how many of it, in which shape."""

import difflib
import math
from typing import NamedTuple

from ...kernels.chips import CHIPS, Boxes, Torus

_SQUARES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Slices of v5e and v6e that Google offers with more than one chip, https://docs.cloud.google.com/tpu/docs/v5e."""
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices of v5p and tpu7x below one cube; above it every side is a multiple of 4."""
_LONGEST = 24
"""Chips along a side: the largest slice of v5p is 16x16x24."""


class Target(NamedTuple):
    """A chip, and the sides of a slice in chips, or hosts and devices of each."""

    chip: str
    sides: tuple[int, ...]

    @property
    def topology(self) -> str:
        """As one types it: "4x4x4", or of GPUs "1x8"."""
        return "x".join(map(str, self.sides))

    @property
    def name(self) -> str:
        """As `kernels.aot` takes it."""
        return f"{self.chip}:{'1x' * isinstance(CHIPS[self.chip].links, Boxes)}{self.topology}"

    @property
    def devices(self) -> int:
        """As JAX sees them."""
        links = CHIPS[self.chip].links
        return math.prod(self.sides) * (2 if isinstance(links, Torus) and links.die is not None else 1)


def find_target(chip: str, topology: str | None = None, devices: int | None = None) -> Target:
    """The devices that a command names.

    Args:
        chip: a key of `CHIPS`.
        topology: of a TPU "4x4x4", of GPUs hosts x devices of each, "4x8"; None: by the number of devices.
        devices: how many; None: by the topology, and with neither the chip's smallest slice or one box.

    Raises:
        ValueError: there is no such chip, the topology is malformed or none of the chip's, or it has another number of
            devices; the message says what is allowed.
    """
    if chip not in CHIPS:
        near = difflib.get_close_matches(chip.lower(), CHIPS, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"chip is {chip!r}; known are {', '.join(CHIPS)}{meant}")
    if topology is None:
        target = _smallest(chip) if devices is None else _with_devices(chip, devices)
    else:
        target = Target(chip, _sides(chip, topology))
    if devices not in (None, target.devices):
        raise ValueError(f"devices is {devices}; {chip} {target.topology} has {target.devices}: give one of the two")
    return target


def _smallest(chip: str) -> Target:
    return Target(chip, _sides(chip, CHIPS[chip].topology))


def _sides(chip: str, topology: str) -> tuple[int, ...]:
    parts = topology.lower().split("x")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"topology is {topology!r}; it must be numbers with x between them, as {_example(chip)}")
    sides, links = tuple(map(int, parts)), CHIPS[chip].links
    if isinstance(links, Boxes):
        sides = sides[1:] if len(sides) == 3 and sides[0] == 1 else sides  # partitions come first in XLA's own
        if len(sides) != 2 or sides[1] > links.devices or (sides[0] > 1 and sides[1] != links.devices):
            raise ValueError(
                f"topology is {topology!r}; of {chip} it is hosts x devices of each, at most {links.devices}, and "
                f"{links.devices} where there are several hosts, as {_example(chip)}"
            )
    elif not _exists(sides, links):
        raise ValueError(f"topology is {topology!r}; {chip} has {_offered(links)}, as {_example(chip)}")
    return sides


def _exists(sides: tuple[int, ...], links: Torus) -> bool:
    if not links.cubes:
        return tuple(sorted(sides)) in _SQUARES
    cubes = len(sides) == 3 and all(side % 4 == 0 and side <= _LONGEST for side in sides)
    return cubes or sides in _BELOW_A_CUBE


def _offered(links: Torus) -> str:
    if not links.cubes:
        return ", ".join("x".join(map(str, sides)) for sides in _SQUARES)
    small = ", ".join("x".join(map(str, sides)) for sides in _BELOW_A_CUBE)
    return f"{small} and three sides that are multiples of 4, at most {_LONGEST}"


def _with_devices(chip: str, devices: int) -> Target:
    links = CHIPS[chip].links
    if isinstance(links, Boxes):
        hosts = -(-devices // links.devices)
        if devices < 1 or (hosts > 1 and devices % links.devices):
            raise ValueError(
                f"devices is {devices}; of {chip} it must be from 1 to {links.devices}, or a multiple of "
                f"{links.devices}: boxes have {links.devices}"
            )
        return Target(chip, (hosts, min(devices, links.devices)))
    found = [target for target in _slices(chip, links) if target.devices == devices]
    if not found:
        sizes = sorted({target.devices for target in _slices(chip, links)})
        near = sorted(sorted(sizes, key=lambda size: abs(size - devices))[:4])
        raise ValueError(
            f"devices is {devices}; no slice of {chip} has so many: near it are {', '.join(map(str, near))}, or name "
            f"the topology, as {_example(chip)}"
        )
    return min(found, key=lambda target: (max(target.sides), target.sides))  # the shortest rings


def _slices(chip: str, links: Torus) -> list[Target]:
    if not links.cubes:
        return [Target(chip, sides) for sides in _SQUARES]
    steps = range(4, _LONGEST + 1, 4)
    cubes = [(x, y, z) for x in steps for y in steps if y >= x for z in steps if z >= y]
    return [Target(chip, sides) for sides in (*_BELOW_A_CUBE, *cubes)]


def _example(chip: str) -> str:
    gpu = CHIPS[chip].gpu is not None
    return CHIPS[chip].larger.removeprefix("1x") if gpu else CHIPS[chip].larger
