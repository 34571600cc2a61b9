"""`dynamoe inspect` prints what the routers did, and leaves pictures and a report."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dynamoe.experiments.commands import inspect, model_option
from dynamoe.experiments.commands.trained_run import parts_of_mixture
from dynamoe.experiments.data import HeldOut, Mixture, TextFiles
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.router_tables import token_table
from dynamoe.experiments.training.restore import Trained, as_trained
from dynamoe.experiments.training.routers import RouterStatistics, measure_routers, router_history
from dynamoe.experiments.training.specialization import total_variation
from dynamoe.experiments.training.step import build_trainer
from dynamoe.models import Decoder, Layout, MeshShape

Dynamoe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(beside: Any, tmp_path: Path) -> Path:
    """A copy of the trained run, for the command writes into it."""
    return shutil.copytree(beside.run, tmp_path / "mine")


def rows(output: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def row_of(layer: RouterStatistics) -> list[str]:
    busiest, idlest = layer.load.max() * 4, layer.load.min() * 4
    figures = (busiest, idlest, layer.max_violation, layer.entropy, layer.entropy / np.log(4))
    return [str(layer.layer), "4", *(f"{figure:.3f}" for figure in figures), f"{layer.dropped:.2%}"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Trained, HeldOut, list[RouterStatistics]]]:
    """What the command measures: model, text and statistics."""
    calls = []

    def remember(trained: Trained, text: HeldOut) -> list[RouterStatistics]:
        calls.append((trained, text, measure_routers(trained, text)))
        return calls[-1][-1]

    monkeypatch.setattr(inspect, "measure_routers", remember)
    return calls


def test_the_tables_hold_what_was_measured_and_logged(dynamoe: Dynamoe, run: Path, measured: list) -> None:
    status, output, errors = dynamoe("inspect", "--run-dir", run)
    assert (status, errors) == (0, "")
    found = rows(output)
    ((trained, text, statistics),) = measured
    validation = trained.experiment.source.documents("validation")
    assert (trained.step, text.bytes) == (3, sum(len(document.encode()) for document in validation))
    assert found[:2] == [row_of(layer) for layer in statistics]
    assert found[2:4] == token_table(statistics).cells  # the router sends a token to one expert: no pairs
    for row, (layer, of) in zip(found[4:], router_history(run).items(), strict=True):
        entropy = " → ".join(f"{value / np.log(4):.3f}" for value in of.entropy)  # three steps were logged
        violation = " → ".join(f"{value:.3f}" for value in of.max_violation)
        assert row == [str(layer), entropy, violation, "0.00%"]
    assert f"Measured on {text.bytes:,} bytes of held-out text, checkpoint of step 3." in output
    assert "Training batches of steps 1 → 2 → 3." in output
    files = [Path(line) for line in output.splitlines()[-5:]]
    names = ("loss.png", "expert_load.png", "routers.png", "token_experts.png", "report.html")
    assert files == [run / name for name in names]
    assert "dynamoe inspect --compare" in output
    assert all(file.is_file() for file in files)
    assert f"{text.bytes:,} bytes of held-out text" in files[-1].read_text()


def test_measures_on_the_text_that_is_given(dynamoe: Dynamoe, run: Path, tmp_path: Path) -> None:
    (tmp_path / "[a] text.txt").write_text("some text of one's own, in brackets [bold]\n" * 3)
    text = tmp_path / "[[]a] text.txt"  # a glob
    status, output, errors = dynamoe("inspect", "--run-dir", run, "--text", text)
    assert (status, errors) == (0, "")
    assert f"Measured on 129 bytes of {text}, checkpoint of step 3." in output


def test_compares_texts_with_each_other(dynamoe: Dynamoe, run: Path, tmp_path: Path, measured: list) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"all about {name} " * 10)
    others = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    status, output, errors = dynamoe("inspect", "--run-dir", run, "--compare", *others)
    assert (status, errors) == (0, "")
    (_, held_out, first), *rest = measured
    assert [text.bytes for _, text, _ in rest] == [140, 140] and held_out.bytes > 140
    apart = [f"{total_variation(first[0].load, statistics[0].load):.3f}" for _, _, statistics in rest]
    assert rows(output)[4][:3] == ["0", *apart]
    assert f"B: 140 bytes of {others[0]}; C: 140 bytes of {others[1]}" in output
    assert (run / "texts.png").is_file() and "--compare" not in output


def test_a_run_on_a_mixture_is_measured_on_each_of_its_sources(tiny: Callable[..., Experiment], text: Path) -> None:
    source = TextFiles(train=(str(text),), separator="\n\n")
    experiment = tiny(source=Mixture(sources=(source, dataclasses.replace(source, separator=None)), weights=(1.0, 2.0)))
    (first, one), (second, other) = parts_of_mixture(experiment, None)
    assert (first, second) == ("source 1, TextFiles", "source 2, TextFiles")
    assert (one.documents, other.documents) == (10, 1)
    assert parts_of_mixture(tiny(), None) == []


def test_a_run_without_routers_is_refused_in_one_line(
    dynamoe: Dynamoe,
    tiny: Callable[..., Experiment],
    dense_model: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = tiny(model=dense_model)
    layout = Layout(MeshShape(data=1).build(jax.devices()[:1]))
    trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=1)
    shapes = trainer.abstract_state
    trained = as_trained(experiment, trainer, shapes.params, shapes.variables, 0)
    monkeypatch.setattr(model_option, "load_trained", lambda path, step: trained)
    status, output, errors = dynamoe("inspect", "--run-dir", tmp_path)
    assert (status, output) == (1, "")
    assert re.match(r"dynamoe: error: the model has no routers, its networks are Dense\(", errors)
    assert len(errors.splitlines()) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--run-dir", "nowhere"), "run directory .*nowhere: no such directory"),
        (("--checkpoint", "7"), r"step is 7; .*checkpoints has \[3\]"),
        (("--max-bytes", "0"), "max_bytes=0: allowed are 1 and above"),
        (("--compare", *"abcdefgh"), "compare names 8 texts; it may name at most 7. A glob in quotes is one text"),
        (("--compare", "none.txt"), "'none.txt' matches no file"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, beside: Any, options: tuple[str, ...], message: str
) -> None:
    status, _, errors = dynamoe("inspect", *options)
    assert status == 1
    assert re.match(f"dynamoe: error: .*{message}", errors) and len(errors.splitlines()) == 2
