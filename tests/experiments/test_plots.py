"""The pictures show what was measured."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from dynamoe.experiments.plots import plot_expert_load, plot_losses, plot_router_history
from dynamoe.experiments.training.routers import RouterStatistics

LINES = [
    {"step": 1, "split": "train", "loss": 2.0},
    {"step": 2, "split": "train", "loss": 1.0},
    {"step": 2, "split": "held_out", "bits_per_byte": 2.5},
]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """`run("name", lines)`: a run's directory with these metrics."""

    def write(name: str, lines: list[dict]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return write


def statistics(layer: int, *load: float) -> RouterStatistics:
    return RouterStatistics(layer, np.array(load), np.array(load), 0.5, max(load) * len(load) - 1, 0.0)


def router_line(step: int, loads: Mapping[int, list[float]], *, dropped: float) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "split": "routers"}
    for layer, load in loads.items():
        figures = {"load": load, "importance": load, "entropy": math.log(2), "max_violation": 0.5, "dropped": dropped}
        line |= {f"layers.{layer}.{name}": value for name, value in figures.items()}
    return line


def lines_of(axes: Any) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def panels_of(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def test_losses_are_drawn_in_bits_beside_the_baseline(
    run: Callable[..., Path], tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    picture = plot_losses({"mixture": run("a", LINES)}, tmp_path / "x.png", baseline=("order-3 n-gram", 3.25))
    assert picture == tmp_path / "x.png"
    assert np.ptp(matplotlib.image.imread(picture)) > 0.5  # not an empty sheet
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["x.png"]  # no temporary file stays
    drawn = lines_of(figures[0].axes[0])
    np.testing.assert_array_equal(drawn["_training"].get_xdata(), [1, 2])
    np.testing.assert_allclose(np.asarray(drawn["_training"].get_ydata()), [2.0 / math.log(2), 1.0 / math.log(2)])
    np.testing.assert_array_equal(drawn["mixture, 2.500 bits per byte"].get_ydata(), [2.5])
    np.testing.assert_array_equal(drawn["order-3 n-gram, 3.250 bits per byte"].get_ydata(), [3.25, 3.25])


def test_each_run_has_its_colour_evaluated_or_not(
    run: Callable[..., Path], tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    plot_losses({"a": run("a", LINES), "b": run("b", LINES[:1])}, tmp_path / "x.png")
    training, held_out, other_training, other = figures[0].axes[0].get_lines()
    assert training.get_color() == held_out.get_color() != other.get_color() == other_training.get_color()
    assert other.get_label() == "b, not evaluated yet" and len(np.asarray(other.get_xdata())) == 0
    assert other_training.get_marker() == "o"  # one point is no line
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a, 2.500 bits per byte", "b, not evaluated yet"]


def test_losses_without_a_run_or_without_metrics_are_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs is empty; it must name at least one run"):
        plot_losses({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"metrics.jsonl: no such file"):
        plot_losses({"a": tmp_path}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"it has no training loss yet"):
        plot_losses({"a": run("a", [])}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_load_is_drawn_over_the_even_share_for_layers_of_unequal_width(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    plot_expert_load([statistics(1, 0.75, 0.25), statistics(4, 0.5, 0.25, 0.125, 0.125)], tmp_path / "x.png")
    axes = figures[0].axes[0]
    (cells,) = axes.collections
    drawn = np.ma.filled(cells.get_array(), np.nan)
    np.testing.assert_allclose(drawn, [[1.5, 0.5, np.nan, np.nan], [2.0, 1.0, 0.5, 0.5]])
    assert cells.norm(1.0) == 0.5  # even is the middle of the colours
    assert [text.get_text() for text in axes.texts] == ["1.50", "0.50", "2.00", "1.00", "0.50", "0.50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    reading = "busiest: expert 0 of layer 4, 2.00 times even; idlest: expert 1 of layer 1, 0.50 times"
    assert reading in [text.get_text() for text in figures[0].texts]


def test_load_of_many_experts_has_no_numbers_in_its_cells(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    crowded = np.full(128, 0.5 / 127)
    crowded[3] = 0.5
    picture = plot_expert_load([statistics(0, *crowded)], tmp_path / "x.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not figures[0].axes[0].texts
    assert figures[0].axes[1].get_ylabel() == "load, times even"


def test_load_of_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="statistics is empty; it must have at least one layer"):
        plot_expert_load([], tmp_path / "x.png")


def test_history_draws_few_experts_as_lines_and_many_as_cells(
    run: Callable[..., Path], tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    many = [1 / 32] * 32
    lines = [
        router_line(1, {0: [0.5, 0.5, 0.0, 0.0], 2: many}, dropped=0.0),
        router_line(5, {0: [0.25, 0.5, 0.25, 0.0], 2: many}, dropped=0.125),
    ]
    plot_router_history(run("a", lines), tmp_path / "x.png")
    panels = panels_of(figures[0])
    assert {"entropy, share of log E", "MaxVio of a batch", "dropped share", "layer 0", "layer 2"} <= set(panels)
    entropy = lines_of(panels["entropy, share of log E"])
    np.testing.assert_allclose(entropy["layer 0"].get_ydata(), [0.5, 0.5])  # log 2 of log 4
    np.testing.assert_allclose(entropy["layer 2"].get_ydata(), [0.2, 0.2])  # log 2 of log 32
    np.testing.assert_array_equal(lines_of(panels["dropped share"])["layer 0"].get_ydata(), [0.0, 0.125])
    loads = lines_of(panels["layer 0"])
    np.testing.assert_array_equal(loads["expert 0"].get_ydata(), [2.0, 1.0])
    np.testing.assert_array_equal(loads["expert 0"].get_xdata(), [1, 5])
    (cells,) = panels["layer 2"].collections
    np.testing.assert_allclose(np.asarray(cells.get_array()), np.ones((32, 2)))


def test_history_of_one_step_without_drops_is_drawn(
    run: Callable[..., Path], tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    lines = [router_line(1, {3: [1 / 16] * 16}, dropped=0.0)]
    plot_router_history(run("a", lines), tmp_path / "x.png")
    panels = panels_of(figures[0])
    assert "dropped share" not in panels
    (cells,) = panels["layer 3"].collections
    assert np.asarray(cells.get_array()).shape == (16, 1)


def test_history_of_a_dense_run_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was logged about routers"):
        plot_router_history(run("a", LINES), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
