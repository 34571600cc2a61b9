"""`dynamoe reproduce` runs papers, goes on where it was, and lists what there is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from dynamoe.experiments.data import standard_library
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.reproduction import running
from dynamoe.experiments.reproduction.paper import paper_names
from dynamoe.experiments.run_directory import RunDirectory
from dynamoe.experiments.training.train import Result

Dynamoe = Callable[..., tuple[int, str, str]]

MY_PAPER = """
def paper():
    import dataclasses
    from dynamoe.experiments.reproduction import BITS_PER_BYTE, Faster, Lower, Paper

    experiment = recipe()
    ffn = dataclasses.replace(experiment.model.ffn, router=Noisy(noise=0.5))
    less = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, ffn=ffn))
    claims = {"published": "none", "arm": "less", "than": "noisy"}
    return Paper(
        about="Mine: less noise.\\n\\nClaim: Better.\\n\\nCommand: dynamoe reproduce mine.py\\n\\nCost: none.",
        arms={"noisy": experiment, "less": less},
        claims=(Lower(says="Less is better.", measure=BITS_PER_BYTE, **claims), Faster(says="Faster.", **claims)),
    )
"""


class Trained(list[str]):
    """The runs that were trained."""

    stop_after: int | None = None


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Training that computes nothing: a run's directory, as the loop opens it, and a figure of the arm and the seed."""
    names = Trained()

    def train(experiment: Experiment, path: Path, *, recipe: Path, trainer: None, console: Console) -> Result:
        if len(names) == names.stop_after:
            raise KeyboardInterrupt
        names.append(path.name)
        RunDirectory.open(path, experiment, recipe)
        router: Any = experiment.model.feed_forwards[0]
        bits = 2.0 + router.router.noise + 0.01 * experiment.seed
        nothing: Any = None
        return Result(path, experiment.steps, bits, 1.0, cast(Any, trainer), nothing, nothing, None)

    seconds = iter((1.0, 2.0))
    monkeypatch.setattr(running, "train", train)
    monkeypatch.setattr(running, "_step_rounds", lambda arms, rounds: dict.fromkeys(arms, [next(seconds)] * rounds))
    return names


def test_a_paper_of_ones_own_runs_by_its_path_and_goes_on_where_it_was(
    dynamoe: Dynamoe, recipe: Path, trained: Trained
) -> None:
    recipe.write_text(recipe.read_text() + MY_PAPER)
    trained.stop_after = 3
    assert dynamoe("reproduce", recipe)[0] == 130
    trained.stop_after = None
    status, output, errors = dynamoe("reproduce", recipe)
    assert (status, errors) == (0, "")
    assert trained == [f"{arm}-seed{seed}" for seed in (0, 1, 2) for arm in ("noisy", "less")]
    assert (
        "6 of 6: less, seed 2: held-out bits per byte 2.5200" in output and "timing 30 steps of noisy, less" in output
    )
    assert "reproduced: Less is better." in output and "not reproduced: Faster." in output

    folder, trained[:] = Path("runs") / "reproduce" / "mine", []
    status, output, _ = dynamoe("reproduce", recipe, "--seeds", "0", "1", "2", "3", "--output", "out")
    assert (status, trained) == (0, ["noisy-seed3", "less-seed3"]) and "timing" not in output, "no run is repeated"
    first, more = (json.loads((place / "mine.json").read_text()) for place in (folder, Path("out")))
    assert more["runs"][:6] == first["runs"] and more["step_time"] == first["step_time"]
    assert RunDirectory.load(folder / "noisy-seed1").config.seed == 1, "its runs are runs like any other"


def test_only_what_is_asked_for_is_done_again(dynamoe: Dynamoe, recipe: Path, trained: Trained) -> None:
    recipe.write_text(recipe.read_text() + MY_PAPER)
    assert dynamoe("reproduce", recipe, "--output", "out")[0] == 0
    files = [Path("out") / f"mine.{kind}" for kind in ("json", "md", "png")]
    before = [file.read_bytes() for file in files]
    for file in files[1:]:
        file.unlink()
    assert dynamoe("reproduce", recipe, "--render", "--output", "out")[0] == 0
    assert [file.read_bytes() for file in files] == before

    trained.clear()
    assert dynamoe("reproduce", recipe, "--measure-again", "--output", "out")[0] == 0
    was, now = json.loads(before[0]), json.loads(files[0].read_text())
    assert not trained and now["runs"] == was["runs"]
    assert (was["step_time"]["seconds"]["less"][0], now["step_time"]["seconds"]["less"][0]) == (1, 2)


def test_papers_share_runs_of_one_configuration_and_mix_none_of_two(
    dynamoe: Dynamoe, recipe: Path, trained: Trained
) -> None:
    recipe.write_text(recipe.read_text() + MY_PAPER)
    assert dynamoe("reproduce", recipe)[0] == 0
    trained.clear()
    other = recipe.with_name("other.py")
    other.write_text(recipe.read_text())
    status, output, _ = dynamoe("reproduce", other)
    assert (status, trained) == (0, []) and "6 of 6" in output
    recipe.write_text(recipe.read_text().replace("noise=0.5", "noise=0.25"))
    status, _, errors = dynamoe("reproduce", recipe)
    assert status == 1 and "less-seed0: it holds a run of another configuration" in errors


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard library of a few files: reading and encoding the real one takes a second a run."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(60):
        (folder / f"module_{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    monkeypatch.setattr(standard_library, "_root", lambda: folder)


@pytest.mark.parametrize("name", paper_names())
def test_every_paper_runs_at_smoke_scale(
    dynamoe: Dynamoe, name: str, small_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, errors = dynamoe("reproduce", name, "--smoke")
    assert (status, errors) == (0, "")
    folder = tmp_path / "runs" / "reproduce-smoke" / name
    results = json.loads((folder / f"{name}.json").read_text())
    assert results["smoke"] and results["seeds"] == [0, 1] and (folder / f"{name}.png").is_file()
    assert "They mean nothing." in (folder / f"{name}.md").read_text()
    assert f"{name}: {results['verdict']}; " in output


def test_without_a_name_the_papers_are_listed(dynamoe: Dynamoe) -> None:
    status, output, _ = dynamoe("reproduce")
    assert status == 0
    assert all(name in output for name in paper_names()) and "2-core CPU" in " ".join(output.split())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("swich",), 1, "paper is 'swich'; there are "),
        (("megablocks", "--seeds", "0", "1"), 2, "seeds is (0, 1); a verdict needs at least 3"),
        (("megablocks", "--seeds", "0", "1", "1"), 2, "seeds is (0, 1, 1); each may stand there once"),
        (("megablocks", "--smoke", "--output", "."), 2, "numbers of a smoke test stay in runs/"),
        (("megablocks", "--smoke", "--render"), 2, "each stands alone"),
        (("--smoke",), 2, "paper is not given"),
        (("megablocks", "--render", "--output", "none"), 1, "none/megablocks.json: no such file; reproduce the paper"),
        (("megablocks", "--measure-again", "--output", "none"), 1, "none/megablocks.json: no such file"),
        (("switch_transformer", "--measure-again"), 1, "switch_transformer claims nothing about time"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    dynamoe: Dynamoe,
    arguments: tuple[str, ...],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, output, errors = dynamoe("reproduce", *arguments)
    assert (found, output) == (status, "") and message in errors
    assert not list(tmp_path.iterdir())
