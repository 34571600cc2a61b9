"""`dynamoe train` in processes of its own: killed, stopped, out of disk, and always continued to the same bits."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dynamoe.experiments.run_directory import RunDirectory, read_metrics
from dynamoe.experiments.training.checkpoints import Checkpoints
from dynamoe.experiments.training.restore import METRIC
from dynamoe.experiments.training.step import build_trainer
from dynamoe.models import Layout, MeshShape

Contents = Callable[[Path], dict[str, bytes]]

STEPS, PATIENCE = 60, 180.0  # steps of a run; seconds for one process on a busy machine


class Trainings:
    """Starts `dynamoe train` of one recipe file, each run in a directory of its own."""

    def __init__(self, recipe: Path):
        self.recipe = recipe
        self.children: list[subprocess.Popen[str]] = []

    def start(self, run: Path, *, before: str = "") -> subprocess.Popen[str]:
        main = f"{before}\nfrom dynamoe.experiments.cli import main; main()"
        sizes = ("--steps", str(STEPS), "--checkpoint-every", "3", "--evaluate-every", "20")
        command = [sys.executable, "-c", main, "train", str(self.recipe), "--run-dir", str(run), *sizes]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.children.append(child)
        return child

    def run(self, run: Path, *, before: str = "") -> subprocess.CompletedProcess[str]:
        child = self.start(run, before=before)
        output, errors = child.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(child.args, child.returncode, output, errors)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, recipe_text: str, text: Path) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.py").write_text(recipe_text)
    shutil.copy(text, folder / "text.txt")
    made = Trainings(folder / "mine.py")
    yield made
    for child in made.children:
        child.kill()
        child.communicate()


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    outcome = trainings.run(run)
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome.stderr
    return run


@pytest.fixture(scope="module")
def stopped(
    trainings: Trainings, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that SIGTERM stopped half-way, and how the process ended."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    child = trainings.start(run)
    wait_for_step(child, run, 7)
    child.terminate()
    output, errors = child.communicate(timeout=PATIENCE)
    return run, subprocess.CompletedProcess(child.args, child.returncode, output, errors)


def last_step(run: Path) -> int:
    """The last step that a run's metrics show so far."""
    file = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(run)), default=0) if file.exists() else 0


def wait_for_step(child: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while last_step(run) < step:
        assert child.poll() is None, f"ended before step {step}: {child.communicate()}"
        assert time.monotonic() < deadline, f"no step {step} in {PATIENCE} s"
        time.sleep(0.002)


def read_state(run: Path) -> dict[str, bytes]:
    """Every array of the newest checkpoint: parameters, variables, optimizer, step and seed, by name."""
    directory = RunDirectory.load(run)
    experiment = directory.config
    layout = Layout(MeshShape(data=1).build(jax.local_devices()[:1]))
    trainer = build_trainer(experiment.model, experiment.optimizer, layout, steps=experiment.steps)
    with Checkpoints(directory.checkpoints, metric=METRIC, read_only=True) as checkpoints:
        state, step = checkpoints.restore(trainer.abstract_state)
    assert step == STEPS
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def read_manifest(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself, the position in the data among others."""
    return json.loads((run / "checkpoints" / str(STEPS) / "manifest" / "metadata").read_text())


def measurements(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run)
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def assert_same_run(found: Path, expected: Path) -> None:
    assert read_state(found) == read_state(expected)
    assert read_manifest(found) == read_manifest(expected)
    lines = measurements(found)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["split"] == "held_out"] == [20, 40, 60]
    assert lines == measurements(expected)


def checkpoints_of(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def test_three_kills_at_random_steps_lose_no_bit(trainings: Trainings, uninterrupted: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"the kills of this test come from random.Random({seed})")
    chance, run = random.Random(seed), tmp_path / "run"
    for left in (3, 2, 1):
        child = trainings.start(run)
        shown = last_step(run)  # of the run before, until this one has cut what came after its checkpoint
        step = chance.randint(shown + 1, shown + (STEPS - shown) // (left + 1))
        wait_for_step(child, run, step)
        child.kill()
        assert child.wait() == -9, "the run ended before the kill"
        print(f"killed when step {step} was asked for and {last_step(run)} shown; {checkpoints_of(run)}")
    outcome = trainings.run(run)
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome.stderr
    assert re.search(rf"continuing {re.escape(str(run))} at step \d+\n", outcome.stdout)
    assert_same_run(run, uninterrupted)


def test_sigterm_saves_says_so_in_one_line_and_ends_with_status_0(
    stopped: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, outcome = stopped
    assert (outcome.returncode, outcome.stderr) == (0, "")
    (line,) = [line for line in outcome.stdout.splitlines() if "SIGTERM" in line]
    step = re.fullmatch(rf"SIGTERM: saved step (\d+) of {STEPS}; the same command continues from there", line)
    assert step is not None and outcome.stdout.endswith(line + "\n")
    assert int(step[1]) == last_step(run) < STEPS
    assert step[1] in checkpoints_of(run)


def test_after_sigterm_the_same_command_continues_to_the_same_bits(
    trainings: Trainings, uninterrupted: Path, stopped: tuple[Path, Any], tmp_path: Path
) -> None:
    run = shutil.copytree(stopped[0], tmp_path / "run")
    step = last_step(run)
    outcome = trainings.run(run)
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome.stderr
    assert f"continuing {run} at step {step}\n" in outcome.stdout
    assert_same_run(run, uninterrupted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a disk: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_continues(
    trainings: Trainings, uninterrupted: Path, stopped: tuple[Path, Any], small_disk: Path, contents: Contents
) -> None:
    run = shutil.copytree(stopped[0], small_disk / "run")
    ballast, room = small_disk / "ballast", 160_000  # enough to begin, not enough for a checkpoint
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    before, kept = contents(run / "checkpoints"), checkpoints_of(run)
    outcome = trainings.run(run)
    assert_one_clear_line(outcome, run)
    assert checkpoints_of(run) == kept
    assert contents(run / "checkpoints") == before
    ballast.unlink()
    outcome = trainings.run(run)
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome.stderr
    assert_same_run(run, uninterrupted)


def test_a_checkpoint_that_may_not_be_written_is_one_line(
    trainings: Trainings, stopped: tuple[Path, Any], tmp_path: Path, contents: Contents
) -> None:
    """As a full disk, where no disk can be mounted: the system refuses files beyond 50 kB."""
    run = shutil.copytree(stopped[0], tmp_path / "run")
    before, kept = contents(run / "checkpoints"), checkpoints_of(run)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    outcome = trainings.run(run, before=limit)
    assert_one_clear_line(outcome, run)
    assert checkpoints_of(run) == kept
    assert contents(run / "checkpoints") == before


def assert_one_clear_line(outcome: subprocess.CompletedProcess[str], run: Path) -> None:
    assert outcome.returncode == 1
    lines = outcome.stderr.splitlines()
    assert re.match(rf"dynamoe: error: could not save step \d+ in {re.escape(str(run))}/checkpoints: ", lines[0])
    assert "bytes needed" in lines[0] and "other steps to restore: [" in lines[0]
    assert lines[1:] == ["(DYNAMOE_TRACEBACK=1 shows where)"]
