"""`dynamoe reproduce` runs papers, goes on where it was, and lists what there is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamoe.experiments.data import standard_library
from dynamoe.experiments.reproduction import running
from dynamoe.experiments.reproduction.paper import paper_names

Dynamoe = Callable[..., tuple[int, str, str]]

MY_PAPER = """
def paper():
    import dataclasses
    from dynamoe.experiments.reproduction import BITS_PER_BYTE, Faster, Lower, Paper

    experiment = dataclasses.replace(recipe(), steps=2, evaluate_every=2, checkpoint_every=2)
    ffn = dataclasses.replace(experiment.model.ffn, router=Noisy(noise=0.5))
    less = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, ffn=ffn))
    claims = {"published": "none", "arm": "less", "than": "noisy"}
    return Paper(
        about="Mine: less noise.\\n\\nClaim: Better.\\n\\nCommand: dynamoe reproduce mine.py\\n\\nCost: none.",
        arms={"noisy": experiment, "less": less},
        claims=(Lower(says="Less is better.", measure=BITS_PER_BYTE, **claims), Faster(says="Faster.", **claims)),
    )
"""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are trained."""
    names, train = [], running.train

    def remember(experiment: Any, path: Path, **options: Any) -> Any:
        if len(names) == 3 and "kill" in names:
            raise KeyboardInterrupt
        names.append(path.name)
        return train(experiment, path, **options)

    monkeypatch.setattr(running, "train", remember)
    return names


def test_a_paper_of_ones_own_runs_by_its_path_and_goes_on_where_it_was(
    dynamoe: Dynamoe, recipe: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamoe.experiments.commands.reproduce.ROUNDS", 6)
    recipe.write_text(recipe.read_text() + MY_PAPER)
    call = ("reproduce", recipe)
    trained.append("kill")
    assert dynamoe(*call)[0] == 130
    assert trained == ["kill", "noisy-seed0", "less-seed0"]
    trained.clear()
    status, output, errors = dynamoe(*call)
    assert (status, errors) == (0, "")
    assert trained == ["noisy-seed1", "less-seed1", "noisy-seed2", "less-seed2"]
    assert "6 of 6: less, seed 2: held-out bits per byte" in output and "timing 6 steps of noisy, less" in output
    folder = Path("runs") / "reproduce" / "mine"
    first = json.loads((folder / "mine.json").read_text())
    assert [finding["measure"] for finding in first["findings"]] == ["held-out bits per byte", "step time"]
    measured = [run["measures"]["held-out bits per byte"] for run in first["runs"]]
    assert len(set(measured)) == 6, "each arm and seed is another run"

    trained.clear()
    status, output, _ = dynamoe(*call, "--seeds", "0", "1", "2", "--output", "out")
    again = json.loads(Path("out/mine.json").read_text())
    assert status == 0 and not trained and "timing" not in output, "what is done is not repeated"
    assert (again["runs"], again["findings"]) == (first["runs"], first["findings"])

    status, output, _ = dynamoe(*call, "--measure-again", "--output", "out")
    timed = json.loads(Path("out/mine.json").read_text())
    assert status == 0 and not trained and "timing 6 steps" in output
    assert timed["runs"] == first["runs"] and timed["step_time"]["seconds"] != first["step_time"]["seconds"]

    made = [Path("out/mine.md"), Path("out/mine.png")]
    before = [file.read_bytes() for file in made]
    for file in made:
        file.unlink()
    assert dynamoe(*call, "--render", "--output", "out")[0] == 0
    assert [file.read_bytes() for file in made] == before

    recipe.write_text(recipe.read_text().replace("noise=0.5", "noise=0.25"))
    status, _, errors = dynamoe(*call)
    assert status == 1 and "less-seed0: it holds a run of another configuration" in errors
    assert dynamoe("evaluate", "--run-dir", folder / "noisy-seed1")[0] == 0, "its runs are runs like any other"


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
