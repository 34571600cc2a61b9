"""A mesh laid over devices that are not here, and the links that each of its axes runs over.

On a TPU every mesh axis takes whole sides of the slice, so that its devices are neighbours; of GPUs the last axes share
a box. A mesh that would have to cut a side in two is refused.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ...kernels.aot import absent_devices
from ...kernels.chips import CHIPS, Boxes, Torus
from ...models import MeshShape
from .target import Target

AXES = ("data", "fsdp", "expert", "tensor")


class Side(NamedTuple):
    """What a group of devices spans along one side of a slice."""

    devices: int
    closed: bool
    """To a ring."""
    link: float
    """Bytes per second, one way."""


class Span(NamedTuple):
    """What a group of devices spans: sides of a TPU slice, or hosts and devices in each."""

    devices: int
    sides: tuple[Side, ...] = ()
    """Of a slice; empty of GPUs."""
    hosts: int = 1
    boxes: Boxes | None = None


class PlacedMesh(NamedTuple):
    """A mesh of absent devices, and where it lies."""

    target: Target
    mesh: Mesh

    def span(self, axes: Sequence[str] | None) -> Span:
        """What the devices along some mesh axes span; None: all axes, where it is not known along which."""
        names = [name for name in (AXES if axes is None else axes) if self.mesh.shape[name] > 1]
        index = tuple(slice(None) if name in names else 0 for name in self.mesh.axis_names)
        group = [device for device in self.mesh.devices[index].ravel()]
        links = CHIPS[self.target.chip].links
        if isinstance(links, Boxes):
            first = min(device.id for device in self.mesh.devices.ravel())
            hosts = {(device.id - first) // self.target.sides[1] for device in group}
            return Span(len(group), hosts=len(hosts), boxes=links)
        return Span(len(group), sides=_sides(group, self.target, links))


def place(mesh: MeshShape, target: Target) -> PlacedMesh:
    """Lay a mesh over the target's devices.

    Raises:
        ValueError: the mesh has another number of devices, or the slice cannot hold it; the message says what it can.
        ModuleNotFoundError: the chip's compiler is not installed.
        ImportError: it is not the one that JAX names.
    """
    return _place(mesh, target, absent_devices(target.name))


def _place(mesh: MeshShape, target: Target, devices: Sequence[Any]) -> PlacedMesh:
    try:
        plain = mesh.build(devices)
    except ValueError as error:
        raise ValueError(
            f"{target.chip} {target.topology} has {len(devices)} devices. {error}; as --mesh.data 1 --mesh.fsdp "
            f"{len(devices)}"
        ) from error
    if isinstance(CHIPS[target.chip].links, Boxes):
        return PlacedMesh(target, plain)  # devices count through their box first, and so do the last axes of a mesh
    sizes = [plain.shape[name] for name in AXES]
    try:
        arranged = mesh_utils.create_device_mesh(sizes, devices)
    except (NotImplementedError, ValueError) as error:
        shown = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ValueError(
            f"mesh is {shown}; {target.chip} {target.topology} cannot hold it: each axis must take whole sides of the "
            f"slice, so it may have {_sizes(target)} devices"
        ) from error
    return PlacedMesh(target, Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def possible_meshes(target: Target) -> list[tuple[MeshShape, PlacedMesh]]:
    """Every mesh that the devices can hold, each with its placement."""
    devices, found = absent_devices(target.name), []
    for sizes in factorizations(len(devices), len(AXES)):
        shape = MeshShape(**dict(zip(AXES, sizes, strict=True)))
        try:
            found.append((shape, _place(shape, target, devices)))
        except ValueError:
            continue  # the slice cannot hold it
    return found


def factorizations(number: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write a number as a product of so many ordered factors."""
    if parts == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in factorizations(number // d, parts - 1)]


def _sides(group: Sequence[Any], target: Target, links: Torus) -> tuple[Side, ...]:
    """The sides of the slice that a group of TPU devices reaches along."""
    places = np.array([(*device.coords, device.core_on_chip) for device in group])
    reach = [len(set(column)) for column in places.T]
    closed = (*links.closed(target.sides), *(False,) * (len(reach) - len(target.sides)))
    rates = [links.link] * (len(reach) - 1) + [links.die or links.link]
    # A group takes whole sides: it is closed where the side is.
    sides = [Side(n, ring, rate) for n, ring, rate in zip(reach, closed, rates, strict=True) if n > 1]
    if math.prod(side.devices for side in sides) != len(group):
        return (Side(len(group), False, links.link),)  # they lie askew: as one line
    return tuple(sides)


def _sizes(target: Target) -> str:
    links = CHIPS[target.chip].links
    sides = target.sides if isinstance(links, Boxes) or links.die is None else (*target.sides, 2)
    chosen = itertools.chain.from_iterable(itertools.combinations(sides, n) for n in range(len(sides) + 1))
    return ", ".join(map(str, sorted({math.prod(some) for some in chosen})))
