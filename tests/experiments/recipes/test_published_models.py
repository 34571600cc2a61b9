"""Recipes of published models build what was published, for devices that exist."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dynamoe.experiments.data import HuggingFace, HuggingFaceTokenizer
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.optimizers import AdamW
from dynamoe.experiments.planning.published import PUBLISHED, RECIPES
from dynamoe.experiments.planning.target import find_target
from dynamoe.experiments.serialization import call_recipe
from dynamoe.models import MeshShape
from dynamoe.models.accounting import count_parts


# Parameters: half of total_size in the released model.safetensors.index.json, whose tensors are bfloat16. Active ones
# in billions, as published: Mistral's announcement, OLMoE's table 1 (1.3), the model card of Qwen3-30B-A3B.
@pytest.mark.parametrize(
    ("name", "bytes_of_bfloat16", "active"),
    [
        ("mixtral_8x7b", 93_405_585_408, 12.9),
        ("olmoe_1b_7b", 13_838_323_712, 1.3),
        ("qwen3_30b_a3b", 61_064_245_248, 3.3),
    ],
)
def test_parameters_are_those_of_the_released_model(name, bytes_of_bfloat16, active):
    total = count_parts(call_recipe(RECIPES / f"{name}.py").model, 4096)[-1]
    assert 2 * total.parameters == bytes_of_bfloat16
    assert total.active_parameters / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_divides_over_its_devices(name):
    experiment = call_recipe(RECIPES / f"{name}.py")
    mesh, model = experiment.mesh, experiment.model
    devices = find_target(*PUBLISHED[name]).devices
    assert mesh.data * mesh.fsdp * mesh.expert * mesh.tensor == devices
    assert experiment.batch_size // experiment.gradient_accumulation % devices == 0
    assert isinstance(experiment.optimizer, AdamW) and model.dtype == "bfloat16" and model.remat
    # What a recipe names is fetched when it trains, not when it is built.
    assert isinstance(experiment.source, HuggingFace) and experiment.source.streams
    assert isinstance(experiment.tokenizer, HuggingFaceTokenizer) and not Path(experiment.tokenizer.path).exists()
    assert math.log2(experiment.sequence_length) == 12


def test_recipes_of_one_model_differ_in_what_depends_on_the_devices_alone():
    free = {"mesh": MeshShape(), "gradient_accumulation": 1}
    for name in ("mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b"):
        first, *others = (call_recipe(RECIPES / f"{name}{chip}.py") for chip in ("", "_v6e", "_h100"))
        for other in others:
            ffn = replace(other.model.ffn, dispatcher=first.model.ffn.dispatcher)
            assert replace(other, model=replace(other.model, ffn=ffn), **free) == replace(first, **free)


def test_every_recipe_that_is_not_the_standard_librarys_is_compiled_each_night():
    names = {path.stem for path in RECIPES.glob("[!_]*.py") if not path.stem.startswith("standard_")}
    assert {name for name in names if isinstance(call_recipe(RECIPES / f"{name}.py"), Experiment)} == set(PUBLISHED)


def test_the_commands_of_a_recipes_header_name_its_file_and_devices():
    for name, (chip, topology) in PUBLISHED.items():
        header = ast.get_docstring(ast.parse((RECIPES / f"{name}.py").read_text())) or ""
        assert f"dynamoe plan experiments/recipes/{name}.py --chip {chip} --topology {topology}\n" in header
        assert f"dynamoe train experiments/recipes/{name}.py --distributed" in header
