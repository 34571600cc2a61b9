"""A run in an object store: as a local one, without rename, appending and a lock of the system."""

import io
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tyro
from etils import epath
from rich.console import Console

from dynamoe.experiments import run_lock
from dynamoe.experiments.commands.evaluate import Evaluate
from dynamoe.experiments.commands.place_option import PlaceOption
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.metrics import Metrics, read_metrics
from dynamoe.experiments.places import check_place, local_folder
from dynamoe.experiments.report import report_run
from dynamoe.experiments.run_directory import RunDirectory
from dynamoe.experiments.training.progress import TrainingProgress
from dynamoe.experiments.training.storage import has_checkpoint
from dynamoe.experiments.training.train import train

from .object_store import FOLDER, ObjectStore

Tiny = Callable[..., Experiment]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """gs://bucket, empty, with a lock that is quick."""
    fsspec.register_implementation("gcs", ObjectStore, clobber=True)
    (tmp_path / "store").mkdir()
    monkeypatch.setenv(FOLDER, str(tmp_path / "store"))
    monkeypatch.setattr(ObjectStore, "refusing", False)
    for package in ("gcsfs", "google.cloud.storage"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for name, seconds in {"RENEWED_EVERY": 0.02, "WATCHED": 0.4, "SETTLED": 0.0}.items():
        monkeypatch.setattr(run_lock, name, seconds)
    return epath.Path("gs://bucket")


@pytest.fixture
def local_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints go to a folder instead: TensorStore has a client of its own, which this store does not serve."""
    monkeypatch.setattr(RunDirectory, "checkpoints", property(lambda run: tmp_path / "checkpoints" / run.path.name))


def names(folder: epath.Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.glob("*") if not file.is_dir())


@pytest.mark.usefixtures("local_checkpoints")
def test_a_run_in_a_store_survives_a_kill_and_has_every_line_and_a_report(
    bucket: epath.Path, tiny: Tiny, quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at_5(progress: TrainingProgress, step: int) -> None:
        if step == 5:
            ObjectStore.refusing = True
            raise KeyboardInterrupt

    whole = train(tiny(), tmp_path / "whole", console=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "stepped", killed_at_5)
        with pytest.raises(OSError, match="does not answer"):
            train(tiny(), bucket / "run", trainer=whole.trainer, console=quiet)
    ObjectStore.refusing = False
    assert names(bucket / "run") == ["config.json", "environment.json", "lock.json", "metrics.jsonl"]
    assert max(line["step"] for line in read_metrics(bucket / "run")) == 4, "uploaded before the checkpoint of step 4"

    result = train(tiny(), bucket / "run", trainer=whole.trainer, console=quiet)
    assert (result.path, result.step) == (bucket / "run", 6)
    assert result.bits_per_byte == whole.bits_per_byte
    assert without_speed(bucket / "run") == without_speed(tmp_path / "whole")
    boards = sorted(file.name.rpartition(".")[2] for file in (bucket / "run" / "tensorboard").iterdir())
    assert boards == ["0000", "0001"]

    report = report_run(bucket / "run", experiment=tiny())
    assert report == bucket / "run" / "report.html" and "<img" in report.read_text()
    assert {"loss.png", "routers.png", "expert_load.png"} <= set(names(bucket / "run"))
    assert "lock.json" not in names(bucket / "run")
    shown = io.StringIO()
    assert Evaluate(run_dir=bucket / "run").run(Console(file=shown)) == 0
    assert f"{result.bits_per_byte:.4f} bits per byte at step 6" in shown.getvalue()


def without_speed(run: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(run)]


def test_another_configuration_is_refused_in_a_store_too(bucket: epath.Path, tiny: Tiny) -> None:
    assert not RunDirectory.open(bucket / "run", tiny()).continued
    assert RunDirectory.open(bucket / "run", tiny()).continued
    with pytest.raises(ValueError, match="gs://bucket/run: it holds a run of another configuration .*batch_size: 4"):
        RunDirectory.open(bucket / "run", tiny(batch_size=8))
    (bucket / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"gs://bucket/thesis: it is not empty and no run, .*chapter.txt"):
        RunDirectory.open(bucket / "thesis", tiny())


def test_the_recipe_of_a_run_in_a_store_is_kept_and_read_back(bucket: epath.Path, tiny: Tiny, recipe: Path) -> None:
    RunDirectory.open(bucket / "run", tiny(), recipe)
    recipe.write_text(recipe.read_text() + "\n# mended\n")
    RunDirectory.open(bucket / "run", tiny(), recipe)
    before = list(sys.path)
    loaded = RunDirectory.load(bucket / "run")
    assert loaded.config == tiny() and hasattr(loaded.recipe, "NoisyRouter")
    assert {"recipe.py", "recipe-1.py"} <= set(names(bucket / "run"))
    assert [entry for entry in sys.path if entry not in before] == [str(recipe.parent)]


def test_lines_reach_the_store_with_a_held_out_line_an_upload_and_the_end(bucket: epath.Path) -> None:
    calls = []
    with Metrics(bucket / "run", None, lambda: calls.append(1)) as metrics:
        metrics.write(1, "train", {"loss": 3.0})
        assert read_metrics(bucket / "run") == []
        metrics.write(1, "held_out", {"bits": 2.0})
        assert len(read_metrics(bucket / "run")) == 2
        metrics.write(2, "train", {"loss": 2.0})
        metrics.upload()
        assert len(read_metrics(bucket / "run")) == 3
        metrics.upload()
        assert len(calls) == 3, "nothing new, nothing uploaded"
        metrics.write(3, "train", {"loss": 1.0})
    assert [line["step"] for line in read_metrics(bucket / "run")] == [1, 1, 2, 3]
    Metrics(bucket / "run", 1).close()
    assert [line["step"] for line in read_metrics(bucket / "run")] == [1, 1]


def test_a_run_in_a_store_that_another_process_holds_is_refused(bucket: epath.Path, tiny: Tiny) -> None:
    run = RunDirectory.open(bucket / "run", tiny())
    with run.lock() as check:
        with (
            pytest.raises(ValueError, match=r"gs://bucket/run: process \d+ of .* trains in it"),
            run.lock(),
        ):
            pass
        check()
    assert "lock.json" not in names(bucket / "run")
    with run.lock():
        pass


def test_the_lock_of_a_killed_process_is_taken_over_and_it_would_learn_of_it(bucket: epath.Path, tiny: Tiny) -> None:
    run = RunDirectory.open(bucket / "run", tiny())
    with run.lock() as dead:
        left = (bucket / "run" / "lock.json").read_bytes()
    (bucket / "run" / "lock.json").write_bytes(left)
    start = time.monotonic()
    with run.lock() as check:
        assert time.monotonic() - start >= run_lock.WATCHED
        check()
        with pytest.raises(ValueError, match=r"gs://bucket/run: process \d+ .* has taken it over; this one stops"):
            dead()


def test_a_half_saved_checkpoint_is_none(bucket: epath.Path, tmp_path: Path) -> None:
    assert not has_checkpoint(bucket / "run" / "checkpoints")
    (bucket / "run" / "checkpoints" / "3" / "manifest" / "metadata").write_text("{}")
    assert not has_checkpoint(bucket / "run" / "checkpoints")
    (bucket / "run" / "checkpoints" / "3" / "commit_success.txt").write_text("done")
    assert has_checkpoint(bucket / "run" / "checkpoints")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not has_checkpoint(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "3").mkdir()
    assert has_checkpoint(tmp_path / "checkpoints")


def test_what_a_library_writes_locally_reaches_the_store(bucket: epath.Path, tmp_path: Path) -> None:
    with local_folder(bucket / "run" / "profile") as folder:
        (folder / "host").mkdir()
        (folder / "host" / "trace").write_text("events")
    assert (bucket / "run" / "profile" / "host" / "trace").read_text() == "events"
    with local_folder(tmp_path) as folder:
        assert folder == tmp_path


def test_the_command_line_keeps_both_slashes() -> None:
    assert tyro.cli(PlaceOption, args=["gs://bucket/run"]) == epath.Path("gs://bucket/run")
    local: Any = tyro.cli(PlaceOption, args=["runs/first"])
    assert (local, check_place(local)) == (Path("runs/first"), Path.cwd() / "runs" / "first")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (Path("gs://bucket/run"), 'gs:/bucket/run: give gs://…, and in Python etils.epath.Path("gs://…")'),
        (epath.Path("s3://bucket/run"), "Orbax cannot save checkpoints to s3://; give gs://BUCKET/RUN, or a directory"),
        (epath.Path("gs://bucket"), "gs://bucket: give a folder in a bucket"),
        (Path("ftp://host/run"), "ftp:/host/run: of addresses, gs://BUCKET/RUN alone is allowed"),
    ],
)
def test_a_place_that_cannot_hold_a_run_is_refused_with_the_fix(bucket: epath.Path, place: Any, problem: str) -> None:
    with pytest.raises(ValueError) as error:
        check_place(place)
    assert problem in str(error.value)


@pytest.mark.parametrize("package", ["gcsfs", "google.cloud.storage"])
def test_a_missing_package_is_named_with_what_installs_it(
    bucket: epath.Path, tiny: Tiny, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"gs://bucket/run: the package {package} .*pip install \"dynamoe\[remote\]\""
    ):
        train(tiny(), bucket / "run")


def test_a_store_that_refuses_is_told_in_one_line(
    bucket: epath.Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectStore, "refusing", True)
    for action in (lambda: RunDirectory.open(bucket / "run", tiny()), lambda: RunDirectory.load(bucket / "run")):
        with pytest.raises(ValueError, match="gs://bucket/run: the store refused .*OSError: the store does not answer"):
            action()
