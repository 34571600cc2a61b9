"""`dynamoe train` and `evaluate` of classifiers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamoe.experiments.commands import evaluate_classifier

Dynamoe = Callable[..., tuple[int, str, str]]
RECIPE = """
from dynamoe.dynamic import Exits
from dynamoe.experiments.classification import ClassificationExperiment
from dynamoe.models import Attention, Dense, VisionTransformer


def recipe():
    model = VisionTransformer(image=(8, 8, 1), patch=4, width=16, layers=2, attention=Attention(heads=2),
                              ffn=Dense(hidden=16), exits=Exits(after=(1,)))
    return ClassificationExperiment(model=model, steps=4, batch_size=16, evaluate_every=2, log_every=1)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny_digits.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def run(dynamoe: Dynamoe, recipe: Path) -> Path:
    """The recipe's run, trained by the first test that asks."""
    path = recipe.with_name("run")
    if not path.exists():
        status, output, errors = dynamoe("train", recipe, "--run-dir", path)
        assert (status, errors) == (0, ""), errors
        assert re.search(r"step 4: accuracy \d+\.\d\d% after 1, \d+\.\d\d% after 2 layers, on 150 examples", output)
        assert re.search(r"test, after the last step: accuracy .* on 300 examples", output)
    return path


def test_a_classifier_is_swept_calibrated_and_answers_by_its_guarantee(
    dynamoe: Dynamoe, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_classifier, "THRESHOLDS", (1.0, 0.0))
    monkeypatch.setattr(evaluate_classifier, "ROUNDS", 1)
    status, output, errors = dynamoe("evaluate", "--run-dir", run)
    assert (status, errors) == (0, "") and re.search(r"test, at step \d: accuracy .* on 300 examples", output), errors
    levels = ("--sweeping.delta", "0.5", "--sweeping.beside", run)
    status, output, errors = dynamoe("evaluate", "--run-dir", run, "--sweep", "thresholds", *levels)
    assert (status, errors) == (0, ""), errors
    assert re.search(r"full model +│", output) and re.search(r"0 \* +│", output) and re.search(r"run +│", output)
    guarantee = json.loads((run / "early_exit.json").read_text())
    assert guarantee["n"] == 150 and guarantee["threshold"] == 0.0 and (run / "early_exit.png").is_file()
    status, output, errors = dynamoe("evaluate", "--run-dir", run, "--early-exit", "calibrated")
    assert (status, errors) == (0, "") and "1.00 of 2 layers" in output and "rows at each exit [300, 0]" in output
    status, output, _ = dynamoe("evaluate", "--run-dir", run, "--early-exit", "1")
    assert status == 0 and "2.00 of 2 layers" in output
    status, _, errors = dynamoe("evaluate", "--run-dir", run, "--checkpoint", "4", "--early-exit", "calibrated")
    best = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"]  # may be the fourth as well
    assert status == 0 or (best != 4 and "policy.model is" in errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("evaluate", "--early-exit", "2"), "early_exit is '2'; it must be a threshold from 0 to 1, or 'calibrated'"),
        (("evaluate", "--text", "x.txt"), "text is .*; the run is a classifier's, which has none"),
        (("evaluate", "--sweep", "thresholds", "--early-exit", "0.5"), "sweep is 'thresholds' and early_exit is '0.5'"),
        (
            ("evaluate", "--sweep", "thresholds", "--sweeping.delta", "0.001"),
            "losses has 150 units; delta = 0.001 with epsilon = 0.05 needs at least",
        ),
        (("generate",), ".* holds a ClassificationExperiment; it must be the run of an Experiment"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(
    dynamoe: Dynamoe, run: Path, options: tuple[str, ...], message: str
) -> None:
    status, _, errors = dynamoe(*options, "--run-dir", run)
    assert status == 1 and re.match(f"dynamoe: error: {message}", errors), errors


@pytest.fixture
def small(dynamoe: Dynamoe, recipe: Path) -> Path:
    """The run of one layer without exits."""
    file, path = recipe.with_name("small_digits.py"), recipe.with_name("small")
    if not path.exists():
        file.write_text(RECIPE.replace("layers=2", "layers=1").replace(", exits=Exits(after=(1,))", ""))
        status, _, errors = dynamoe("train", file, "--run-dir", path)
        assert (status, errors) == (0, ""), errors
    return path


def test_a_cascade_asks_the_small_model_first(dynamoe: Dynamoe, run: Path, small: Path) -> None:
    behind, levels = ("--cascade.behind", run), ("--cascade.delta", "0.5")
    status, output, errors = dynamoe("evaluate", "--run-dir", small, *behind, *levels)
    assert (status, errors) == (0, ""), errors
    assert re.search(r"small +│ +\d+\.\d\d% │ 0\.\d+ │", output) and re.search(r"run +│ +\d+\.\d\d% │ 1\.000 │", output)
    assert "choosing between the two by chance gives" in output and "only because a smaller model gave them" in output
    guarantee = json.loads((small / "cascade.json").read_text())
    assert guarantee["n"] == 150 and guarantee["policy"]["confidence"]["models"] == ["small", "run"]
    prices = ("--cascade.unit", "money", "--cascade.prices", "1", "4")
    status, output, errors = dynamoe("evaluate", "--run-dir", small, *behind, *levels, *prices)
    assert (status, errors) == (0, "") and re.search(r"small +│ +\d+\.\d\d% │ 0\.250 │", output), errors


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        ("run", ("--cascade.behind", "small"), r"Cascade.models cost \[.*\] FLOPs; costs must ascend"),
        ("small", ("--cascade.behind", "run", "--cascade.unit", "money"), "money takes one of each of 2 models"),
        ("small", ("--cascade.behind", "run", "--early-exit", "0.5"), "early_exit is '0.5' and cascade.behind is"),
        ("small", ("--cascade.behind", "run", "--cascade.delta", "0"), "delta is 0"),
    ],
)
def test_a_cascade_refuses_with_the_name(
    dynamoe: Dynamoe, run: Path, small: Path, first: str, options: tuple[str, ...], message: str
) -> None:
    runs = {"run": run, "small": small}
    arguments = (str(runs.get(option, option)) for option in options)
    status, _, errors = dynamoe("evaluate", "--run-dir", runs[first], *arguments)
    assert status == 1 and re.search(message, errors), errors


def test_nothing_is_calibrated_before_a_sweep(dynamoe: Dynamoe, run: Path) -> None:
    (run / "early_exit.json").unlink(missing_ok=True)
    status, _, errors = dynamoe("evaluate", "--run-dir", run, "--early-exit", "calibrated")
    assert status == 1 and "there is no" in errors and "--sweep thresholds --run-dir RUN calibrates it" in errors


def test_a_language_model_answers_early_in_generate(dynamoe: Dynamoe, beside: Any) -> None:
    status, _, errors = dynamoe("evaluate", "--run-dir", beside.run, "--early-exit", "0.5")
    assert status == 1 and "dynamoe generate --early-exit answers early" in errors
    status, _, errors = dynamoe("evaluate", "--run-dir", beside.run, "--cascade.behind", beside.run)
    assert status == 1 and "only classifiers take it" in errors


def test_a_plan_takes_no_classifier(dynamoe: Dynamoe, recipe: Path) -> None:
    status, _, errors = dynamoe("plan", recipe)
    assert status == 1 and "it must return an Experiment" in errors


def test_help_shows_the_classifiers_options(dynamoe: Dynamoe, recipe: Path) -> None:
    status, output, _ = dynamoe("train", recipe, "--help")
    assert status == 0 and "--label-smoothing" in output and "--model.patch" in output
