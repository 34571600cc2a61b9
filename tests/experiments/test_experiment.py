"""An experiment refuses what could not be trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from dynamoe.experiments.experiment import FREE_FIELDS, Experiment
from dynamoe.experiments.recipes import standard_library
from dynamoe.experiments.serialization import from_json, to_json
from dynamoe.models import Attention, Decoder, MeshShape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -3}, "steps is -3; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"sequence_length": 0}, "sequence_length is 0; it must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every is 0; it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1"),
        ({"log_every": 0}, "log_every is 0; it must be at least 1"),
        ({"keep_last": 0}, "keep_last is 0; it must be at least 1"),
        ({"keep_best": -1}, "keep_best is -1; it must be at least 0"),
        ({"gradient_accumulation": 3}, "gradient_accumulation is 3; it must divide batch_size=4"),
        ({"seed": -1}, r"seed is -1; it must be from 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed is 4294967296; it must be from 0"),
    ],
)
def test_refuses_a_number_with_its_name_and_what_is_allowed(
    tiny: Callable[..., Experiment], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads.*3.*16|16.*heads.*3"):
        Decoder(vocab=258, width=16, attention=Attention(heads=3))


def test_a_mesh_of_other_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mesh is .*data=3.*take 3 devices; 1 are there"):
        MeshShape(data=3).build()


def test_fields_that_may_change_exist() -> None:
    assert set(FREE_FIELDS) <= {field.name for field in dataclasses.fields(Experiment)}


@pytest.mark.smoke
def test_the_default_recipe_can_be_stored_and_read_back() -> None:
    experiment = standard_library.recipe()
    assert from_json(to_json(experiment)) == experiment
