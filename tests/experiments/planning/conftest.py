"""Slices and boxes whose devices are made up: what a plan asks of a device, without a compiler."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from dynamoe.experiments.commands import plan as command
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.planning import placement, search
from dynamoe.experiments.planning.formulas import by_formulas
from dynamoe.experiments.planning.placement import PlacedMesh, place
from dynamoe.experiments.planning.plan import StepPlan
from dynamoe.experiments.planning.target import find_target
from dynamoe.kernels import aot
from dynamoe.models import MeshShape
from dynamoe.moe import ExpertParallel


class MadeUp:
    """A device of a TPU slice, or of a box of GPUs."""

    def __init__(self, number: int, coords: tuple[int, ...], core: int, kind: str):
        self.id, self.coords, self.core_on_chip, self.device_kind = number, coords, core, kind
        self.platform, self.process_index, self.client = ("gpu" if kind == "gpu" else "tpu"), 0, None

    def __repr__(self) -> str:
        return f"{self.device_kind} {self.id}"


def made_up(chip: str) -> list[Any]:
    kind, _, topology = chip.partition(":")
    sides = [int(side) for side in topology.split("x")]
    if kind.startswith("h"):
        return [MadeUp(number, (), 0, "gpu") for number in range(sides[1] * sides[2])]
    sides += [1] * (3 - len(sides))
    places = itertools.product(*(range(side) for side in reversed(sides)))  # the first side counts fastest
    return [MadeUp(number, place[::-1], 0, f"TPU {kind}") for number, place in enumerate(places)]


@pytest.fixture
def tiny(tiny: Callable[..., Experiment]) -> Callable[..., Experiment]:
    """The tiny experiment with its tokens sent to their experts."""

    def build(**fields: Any) -> Experiment:
        experiment = tiny(**fields)
        ffn = dataclasses.replace(experiment.model.ffn, dispatcher=ExpertParallel())
        return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, ffn=ffn))

    return build


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "absent_devices", made_up)
    monkeypatch.setattr(aot, "absent_devices", made_up)


@pytest.fixture
def on(no_compiler: None) -> Callable[..., PlacedMesh]:
    """`on("v5p", "4x4x4", fsdp=16, expert=4)`: a mesh on made-up devices."""

    def build(chip: str, topology: str, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> PlacedMesh:
        return place(MeshShape(data=data, fsdp=fsdp, expert=expert, tensor=tensor), find_target(chip, topology))

    return build


@pytest.fixture
def planned_without_compiling(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> list[str]:
    """Let steps be planned by formulas, as if they had been compiled. Returns the meshes, as they are planned.

    A mesh with an expert axis of 2 takes one millisecond, others two. Those with a tensor axis do not fit.
    """
    planned: list[str] = []

    def plan_step(experiment: Any, step: Any, placement: PlacedMesh) -> StepPlan:
        found, shape = by_formulas(experiment, step.arguments[0], placement), placement.mesh.shape
        planned.append(" ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1))
        time = found.estimate._replace(compute=0.0, executed=1e-3 if shape["expert"] == 2 else 2e-3, memory=0.0)
        memory = found.memory._replace(estimated=False, padding=0)
        refusal = "Ran out of memory" if shape["tensor"] > 1 else None
        return StepPlan(step.name, step.tokens, memory, time, found.exchanges, 1.0, refusal)

    for module in (search, command):
        monkeypatch.setattr(module, "plan_step", plan_step)
    return planned
