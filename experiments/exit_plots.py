"""The picture of a sweep of early exit's thresholds: quality against FLOPs and against time, and time by difficulty."""

from collections.abc import Sequence
from typing import Any

from .exit_sweep import Sweep
from .places import Place
from .plot_style import COLOURS, DASHED, QUIET, colours, drawing, entitle

QUARTERS = ("easiest", "second", "third", "hardest")


def plot_sweep(found: Sweep, file: Place) -> Place:
    """Draw it, and return the file."""
    full, *points = found.points
    with drawing(file, 5.6) as figure:
        (flops, seconds), (shares, difficulty) = figure.subplots(2, 2)
        _curve(flops, found, "flops", "FLOPs per token, full model = 1")
        _curve(seconds, found, "seconds", "time per token, full model = 1")
        shares.plot([p.layers for p in points], [p.disagreement for p in points], "o-", color=COLOURS[1], markersize=3)
        shares.set_xlabel("layers per token")
        shares.set_ylabel("tokens unlike the full model's")
        places = [p.threshold for p in points]
        for number, colour in enumerate(colours(len(QUARTERS))):
            values = [p.by_difficulty[number] / full.by_difficulty[number] for p in points]
            difficulty.plot(places, values, "o-", color=colour, markersize=3, label=QUARTERS[number])
        difficulty.axhline(1, color=QUIET, linestyle=DASHED, linewidth=0.8)
        difficulty.set_xlabel("threshold")
        difficulty.set_ylabel("time per token, full model = 1")
        difficulty.legend(title="quarter of prompts", fontsize=7, title_fontsize=7)
        entitle(figure, "Early exit", "Every point is a threshold; dashed is the full model, crosses are other models.")
    return file


def _curve(axes: Any, found: Sweep, cost: str, label: str) -> None:
    full, *points = found.points
    costs = [getattr(point, cost) / getattr(full, cost) for point in points]
    axes.plot(costs, [point.bits_per_byte for point in points], "o-", color=COLOURS[0], markersize=3)
    axes.axhline(full.bits_per_byte, color=QUIET, linestyle=DASHED, linewidth=0.8)
    mark_others(
        axes, [(other.name, getattr(other, cost) / getattr(full, cost), other.bits_per_byte) for other in found.others]
    )
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")


def mark_others(axes: Any, others: Sequence[tuple[str, float, float]]) -> None:
    """A cross with its name for each other model: its cost and its quality."""
    for name, *place in others:
        axes.plot(*place, "x", color=COLOURS[1], markersize=6)
        axes.annotate(name, place, textcoords="offset points", xytext=(5, -8), fontsize=7, color=QUIET)
