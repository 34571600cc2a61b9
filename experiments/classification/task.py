"""The loss of a classifier with exits, and what an evaluation counts.

Letters: B rows, N exits, V classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ...dynamic import divergence
from ...models import ClassifierModel, ClassifierOutput
from ..data.examples import Examples
from ..training.task import Task
from .augmentation import Augmentation

_AUGMENTATION_STREAM = 0xA06
"""Folded into the key of a step for its augmentation, away from the layers' noise."""


class Score(NamedTuple):
    """Sums over rows, of each exit."""

    nats: Float[Array, " N"]
    correct: Int[Array, " N"]


def classification_task(augmentation: Augmentation, label_smoothing: float) -> Task:
    """Cross-entropy at every exit, weighted as `Exits.loss` says."""

    def forward(model: ClassifierModel, batch: Examples, **options: Any) -> ClassifierOutput:
        inputs, labels = _arrays(batch)
        if options.get("training"):
            inputs = augmentation(jax.random.fold_in(options["key"], _AUGMENTATION_STREAM), inputs)
        return model(inputs, labels >= 0, **options)

    def loss(model: ClassifierModel, output: ClassifierOutput, batch: Examples, progress: jax.Array) -> Any:
        labels = _arrays(batch)[1]
        soft = optax.smooth_labels(jax.nn.one_hot(labels, output.logits.shape[2]), label_smoothing)
        losses = optax.softmax_cross_entropy(output.logits, soft[None])
        losses = jnp.where(labels >= 0, losses, 0.0).sum(axis=1)
        logged = {f"loss_after_{depth}": nats for depth, nats in zip(model.config.exit_depths, losses, strict=True)}
        logged["loss"] = losses[-1]
        exits = model.config.exits
        if exits is None:
            return losses[-1], {"loss": losses[-1]}
        if exits.loss.distilled:
            apart = jnp.where(labels >= 0, divergence(output.logits[:-1], output.logits[-1:]), 0.0).sum(axis=1)
            share = exits.loss.distilled
            losses = jnp.append((1 - share) * losses[:-1] + share * apart, losses[-1])
        weights = exits.loss.weights(model.config.exit_depths, model.config.layers, progress)
        return (weights * losses).sum(), logged

    def score(model: ClassifierModel, output: ClassifierOutput, batch: Examples) -> Score:
        labels = _arrays(batch)[1]
        nats = optax.softmax_cross_entropy_with_integer_labels(output.logits, jnp.maximum(labels, 0)[None])
        right = output.logits.argmax(axis=2) == labels[None]
        return Score(jnp.where(labels >= 0, nats, 0.0).sum(axis=1), right.sum(axis=1))

    return Task(forward, loss, score, lambda batch: (_arrays(batch)[1] >= 0).sum())


def _arrays(batch: Examples) -> tuple[Any, Any]:
    """Inputs and labels: of JAX inside of a step."""
    return batch
