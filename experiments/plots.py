"""Plots of a run, as PNG."""

import math
from pathlib import Path

from .run_directory import read_metrics


def plot_losses(run: Path, *, baseline: tuple[str, float] | None = None) -> Path:
    """Draw training loss and held-out loss over steps, both in bits, into `loss.png` in the run's directory.

    Args:
        run: a run's directory with metrics.
        baseline: a name and its held-out bits per byte, drawn as a line.

    Returns:
        The picture's path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(run)
    training = [(line["step"], line["loss"] / math.log(2)) for line in lines if line["split"] == "train"]
    measured = [(line["step"], line["bits_per_byte"]) for line in lines if line["split"] == "held_out"]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="training, bits per token")
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color="tab:red", markersize=4, label="held out, bits per byte")
    if baseline is not None:
        axes.axhline(baseline[1], color="black", linestyle="--", linewidth=1, label=f"{baseline[0]}, bits per byte")
    axes.set(xlabel="step", ylabel="bits", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path)
    return path
