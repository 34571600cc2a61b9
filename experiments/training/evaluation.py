"""Bits per byte on held-out text."""

import math
from collections.abc import Callable

import jax
from flax import nnx

from ...models import Layout
from ..data import HeldOut, Windows
from .process_rows import process_rows
from .step import to_device


def bits_per_byte(
    evaluate: Callable[[nnx.State, nnx.State, Windows], tuple[jax.Array, jax.Array]],
    params: nnx.State,
    variables: nnx.State,
    held_out: HeldOut,
    layout: Layout,
) -> float:
    """Nats of all targets over ln 2 and over the bytes of the text, so that tokenizers compare.

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
    return math.fsum(float(value) for value in nats) / math.log(2) / held_out.bytes
