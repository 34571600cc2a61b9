"""How expert parallelism scales: one model, compiled for slices of v5p of 8 to 512 chips, with as many tokens on each.

    python -m dynamoe.experiments.planning.scaling                # an eighth of Mixtral's widths, all sizes
    python -m dynamoe.experiments.planning.scaling full 4x4x4     # the whole width, one size

An exchange brings a device T K c rows of D numbers, of which (n - 1) / n come from others. Letters: T tokens of a
device, K experts per token, c capacity factor, D width, n devices that share the experts. A layer has six exchanges in
a step: to the experts and back, in the forward pass, again where the backward pass recomputes the layer, and of the
gradients.
"""

import sys
from dataclasses import replace
from typing import NamedTuple

import jax

from ...models import MeshShape
from ...moe import AllToAll, CapacityDispatcher, ExpertParallel, MoE, SwiGLU, TopK
from ..experiment import Experiment
from ..recipes import mixtral_8x7b
from .compiled import compile_step, training_step
from .network import wire_bytes
from .placement import place
from .target import find_target

MESHES = {
    "2x2x2": MeshShape(data=1, fsdp=1, expert=8),
    "4x4x4": MeshShape(data=1, fsdp=16, expert=4),
    "8x8x8": MeshShape(data=1, fsdp=64, expert=8),
}
"""By topology. The axis of the experts takes whole sides of the slice."""
EXCHANGES = 6
"""Of a layer in a step."""


class Scale(NamedTuple):
    """One size, in bytes and operations of one device and step."""

    topology: str
    devices: int
    shared_by: int
    """Devices that share the experts, n."""
    exchanged: float
    """Bytes that all-to-alls bring from other devices, read from the compiled program."""
    formula: float
    """The same by the formula."""
    flops: float
    """The compiler's count, the body of the loop over the layers once."""
    memory: int

    @property
    def deviation(self) -> float:
        """Of the program from the formula, as a share."""
        return self.exchanged / self.formula - 1


def at_scale(experiment: Experiment, chip: str, topology: str, mesh: MeshShape) -> Scale:
    """Compile an experiment, its batch and mesh changed, for a slice: one sequence for each device.

    Args:
        experiment: its feed-forward networks are `MoE` with `AllToAll`, and it recomputes its layers.
        chip: a key of `CHIPS`.
        topology: as "4x4x4".
        mesh: of as many devices.

    Raises:
        RuntimeError: the compiler refuses the program.
    """
    target = find_target(chip, topology)
    placement = place(mesh, target)
    experiment = replace(experiment, mesh=mesh, batch_size=target.devices, gradient_accumulation=1)
    compiled = compile_step(training_step(experiment, placement), placement)
    if compiled.report is None or compiled.report.own_flops is None:
        raise RuntimeError(f"{target.name} does not hold the program: {compiled.refusal}")
    shared_by = placement.mesh.shape["expert"]
    exchanged = sum(
        wire_bytes(one.kind, float(one.bytes), shared_by) * (one.times or 0)
        for one in compiled.report.collectives
        if one.kind == "all-to-all"
    )
    return Scale(
        topology,
        target.devices,
        shared_by,
        exchanged,
        by_formula(experiment, shared_by),
        compiled.report.own_flops,
        compiled.report.memory_bytes,
    )


def by_formula(experiment: Experiment, shared_by: int) -> float:
    """Bytes that exchanges bring to one device in a step from others, one sequence for each device."""
    model, ffn = experiment.model, experiment.model.ffn
    assert isinstance(ffn, MoE) and isinstance(ffn.dispatcher, ExpertParallel)
    exchange = ffn.dispatcher.exchange
    assert isinstance(exchange, AllToAll)
    rows = experiment.sequence_length * ffn.router.experts_per_token * exchange.capacity.capacity_factor
    number = 2 if model.dtype == "bfloat16" else 4
    return model.layers * EXCHANGES * rows * model.width * number * (shared_by - 1) / shared_by


def mixtral(*, parts: int = 8, layers: int = 4) -> Experiment:
    """Mixtral 8x7B with its widths, heads, vocabulary and sequence divided by `parts`, and fewer layers."""
    recipe = mixtral_8x7b.recipe()
    model = recipe.model
    ffn = MoE(
        experts=8,
        router=TopK(k=2),
        expert=SwiGLU(hidden=14_336 // parts),
        dispatcher=ExpertParallel(exchange=AllToAll(capacity=CapacityDispatcher(capacity_factor=1.0))),
    )
    attention = replace(model.attention, heads=32 // parts, kv_heads=8 // parts)
    model = replace(
        model, vocab=model.vocab // parts, width=model.width // parts, layers=layers, attention=attention, ffn=ffn
    )
    return replace(recipe, model=model, sequence_length=recipe.sequence_length // parts)


def main(topologies: list[str]) -> None:
    """Print a line for each size as it is compiled: an eighth of Mixtral, or with "full" the whole width."""
    experiment = mixtral(parts=1 if "full" in topologies else 8)
    print("| chips | n | exchanged, MiB | formula, MiB | deviation | compiler's FLOP | GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for topology in [name for name in topologies if name != "full"] or MESHES:
        scale = at_scale(experiment, "v5p", topology, MESHES[topology])
        print(
            f"| {topology} = {scale.devices} | {scale.shared_by} | {scale.exchanged / 2**20:.2f} | "
            f"{scale.formula / 2**20:.2f} | {scale.deviation:+.2%} | {scale.flops:.4g} | {scale.memory / 2**30:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a compiler for absent chips must not take those that are here
    main(sys.argv[1:])
