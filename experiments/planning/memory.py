"""What fills the memory of one device, by category."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ...kernels.chips import CHIPS
from ...models import Layout
from ..data import Windows
from ..experiment import Experiment
from ..training.step import TrainState


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: dict[str, int]
    """Of what a step is given, by category, exact."""
    padding: int | None
    """That the compiler's layouts add to the arguments; None: not compiled."""
    results: int
    """Beside those that take the place of arguments."""
    temporaries: int
    """Activations, gradients, gathered weights, buffers of collectives; of the compiler, or by formula."""
    estimated: bool
    """Whether temporaries are by formula."""
    capacity: int

    @property
    def total(self) -> int:
        """All that a device holds at once, about."""
        return sum(self.arguments.values()) + (self.padding or 0) + self.results + self.temporaries

    @property
    def margin(self) -> int:
        """What is left; below 0: what is missing."""
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    def parts(self) -> dict[str, int]:
        """Every category that holds something."""
        rest = {"layout padding": self.padding or 0, "results": self.results, "temporaries": self.temporaries}
        return {name: size for name, size in (self.arguments | rest).items() if size}


def bytes_per_device(tree: Any) -> int:
    """Of the abstract arrays of a tree, whose shardings are known."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def abstract_batch(experiment: Experiment, layout: Layout) -> Any:
    """The `Windows` of one step, abstract.

    Raises:
        ValueError: the batch, or a micro-batch of it, does not divide over the mesh.
    """
    layout.batch(experiment.batch_size // experiment.gradient_accumulation, 2, "batch_size / gradient_accumulation")
    shape, sharding = (experiment.batch_size, experiment.sequence_length + 1), layout.batch(experiment.batch_size, 2)
    array: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return Windows(*(array for _ in Windows._fields))


def training_arguments(state: TrainState, batch: Any) -> dict[str, int]:
    """What a training step is given, by category."""
    return {
        "parameters": bytes_per_device(state.params),
        "router state": bytes_per_device(state.variables),
        "optimizer state": bytes_per_device(state.optimizer),
        "batch": bytes_per_device((batch, state.step, state.seed)),
    }


def generation_arguments(params: nnx.State, cache: Any, tokens: Any) -> dict[str, int]:
    """What a step of generation is given, by category."""
    return {
        "parameters": bytes_per_device(params),
        "key-value cache": bytes_per_device(cache),
        "batch": bytes_per_device(tokens),
    }


def capacity(chip: str) -> int:
    """Bytes of one device."""
    return CHIPS[chip].hbm_bytes
