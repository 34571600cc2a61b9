"""A training step's memory and time by formulas: good enough to rank meshes by, and fast enough for all of them.

Letters: n devices, t tokens of one micro-batch on one device, D model width, L layers, K experts per token, c bytes of
the compute dtype.

Temporaries are the sum of
- gradients, like the parameters that a device holds;
- weights gathered over "fsdp": two layers' in use and one layer's gradient, and the head's;
- activations that wait for the backward pass: t D c for each layer where it recomputes, else everything that a layer's
  products return;
- one layer's products, attention scores [rows, H, S, S] twice in float32, and logits three times in float32; of scores
  and logits a block at a time where the model has blocks.

Collectives, in each micro-batch:
- over "fsdp" the split weights are gathered in each pass, and their gradients summed and scattered;
- over the axes that split the batch but not a weight its gradients are summed ("data"; for all but experts "expert");
- over "tensor" the outputs of attention and of the feed-forward network are summed in each pass: t D c, and of experts
  K t D c;
- over "expert" each layer of experts under `ExpertParallel` exchanges t K D c, times its capacity factor, twice in each
  pass, or with `AllGather` the tokens of all, t D c of each; under other dispatchers its weights are gathered and their
  gradients scattered.
Passes are the forward and the backward one, and the recomputation.
"""

import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from ...models import Attention, LatentAttention, Layout, SelfAttention
from ...models.accounting import Part, count_parts
from ...moe import AllGather, AllToAll, ExpertParallel, MoE
from ..experiment import Experiment
from ..training.step import TrainState
from .memory import Memory, abstract_batch, capacity, training_arguments
from .placement import PlacedMesh
from .roofline import Estimate, Exchange, estimate, exchange


class Weight(NamedTuple):
    """A parameter, as the layout splits it."""

    size: int
    """Elements on one device while in use: gathered over "fsdp"."""
    gathered: bool
    """Whether "fsdp" splits it otherwise."""
    summed_over: tuple[str, ...]
    """Axes that split the batch and not the weight: its gradient is summed over them."""
    layered: bool
    """Whether it belongs to a run of stacked layers."""
    of_experts: bool
    """Whether "expert" splits it."""


class Formulas(NamedTuple):
    """One mesh, without a compiler."""

    memory: Memory
    estimate: Estimate
    exchanges: list[Exchange]


def by_formulas(experiment: Experiment, state: TrainState, placement: PlacedMesh) -> Formulas:
    """Memory and time of a training step on a mesh.

    Args:
        experiment: what is trained.
        state: its abstract state; shardings of another mesh do not matter.
        placement: the mesh.

    Raises:
        ValueError: an axis of a parameter or the batch does not divide over the mesh; it is named.
    """
    layout = Layout(placement.mesh, experiment.rules)
    batch = abstract_batch(experiment, layout)
    placed: Any = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state, layout.shardings(state)
    )
    weights, parts = _weights(placed.params, layout), count_parts(experiment.model, experiment.sequence_length)
    exchanges = _exchanges(experiment, weights, placement)
    memory = Memory(
        arguments=training_arguments(placed, batch),
        padding=None,
        results=0,
        temporaries=_temporaries(experiment, placed.params, weights, parts, placement),
        estimated=True,
        capacity=capacity(placement.target.chip),
    )
    time = estimate(
        placement,
        model_flops=3 * parts[-1].flops * experiment.batch_size * experiment.sequence_length,
        needed_flops=needed_flops(experiment),
        executed_flops=None,
        hbm_bytes=hbm_bytes(experiment, memory, sum(weight.size for weight in weights)),
        exchanges=exchanges,
    )
    return Formulas(memory, time, exchanges)


def weights_in_use(experiment: Experiment, params: nnx.State, placement: PlacedMesh) -> int:
    """Elements of the parameters that one device multiplies with: gathered over "fsdp", still split by the others."""
    return sum(weight.size for weight in _weights(params, Layout(placement.mesh, experiment.rules)))


def hbm_bytes(experiment: Experiment, memory: Memory, weights: int, *, training: bool = True) -> float:
    """What one device's memory moves in a step at least: see `roofline.assumptions`.

    Args:
        experiment: its dtype, its recomputation and its micro-batches count.
        memory: what the device holds.
        weights: elements that it multiplies with.
        training: else one pass of generation.
    """
    held = sum(memory.arguments.values())
    written = held if training else memory.arguments.get("key-value cache", 0)
    passes = (3 + experiment.model.remat) * experiment.gradient_accumulation if training else 0
    in_use = passes * weights * _bytes_each(experiment)
    return float(held + written + memory.results + 2 * memory.temporaries + in_use)


def needed_flops(experiment: Experiment) -> float:
    """Of a training step over all devices: three forward passes, and a fourth of the layers where they recompute."""
    parts = count_parts(experiment.model, experiment.sequence_length)
    again = _inside_layers(parts) if experiment.model.remat else 0.0
    return (3 * parts[-1].flops + again) * experiment.batch_size * experiment.sequence_length


