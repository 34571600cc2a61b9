"""The command line explains itself, and tells an error in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dynamoe.experiments.cli import parse
from dynamoe.experiments.commands.demo import Demo

Dynamoe = Callable[..., tuple[int, str, str]]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("command", "explained"),
    [
        (
            None,
            [
                "train",
                "evaluate",
                "generate",
                "inspect",
                "demo",
                "plan",
                "bench",
                "reproduce",
                "Measure a run's bits per byte",
            ],
        ),
        ("train", ["continue a run that was stopped", "--steps", "Optimizer steps of the whole run", "--seeds"]),
        (
            "train",
            [
                "--upcycle {None,copy,copy-with-noise,granular-split,moefication}",
                "Make the recipe's mixtures of experts",
            ],
        ),
        ("train --upcycle granular-split", ["--upcycle.shards INT", "--upcycle.scale", "shards of the dense network"]),
        (
            "evaluate",
            ["bits per byte on held-out text", "--text", "Text files (.gz too) or globs"],
        ),
        (
            "generate",
            ["Continue prompts", "--temperature", "--stop", "--prompts-file", "The same seed draws the same text"],
        ),
        (
            "compress",
            [
                "Pack a run's weights or a published model's",
                "--format {int8,int4,int2,fp8_e4m3,nf4,mxfp4}",
                "--only",
            ],
        ),
        (
            "inspect",
            ["Show what a model's routers do", "load, entropy and drops", "Text files or globs"],
        ),
        ("inspect", ["--run-dir", "--checkpoint", "--text", "--max-bytes"]),
        ("demo", ["a mixture of experts of equal cost", "--smoke", "Seconds instead of minutes"]),
        ("reproduce", ["Test a paper's claim", "--measure-again", "--seeds", "At least three", "experiments/results"]),
        (
            "plan",
            ["Compile a recipe's steps for devices that are not here", "--chip", "--topology", "--search", "--phase"],
        ),
        ("plan", ["As v5e, v5p, v6e, tpu7x, h100 or h200", "--generation.rows", "--mesh.expert", "--steps"]),
        ("bench", ["kernel's implementations against their peers", "grouped_matmul", "training_step", "--rounds"]),
    ],
)
def test_help_explains_the_command(dynamoe: Dynamoe, command: str | None, explained: list[str]) -> None:
    status, output, errors = dynamoe(*(command or "").split(), "--help")
    assert (status, errors) == (0, "")
    for text in explained:
        assert text in " ".join(output.replace("│", "").split())


OPTIONAL_PARTS_TWICE = """
from dynamoe.experiments.experiment import Experiment
from dynamoe.models import Decoder, Dense, FirstLayers
from dynamoe.moe import GroupLimit, Jitter, LossFree, MoE, TopK

def recipe():
    router = TopK(noise=Jitter(), balancing=LossFree(), groups=GroupLimit(groups=4, chosen=2))
    return Experiment(model=Decoder(ffn=FirstLayers(first=MoE(router=router), ffn=MoE(router=router))))
"""


def test_help_lists_the_values_of_optional_parts_under_their_own_names(dynamoe: Dynamoe, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(OPTIONAL_PARTS_TWICE)
    status, output, errors = dynamoe("train", str(tmp_path / "twice.py"), "--help")
    assert (status, errors) == (0, "")
    for field in ("noise.amount", "balancing.rate", "groups.chosen"):
        for place in ("first", "ffn"):
            assert f"--model.ffn.{place}.router.{field}" in output


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


def test_networks_that_may_be_none_have_options_under_their_full_names() -> None:
    found = parse(["train", "--model.ffn.shared.hidden", "64"]).experiment.model.ffn
    assert found.shared.hidden == 64 and found.expert.hidden != 64
