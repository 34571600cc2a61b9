"""The picture of a reproduction: every run by arm, and beside them what was claimed, with its interval and bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plot_style import COLOURS, DASHED, FAINT, INK, QUIET, colours, drawing, entitle
from .claims import STEP_TIME, Finding
from .results import findings_of

VERDICT_COLOURS = {"reproduced": COLOURS[2], "not reproduced": COLOURS[1], "inconclusive": QUIET}


def draw_results(results: dict[str, Any], file: Path) -> Path:
    """Draw one row of panels for each measure that a claim is about.

    Left: a dot for each run and a bar at the arm's mean; of step times the rounds. Right: each claim's estimate with
    its 95% interval, and the bound that the claim puts it below.

    Args:
        results: what `results.collect` made.
        file: the picture to write.

    Returns:
        `file`.
    """
    findings = findings_of(results)
    measures = list(dict.fromkeys(finding.measure for finding in findings))
    arms = list(results["arms"])
    rows = [max(len(arms), 1.6 * sum(finding.measure == name for finding in findings)) for name in measures]
    heights = [0.75 + 0.24 * count for count in rows]
    with drawing(file, sum(heights) + 0.6) as figure:
        panels = figure.subplots(len(measures), 2, squeeze=False, height_ratios=heights)
        for (left, right), name in zip(panels, measures, strict=True):
            _draw_arms(left, name, _values(results, name))
            _draw_findings(right, name, [finding for finding in findings if finding.measure == name])
        reading = "left: runs, thin lines join those of a seed; right: 95% intervals, claimed to lie left of the bar"
        entitle(figure, f"{results['title'].split(':')[0]}: {results['verdict']}", reading)
    return file


def _values(results: dict[str, Any], measure: str) -> dict[str, list[float]]:
    """What was measured, by arm; of step times in milliseconds."""
    if measure == STEP_TIME:
        return {arm: [1e3 * s for s in seconds] for arm, seconds in results["step_time"]["seconds"].items()}
    values: dict[str, list[float]] = {arm: [] for arm in results["arms"]}
    for run in results["runs"]:
        if run["measures"][measure] is not None:
            values[run["arm"]].append(run["measures"][measure])
    return values


def _draw_arms(axes: Any, measure: str, values: dict[str, list[float]]) -> None:
    timed = measure == STEP_TIME
    if not timed:  # the runs of a seed belong together
        rows = [row for row, numbers in enumerate(values.values()) if numbers]
        for pair in zip(*filter(None, values.values()), strict=True):
            axes.plot(pair, rows, color=FAINT, linewidth=0.8)
    for row, (numbers, colour) in enumerate(zip(values.values(), colours(len(values)), strict=True)):
        axes.plot(numbers, [row] * len(numbers), "o", color=colour, markersize=4, alpha=0.35 if timed else 0.8)
        if numbers:
            middle = sorted(numbers)[len(numbers) // 2] if timed else sum(numbers) / len(numbers)
            axes.plot([middle, middle], [row - 0.3, row + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(f"{measure}, ms; bar: median" if timed else f"{measure}; bar: mean")
    axes.grid(axis="x")


def _draw_findings(axes: Any, measure: str, findings: Sequence[Finding]) -> None:
    from matplotlib.ticker import MaxNLocator

    for row, finding in enumerate(findings):
        colour = VERDICT_COLOURS[finding.verdict]
        value, low, high, _, _ = finding.estimate
        axes.plot([low, high], [row, row], color=colour, linewidth=2)
        axes.plot([value], [row], "o", color=colour, markersize=5)
        axes.plot([finding.bound] * 2, [row - 0.28, row + 0.28], color=INK, linewidth=1.2)
        axes.annotate(
            f"{finding.quantity.split(', ', 1)[1]}: {finding.verdict}",
            (0.0, row - 0.36),
            xycoords=("axes fraction", "data"),
            fontsize=7.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.axvline(1.0 if measure == STEP_TIME else 0.0, color=QUIET, linewidth=0.8, linestyle=DASHED)
    axes.set_ylim(len(findings) - 0.5, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("ratio of step times" if measure == STEP_TIME else f"difference of {measure}")
    axes.grid(axis="x")
