"""Pictures of runs, as PNG: losses, the load of every expert, what the routers do over the steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import read_metrics
from .places import Place
from .plot_style import (
    COLOURS,
    DASHED,
    INK,
    LOAD,
    QUIET,
    colours,
    drawing,
    edges,
    entitle,
    load_bar,
    log_axis,
    marker,
    shades,
    step_axis,
)
from .training.routers import RouterHistory, RouterStatistics, entropy_share, router_history

MOST_LINES = 8
"""Experts that are drawn as lines of different colours; more are a heat map."""
MOST_NUMBERS = 16
"""Experts side by side whose load fits into the cells as a number."""


def plot_losses(runs: Mapping[str, Place], file: Place, *, baseline: tuple[str, float] | None = None) -> Place:
    """Draw the training loss (thin, bits per token) and the held-out loss (dots, bits per byte) of runs over steps.

    Args:
        runs: directories of runs by the name that the legend gives them.
        file: the picture to write.
        baseline: a name and its held-out bits per byte, drawn as a line.

    Returns:
        `file`.

    Raises:
        ValueError: there are no runs, or one has no training loss.
    """
    if not runs:
        raise ValueError("runs is empty; it must name at least one run")
    with drawing(file, 4.0) as figure:
        axes = figure.add_subplot()
        for (name, run), colour in zip(runs.items(), colours(len(runs)), strict=True):
            lines = read_metrics(run)
            training = [(line["step"], line["loss"] / math.log(2)) for line in lines if line["split"] == "train"]
            held_out = [(line["step"], line["bits_per_byte"]) for line in lines if line["split"] == "held_out"]
            if not training:
                raise ValueError(f"{run}: it has no training loss yet; train it first")
            last = f"{held_out[-1][1]:.3f} bits per byte" if held_out else "not evaluated yet"
            thin: Any = {"alpha": 0.45, "linewidth": 0.9, "marker": marker(training), "label": "_training"}
            axes.plot(*zip(*training, strict=True), color=colour, **thin)
            points = zip(*held_out, strict=True) if held_out else ((), ())
            axes.plot(*points, "o-", color=colour, markersize=4, label=f"{name}, {last}")
        if baseline is not None:
            label = f"{baseline[0]}, {baseline[1]:.3f} bits per byte"
            axes.axhline(baseline[1], color=INK, linestyle=DASHED, linewidth=1, label=label)
        # The first steps fall from log2 V; on a log scale they leave room for the rest.
        log_axis(axes)
        axes.set_ylabel("bits (log scale)")
        step_axis(axes, most=10)
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        entitle(
            figure, "Loss over training", "dots: held out, bits per byte; thin line: training batch, bits per token"
        )
    return file


def plot_expert_load(statistics: Sequence[RouterStatistics], file: Place) -> Place:
    """Draw a heat map, layer by expert, of each expert's load over the even share: 1 is even, 0 idle.

    Args:
        statistics: of each layer that routes; layers may have different numbers of experts.
        file: the picture to write.

    Returns:
        `file`.

    Raises:
        ValueError: there are no statistics.
    """
    if not statistics:
        raise ValueError("statistics is empty; it must have at least one layer")
    widest = max(layer.load.size for layer in statistics)
    load = np.full((len(statistics), widest), np.nan)
    for row, layer in zip(load, statistics, strict=True):
        row[: layer.load.size] = layer.load * layer.load.size
    with drawing(file, 1.35 + 0.3 * len(statistics)) as figure:
        axes = figure.add_subplot(facecolor="#f1f3f5")
        cells = axes.pcolormesh(load, **LOAD, edgecolors="white", linewidth=1 if widest <= 64 else 0)
        if widest <= MOST_NUMBERS:
            for (row, column), value in np.ndenumerate(load):
                if not np.isnan(value):
                    ink = "white" if abs(value - 1.0) > 0.66 else INK
                    axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        axes.set(xlabel="expert", ylabel="layer")
        numbers = np.arange(0, widest, max(1, widest // 16))
        axes.set_xticks(numbers + 0.5, numbers)
        axes.set_yticks(np.arange(len(load)) + 0.5, [layer.layer for layer in statistics])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        load_bar(figure, cells, axes, largest=np.nanmax(load))
        entitle(figure, "Load of every expert, 1 = its even share", _extremes(statistics, load))
    return file


def plot_router_history(run: Place, file: Place) -> Place:
    """Draw what the routers did over a run's steps: entropy, MaxVio and dropped share by layer, the load of experts.

    Args:
        run: the run's directory.
        file: the picture to write.

    Returns:
        `file`.

    Raises:
        ValueError: the run logged nothing about routers.
    """
    history = router_history(run)
    rows = math.ceil(len(history) / 4)
    columns = math.ceil(len(history) / rows)
    heights = (2.5, 0.5 + 1.5 * rows)
    with drawing(file, sum(heights) + 0.25) as figure:
        top, bottom = figure.subfigures(2, 1, height_ratios=heights, hspace=0.04)
        _draw_figures(top, history)
        _draw_loads(bottom, history, rows, columns)
    return file


def _draw_figures(figure: Any, history: Mapping[int, RouterHistory]) -> None:
    """A panel for each figure, a line for each layer."""
    panels = {
        "entropy, share of log E": [entropy_share(of.entropy, of.load.shape[1]) for of in history.values()],
        "MaxVio of a batch": [of.max_violation for of in history.values()],
    }
    if any((of.dropped > 0).any() for of in history.values()):
        panels["dropped share"] = [of.dropped for of in history.values()]
    for axes, (name, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (layer, of), line, colour in zip(history.items(), lines, shades(len(history)), strict=True):
            axes.plot(of.steps, line, color=colour, marker=marker(of.steps), markersize=3, label=f"layer {layer}")
        axes.set_title(name)
        step_axis(axes, most=5)
        axes.grid(axis="y")
        if not name.startswith("entropy"):
            axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # Of many layers every few are named: their shades go from dark to light.
    named = np.unique(np.linspace(0, len(handles) - 1, min(len(handles), 8)).round().astype(int))
    figure.legend([handles[i] for i in named], [labels[i] for i in named], loc="outside right upper")
    entitle(figure, "Routers over training", "training batches at the logged steps, one line per layer")


def _draw_loads(figure: Any, history: Mapping[int, RouterHistory], rows: int, columns: int) -> None:
    """A panel for each layer: lines where its experts are few, a heat map of steps and experts where they are many."""
    loads = {layer: of.load * of.load.shape[1] for layer, of in history.items()}
    few = {layer: load for layer, load in loads.items() if load.shape[1] <= MOST_LINES}
    alike = len({load.shape[1] for load in loads.values()}) == 1
    grid = figure.subplots(rows, columns, sharex=True, sharey=alike, squeeze=False)
    cells, panels = None, dict(zip(loads, grid.flat, strict=False))
    for layer, axes in panels.items():
        steps, load = history[layer].steps, loads[layer]
        axes.set_title(f"layer {layer}")
        if layer in few:
            axes.axhline(1.0, color=QUIET, linewidth=0.8, linestyle=DASHED)
            for expert, line in enumerate(load.T):
                label = f"expert {expert}"
                axes.plot(steps, line, color=COLOURS[expert], linewidth=1, marker=marker(steps), label=label)
            axes.set_ylim(0, 1.1 * max(load.max() for load in few.values()))
            axes.grid(axis="y")
        else:
            cells = axes.pcolormesh(edges(steps), np.arange(load.shape[1] + 1), load.T, **LOAD)
            axes.set_ylabel("expert" if not alike or axes in grid[:, 0] else "")
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(loads))
        step_axis(axes, most=4, named=number + columns >= len(loads))
    if cells is not None:
        load_bar(figure, cells, list(grid.flat), largest=max(load.max() for load in loads.values()))
    if few:
        widest = max(few, key=lambda layer: few[layer].shape[1])
        figure.legend(*panels[widest].get_legend_handles_labels(), loc="outside right upper")
    entitle(figure, "Load of every expert over training", "1 = its even share of the batch's assignments")


def _extremes(statistics: Sequence[RouterStatistics], load: np.ndarray) -> str:
    busy_row, busy = divmod(int(np.nanargmax(load)), load.shape[1])
    idle_row, idle = divmod(int(np.nanargmin(load)), load.shape[1])
    return (
        f"busiest: expert {busy} of layer {statistics[busy_row].layer}, {load[busy_row, busy]:.2f} times even; "
        f"idlest: expert {idle} of layer {statistics[idle_row].layer}, {load[idle_row, idle]:.2f} times"
    )
