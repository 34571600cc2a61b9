"""The first weights of a run of a mixture, made from the run of a dense model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import UInt

from ...models import Decoder
from ...models.upcycling import check_upcycling, upcycle
from ...moe import DenseDispatcher, DroplessDispatcher, MoE, Upcycling
from ..experiment import Experiment
from ..run_directory import RunDirectory
from ..serialization import to_json
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
    dense: RunDirectory, experiment: Experiment, trainer: Trainer, technique: Upcycling
) -> tuple[dict[str, nnx.State], str]:
    """The `params` and `variables` of step 0, born with the shardings of the trainer's state.

    Args:
        dense: the run of a dense model; its best checkpoint is taken.
        experiment: the run that begins.
        trainer: of that run.
        technique: makes the experts.

    Returns:
        The weights, and a line that says what was done.

    Raises:
        ValueError: the dense run's model cannot become this one; before its checkpoint is read.
        DamagedCheckpoint: its files are damaged.
    """
    source = dense.config
    if not isinstance(source, Experiment):
        raise ValueError(f"{dense.path} holds a {type(source).__name__}; it must be the run of an Experiment")
    try:
        layers = check_upcycling(source.model, experiment.model, technique)
    except ValueError as error:
        raise ValueError(f"upcycle is {technique}, init_from {dense.path}: {error}") from error
    reader = build_trainer(source.model, source.optimizer, trainer.layout, steps=source.steps)
    weights, step = restore_weights(dense, reader)

    def convert(weights: dict[str, nnx.State], seed: UInt[jax.Array, ""]) -> dict[str, nnx.State]:
        key = jax.random.key(seed)
        trained = nnx.merge(reader.graph, weights["params"], weights["variables"])
        mixture = upcycle(trained, experiment.model.build(key), technique, jax.random.fold_in(key, STREAM))
        _, params, variables = nnx.split(mixture, nnx.Param, ...)
        return {"params": params, "variables": variables}

    abstract = trainer.abstract_state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, {"params": abstract.params, "variables": abstract.variables})
    note = f"upcycled {_layers(layers)} of {dense.path}, step {step}, by {technique}"
    return jax.jit(convert, out_shardings=shardings)(weights, jnp.uint32(experiment.seed)), note


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
