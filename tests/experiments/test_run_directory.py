"""A run's directory holds one run, whole, and never loses it."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from dynamoe.experiments.metrics import Metrics, read_metrics
from dynamoe.experiments.run_directory import RunDirectory, newest_run
from dynamoe.experiments.serialization import load_recipe

RECIPE = """
import dataclasses

@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    folder: str = "books"
    workers: int = 1

@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    steps: int = 100
    layers: int = 4
    data: Data = Data()

def recipe():
    return Experiment()
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "source" / "mine.py"
    file.parent.mkdir()
    file.write_text(RECIPE)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_new_run_is_written_and_read_back(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe).recipe()
    run = RunDirectory.open(tmp_path / "runs" / "first", config, recipe, {"data": "3 books"})
    assert (run.continued, run.config) == (False, config)
    assert sorted(contents(run.path)) == ["config.json", "environment.json", "recipe.py"]
    (entry,) = json.loads((run.path / "environment.json").read_text())
    assert entry["data"] == "3 books"
    assert entry["recipe"] == str(recipe)
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "dynamoe"} <= set(entry["versions"])
    assert entry["platform"] == "cpu" and entry["devices"]

    loaded = RunDirectory.load(run.path)
    assert repr(loaded.config) == repr(config)
    assert loaded.checkpoints == run.path / "checkpoints"
    assert loaded.recipe is not None and type(loaded.config) is loaded.recipe.Experiment


def test_the_same_configuration_continues(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe).recipe()
    RunDirectory.open(tmp_path / "run", config, recipe)
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe(), recipe).continued
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 2


def test_another_configuration_is_refused_with_every_difference_and_nothing_is_written(
    recipe: Path, tmp_path: Path
) -> None:
    module = load_recipe(recipe)
    RunDirectory.open(tmp_path / "run", module.recipe(), recipe)
    before = contents(tmp_path / "run")
    other = module.Experiment(steps=200, layers=6, data=module.Data(folder="songs", workers=2))
    with pytest.raises(ValueError, match="run of another configuration") as error:
        RunDirectory.open(tmp_path / "run", other, recipe, free_fields=("steps", "data.workers"))
    assert "layers: 4 in the run directory, 6 now" in str(error.value)
    assert 'data.folder: "books" in the run directory, "songs" now' in str(error.value)
    assert "steps" not in str(error.value) and "workers" not in str(error.value)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("free", [("steps", "data.workers"), ("steps", "data")])
def test_free_fields_may_change_and_the_new_value_is_stored(
    recipe: Path, tmp_path: Path, free: tuple[str, ...]
) -> None:
    module = load_recipe(recipe)
    RunDirectory.open(tmp_path / "run", module.recipe(), recipe)
    longer = module.Experiment(steps=200, data=module.Data(workers=2))
    assert RunDirectory.open(tmp_path / "run", longer, recipe, free_fields=free).continued
    assert repr(RunDirectory.load(tmp_path / "run").config) == repr(longer)


def test_a_directory_that_is_no_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe).recipe()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"it is not empty and no run, it holds \['chapter.txt'\]"):
        RunDirectory.open(tmp_path / "thesis", config)
    assert list(contents(tmp_path / "thesis")) == ["chapter.txt"]
    with pytest.raises(ValueError, match="it is a file"):
        RunDirectory.open(recipe, config)
    with pytest.raises(ValueError, match=r"gs:/bucket/run: give gs://…, and in Python etils.epath.Path"):
        RunDirectory.open(Path("gs://bucket/run"), config)


@pytest.mark.parametrize("before_rename", [1, 2, 3])
def test_a_start_that_was_cut_short_can_be_repeated(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_rename: int
) -> None:
    config = load_recipe(recipe).recipe()
    rename, calls = Path.replace, []

    def killed(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == before_rename:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.open(tmp_path / "run", config, recipe)
    run = RunDirectory.open(tmp_path / "run", config, recipe)
    assert sorted(contents(run.path)) == ["config.json", "environment.json", "recipe.py"]
    assert repr(RunDirectory.load(run.path).config) == repr(config)


def test_the_older_text_of_a_recipe_is_kept(recipe: Path, tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe(), recipe)
    recipe.write_text(RECIPE + "\n# a bug fixed\n")
    RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe(), recipe)
    assert (tmp_path / "run" / "recipe.py").read_text() == RECIPE + "\n# a bug fixed\n"
    assert (tmp_path / "run" / "recipe-1.py").read_text() == RECIPE


def test_a_runs_recipe_imports_the_siblings_of_the_original(recipe: Path, tmp_path: Path) -> None:
    (recipe.parent / "sibling_of_mine.py").write_text("LAYERS = 9\n")
    recipe.write_text("import sibling_of_mine\n" + RECIPE.replace("= 4", "= sibling_of_mine.LAYERS"))
    RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe(), recipe)
    sys.modules.pop("sibling_of_mine")
    sys.path.remove(str(recipe.parent))
    assert RunDirectory.load(tmp_path / "run").config.layers == 9
    sys.modules.pop("sibling_of_mine")


