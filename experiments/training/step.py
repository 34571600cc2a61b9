"""One training step: loss, gradients over micro-batches, update; jitted, donated, over arrays split once.

Letters: B batch, S sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt

from ...models import Classifier, Decoder, Layout
from ...moe import MoEStats
from ..optimizers import TrainingRule
from .process_rows import global_rows
from .task import LANGUAGE, Batch, Task

ROUTERS = "routers"
"""Among a step's metrics: the statistics of each layer that routes, as "layers.3.entropy"."""
LAYER_FIGURES = ("load", "importance", "entropy", "max_violation", "dropped", "overflow")
"""Fields of `MoEStats` that are measured layer by layer."""
MEAN_FIGURES = {
    "router_entropy": "entropy",
    "max_violation": "max_violation",
    "dropped": "dropped",
    "overflow": "overflow",
}
"""Means over the layers: name of the metric, field of `MoEStats`."""


class TrainState(NamedTuple):
    """All that a run carries from step to step, besides the position in the data."""

    params: nnx.State
    variables: nnx.State
    """What modules keep beside parameters, as `RouterState`; the optimizer does not see it."""
    optimizer: Any
    step: Int[Array, ""]
    """Steps done."""
    seed: UInt[Array, ""]
    """Every random number of the run is drawn from (seed, step, layer)."""


Evaluate = Callable[[nnx.State, nnx.State, Any], tuple[Any, Int[Array, ""]]]
"""Of parameters, variables and a batch: what `Task.score` sums over the targets, and their number."""


class Trainer(NamedTuple):
    """Compiled functions of one experiment, and the shape of its state."""

    graph: nnx.GraphDef
    layout: Layout
    abstract_state: TrainState
    """ShapeDtypeStructs with shardings."""
    init: Callable[[jax.Array], TrainState]
    """The state of step 0 from a seed (uint32), born sharded."""
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    """Consumes the state and a batch, returns the next state and metrics. A step with a non-finite loss or gradient
    changes nothing and reports `finite` False."""
    evaluate: Evaluate


def build_trainer(
    model: Decoder | Classifier,
    optimizer: TrainingRule,
    layout: Layout,
    *,
    steps: int,
    accumulation: int = 1,
    task: Task = LANGUAGE,
) -> Trainer:
    """Split the model once and build the functions over its arrays; `task` says what is learned of a batch.

    Raises:
        ValueError: an axis of a parameter does not divide over the mesh; it is named.
    """
    abstract_model = nnx.eval_shape(lambda: model.build(jax.random.key(0)))
    graph, abstract_params, _ = nnx.split(abstract_model, nnx.Param, ...)
    rule = optimizer.build(abstract_params, steps=steps)
    learning_rate = optimizer.rate(steps=steps)

    def init(seed: UInt[Array, ""]) -> TrainState:
        _, params, variables = nnx.split(model.build(jax.random.key(seed)), nnx.Param, ...)
        with jax.numpy_dtype_promotion("standard"):
            return TrainState(params, variables, rule.init(params), jnp.zeros((), jnp.int32), seed)

    def loss(params: nnx.State, variables: nnx.State, batch: Batch, key: jax.Array, targets: jax.Array, progress):
        model = nnx.merge(graph, params, variables)
        output = task.forward(model, batch, layout=layout, key=key, training=True, progress=progress)
        learned, metrics = task.loss(model, output, batch, progress)
        learned, metrics = jax.tree.map(lambda total: total / targets, (learned, metrics))
        routing = _router_metrics(output.stats, accumulation)
        return learned + routing["auxiliary_loss"], ({**metrics, **routing}, output.stats)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        targets = jnp.maximum(task.targets(batch), 1).astype(jnp.float32)
        progress = state.step.astype(jnp.float32) / steps

        def gradient(variables: nnx.State, part: Batch, index: jax.Array) -> tuple[Any, nnx.State]:
            part_key = jax.random.fold_in(key, index)
            gradients, (metrics, stats) = jax.grad(loss, has_aux=True)(
                state.params, variables, part, part_key, targets, progress
            )
            model = nnx.merge(graph, state.params, variables)
            model.update_router_states(stats)
            _, _, variables = nnx.split(model, nnx.Param, ...)
            return (gradients, metrics), variables

        (gradients, metrics), variables = _sum_over_parts(gradient, state.variables, batch, accumulation)
        norms = _norms(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(jnp.stack(list(norms.values()))).all()
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = rule.update(gradients, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            rate = learning_rate(state.step)
        new = TrainState(params, variables, optimizer_state, state.step + 1, state.seed)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        norm = jnp.sqrt(sum(jnp.square(value) for value in norms.values()))
        return kept, metrics | {
            "gradient_norm": norm,
            "gradient_norms": norms,
            "learning_rate": rate,
            "finite": finite,
        }

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    shapes = jax.eval_shape(init, seed)
    shardings = layout.shardings(shapes)
    whole = NamedSharding(layout.mesh, PartitionSpec())  # every process can read every metric
    return Trainer(
        graph=graph,
        layout=layout,
        abstract_state=jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
        ),
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole)),
        evaluate=build_evaluate(graph, layout, task),
    )


