"""Which mesh is best: all are ranked by formulas, the first few are compiled."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ...models import Layout, MeshShape
from ..experiment import Experiment
from ..training.step import TrainState, build_trainer
from .compiled import training_step
from .formulas import Formulas, by_formulas
from .placement import AXES, PlacedMesh, factorizations, possible_meshes
from .plan import StepPlan, plan_step
from .target import Target

COMPILED = 5
"""How many of the best are compiled."""


class Candidate(NamedTuple):
    """A mesh that divides what it has to and that the devices can hold."""

    shape: MeshShape
    placement: PlacedMesh
    formulas: Formulas
    compiled: StepPlan | None = None

    @property
    def name(self) -> str:
        """Its axes of more than one device, as "fsdp=16 expert=4"."""
        sizes = {axis: getattr(self.shape, axis) for axis in AXES}
        return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"

    @property
    def fits(self) -> bool:
        """What the compiler says, else the formulas."""
        return self.formulas.memory.fits if self.compiled is None else self.compiled.refusal is None


class Search(NamedTuple):
    """What came of a search."""

    candidates: list[Candidate]
    """Best first: what was compiled and fits, by the time of the program where nothing overlaps; then the rest, by the
    formulas."""
    refused: list[tuple[MeshShape, str]]
    """Meshes that the devices could hold, with what does not divide."""
    unheld: int
    """How many meshes of as many devices these cannot hold."""

    @property
    def winner(self) -> Candidate | None:
        """None: nothing that was compiled fits."""
        best = self.candidates[0] if self.candidates else None
        return best if best is not None and best.compiled is not None and best.fits else None


def search_meshes(experiment: Experiment, target: Target, note: Callable[[str], None]) -> Search:
    """Rank every mesh of the target's devices, and compile the best.

    Args:
        experiment: what is trained; its own mesh does not matter.
        target: the devices.
        note: is told what is being done.

    Raises:
        ValueError: no mesh divides what it has to; the message says why the first does not.
    """
    held = possible_meshes(target)
    state = abstract_state(experiment, held[0][1].mesh)
    candidates, refused = [], []
    for shape, placement in held:
        try:
            candidates.append(Candidate(shape, placement, by_formulas(experiment, state, placement)))
        except ValueError as error:
            refused.append((shape, str(error)))
    if not candidates:
        raise ValueError(
            f"none of the {len(held)} meshes that {target.chip} {target.topology} can hold divides this experiment; "
            f"{refused[0][0]}: {refused[0][1]}"
        )
    candidates.sort(key=_by_formulas)
    note(f"{len(candidates)} meshes are possible, {len(refused)} do not divide; compiling the best by formulas")
    for place, candidate in enumerate(candidates[:COMPILED]):
        note(f"compiling {place + 1} of {min(COMPILED, len(candidates))}: {candidate.name}")
        planned = plan_step(experiment, training_step(experiment, candidate.placement), candidate.placement)
        candidates[place] = candidate._replace(compiled=planned)
        jax.clear_caches()  # of a program that is not needed any more
    return Search(sorted(candidates, key=_best_first), refused, _meshes_of(target.devices) - len(held))


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The shapes of the state, as one device of the mesh would hold them: there nothing has to divide."""
    alone = MeshShape(data=1).build([mesh.devices.flat[0]])
    layout = Layout(alone, experiment.rules)
    return build_trainer(experiment.model, experiment.optimizer, layout, steps=experiment.steps).abstract_state


def _by_formulas(candidate: Candidate) -> tuple[bool, float]:
    """What fits first; of what fits the fastest where nothing overlaps, of the rest what misses least."""
    memory, time = candidate.formulas.memory, candidate.formulas.estimate
    return not memory.fits, time.serial if memory.fits else float(-memory.margin)


def _best_first(candidate: Candidate) -> tuple[bool, bool, float]:
    """What was compiled and fits first, by the time of the program; then what was not, or does not, by formulas."""
    compiled = candidate.compiled
    if compiled is None or compiled.estimate is None or not candidate.fits:
        return True, *_by_formulas(candidate)
    return False, False, compiled.estimate.serial


def _meshes_of(devices: int) -> int:
    return len(factorizations(devices, len(AXES)))
