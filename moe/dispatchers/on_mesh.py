"""Run a dispatcher on each device of a mesh, with that device's tokens and the experts' weights that it needs.

A weight is split over mesh axes of two kinds. Over the axes of the batch devices have tokens of their own, so each
needs the whole: it is gathered before use and its gradient is scattered back. Over the others (tensor) all devices
have the same tokens, and each part of the weight yields a part of a sum: the outputs are added up. So experts may sum
over a split axis once, and add nothing after it. Letters: T tokens, D width, A assignments.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ...kernels.quantized import Quantized
from ..experts import ExpertsModule
from ..placement import Placement
from ..routing import Routing, RoutingContext


class Local(NamedTuple):
    """What one device has carried: `Carried`, of its own tokens."""

    y: Float[Array, "T D"]
    dropped: Float[Array, ""]
    overflow: Float[Array, ""]


Run = Callable[[ExpertsModule, Float[Array, "T D"], Routing, RoutingContext], Local]
"""Carries one device's tokens, inside shard_map."""


class Split(NamedTuple):
    """How one leaf of the experts' weights is split."""

    spec: PartitionSpec
    axes: tuple[tuple[str, ...], ...]
    """The mesh axes of each dimension."""
    kept: frozenset[str]
    """Those of them that it stays split over in use."""
    parameter: bool


def local_tokens(tokens: int, placement: Placement) -> int:
    """How many of the tokens each device has.

    Raises:
        ValueError: they do not divide over the mesh.
    """
    parts = math.prod(placement.mesh.shape[axis] for axis in placement.batch_axes)
    if tokens % parts:
        raise ValueError(
            f"x has {tokens} tokens; it must be a multiple of {parts} to divide over the mesh axes "
            f"{list(placement.batch_axes)}"
        )
    return tokens // parts


def assignments_divide(routing: Routing, tokens: int) -> bool:
    """Whether the assignments of each `tokens` neighbours stand together."""
    return routing.token is None or (routing.group is not None and tokens % routing.group == 0)


def run_on_mesh(
    run: Run,
    experts: ExpertsModule,
    x: Float[Array, "T D"],
    routing: Routing,
    context: RoutingContext,
    *,
    keep: tuple[str, ...],
) -> Local:
    """Call `run` on each device, and put the tokens together again.

    Args:
        run: gets the experts with this device's weights, its tokens, its assignments (of tokens numbered from 0) and a
            context with the length of the sequences and `training` alone.
        experts: built experts, whose variables carry logical axes.
        x: all tokens; their number divides over the batch axes.
        routing: of all tokens; see `assignments_divide`.
        context: with a placement.
        keep: batch axes over which the experts stay split; `run` brings the tokens there.

    Returns:
        All tokens' output, and the shares over all devices.

    Raises:
        ValueError: a weight does not divide over the mesh, or it is split in an order that cannot be gathered.
    """
    placement = context.placement
    assert placement is not None
    batch, experts_count = placement.batch_axes, routing.logits.shape[1]
    graph, state = nnx.split(experts)
    leaves, structure = jax.tree.flatten(state)
    splits = _splits(state, placement, frozenset(batch) - frozenset(keep))
    summed = tuple({axis: None for split in splits for axis in split.kept if axis not in batch})
    here = RoutingContext(training=context.training, sequence_length=context.sequence_length)

    def on_device(
        leaves: list[jax.Array], x: jax.Array, expert: jax.Array, weight: jax.Array, token: jax.Array | None, probs: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = [_gathered(leaf, split, batch, x.dtype) for leaf, split in zip(leaves, splits, strict=True)]
        module: Any = nnx.merge(graph, jax.tree.unflatten(structure, weights))
        if summed:  # before anything is repeated K times: their gradients are then summed over fewer numbers
            x, weight = (jax.lax.pcast(array, summed, to="varying") for array in (x, weight))
        mine = Routing(expert, weight, _own_numbers(token, x.shape[0], batch), probs, probs)
        y, dropped, overflow = run(module, x, mine, here)
        y = jax.lax.psum(y, summed) if summed else y
        count = (expert < experts_count).sum(dtype=jnp.int32).astype(jnp.float32)
        dropped, overflow, total = jax.lax.psum((dropped * count, overflow * count, count), batch)
        return y, dropped / jnp.maximum(total, 1.0), overflow / jnp.maximum(total, 1.0)

    rows, flat, whole = PartitionSpec(batch, None), PartitionSpec(batch), PartitionSpec()
    carried = jax.shard_map(
        on_device,
        mesh=placement.mesh,
        in_specs=([split.spec for split in splits], rows, flat, flat, None if routing.token is None else flat, rows),
        out_specs=(rows, whole, whole),
    )(leaves, x, routing.expert, routing.weight, routing.token, jax.lax.stop_gradient(routing.probs))
    return Local(*carried)


def _own_numbers(token: jax.Array | None, tokens: int, batch: tuple[str, ...]) -> jax.Array | None:
    """Number this device's tokens from 0. That of an assignment to nobody may be any."""
    if token is None or not batch:
        return token
    return jnp.clip(token - tokens * jax.lax.axis_index(batch), 0, tokens - 1)


def _splits(state: nnx.State, placement: Placement, gathered: frozenset[str]) -> list[Split]:
    """How each leaf of the experts' variables is split, in the order of `jax.tree.leaves`."""
    splits: list[Split] = []
    for path, variable in jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    ):
        axes, value = variable.get_metadata().get("axes"), variable.get_value()
        name = "experts." + ".".join(str(getattr(key, "key", key)) for key in path)
        for leaf in jax.tree.leaves(value):
            spec = PartitionSpec() if axes is None else placement.spec(axes, leaf.shape, name)
            over = tuple(entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec)
            for entry in over:
                late = [axis in gathered for axis in entry]
                if late != sorted(late):
                    raise ValueError(
                        f"{name} is split over the mesh axes {entry} in one dimension; those that are gathered for "
                        f"use, {sorted(gathered & set(entry))}, must stand last"
                    )
            kept = frozenset(axis for entry in over for axis in entry) - gathered
            splits.append(Split(spec, over, kept, not isinstance(value, Quantized)))
    return splits


def _gathered(leaf: jax.Array, split: Split, batch: tuple[str, ...], dtype: Any) -> jax.Array:
    """This device's weight in use: whole over the gathered axes.

    Parameters travel in the dtype of the activations, and so do their gradients back over these axes; over the other
    axes of the batch gradients are summed as they are stored, part by part.
    """
    if split.parameter and jnp.issubdtype(leaf.dtype, jnp.floating):
        used = {axis for entry in split.axes for axis in entry}
        if others := tuple(axis for axis in batch if axis not in used):
            leaf = jax.lax.pcast(leaf, others, to="varying")
        leaf = leaf.astype(dtype) if any(set(entry) - split.kept for entry in split.axes) else leaf
    for dimension, entry in enumerate(split.axes):
        axes = tuple(axis for axis in entry if axis not in split.kept)
        if axes:
            leaf = jax.lax.all_gather(leaf, axes, axis=dimension, tiled=True)
    return leaf
