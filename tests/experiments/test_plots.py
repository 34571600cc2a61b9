"""The picture of a run shows its losses."""

import json
import math
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from dynamoe.experiments.plots import plot_losses

LINES = [
    {"step": 1, "split": "train", "loss": 2.0},
    {"step": 2, "split": "train", "loss": 1.0},
    {"step": 2, "split": "held_out", "bits_per_byte": 2.5},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    saved, savefig = [], matplotlib.figure.Figure.savefig

    def remember(self: matplotlib.figure.Figure, *args: object, **kwargs: object) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", remember)
    return saved


def write(run: Path, lines: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_draws_both_losses_in_bits_and_the_baseline(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    write(tmp_path, LINES)
    picture = plot_losses(tmp_path, baseline=("order-3 n-gram", 3.25))
    assert picture == tmp_path / "loss.png"
    assert np.ptp(matplotlib.image.imread(picture)) > 0.5  # not an empty sheet
    drawn = {str(line.get_label()): line for line in figures[0].axes[0].get_lines()}
    training = drawn["training, bits per token"]
    np.testing.assert_array_equal(training.get_xdata(), [1, 2])
    np.testing.assert_allclose(np.asarray(training.get_ydata()), [2.0 / math.log(2), 1.0 / math.log(2)])
    np.testing.assert_array_equal(drawn["held out, bits per byte"].get_ydata(), [2.5])
    np.testing.assert_array_equal(drawn["order-3 n-gram, bits per byte"].get_ydata(), [3.25, 3.25])


def test_a_run_that_was_not_evaluated_yet_is_drawn(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    write(tmp_path, LINES[:2])
    assert plot_losses(tmp_path).is_file()
    assert len(figures[0].axes[0].get_lines()) == 1


def test_a_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics.jsonl: no such file"):
        plot_losses(tmp_path)
