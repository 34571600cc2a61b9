"""What the routers do: on one text under one checkpoint, and over the steps of a run.

Letters: E experts of a layer, N logged steps, T tokens of a batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ...moe import MoEStats, Routing
from ...moe.routing import assignment_counts
from ..data import HeldOut, Windows
from ..metrics import read_metrics
from .restore import Trained
from .step import LAYER_FIGURES, ROUTERS, to_device


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
        figures = (self.entropy[index], self.max_violation[index], self.dropped[index])
        return RouterStatistics(layer, self.load[index], self.importance[index], *map(float, figures))


def entropy_share(entropy: Any, experts: int) -> Any:
    """Entropy over its largest value, log E; NaN for a single expert, where there is nothing to choose."""
    return entropy / np.log(experts) if experts > 1 else entropy * np.nan


def measure_routers(trained: Trained, text: HeldOut) -> list[RouterStatistics]:
    """Route a text with a trained model, and measure every layer that routes.

    Args:
        trained: the model.
        text: what it reads; batches may be padded unequally.

    Raises:
        ValueError: the model has no routers; nothing was computed.
    """
    graph, layout = trained.trainer.graph, trained.trainer.layout

    @jax.jit
    def measure(params: nnx.State, variables: nnx.State, windows: Windows) -> tuple[jax.Array, list]:
        inputs: list[Any] = [array[:, :-1] for array in windows]
        output = nnx.merge(graph, params, variables)(*inputs, layout=layout, tap=_count_assignments)
        counts = [stats and _tapped(output.taps, layer) for layer, stats in enumerate(output.stats)]
        return (inputs[1] > 0).sum(), list(zip(counts, output.stats, strict=True))

    _, layers = jax.eval_shape(measure, trained.params, trained.variables, text.batches[0])
    if all(stats is None for _, stats in layers):
        raise ValueError(
            f"the model has no routers, its networks are {trained.experiment.model.ffn}: nothing to measure"
        )
    batches = [
        jax.device_get(measure(trained.params, trained.variables, to_device(batch, layout))) for batch in text.batches
    ]
    tokens = np.array([tokens for tokens, _ in batches], np.float64)
    layers = enumerate(zip(*(layers for _, layers in batches), strict=True))
    return [_over_batches(layer, tokens, parts) for layer, parts in layers if parts[0][1] is not None]


def router_history(run: Path) -> dict[int, RouterHistory]:
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
    return RouterHistory(
        steps, *(np.array([line[f"layers.{layer}.{name}"] for line in lines]) for name in LAYER_FIGURES)
    )


def _count_assignments(path: str, activations: jax.Array, routing: Routing | None) -> Any:
    """A tap: the statistics are shares, and how many assignments a batch has is for the routing to say."""
    return None if routing is None else assignment_counts(routing)


def _tapped(taps: dict[str, Any], layer: int) -> jax.Array:
    counts = taps.get(f"layers.{layer}.ffn")
    if counts is None:
        raise ValueError(f"the network of layer {layer} routes, and did not call tap('ffn', x, routing)")
    return counts


def _over_batches(
    layer: int, tokens: Float[np.ndarray, " N"], parts: Sequence[tuple[np.ndarray, MoEStats]]
) -> RouterStatistics:
    """Join N batches: probabilities weighted by real tokens, assignments counted."""
    counts = np.stack([counts for counts, _ in parts]).astype(np.float64)
    assignments = counts.sum(axis=1)
    load = counts.sum(axis=0) / max(assignments.sum(), 1.0)

    def mean(values: Sequence[Any], weights: np.ndarray) -> Any:
        return np.tensordot(weights / max(weights.sum(), 1.0), np.stack(values).astype(np.float64), axes=1)

    return RouterStatistics(
        layer=layer,
        load=load,
        importance=mean([stats.importance for _, stats in parts], tokens),
        entropy=float(mean([stats.entropy for _, stats in parts], tokens)),
        max_violation=float(load.max() * load.size - 1.0),
        dropped=float(mean([stats.dropped for _, stats in parts], assignments)),
    )