def build_evaluate(graph: nnx.GraphDef, layout: Layout, task: Task = LANGUAGE) -> Evaluate:
    """`Trainer.evaluate` of a model, which may also be another than the one that was trained, such as a packed one."""

    def evaluate(params: nnx.State, variables: nnx.State, batch: Batch) -> tuple[Any, jax.Array]:
        model = nnx.merge(graph, params, variables)
        return task.score(model, task.forward(model, batch, layout=layout), batch), task.targets(batch)

    return jax.jit(evaluate)


def to_device(batch: Batch, layout: Layout) -> Batch:
    """This process's rows of a global batch, split over the mesh."""
    rows = global_rows(layout, len(jax.tree.leaves(batch)[0]))

    def placed(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_process_local_data(layout.batch(rows, array.ndim), array, (rows, *array.shape[1:]))

    return jax.tree.map(placed, batch)


def _router_metrics(of_layers: Sequence[MoEStats | None], accumulation: int) -> dict[str, Any]:
    """Losses summed over layers, as Switch Transformer does, statistics averaged; `ROUTERS` has them layer by layer.

    Each is a micro-batch's share.
    """
    stats = {layer: stats for layer, stats in enumerate(of_layers) if stats is not None}
    if not stats:
        return {"auxiliary_loss": jnp.zeros(())}
    routers = {
        f"layers.{layer}.{name}": getattr(of_layer, name) for layer, of_layer in stats.items() for name in LAYER_FIGURES
    }
    values = {name: [getattr(s, field) for s in stats.values()] for name, field in MEAN_FIGURES.items()}
    for name in sorted({name for s in stats.values() for name in s.losses}):
        values[name] = [s.losses[name] for s in stats.values() if name in s.losses]
    metrics: dict[str, Any] = {name: jnp.stack(entries).mean() for name, entries in values.items()}
    metrics |= {"auxiliary_loss": jnp.stack([s.loss for s in stats.values()]).sum(), ROUTERS: routers}
    return jax.tree.map(lambda value: value / accumulation, metrics)


def _sum_over_parts(gradient: Callable, variables: nnx.State, batch: Batch, parts: int) -> tuple[Any, nnx.State]:
    """Sum `gradient(variables, part, index)` over `parts` micro-batches, one after another; each leaves the next one
    its variables."""
    if parts == 1:
        return gradient(variables, batch, jnp.int32(0))
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    indices = jnp.arange(parts)
    shapes, _ = jax.eval_shape(gradient, variables, jax.tree.map(lambda a: a[0], split), indices[0])
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def add(carry: tuple[Any, nnx.State], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, nnx.State], None]:
        total, variables = carry
        share, variables = gradient(variables, *part)
        return (jax.tree.map(jnp.add, total, share), variables), None

    return jax.lax.scan(add, (zero, variables), (split, indices))[0]


def _norms(gradients: nnx.State) -> dict[str, Float[Array, ""]]:
    """The norm of each parameter's gradient, by its path."""
    return {
        ".".join(map(str, path)): jnp.linalg.norm(variable.get_value().astype(jnp.float32))
        for path, variable in nnx.to_flat_state(gradients)
    }
