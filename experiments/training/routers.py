"""What the routers do: on one text under one checkpoint, and over the steps of a run.

Letters: E experts of a layer, N logged steps, T tokens of a batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ...moe import MoEStats
from ..data import HeldOut, Windows
from ..metrics import read_metrics
from ..places import Place
from .restore import Trained
from .routing_counts import MOST_CELLS, RoutingCounts, Seen, Tally, index_text, real_tokens, watch
from .step import ROUTERS, to_device


class NoRouters(ValueError):
    """A model has no layer that routes."""


class RouterStatistics(NamedTuple):
    """One layer's routing of a whole text: means over its real tokens or assignments, padding left out."""

    layer: int
    """Counted from 0 over all layers, those without a router included."""
    load: Float[np.ndarray, " E"]
    """Share of the whole text's assignments that the router gave to each expert; sums to 1."""
    importance: Float[np.ndarray, " E"]
    """Mean router probability of each expert; sums to 1."""
    entropy: float
    """Mean entropy of a token's router probabilities, in nats; log E is the most there can be."""
    max_violation: float
    """The busiest expert's load over the mean load, minus 1, of the whole text's load. The MaxVio of a batch is larger
    on average, for the busiest expert changes from batch to batch."""
    dropped: float
    """Share of the assignments that the dispatcher had no place for."""
    counts: RoutingCounts | None = None
    """Which experts were chosen together, and for which token ids; None for what a training step logged."""


class RouterHistory(NamedTuple):
    """One layer's routing of the training batches at the logged steps."""

    steps: Int[np.ndarray, " N"]
    load: Float[np.ndarray, "N E"]
    importance: Float[np.ndarray, "N E"]
    entropy: Float[np.ndarray, " N"]
    """In nats."""
    max_violation: Float[np.ndarray, " N"]
    dropped: Float[np.ndarray, " N"]

    def at(self, layer: int, index: int) -> RouterStatistics:
        """The statistics of one logged step's batch, `index` of N."""
        entropy, violation, dropped = (float(of[index]) for of in (self.entropy, self.max_violation, self.dropped))
        return RouterStatistics(layer, self.load[index], self.importance[index], entropy, violation, dropped)


def entropy_share(entropy: Any, experts: int) -> Any:
    """Entropy over its largest value, log E; NaN for a single expert, where there is nothing to choose."""
    return entropy / np.log(experts) if experts > 1 else entropy * np.nan


def measure_routers(trained: Trained, text: HeldOut) -> list[RouterStatistics]:
    """Route a text with a trained model, and measure every layer that routes.

    Args:
        trained: the model.
        text: what it reads; batches may be padded unequally.

    Raises:
        NoRouters: the model has none; nothing was computed.
    """
    graph, layout = trained.graph, trained.layout

    @jax.jit
    def measure(params: nnx.State, variables: nnx.State, windows: Windows) -> list:
        tap = watch((windows.inputs[1] > 0).reshape(-1))
        output = nnx.merge(graph, params, variables)(*windows.inputs, layout=layout, tap=tap)
        return [stats and (stats, _tapped(output.taps, layer)) for layer, stats in enumerate(output.stats)]

    shapes = jax.eval_shape(measure, trained.params, trained.variables, text.batches[0])
    experts = {layer: shape[0].load.size for layer, shape in enumerate(shapes) if shape is not None}
    if not experts:
        raise NoRouters(
            f"the model has no routers, its networks are {trained.experiment.model.ffn}: nothing to measure"
        )
    index = index_text(text, most=MOST_CELLS // sum(experts.values()))
    tallies = {layer: Tally(index, count) for layer, count in experts.items()}
    parts: dict[int, list[tuple[MoEStats, int, int]]] = {layer: [] for layer in experts}
    before = 0
    for batch in text.batches:
        seen = jax.device_get(measure(trained.params, trained.variables, to_device(batch, layout)))
        tokens = real_tokens(batch)
        for layer, tally in tallies.items():
            stats, of_layer = seen[layer]
            parts[layer].append((stats, tokens, tally.add(batch, before, of_layer)))
        before += tokens
    return [_over_batches(layer, parts[layer], tally.counts()) for layer, tally in tallies.items()]


def router_history(run: Place) -> dict[int, RouterHistory]:
    """Read the routers' statistics that a run logged, by layer.

    Args:
        run: the run's directory.

    Raises:
        ValueError: the run has no metrics, or none of routers.
    """
    lines = [line for line in read_metrics(run) if line["split"] == ROUTERS]
    if not lines:
        raise ValueError(
            f"{run}: nothing was logged about routers; its model has none, or an older version of dynamoe trained it"
        )
    layers = sorted({int(name.split(".")[1]) for line in lines for name in line if name.startswith("layers.")})
    return {layer: _history(layer, lines) for layer in layers}


def _history(layer: int, lines: Sequence[dict[str, Any]]) -> RouterHistory:
    steps = np.array([line["step"] for line in lines])
    figures = RouterHistory._fields[1:]  # not all that a step logs, and what every version logged
    return RouterHistory(steps, *(np.array([line[f"layers.{layer}.{name}"] for line in lines]) for name in figures))


def _tapped(taps: dict[str, Any], layer: int) -> Seen:
    seen = taps.get(f"layers.{layer}.ffn")
    if seen is None:
        raise ValueError(f"the network of layer {layer} routes, and did not call tap('ffn', x, routing)")
    return seen


def _over_batches(layer: int, parts: Sequence[tuple[MoEStats, int, int]], counts: RoutingCounts) -> RouterStatistics:
    """Join batches, each with its numbers of tokens and assignments: probabilities are weighted by real tokens."""
    stats, tokens, assignments = zip(*parts, strict=True)
    assigned = counts.halves.sum(axis=0)
    load = assigned / max(assigned.sum(), 1)

    def mean(values: Sequence[Any], weights: Sequence[int]) -> Any:
        shares = np.array(weights, np.float64) / max(sum(weights), 1)
        return np.tensordot(shares, np.stack(values).astype(np.float64), axes=1)

    return RouterStatistics(
        layer=layer,
        load=load,
        importance=mean([of.importance for of in stats], tokens),
        entropy=float(mean([of.entropy for of in stats], tokens)),
        max_violation=float(load.max() * load.size - 1.0),
        dropped=float(mean([of.dropped for of in stats], assignments)),
        counts=counts,
    )
