"""Pictures of what experts specialise in: which work together, how far tokens decide them, how texts differ."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .places import Place
from .plot_style import DASHED, INK, QUIET, colours, drawing, entitle, shaded_bar
from .router_tables import Measured, first_middle_last, lettered
from .training.routers import RouterStatistics
from .training.specialization import (
    coactivation,
    halves_apart,
    pairs_up,
    strongest_pairs,
    token_specialization,
    total_variation,
)

MOST_PANELS = 6
"""Layers whose pairs are drawn; of more, some from first to last."""
MOST_EXPERTS = 64
"""Experts of a layer whose pairs are drawn; of more, those of the strongest pairs."""
MOST_NUMBERS = 10
"""Experts side by side in a panel whose cells have room for a number."""


def plot_coactivation(statistics: Sequence[RouterStatistics], file: Place) -> Place:
    """Draw, layer by layer, the share of each expert's tokens (row) that also went to another (column).

    Args:
        statistics: of each layer that routes, with counts; layers that choose one expert per token are left out.
        file: the picture to write.

    Returns:
        `file`.

    Raises:
        ValueError: no layer sends tokens to several experts, or nothing was counted.
    """
    paired = [layer for layer in statistics if layer.counts and pairs_up(layer.counts)]
    if not paired:
        raise ValueError("statistics has no layer that sends a token to several experts; there are no pairs to draw")
    drawn = [paired[i] for i in _spread(len(paired), MOST_PANELS)]
    panels = [_pairs(layer) for layer in drawn]
    largest = max(float(np.nanmax(shares)) for _, shares in panels)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = 6.2 / columns if columns > 1 else 3.6
    with drawing(file, 0.85 + (size + 0.2) * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        cells = None
        for axes, layer, (experts, shares) in zip(grid.flat, drawn, panels, strict=False):
            cells = _draw_pairs(axes, experts, shares, largest)
            axes.set_title(f"layer {layer.layer}")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        shaded_bar(figure, cells, list(grid.flat), label="share of the row's tokens")
        entitle(figure, "Experts that take the same tokens", _reading(paired, drawn))
    return file


def plot_token_specialization(statistics: Sequence[RouterStatistics], file: Place) -> Place:
    """Draw how far the token id alone decides the expert, over the layers, beside what chance would give.

    Args:
        statistics: of each layer that routes, with counts.
        file: the picture to write.

    Returns:
        `file`.

    Raises:
        ValueError: nothing was counted.
    """
    found = {layer.layer: token_specialization(layer.counts) for layer in statistics if layer.counts}
    if not found:
        raise ValueError("statistics has no counts; measure the routers on a text")
    layers = np.array(list(found))
    blue, grey = colours(1)[0], QUIET
    with drawing(file, 2.9) as figure:
        known, favourite = figure.subplots(1, 2)
        known.plot(layers, [of.entropy for of in found.values()], ":", color=INK, marker=".", label="there is to know")
        known.plot(layers, [of.information for of in found.values()], "o-", color=blue, markersize=4, label="known")
        chance: Any = {"color": grey, "linestyle": DASHED, "marker": ".", "linewidth": 1, "label": "by chance"}
        known.plot(layers, [of.information_by_chance for of in found.values()], **chance)
        known.set_title("bits about the expert, from the token id")
        favourite.plot(layers, [of.favourite for of in found.values()], "o-", color=blue, markersize=4)
        favourite.plot(layers, [of.favourite_by_chance for of in found.values()], **chance)
        favourite.set_title("share of a token that its favourite expert takes")
        for axes in (known, favourite):
            axes.set_ylim(bottom=0)
            axes.margins(y=0.1)
            axes.set_xlabel("layer")
            axes.set_xticks(layers[:: math.ceil(len(layers) / 12)])
            axes.grid(axis="y")
        favourite.set_ylim(0, 1.03)
        figure.legend(*known.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        entitle(figure, "Experts and token ids", "what the token id does not decide, its context does")
    return file


def plot_comparison(texts: Sequence[Measured], file: Place) -> Place:
    """Draw the load of every expert on several texts, and how far each layer's load on them is apart.

    Args:
        texts: two or more, each its name and the statistics of the same layers, with counts.
        file: the picture to write.

    Returns:
        `file`.

    Raises:
        ValueError: there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"texts has {len(texts)} texts; it must have at least two to compare")
    layers = texts[0][1]
    shown = first_middle_last(len(layers))
    heights = [2.0, *([1.55] * len(shown))]
    with drawing(file, 0.9 + 0.18 * len(texts) + sum(heights)) as figure:
        top, *panels = figure.subplots(len(heights), 1, height_ratios=heights)
        _draw_distances(top, texts)
        for axes, place in zip(panels, shown, strict=True):
            _draw_loads(axes, texts, place)
        panels[-1].set_xlabel("expert")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left")
        entitle(
            figure, "Load on several texts", "the share of A's assignments that go elsewhere, and every expert's load"
        )
    return file


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` places from first to last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _pairs(layer: RouterStatistics) -> tuple[list[int], np.ndarray]:
    """The experts to draw, and the shares among them."""
    assert layer.counts is not None
    together = layer.counts.together
    experts = list(range(len(together)))
    if len(experts) > MOST_EXPERTS:
        pairs = strongest_pairs(together, most=len(experts) * MOST_EXPERTS)
        found = dict.fromkeys(expert for pair in pairs for expert in (pair.first, pair.second))
        experts = sorted(list(found)[:MOST_EXPERTS])
    return experts, coactivation(together)[np.ix_(experts, experts)]


def _draw_pairs(axes: Any, experts: list[int], shares: np.ndarray, largest: float) -> Any:
    count = len(experts)
    axes.set_facecolor("#e9ecef")
    line: Any = {"edgecolors": "white", "linewidth": 1 if count <= 16 else 0.25 if count <= 40 else 0}
    cells = axes.pcolormesh(np.ma.masked_invalid(shares), cmap="Purples", vmin=0.0, vmax=largest, **line)
    if count <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(shares):
            if not np.isnan(value):
                ink = "white" if value > 0.6 * largest else INK
                text = f"{100 * value:.0f}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=7)
    places = np.arange(0, count, max(1, count // 8))
    axes.set_xticks(places + 0.5, [experts[place] for place in places])
    axes.set_yticks(places + 0.5, [experts[place] for place in places])
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return cells


def _reading(paired: Sequence[RouterStatistics], drawn: Sequence[RouterStatistics]) -> str:
    widest = max(layer.load.size for layer in drawn)
    parts = ["share of the row's tokens that the column took too" + (", percent" if widest <= MOST_NUMBERS else "")]
    if len(drawn) < len(paired):
        parts.append(f"{len(drawn)} of {len(paired)} layers")
    if widest > MOST_EXPERTS:
        parts.append(f"{MOST_EXPERTS} experts of strong pairs")
    return "; ".join(parts)


def _draw_distances(axes: Any, texts: Sequence[Measured]) -> None:
    """Total variation from the first text, over the layers."""
    (_, first), *others = texts
    layers = np.array([layer.layer for layer in first])
    colour = colours(len(texts))
    for place, (_, statistics) in enumerate(others, 1):
        apart = [total_variation(one.load, other.load) for one, other in zip(first, statistics, strict=True)]
        axes.plot(layers, apart, "o-", color=colour[place], markersize=4, label="_text")
    floors = [[halves_apart(layer.counts) for layer in of if layer.counts] for _, of in texts]
    if all(len(floor) == len(layers) for floor in floors):
        floor = np.max(floors, axis=0)
        axes.plot(layers, floor, color=QUIET, linestyle=DASHED, linewidth=1, marker=".", label="halves of one text")
        axes.legend(loc="best")
    axes.set_title("share of the assignments that go elsewhere than on A")
    axes.set_xlabel("layer")
    axes.set_xticks(layers[:: math.ceil(len(layers) / 24)])
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.grid(axis="y")


def _draw_loads(axes: Any, texts: Sequence[Measured], place: int) -> None:
    """A dot for each text and expert, joined by a line where they are apart."""
    loads = np.array([statistics[place].load * statistics[place].load.size for _, statistics in texts])
    experts = np.arange(loads.shape[1])
    axes.axhline(1.0, color=QUIET, linewidth=0.8, linestyle=DASHED)
    axes.vlines(experts, loads.min(axis=0), loads.max(axis=0), color=QUIET, linewidth=1, alpha=0.6)
    size = 5 if experts.size <= 16 else 3 if experts.size <= 64 else 1.8
    letters, _ = lettered(texts)
    for letter, (name, _), load, colour in zip(letters, texts, loads, colours(len(texts)), strict=True):
        axes.plot(experts, load, "o", color=colour, markersize=size, label=f"{letter}: {_short(name)}")
    axes.set_title(f"layer {texts[0][1][place].layer}: load, 1 = even")
    axes.set_xticks(experts[:: max(1, experts.size // 16)])
    axes.set_xlim(-0.6, experts.size - 0.4)
    axes.set_ylim(0, 1.08 * max(loads.max(), 1.0))
    axes.grid(axis="y")


def _short(name: str, most: int = 90) -> str:
    """A name that fits on a line: its middle is left out."""
    return name if len(name) <= most else f"{name[: most // 2]} … {name[-most // 2 :]}"
