"""Recipes of classifiers build models that fit their examples."""

from pathlib import Path

import pytest

from dynamoe.experiments.classification import ClassificationExperiment
from dynamoe.experiments.classification.experiment import check_fits
from dynamoe.experiments.planning.published import RECIPES
from dynamoe.experiments.serialization import call_recipe, from_json, to_json


@pytest.mark.parametrize("name", ["digits", "mnist", "sst2"])
def test_a_recipe_builds_what_can_be_stored_and_read_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMOE_DATA", "somewhere")
    experiment = call_recipe(RECIPES / f"{name}.py")
    assert isinstance(experiment, ClassificationExperiment) and experiment.model.exits is not None
    assert from_json(to_json(experiment)) == experiment
    if name != "digits":
        with pytest.raises(ValueError, match=f"somewhere/{name}"):
            check_fits(experiment)  # the data is not here, and is named


def test_the_digits_fit_without_any_file(tmp_path: Path) -> None:
    check_fits(call_recipe(RECIPES / "digits.py"))
