"""Layers stacked and scanned, or unstacked: the two forms of one model, and the way between them.

Stacked, a run of equal layers is one set of arrays with a leading axis, scanned: compile time does not grow with depth.
Unstacked, each layer has arrays of its own, as decoding, early exit and editing want them: a scan over stacked weights
copies them. The pattern may repeat in units of several layers, as in dense, mixture, dense, mixture.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

LONGEST_UNIT = 8
"""Patterns that repeat after more layers than this are not looked for."""


class Unit(nnx.Module):
    """A few layers in a row: what a segment repeats."""

    def __init__(self, layers: Sequence[nnx.Module]):
        self.layers = nnx.List(list(layers))


class Segment(nnx.Module):
    """A unit, `repeats` times. With more than one repeat every array has a leading axis "layers" of that length."""

    def __init__(self, unit: Unit, *, repeats: int):
        self.unit = unit
        self.repeats = repeats

    @property
    def depth(self) -> int:
        """How many layers this is."""
        return self.repeats * len(self.unit.layers)


class Run(NamedTuple):
    """`repeats` units of `length` layers each, from layer `start` on."""

    start: int
    length: int
    repeats: int

    @property
    def stop(self) -> int:
        """The first layer after the run."""
        return self.start + self.length * self.repeats


def runs_of(kinds: Sequence[Any]) -> list[Run]:
    """Cut a sequence of layer kinds into repeated units, longest cover first, shortest unit among equals."""
    runs, start = [], 0
    while start < len(kinds):
        best = Run(start, 1, 1)
        for length in range(1, min(LONGEST_UNIT, len(kinds) - start) + 1):
            repeats = 1
            while list(kinds[start : start + length]) == list(
                kinds[start + repeats * length : start + (repeats + 1) * length]
            ):
                repeats += 1
            candidate = Run(start, length, repeats)
            if repeats > 1 and candidate.stop > best.stop:
                best = candidate
        runs.append(best)
        start = best.stop
    return runs


def build_segments(
    kinds: Sequence[Any], keys: jax.Array, build: Callable[[Any, jax.Array], nnx.Module], *, stacked: bool
) -> list[Segment]:
    """Build one layer per kind, each from its own key; the numbers are the same in both forms."""
    runs = runs_of(kinds) if stacked else [Run(layer, 1, 1) for layer in range(len(kinds))]
    return [_build_run(run, kinds, keys, build) for run in runs]


def _build_run(
    run: Run, kinds: Sequence[Any], keys: jax.Array, build: Callable[[Any, jax.Array], nnx.Module]
) -> Segment:
    def unit(keys: jax.Array) -> Unit:
        return Unit([build(kinds[run.start + offset], keys[offset]) for offset in range(run.length)])

    keys = keys[run.start : run.stop].reshape(run.repeats, run.length)
    if run.repeats == 1:
        return Segment(unit(keys[0]), repeats=1)
    graph = nnx.graphdef(nnx.eval_shape(unit, keys[0]))
    state = jax.vmap(lambda keys: nnx.state(unit(keys)))(keys)
    return Segment(nnx.merge(graph, _with_axes(state, _prepend_layers)), repeats=run.repeats)


def unstack(segments: Sequence[Segment]) -> list[Segment]:
    """One segment per layer, each with arrays of its own."""
    return [Segment(Unit([layer]), repeats=1) for segment in segments for layer in _layers(segment)]


def stack(segments: Sequence[Segment], kinds: Sequence[Any]) -> list[Segment]:
    """Join layers of equal kind (one entry of `kinds` per layer) into repeated units, the inverse of `unstack`."""
    layers = [layer for segment in segments for layer in _layers(segment)]
    return [_stack_run(run, layers[run.start : run.stop]) for run in runs_of(kinds)]


def _stack_run(run: Run, layers: list[nnx.Module]) -> Segment:
    units = [Unit(layers[start : start + run.length]) for start in range(0, len(layers), run.length)]
    if run.repeats == 1:
        return Segment(units[0], repeats=1)
    graph, _ = nnx.split(units[0])
    state = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(nnx.state(unit) for unit in units))
    return Segment(nnx.merge(graph, _with_axes(state, _prepend_layers)), repeats=run.repeats)


def split_repeats(segment: Segment) -> tuple[nnx.GraphDef, nnx.State]:
    """A segment's unit as a graph and arrays that have a leading axis, one entry a repeat; the axes that variables name
    are those of one repeat."""
    graph, state = nnx.split(segment.unit)
    return graph, _with_axes(state, lambda axes: axes[1:])


def _layers(segment: Segment) -> list[nnx.Module]:
    if segment.repeats == 1:
        return list(segment.unit.layers)
    graph, state = split_repeats(segment)
    units = [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(segment.repeats)]
    return [layer for unit in units for layer in unit.layers]


def _prepend_layers(axes: tuple) -> tuple:
    return ("layers", *axes)


def _with_axes(state: nnx.State, change: Callable[[tuple], tuple]) -> nnx.State:
    """Change the logical axes that the variables of a state carry, not their arrays; a variable may carry none."""

    def renamed(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes")
        return variable if axes is None else variable.replace(variable.get_value(), axes=change(axes))

    return jax.tree.map(renamed, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
