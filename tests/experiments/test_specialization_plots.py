"""The pictures and tables of specialisation show what was counted."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from dynamoe.experiments import router_tables
from dynamoe.experiments.data import Bytes
from dynamoe.experiments.router_tables import (
    comparison_table,
    differences_table,
    favourites_table,
    pairs_table,
    token_table,
)
from dynamoe.experiments.specialization_plots import plot_coactivation, plot_comparison, plot_token_specialization
from dynamoe.experiments.training.routers import RouterStatistics
from dynamoe.experiments.training.routing_counts import RoutingCounts

A, NEWLINE = 65, 10


def layer(number: int, *, pairs: bool = True, moved: int = 0) -> RouterStatistics:
    """20 times "A" and 20 line ends. All "A" go to expert 0, with expert 1 (16) or 2 (4); line ends to 2 alone."""
    together = np.array([[20, 16, 4], [16, 16, 0], [4, 0, 24]]) if pairs else np.diag([20, 0, 20])
    by_id = np.array([[20, 16, 4], [0, 0, 20]]) if pairs else np.array([[20, 0, 0], [0, 0, 20]])
    halves = np.stack([by_id.sum(axis=0) // 2 + [moved, 0, -moved], by_id.sum(axis=0) // 2])
    load = halves.sum(axis=0) / halves.sum()
    counts = RoutingCounts(together, 40, np.array([A, NEWLINE]), np.array([20, 20]), by_id, halves)
    return RouterStatistics(number, load, load, 0.5, float(load.max() * 3 - 1), 0.0, counts)


LOGGED = layer(0)._replace(counts=None)


def texts_of(axes: matplotlib.figure.Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_coactivation_is_drawn_in_percent_of_the_row_for_layers_with_pairs(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    picture = plot_coactivation([layer(1), layer(2, pairs=False), layer(4)], tmp_path / "x.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figures[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["layer 1", "layer 4"]
    assert texts_of(panels[0]) == ["80", "20", "100", "0", "17", "0"]


def test_of_many_experts_and_layers_some_are_drawn(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    wide = np.full((80, 80), 1) + np.diag(np.full(80, 9))
    wide[70, 79] = wide[79, 70] = 8
    one = layer(0)
    assert one.counts is not None
    statistics = [
        one._replace(layer=i, load=np.full(80, 1 / 80), counts=one.counts._replace(together=wide)) for i in range(8)
    ]
    plot_coactivation(statistics, tmp_path / "x.png")
    panels = [axes for axes in figures[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [f"layer {i}" for i in (0, 1, 3, 4, 6, 7)]
    (cells,) = panels[0].collections
    drawn = np.ma.filled(cells.get_array(), np.nan).reshape(64, 64)
    assert np.nanmax(drawn) == 0.8 and not panels[0].texts  # the strong pair is among those that are drawn
    assert "6 of 8 layers; 64 experts of strong pairs" in figures[0].texts[-1].get_text()


def test_without_pairs_or_counts_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer that sends a token to several experts"):
        plot_coactivation([layer(0, pairs=False), LOGGED], tmp_path / "x.png")
    with pytest.raises(ValueError, match="statistics has no counts; measure the routers on a text"):
        plot_token_specialization([LOGGED], tmp_path / "x.png")
    with pytest.raises(ValueError, match="texts has 1 texts; it must have at least two"):
        plot_comparison([("a", [layer(0)])], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_token_specialization_is_drawn_over_the_layers(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    plot_token_specialization([layer(1, pairs=False), layer(3)], tmp_path / "x.png")
    known, favourite = figures[0].axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in known.get_lines()}
    assert lines["known"][0] == pytest.approx(1.0)  # two tokens, each with an expert of its own: one bit
    assert lines["by chance"][0] < 0.2
    np.testing.assert_allclose(np.asarray(favourite.get_lines()[0].get_ydata()), [1.0, 1.0])
    np.testing.assert_array_equal(np.asarray(favourite.get_lines()[0].get_xdata()), [1, 3])


def test_texts_are_drawn_side_by_side(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    plot_comparison([("one", [layer(0), layer(2)]), ("x" * 200, [layer(0, pairs=False)] * 2)], tmp_path / "x.png")
    top, *panels = figures[0].axes
    apart, floor = top.get_lines()
    # Loads (20, 16, 24) of 60 and (1, 0, 1) of 2: the 16 that expert 1 has move to the others.
    np.testing.assert_allclose(np.asarray(apart.get_ydata()), [16 / 60] * 2)
    np.testing.assert_allclose(np.asarray(floor.get_ydata()), [0.0, 0.0])
    assert floor.get_label() == "halves of one text" and len(panels) == 2
    dots = [line for line in panels[0].get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(np.asarray(dots[0].get_ydata()), [1.0, 0.8, 1.2])
    np.testing.assert_allclose(np.asarray(dots[1].get_ydata()), [1.5, 0.0, 1.5])
    assert str(dots[1].get_label()).startswith("B: xxx") and len(str(dots[1].get_label())) < 100


def test_the_tables_say_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pairs_table([layer(1), layer(2, pairs=False), LOGGED])
    # 20 pairs fall on products of loads 320, 480 and 384: experts 0 and 1 would share 20 * 320 / 1184 = 5.41.
    assert table.cells[0] == ["1", "0 and 1", "16", "80.0%", "100.0%", "2.96"]
    assert [row[1] for row in table.cells] == ["0 and 1", "0 and 2"]
    (row,) = token_table([layer(2, pairs=False)]).cells
    assert row[:3] == ["2", "1.000", "1.000"] and row[4] == "100.0%"
    expected = [["0", "1.00", "A 100%"], ["1", "0.80", "A 80%"], ["2", "1.20", "\\n 100%   A 20%"]]
    assert favourites_table(layer(3), Bytes()).cells == expected
    monkeypatch.setattr(router_tables, "MOST_EXPERTS", 2)
    short = favourites_table(layer(3), Bytes())
    assert [row[0] for row in short.cells] == ["0", "2"] and "The 2 busiest of 3 experts" in short.caption


def test_texts_are_compared_with_the_first_and_with_halves_of_one() -> None:
    texts = [("one text", [layer(0, moved=3)]), ("another", [layer(0, pairs=False)])]
    (row,) = comparison_table(texts).cells
    assert row[0] == "0" and row[2] == "0.100"  # 3 of 30 assignments
    assert "A: one text; B: another" in comparison_table(texts).caption
    rows = differences_table(texts).cells
    assert rows[0][0] == "layer 0, expert 1" and rows[0][2] == "0.00"
