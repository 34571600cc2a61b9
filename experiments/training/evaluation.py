"""Nats and bits per byte on held-out text."""

import math

from flax import nnx

from ...models import Layout
from ..data import HeldOut, Windows
from .process_rows import process_rows
from .step import Evaluate, to_device


def total_nats(evaluate: Evaluate, params: nnx.State, variables: nnx.State, held_out: HeldOut, layout: Layout) -> float:
    """Sum of the negative log-likelihoods of all targets of a text.

    Args:
        evaluate: `Trainer.evaluate`.
        params: the parameters.
        variables: what modules keep beside parameters.
        held_out: the text, the same on every process.
        layout: the mesh.
    """
    nats = []
    for batch in held_out.batches:
        rows = process_rows(layout, batch.tokens.shape[0])
        local = Windows(*(array[rows] for array in batch))
        nats.append(evaluate(params, variables, to_device(local, layout))[0])
    return math.fsum(float(value) for value in nats)


def bits_per_byte(
    evaluate: Evaluate, params: nnx.State, variables: nnx.State, held_out: HeldOut, layout: Layout
) -> float:
    """`total_nats` over ln 2 and over the bytes of the text, so that tokenizers compare."""
    return total_nats(evaluate, params, variables, held_out, layout) / math.log(2) / held_out.bytes
