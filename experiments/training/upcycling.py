"""The first weights of a run of a mixture, made from the run of a dense model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import UInt

from ...models import Decoder
from ...models.checkpoints import open_published
from ...models.upcycling import check_upcycling, upcycle
from ...moe import DenseDispatcher, DroplessDispatcher, MoE, Upcycling
from ..experiment import Experiment
from ..places import Place
from ..published import is_published
from ..run_directory import RunDirectory
from ..serialization import to_json
from .published_weights import published_stacked
from .restore import restore_weights
from .step import Trainer, build_trainer

STREAM = 0x5EED
"""Folded into the run's seed for the technique's randomness, away from the keys of the initialisation."""


def upcycling_fact(technique: Upcycling | None, model: Decoder) -> dict[str, Any] | None:
    """What a run remembers of its upcycling, from the first start on. A dispatcher that may drop does not keep the
    function, whatever the technique."""
    if technique is None:
        return None
    mixtures = [ffn for ffn in model.feed_forwards if isinstance(ffn, MoE)]
    whole = all(isinstance(ffn.dispatcher, DenseDispatcher | DroplessDispatcher) for ffn in mixtures)
    return {"technique": to_json(technique), "keeps_function": technique.keeps_function and whole}


def upcycled_weights(
    dense: Place, experiment: Experiment, trainer: Trainer, technique: Upcycling
) -> tuple[dict[str, nnx.State], str]:
    """The `params` and `variables` of step 0, born with the shardings of the trainer's state.

    Args:
        dense: a dense model: a run, whose best checkpoint is taken, or a published one.
        experiment: the run that begins.
        trainer: of that run.
        technique: makes the experts.

    Returns:
        The weights, and a line that says what was done.

    Raises:
        ValueError: the dense run's model cannot become this one; before its checkpoint is read.
        DamagedCheckpoint: its files are damaged.
    """
    config, read = _dense_model(dense, trainer)
    try:
        layers = check_upcycling(config, experiment.model, technique)
    except ValueError as error:
        raise ValueError(f"upcycle is {technique}, init_from {dense}: {error}") from error
    graph, weights, which = read()

    def convert(weights: dict[str, nnx.State], seed: UInt[jax.Array, ""]) -> dict[str, nnx.State]:
        key = jax.random.key(seed)
        trained = nnx.merge(graph, weights["params"], weights["variables"])
        mixture = upcycle(trained, experiment.model.build(key), technique, jax.random.fold_in(key, STREAM))
        _, params, variables = nnx.split(mixture, nnx.Param, ...)
        return {"params": params, "variables": variables}

    abstract = trainer.abstract_state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, {"params": abstract.params, "variables": abstract.variables})
    note = f"upcycled {_layers(layers)} of {dense}{which}, by {technique}"
    return jax.jit(convert, out_shardings=shardings)(weights, jnp.uint32(experiment.seed)), note


Weights = tuple[nnx.GraphDef, dict[str, nnx.State], str]
"""Graph and weights of a model, and which of several they are."""


def _dense_model(path: Place, trainer: Trainer) -> tuple[Decoder, Callable[[], Weights]]:
    """Its configuration, and what reads its weights."""
    if is_published(path):

        def published() -> Weights:
            _, graph, weights = published_stacked(path, trainer.layout)
            return graph, weights, ""

        return open_published(Path(path)).decoder, published
    directory = RunDirectory.load(path)
    source = directory.config
    if not isinstance(source, Experiment):
        raise ValueError(f"{path} holds a {type(source).__name__}; it must be the run of an Experiment")

    def trained() -> Weights:
        reader = build_trainer(source.model, source.optimizer, trainer.layout, steps=source.steps)
        weights, step = restore_weights(directory, reader)
        return reader.graph, weights, f", step {step}"

    return source.model, trained


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
