"""A classifier's exits as compiled programs: one for the layers up to each exit, for `dynamic.run_with_exits`.

Letters: N exits, V classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..dynamic import StageOutput
from .classifier import ClassifierModel
from .layer_stack import refuse_batch_dependence, with_layers


def staged(model: ClassifierModel) -> list[Callable[[Any], StageOutput]]:
    """One jitted function of each exit, over arrays that are split once; see `ClassifierModel.stage`.

    Raises:
        ValueError: what a layer makes of a row depends on the others: capacity, or a router that compares tokens.
    """
    refuse_batch_dependence(model.config, None)
    graph, state = nnx.split(with_layers(model, stacked=False))

    def run(exit: int, state: nnx.State, carried: Any) -> StageOutput:
        return nnx.merge(graph, state).stage(exit, carried)

    return [partial(jax.jit(partial(run, exit)), state) for exit in range(len(model.config.exit_depths))]


def whole(model: ClassifierModel) -> Callable[[Array], Float[Array, "B V"]]:
    """One jitted function of inputs to the last exit's logits, without the heads of the others."""
    graph, state = nnx.split(with_layers(model, stacked=False))

    def run(state: nnx.State, inputs: Array) -> Float[Array, "B V"]:
        return nnx.merge(graph, state)(inputs).logits[-1]

    return partial(jax.jit(run), state)
