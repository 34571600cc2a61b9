"""The visual language of all pictures: type, colours, a title with its reading, the scale of load.

Runs and experts have colours that the colour-blind can tell apart; layers go from dark to light; load is white where it
is even, red above and blue below, the same in every picture. Matplotlib is imported where it is used: that takes half a
second.
"""

import contextlib
import io
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np

from .files import write_picture
from .places import Place

WIDTH = 7.2
"""Inches."""
INK, QUIET, FAINT = "#22262b", "#68707a", "#d9dde2"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#7f6a4f")
DASHED = (0, (4, 3))
LOAD: Any = {"cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0}
"""How load over the even share is coloured, the same in every picture: white is 1, blue idle, red twice and above."""
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "legend.facecolor": "white",
    "legend.edgecolor": "white",
    "legend.framealpha": 1.0,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}


@contextlib.contextmanager
def drawing(file: Place, height: float) -> Iterator[Any]:
    """A figure to draw on; written when the block ends, whole or not at all. Height in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    write_picture(file, picture.getvalue())


def entitle(figure: Any, title: str, reading: str) -> None:
    """A bold title, and how to read the picture below it, at the left edge."""
    from matplotlib.transforms import ScaledTranslation

    edge = 0.08 / WIDTH
    # The layout leaves room for the title alone: its second, empty line is the reading's.
    figure.suptitle(f"{title}\n", x=edge, ha="left", fontsize=11, fontweight="bold", linespacing=1.3)
    below = figure.transSubfigure + ScaledTranslation(0, -21 / 72, figure.dpi_scale_trans)
    figure.text(edge, 1.0, reading, va="top", color=QUIET, transform=below)


def load_bar(figure: Any, cells: Any, axes: Any, *, largest: float) -> None:
    """The scale of the load beside the axes; it ends in an arrow where a load lies above it."""
    extend = "max" if largest > LOAD["vmax"] else "neither"
    shaded_bar(figure, cells, axes, label="load, times even", extend=extend)


def shaded_bar(figure: Any, cells: Any, axes: Any, *, label: str, extend: str = "neither") -> None:
    """The scale of shaded cells beside the axes."""
    aspect = figure.bbox.height / 15  # a tenth of an inch wide
    bar = figure.colorbar(cells, ax=axes, pad=0.01, aspect=aspect, label=label, extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def step_axis(axes: Any, *, most: int, named: bool = True) -> None:
    """Whole steps along the x axis, at most so many of them; named where there is no panel below."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    if named:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)


def log_axis(axes: Any) -> None:
    """A logarithmic y axis with round numbers on it."""
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def colours(count: int) -> list[Any]:
    """Colours that can be told apart; of more than there are, shades."""
    return list(COLOURS[:count]) if count <= len(COLOURS) else shades(count)


def shades(count: int) -> list[Any]:
    """Colours in order, from dark to light, as far as lines can be seen on white, and inverted on black."""
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.75, count)))


def edges(steps: np.ndarray) -> np.ndarray:
    """The borders of cells around the steps."""
    middle = (steps[1:] + steps[:-1]) / 2
    first, last = (middle[0], middle[-1]) if middle.size else (steps[0] - 0.5, steps[-1] + 0.5)
    return np.array([min(first, 2 * steps[0] - first), *middle, max(last, 2 * steps[-1] - last)])


def marker(points: Sized) -> str:
    """A line of one point is not seen."""
    return "o" if len(points) == 1 else ""
