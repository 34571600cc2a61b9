"""The picture of a classifier's sweep: accuracy against FLOPs and against time, beside other models; depth by
difficulty."""

from typing import Any

from ..exit_plots import QUARTERS, mark_others
from ..places import Place
from ..plot_style import COLOURS, DASHED, QUIET, colours, drawing, entitle
from .exit_sweep import ClassifierSweep


def plot_classifier_sweep(found: ClassifierSweep, file: Place) -> Place:
    """Draw it, and return the file."""
    full = found.full
    with drawing(file, 5.6) as figure:
        (flops, seconds), (depth, difficulty) = figure.subplots(2, 2)
        _curve(flops, found, "flops", "FLOPs of an example, full model = 1")
        _curve(seconds, found, "seconds", "time of an example, full model = 1")
        depth.plot([p.layers for p in found.points], [p.accuracy for p in found.points], "o-", color=COLOURS[1], ms=3)
        depth.axhline(full.accuracy, color=QUIET, linestyle=DASHED, linewidth=0.8)
        depth.set_xlabel("layers of an example")
        depth.set_ylabel("accuracy")
        for number, colour in enumerate(colours(len(QUARTERS))):
            values = [point.by_difficulty[number] for point in found.points]
            places = [point.threshold for point in found.points]
            difficulty.plot(places, values, "o-", color=colour, markersize=3, label=QUARTERS[number])
        difficulty.set_xlabel("threshold")
        difficulty.set_ylabel("layers of an example")
        difficulty.legend(title="quarter of examples", fontsize=7, title_fontsize=7)
        entitle(figure, "Early exit", "Every point is a threshold; dashed is the full model, crosses are other models.")
    return file


def _curve(axes: Any, found: ClassifierSweep, cost: str, label: str) -> None:
    full = getattr(found.full, cost)
    costs = [getattr(point, cost) / full for point in found.points]
    axes.plot(costs, [point.accuracy for point in found.points], "o-", color=COLOURS[0], markersize=3)
    axes.axhline(found.full.accuracy, color=QUIET, linestyle=DASHED, linewidth=0.8)
    mark_others(axes, [(other.name, getattr(other, cost) / full, other.accuracy) for other in found.others])
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
