"""What a training step learns of a batch: the part of it that differs between language models and classifiers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from ..data import target_mask
from .exits_loss import exit_nats, exits_loss

Batch = Any
"""A NamedTuple of arrays whose first axis is the rows of the batch."""


class Task(NamedTuple):
    """Functions of a model, what its forward pass returned, and a batch."""

    forward: Callable[..., Any]
    """Of a model and a batch, with `layout` and the model's own `key`, `training` and `progress`: the forward pass; it
    has `stats`, those of the layers."""
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
    """What is minimised, and what is logged; sums over the targets. The last argument is the share of the training
    that is done."""
    score: Callable[[Any, Any, Batch], Any]
    """What an evaluation sums over the targets."""
    targets: Callable[[Batch], Int[Array, ""]]
    """How many there are."""


LANGUAGE = Task(
    forward=lambda model, windows, **options: model.hidden(*windows.inputs, **options),
    loss=exits_loss,
    score=exit_nats,
    targets=lambda windows: target_mask(windows).sum(),
)
"""The next token of every window; scored in nats."""
