"""Two pictures of a plan: what fills a device's memory, and where a step's time would go, for each mesh or step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..plot_style import COLOURS, DASHED, INK, QUIET, drawing, entitle
from .memory import Memory
from .roofline import Estimate

GIB = 2**30
CATEGORIES = (
    "parameters",
    "router state",
    "optimizer state",
    "key-value cache",
    "batch",
    "layout padding",
    "results",
    "temporaries",
)
"""Of memory, in the order and so in the colours of the picture."""

_TIMES = {"compute": COLOURS[0], "padding of kernels": COLOURS[5], "memory": COLOURS[1], "network": COLOURS[2]}


class Bar(NamedTuple):
    """One row of a picture."""

    label: str
    memory: Memory
    estimate: Estimate | None
    compiled: bool


def draw_memory(bars: Sequence[Bar], file: Path, *, title: str) -> Path:
    """A bar for each mesh or step, cut by category, and the device's capacity. Paler: by formulas."""
    capacity = bars[0].memory.capacity / GIB
    with drawing(file, 1.5 + 0.28 * len(bars)) as figure:
        axes = figure.subplots()
        seen = [name for name in CATEGORIES if any(bar.memory.parts().get(name) for bar in bars)]
        for name in seen:
            colour = COLOURS[CATEGORIES.index(name) % len(COLOURS)]
            for row, bar in enumerate(bars):
                parts = bar.memory.parts()
                left = sum(parts.get(before, 0) for before in CATEGORIES[: CATEGORIES.index(name)]) / GIB
                label = name if row == 0 else None
                axes.barh(row, parts.get(name, 0) / GIB, left=left, color=colour, label=label, **_shade(bar))
        largest = max(bar.memory.total for bar in bars) / GIB
        small = largest < capacity / 10  # beside the capacity nothing would be seen of it
        if not small:
            axes.axvline(capacity, color=INK, linestyle=DASHED, linewidth=1)
        axes.set_xlim(0, 1.05 * (largest if small else max(capacity, largest)))
        axes.set_xlabel("GiB on one device")
        _finish(figure, axes, bars)
        has = f"a device has {capacity:.1f} GiB" + ("" if small else ", dashed")
        entitle(figure, title, f"{has}; paler bars are by formulas, the others compiled")
    return file


def draw_time(bars: Sequence[Bar], file: Path, *, title: str) -> Path:
    """Three times for each mesh or step, one after the other; a tick where all of it overlaps."""
    known = [bar for bar in bars if bar.estimate is not None]
    with drawing(file, 1.5 + 0.28 * len(known)) as figure:
        axes = figure.subplots()
        for row, bar in enumerate(known):
            assert bar.estimate is not None
            left = 0.0
            for (name, colour), width in zip(_TIMES.items(), _widths(bar.estimate), strict=True):
                axes.barh(row, width, left=left, color=colour, label=name if row == 0 else None, **_shade(bar))
                left += width
            axes.plot([1e3 * bar.estimate.overlapped] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=1.4)
        axes.set_xlabel("ms of one step, an estimate")
        _finish(figure, axes, known)
        entitle(figure, title, "whole bars: nothing overlaps; black ticks: everything does; paler bars are by formulas")
    return file


def _widths(time: Estimate) -> tuple[float, ...]:
    """In milliseconds, in the order of `_TIMES`."""
    return tuple(1e3 * part for part in (time.compute, time.executed - time.compute, time.memory, time.network))


def _shade(bar: Bar) -> Any:
    return {"height": 0.66, "alpha": 1.0 if bar.compiled else 0.4}


def _finish(figure: Any, axes: Any, bars: Sequence[Bar]) -> None:
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.tick_params(axis="y", labelcolor=QUIET, length=0)
    axes.grid(axis="x")
    legend = figure.legend(loc="outside lower left", ncols=4, frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
