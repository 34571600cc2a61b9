"""The best mesh as a recipe: it builds what was planned, also out of classes of the recipe's own."""

import dataclasses
import sys
from pathlib import Path

import pytest

from dynamoe.experiments.cli import parse
from dynamoe.experiments.planning.target import find_target
from dynamoe.experiments.planning.winner import winner_text
from dynamoe.experiments.recipes import standard_library
from dynamoe.experiments.serialization import to_json
from dynamoe.models import MeshShape

MESH = MeshShape(data=2, fsdp=1, expert=2, tensor=1)


def written(file: Path, recipe: Path | None, base, **changes) -> Path:
    file.parent.mkdir(exist_ok=True)
    experiment = dataclasses.replace(base, mesh=MESH, **changes)
    file.write_text(winner_text(file, recipe, base, experiment, find_target("v5e")))
    return file


def test_it_builds_the_standard_recipe_on_another_mesh(tmp_path):
    file = written(tmp_path / "best.py", None, standard_library.recipe(), steps=7)
    experiment = parse(["train", str(file)]).experiment
    assert experiment == dataclasses.replace(standard_library.recipe(), mesh=MESH, steps=7)
    assert "standard_library on 4 devices of v5e, 2x2" in file.read_text()


def test_it_finds_the_planned_recipe_by_its_path(recipe, tmp_path):
    base = parse(["plan", str(recipe)]).experiment
    model = dataclasses.replace(base.model, remat=True)
    file = written(tmp_path / "plans" / "mine_v5e_2x2.py", recipe, base, model=model)
    experiment = parse(["plan", str(file)]).experiment
    assert (experiment.mesh, experiment.model.remat) == (MESH, True)
    assert type(experiment.model.ffn.router).__qualname__ == "Noisy"
    assert to_json(experiment)["model"]["ffn"]["router"]["type"] == "mine:Noisy"  # another process can import it
    sys.modules.pop("mine")


def test_it_can_be_planned_again_and_changed(recipe, tmp_path):
    base = parse(["plan", str(recipe)]).experiment
    file = written(tmp_path / "best.py", recipe, base)
    assert parse(["train", str(file), "--mesh.data", "4", "--mesh.expert", "1"]).experiment.mesh.data == 4
    sys.modules.pop("mine")


def test_a_change_that_cannot_be_written_is_named(tmp_path):
    base = standard_library.recipe()
    changed = dataclasses.replace(base)
    object.__setattr__(changed, "source", object())
    with pytest.raises(ValueError, match="experiment.source is <object .*; put it into the recipe"):
        winner_text(tmp_path / "best.py", None, base, changed, find_target("v5e"))
