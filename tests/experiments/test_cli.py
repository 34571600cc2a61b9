"""The command line explains itself, and tells an error in one line."""

from collections.abc import Callable

import pytest

from dynamoe.experiments.commands.demo import Demo

Dynamoe = Callable[..., tuple[int, str, str]]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("command", "explained"),
    [
        (
            None,
            ["train", "evaluate", "generate", "inspect", "demo", "bench", "reproduce", "Measure a run's bits per byte"],
        ),
        ("train", ["continue a run that was stopped", "--steps", "Optimizer steps of the whole run", "--seeds"]),
        ("evaluate", ["bits per byte on held-out text", "--text", "Text files or globs to measure on instead"]),
        ("generate", ["Continue a prompt", "--sampling.temperature", "The same seed draws the same text"]),
        ("inspect", ["Show what a run's routers do", "load, entropy and drops of every layer", "Text files or globs"]),
        ("inspect", ["--run-dir", "--checkpoint", "--text", "--max-bytes"]),
        ("demo", ["a mixture of experts of equal cost", "--smoke", "Seconds instead of minutes"]),
        ("reproduce", ["Test a paper's claim", "--measure-again", "--seeds", "At least three", "experiments/results"]),
        ("bench", ["kernel's implementations against their peers", "grouped_matmul", "training_step", "--rounds"]),
    ],
)
def test_help_explains_the_command(dynamoe: Dynamoe, command: str | None, explained: list[str]) -> None:
    status, output, errors = dynamoe(*([command] if command else []), "--help")
    assert (status, errors) == (0, "")
    for text in explained:
        assert text in " ".join(output.replace("│", "").split())


@pytest.mark.parametrize("arguments", [(), ("fly",), ("demo", "--smokey"), ("train", "--steps", "three")])
def test_wrong_usage_has_status_2(dynamoe: Dynamoe, arguments: tuple[str, ...]) -> None:
    status, output, errors = dynamoe(*arguments)
    assert (status, output) == (2, "")
    assert all(argument in errors for argument in arguments[1:])


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no"), ArithmeticError("no"), RuntimeError("no")])
def test_an_error_is_one_line_and_its_place_on_demand(
    dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Demo, "run", fail)
    assert dynamoe("demo") == (1, "", "dynamoe: error: no\n(DYNAMOE_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("DYNAMOE_TRACEBACK", "1")
    with pytest.raises(type(error), match="no"):
        dynamoe("demo")


def test_ctrl_c_has_status_130(dynamoe: Dynamoe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Demo, "run", interrupt)
    assert dynamoe("demo") == (130, "", "")
