"""What fills a device: exact bytes of arguments against XLA's own, and the formulas."""

import dataclasses

import jax
import pytest

from dynamoe.experiments.planning.compiled import training_step
from dynamoe.experiments.planning.formulas import by_formulas
from dynamoe.experiments.planning.memory import Memory, bytes_per_device, training_arguments
from dynamoe.experiments.planning.placement import PlacedMesh
from dynamoe.experiments.planning.search import abstract_state
from dynamoe.experiments.planning.target import Target
from dynamoe.models import MeshShape


def test_categories_of_arguments_are_what_xla_counts(tiny):
    # On CPU no layout pads, so that nothing is left over.
    mesh = MeshShape().build(jax.devices()[:1])
    step = training_step(tiny(), PlacedMesh(Target("v5e", (1, 1)), mesh))
    compiled = step.function.lower(*step.arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert sum(step.categories.values()) == memory.argument_size_in_bytes
    params = bytes_per_device(step.arguments[0].params)
    assert step.categories["parameters"] == params
    assert 2 * params <= step.categories["optimizer state"] <= 2 * params + 64  # AdamW's two moments


def test_a_device_holds_its_part_of_what_is_split(on, tiny):
    experiment = tiny()
    whole, split = on("v5e", "2x2", data=4), on("v5e", "2x2", fsdp=2, expert=2)
    state = abstract_state(experiment, whole.mesh)
    everything = by_formulas(experiment, state, whole).memory.arguments
    parts = by_formulas(experiment, state, split).memory.arguments
    assert everything["parameters"] == training_arguments(state, ())["parameters"]
    assert everything["parameters"] / 4 < parts["parameters"] < everything["parameters"] / 2
    assert everything["batch"] == parts["batch"]  # both split it in four


def test_micro_batches_and_recomputation_save_memory(on, tiny):
    experiment, placed = tiny(), on("v5e", "2x2", fsdp=2, expert=2)
    state = abstract_state(experiment, placed.mesh)

    def temporaries(**options) -> int:
        model = dataclasses.replace(experiment.model, remat=options.pop("remat", False))
        changed = dataclasses.replace(experiment, model=model, batch_size=16, sequence_length=64, **options)
        return by_formulas(changed, state, placed).memory.temporaries

    assert temporaries(gradient_accumulation=4) < temporaries()
    assert temporaries(remat=True) < temporaries()


def test_what_is_missing_is_a_negative_margin():
    memory = Memory({"parameters": 60, "optimizer state": 30}, 5, 1, 14, False, 100)
    assert (memory.total, memory.margin, memory.fits) == (110, -10, False)
    assert memory._replace(temporaries=4).fits
    assert sum(memory.parts().values()) == memory.total


def test_formulas_name_what_does_not_divide(on, tiny):
    experiment, placed = tiny(), on("v5e", "4x4", expert=16)
    with pytest.raises(ValueError, match="gradient_accumulation has length 4; it must be a multiple of 16"):
        by_formulas(experiment, abstract_state(experiment, placed.mesh), placed)
