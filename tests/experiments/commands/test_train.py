"""`dynamoe train` runs a recipe file, and refuses one that it cannot run."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flax import nnx
from rich.console import Console

from dynamoe.experiments.commands.train import _measured
from dynamoe.experiments.run_directory import read_metrics
from dynamoe.experiments.training.step import Trainer
from dynamoe.experiments.training.train import Result

Dynamoe = Callable[..., tuple[int, str, str]]


def test_trains_a_recipe_with_a_router_of_its_own(trained: Any) -> None:
    config = json.loads((trained.run / "config.json").read_text())
    assert config["steps"] == 3  # the option; the recipe says 30
    assert config["model"]["ffn"]["router"] == {"type": "recipe:Noisy", "noise": 1.0}
    lines = read_metrics(trained.run)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]
    (bits,) = [line["bits_per_byte"] for line in lines if line["split"] == "held_out"]
    assert f"step 3: {bits:.4f} bits per byte on " in trained.output
    assert (trained.run / "recipe.py").read_text() == trained.recipe.read_text()
    assert "bytes of held-out text, after step 3." in (trained.run / "report.html").read_text()
    assert (trained.run / "token_experts.png").is_file()


def test_routers_that_cannot_be_measured_do_not_fail_a_training_that_is_done(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(trained: Any, text: Any) -> Any:
        raise ValueError("the network of layer 0 routes, and did not call tap")

    state: Any = SimpleNamespace(params=nnx.State({}), variables=nnx.State({}))
    nothing: Any = None
    trainer = Trainer(*[nothing] * len(Trainer._fields))
    result = Result(Path("r"), 3, 2.0, 1.0, trainer, state, nothing, None)
    monkeypatch.setattr("dynamoe.experiments.commands.train.measure_routers", refuse)
    assert _measured(tiny(), result, Console(soft_wrap=True)) is None
    said = "the report shows routers of the last logged batch: the network of layer 0 routes, and did not call tap"
    assert said in capsys.readouterr().out


def test_seeds_train_side_by_side_and_print_their_spread(dynamoe: Dynamoe, recipe: Path) -> None:
    status, output, errors = dynamoe("train", recipe, "--steps", "3", "--run-dir", "r", "--seeds", "0", "4")
    assert (status, errors) == (0, "")
    found = {}
    for seed in (0, 4):
        run = Path("r").with_name(f"r-seed{seed}")
        assert json.loads((run / "config.json").read_text())["seed"] == seed
        (found[seed],) = [line["bits_per_byte"] for line in read_metrics(run) if line["split"] == "held_out"]
        assert f"seed {seed}: {found[seed]:.4f} bits per byte\n" in output
    assert found[0] != found[4]
    mean, spread = statistics.mean(found.values()), abs(found[0] - found[4]) / 2**0.5  # of two values
    assert output.endswith(f"mean {mean:.4f}, standard deviation {spread:.4f}\n")
    assert not Path("r").exists()


WITHOUT = "x = 1\n"
NUMBER = "def recipe():\n    return 3\n"
MISSPELT = "from dynamoe.models import Decoder\n\ndef recipe():\n    return Decoder(widht=3)\n"
BROKEN = "def recipe(:\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WITHOUT, r"recipe .*other\.py: it defines no function recipe\(\)"),
        (NUMBER, r"recipe other\.py: recipe\(\) returned 3; it must return an Experiment"),
        (MISSPELT, r"recipe .*other\.py, line 4: TypeError: .*unexpected keyword argument 'widht'"),
        (BROKEN, r"recipe .*other\.py, line 1: SyntaxError"),
        (None, r"recipe .*other\.py: no such file; give a Python file that defines recipe\(\)"),
    ],
    ids=["no recipe()", "a number", "a misspelt field", "no Python", "no file"],
)
def test_a_recipe_that_cannot_run_is_refused(dynamoe: Dynamoe, recipe: Path, text: str | None, message: str) -> None:
    if text is not None:
        Path("other.py").write_text(text)
    status, output, errors = dynamoe("train", "other.py")
    assert (status, output) == (1, "")
    assert re.match(f"dynamoe: error: {message}", errors) and len(errors.splitlines()) == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--steps", "-3"), 1, "steps is -3; it must be at least 1"),
        (("--stepz", "3"), 2, "Unrecognized options: --stepz"),
        (("--gradient-accumulation", "3"), 1, "gradient_accumulation is 3; it must divide batch_size=4"),
        (("--mesh.data", "3"), 1, "take 3 devices; 1 are there"),
        (("--seeds", "1", "1"), 1, r"seeds is (1, 1); each may stand there once"),
        (("--init-from", "nowhere"), 1, "nowhere: no such directory"),
        (
            ("--upcycle", "copy"),
            1,
            "upcycle is Copy(scale=None) and init_from None; it must be the directory",
        ),
        (("--upcycle", "copying"), 2, "invalid choice 'copying' for argument '--upcycle'"),
        (
            ("--upcycle", "copy", "--upcycle", "moefication"),
            1,
            "upcycle is moefication and Copy(scale=None)",
        ),
        (("--upcycle=granular-split", "--upcycle.shards", "0"), 2, "GranularSplit.shards is 0; it must be at least 1"),
        (("--upcycle.shards", "3"), 2, "Unrecognized options: --upcycle.shards"),
        (("--model.attention.heads", "3"), 2, "heads"),
        (("--model.vocab", "100"), 1, "vocab=100: Bytes() has 258 ids; allowed are models with at least as many rows"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_written(
    dynamoe: Dynamoe, recipe: Path, options: tuple[str, ...], status: int, message: str
) -> None:
    found, output, errors = dynamoe("train", recipe, *options)
    assert (found, output) == (status, "")
    assert message in " ".join(errors.replace("│", "").split())
    assert not Path("runs").exists()


def test_a_recipe_behind_the_options_is_refused(dynamoe: Dynamoe, recipe: Path) -> None:
    status, _, errors = dynamoe("train", "--steps", "3", recipe)
    assert status == 1
    assert "it must stand right after `train`, before the options" in errors
    assert not Path("runs").exists()
