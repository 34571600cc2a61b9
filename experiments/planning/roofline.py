"""An estimate of a step's time from counted work and the peaks of the chip. It is no measurement.

Three times: what the matrix units need at their peak, what the memory needs for bytes that have to move, what the links
need for the collectives. Where all of it overlaps, the longest is the step's time; where nothing does, their sum.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...kernels.chips import CHIPS, Boxes
from ...kernels.collectives import Collective
from .network import seconds, wire_bytes
from .placement import PlacedMesh


class Exchange(NamedTuple):
    """A collective with what it costs in one step, on one device."""

    kind: str
    bytes: float
    """Of its result, once."""
    axes: tuple[str, ...] | None
    times: float | None
    """In a step; None: not known, and counted as once."""
    wire_bytes: float
    """That a device takes in, in a step."""
    seconds: float
    """In a step, at least."""


class Estimate(NamedTuple):
    """Times of one step in seconds, and what was counted for them."""

    compute: float
    """Of the products that the step needs."""
    executed: float
    """Of all that the program executes where ragged products skip the rows that a balanced load leaves empty."""
    memory: float
    network: float
    model_flops: float
    """Of one step over all devices: what the model asks for, nothing twice."""
    executed_flops: float | None
    """Of the program, with what it computes again and pads; None: not counted."""
    peak_flops: float
    """Of all devices, in one second."""

    @property
    def overlapped(self) -> float:
        """Where everything overlaps and kernels skip all they can."""
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        """Where nothing overlaps."""
        return self.executed + self.memory + self.network

    def utilization(self, time: float) -> float:
        """Share of the peak that the model's own flops are, in a step of this time."""
        return self.model_flops / (time * self.peak_flops) if time else math.nan

    def executed_utilization(self, time: float) -> float | None:
        """The same of all that the program computes; it may be above 1 where a count is a bound."""
        return None if self.executed_flops is None or not time else self.executed_flops / (time * self.peak_flops)


def exchanges_of(collectives: Sequence[Collective], placement: PlacedMesh) -> list[Exchange]:
    """The collectives of a compiled step, the slowest first."""
    found = [exchange(c.kind, c.bytes, c.axes, c.times, placement) for c in collectives]
    return sorted(found, key=lambda one: -one.seconds)


def exchange(
    kind: str, size: int | float, axes: tuple[str, ...] | None, times: int | float | None, placement: PlacedMesh
) -> Exchange:
    """One collective, with the links of the mesh axes that it runs over; all links where the axes are not known."""
    span, count = placement.span(axes), 1 if times is None else times
    moved = wire_bytes(kind, size, span.devices)
    return Exchange(kind, size, axes, times, count * moved, count * seconds(kind, size, span))


def estimate(
    placement: PlacedMesh,
    *,
    model_flops: int | float,
    needed_flops: int | float,
    executed_flops: int | float | None,
    hbm_bytes: int | float,
    exchanges: Sequence[Exchange],
) -> Estimate:
    """Estimate one step.

    Args:
        placement: the devices.
        model_flops: over all devices, that the model asks for.
        needed_flops: with what the step computes again because its experiment says so.
        executed_flops: of the program; None: those that are needed.
        hbm_bytes: that one device's memory has to read and write.
        exchanges: of one device.
    """
    chip = CHIPS[placement.target.chip]
    peak = chip.flops * placement.mesh.size
    executed = needed_flops if executed_flops is None else executed_flops
    return Estimate(
        compute=min(needed_flops, executed) / peak,
        executed=executed / peak,
        memory=hbm_bytes / chip.hbm_bandwidth,
        network=math.fsum(one.seconds for one in exchanges),
        model_flops=model_flops,
        executed_flops=executed_flops,
        peak_flops=peak,
    )


def assumptions(chip: str) -> list[str]:
    """What an estimate takes for granted, line by line."""
    links = CHIPS[chip].links
    return [
        f"matrix units at {CHIPS[chip].flops / 1e12:g} TFLOP/s per device, the peak for bfloat16, whatever the dtype; "
        "elementwise work is free",
        f"memory at its peak, {CHIPS[chip].hbm_bandwidth / 1e9:g} GB/s; bytes are a lower bound: arguments read and "
        "results written once, temporaries written and read once, and the weights in the compute dtype moved in each "
        "pass (forward, recomputation, and twice in the backward pass)",
        f"links at their peak, {links}; no latency, and one collective after the other",
        "a collective over unknown mesh axes runs over all of them; one in a loop of unknown length counts once",
        "overlapped: the longest of the three, with the products that the step needs; nothing overlapped: their sum, "
        "with all that the program executes, rows that a capacity pads included. A real step reaches no peak, so that "
        "it may lie above both",
        "ragged products skip rows that belong to no expert, and loads are balanced"
        + ("; XLA's own on a GPU does not skip, and takes E times as long" if isinstance(links, Boxes) else ""),
        "model flops are three forward passes of every token in training and one in generation, attention over the "
        "whole sequence counted, nothing computed twice; executed flops count the larger side of a branch",
    ]
