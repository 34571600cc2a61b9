"""A run that `dynamoe train` made in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class TrainedRun(NamedTuple):
    recipe: Path
    folder: Path
    """Where the command was called."""
    run: Path
    output: str


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe_text: str, text: Path) -> TrainedRun:
    """`dynamoe train mine.py --steps 3`, whose recipe has a router of its own."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "mine.py"
    recipe.write_text(recipe_text)
    shutil.copy(text, folder / "text.txt")
    command = [sys.executable, "-c", "from dynamoe.experiments.cli import main; main()"]
    child = subprocess.run(
        [*command, "train", "mine.py", "--steps", "3"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert (child.returncode, child.stderr) == (0, ""), child.stderr
    return TrainedRun(recipe, folder, folder / "runs" / "mine", child.stdout)


@pytest.fixture
def beside(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> TrainedRun:
    """The trained run, seen from where it was trained; the recipe's module leaves with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "recipe", sys)
    monkeypatch.chdir(trained.folder)
    return trained