def test_what_cannot_be_loaded_is_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing: no such directory"):
        RunDirectory.load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"source: it is no run, there is no config.json in it"):
        RunDirectory.load(recipe.parent)
    RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe(), recipe)
    file = tmp_path / "run" / "config.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"run/config.json: it is no JSON, the file is damaged"):
        RunDirectory.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run/config.json: it is no JSON, the file is damaged"):
        RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe(), recipe)
    file.write_text(text.replace('"layers": 4', '"depth": 4'))
    with pytest.raises(ValueError, match=r"config.json: config, .* unknown fields \['depth'\], missing fields \['lay"):
        RunDirectory.load(tmp_path / "run")


def test_the_newest_run_is_the_one_started_or_continued_last(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe).recipe()
    with pytest.raises(ValueError, match="there is no run in it"):
        newest_run(tmp_path / "runs")
    for number, name in enumerate(("b", "a", "demo/moe")):
        RunDirectory.open(tmp_path / "runs" / name, config)
        os.utime(tmp_path / "runs" / name / "environment.json", ns=(number, number))
    assert newest_run(tmp_path / "runs") == tmp_path / "runs" / "demo" / "moe"
    os.utime(tmp_path / "runs" / "a" / "environment.json", ns=(3, 3))
    assert newest_run(tmp_path / "runs") == tmp_path / "runs" / "a"
    RunDirectory.open(tmp_path / "runs" / "b", config)
    assert newest_run(tmp_path / "runs") == tmp_path / "runs" / "b"


def tensorboard_steps(folder: Path) -> list[int]:
    """The scalar events that a viewer shows: what a later file purges is gone. Reads the files' own format."""
    steps: list[int] = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            if event.session_log.status == 1:  # START
                steps = [step for step in steps if step < event.step]
            elif event.summary.value:
                steps.append(event.step)
            content = content[16 + length :]
    return steps


def write_steps(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with Metrics(folder, resume_step) as metrics:
        for step in steps:
            metrics.write(step, "train", {"loss": 1 / (step + 1)})


def test_metrics_are_read_back_exactly(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.write(0, "train", {"loss": 0.1, "tokens": 7})
        metrics.write(1, "held_out", {"bits": float("nan"), "norm": float("inf")})
        # Flushed per line: readable while the run goes on.
        first, second = read_metrics(tmp_path)
    assert first == {"step": 0, "split": "train", "loss": 0.1, "tokens": 7.0}
    assert str(second) == "{'step': 1, 'split': 'held_out', 'bits': nan, 'norm': inf}"
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # standard JSON, which has no NaN


@pytest.mark.parametrize("resume_step", [None, 2, 4, 9])
def test_resuming_gives_the_metrics_of_an_uninterrupted_run(tmp_path: Path, resume_step: int | None) -> None:
    write_steps(tmp_path / "whole", range(8))
    write_steps(tmp_path / "killed", range(5))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')
    done = -1 if resume_step is None else min(resume_step, 4)
    write_steps(tmp_path / "killed", range(done + 1, 8), resume_step)
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert tensorboard_steps(tmp_path / "killed") == tensorboard_steps(tmp_path / "whole") == list(range(8))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "\0\0\0\n" + lines[2])
    before = file.read_bytes()
    for action in (lambda: read_metrics(tmp_path), lambda: Metrics(tmp_path, 2)):
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .* is no measurement; delete that line"):
            action()
    assert file.read_bytes() == before


def test_a_measurement_cannot_take_the_place_of_step_or_split(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics, pytest.raises(ValueError, match=r"values has \['step'\]; these names are taken"):
        metrics.write(0, "train", {"step": 3.0})


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metrics.jsonl: no such file"):
        read_metrics(tmp_path)


def test_a_runs_configuration_is_frozen(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.config = None  # type: ignore[misc]


def test_run_whose_text_has_changed_is_not_continued(recipe: Path, tmp_path: Path) -> None:
    config, run = load_recipe(recipe).recipe(), tmp_path / "run"

    def start(text: str) -> RunDirectory:
        return RunDirectory.open(run, config, recipe, {"source": {"sha256": text}}, fixed_facts=("source",))

    start("a")
    before = contents(run)
    with pytest.raises(ValueError, match="source was .*'a'.* is now .*'b'"):
        start("b")
    assert contents(run) == before
    assert start("a").continued


def test_a_run_that_another_holds_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", load_recipe(recipe).recipe())
    with run.lock(), pytest.raises(ValueError, match="another process trains in it"), run.lock():
        pass
    with run.lock():
        pass