def _weights(params: nnx.State, layout: Layout) -> list[Weight]:
    batch_axes = [axis for axis in layout.rules.batch if layout.mesh.shape[axis] > 1]
    found = []
    for _, variable in nnx.to_flat_state(params):
        array, axes = variable.get_value(), variable.get_metadata().get("axes") or ()
        spec = layout.rules.spec(axes, array.shape, layout.mesh, "weight") if axes else ()
        over = {axis for entry in spec if entry for axis in ([entry] if isinstance(entry, str) else entry)}
        kept = math.prod(layout.mesh.shape[axis] for axis in over if axis != "fsdp")
        summed = tuple(axis for axis in batch_axes if axis not in over)
        found.append(Weight(math.prod(array.shape) // kept, "fsdp" in over, summed, "layers" in axes, "expert" in over))
    return found


def _exchanges(experiment: Experiment, weights: list[Weight], placement: PlacedMesh) -> list[Exchange]:
    model, sizes, each = experiment.model, placement.mesh.shape, _bytes_each(experiment)
    passes, repeats = 2 + model.remat, experiment.gradient_accumulation
    activations = _tokens(experiment, placement) * model.width * each
    found: list[tuple[str, float, tuple[str, ...], float]] = []
    gathered = sum(weight.size for weight in weights if weight.gathered) * each
    found.append(("all-gather", gathered, ("fsdp",), passes * repeats))
    found.append(("reduce-scatter", gathered / sizes["fsdp"], ("fsdp",), repeats))
    for axes in {weight.summed_over for weight in weights}:
        summed = sum(w.size / (sizes["fsdp"] if w.gathered else 1) for w in weights if w.summed_over == axes)
        found.append(("all-reduce", summed * each, axes, repeats))
    mixtures = [ffn for ffn in model.feed_forwards if isinstance(ffn, MoE)]
    chosen = sum(ffn.router.experts_per_token for ffn in mixtures)
    rows = (2 * model.layers - len(mixtures) + chosen) * activations
    found.append(("all-reduce", rows, ("tensor",), passes * repeats))
    exchanged = [one for ffn in mixtures for one in _of_experts(ffn, activations, placement)]
    for kind in ("all-to-all", "all-gather", "reduce-scatter"):
        rows = sum(size for of_kind, size in exchanged if of_kind == kind)
        found.append((kind, rows, ("expert",), passes * repeats * (2 if kind == "all-to-all" else 1)))
    if not all(isinstance(ffn.dispatcher, ExpertParallel) for ffn in mixtures):
        experts = sum(weight.size for weight in weights if weight.of_experts) * each
        found.append(("all-gather", experts * sizes["expert"], ("expert",), passes * repeats))
        found.append(("reduce-scatter", experts, ("expert",), repeats))
    return [
        exchange(kind, size, axes, times, placement)
        for kind, size, axes, times in found
        if size and math.prod(sizes[axis] for axis in axes) > 1
    ]


def _of_experts(ffn: MoE, activations: float, placement: PlacedMesh) -> list[tuple[str, float]]:
    """Kind and bytes of the exchanges of a layer's tokens; an all-to-all is there and back."""
    if not isinstance(ffn.dispatcher, ExpertParallel):
        return []
    exchange, rows = ffn.dispatcher.exchange, ffn.router.experts_per_token * activations
    if isinstance(exchange, AllGather):
        return [("all-gather", placement.mesh.shape["expert"] * activations), ("reduce-scatter", activations)]
    factor = exchange.capacity.capacity_factor if isinstance(exchange, AllToAll) else 1.0
    return [("all-to-all", factor * rows)]


def _temporaries(
    experiment: Experiment, params: nnx.State, weights: list[Weight], parts: list[Part], placement: PlacedMesh
) -> int:
    model, sizes, each = experiment.model, placement.mesh.shape, _bytes_each(experiment)
    tokens, layers = _tokens(experiment, placement), model.layers
    gradients = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(params))
    layered = sum(weight.size for weight in weights if weight.gathered and weight.layered) / layers
    outside = sum(weight.size for weight in weights if weight.gathered and not weight.layered)
    gathered = (3 * layered + outside) * each
    products = _inside_layers(parts, of="active_parameters") / model.width / layers / sizes["tensor"] * tokens * each
    rows = tokens / experiment.sequence_length
    most = max(_scores(attention, experiment.sequence_length) for attention in model.attentions)
    scores = 2 * rows * most / sizes["tensor"] * 4
    kept = layers * tokens * model.width * each if model.remat else layers * (products + scores)
    share = min(1.0, (model.loss_block or experiment.sequence_length) / experiment.sequence_length)
    logits = 3 * tokens * share * model.vocab / sizes["tensor"] * 4
    return round(gradients + gathered + kept + max(2 * products + scores, logits))


def _scores(attention: SelfAttention, length: int) -> int:
    """Scores of one sequence that exist at once; of an attention of one's own unknown, and left out."""
    if isinstance(attention, LatentAttention):
        return attention.heads * length**2
    if isinstance(attention, Attention):
        return attention.heads * length * min(attention.query_block or length, length)
    return 0


def _tokens(experiment: Experiment, placement: PlacedMesh) -> float:
    """t."""
    over = math.prod(placement.mesh.shape[axis] for axis in experiment.rules.batch)
    return experiment.batch_size * experiment.sequence_length / experiment.gradient_accumulation / over


def _inside_layers(parts: list[Part], of: str = "flops") -> float:
    return sum(getattr(part, of) for part in parts if part.name not in ("embedding", "head", "norms", "total"))


def _bytes_each(experiment: Experiment) -> int:
    """c."""
    return 2 if experiment.model.dtype == "bfloat16" else 4
