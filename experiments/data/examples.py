"""Labelled examples: inputs and their classes, in memory. Images and texts alike.

Letters: n examples.
"""

import abc
import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int, Shaped

ExampleSplit = Literal["train", "validation", "test"]

NOBODY = -1
"""The label of a row that is padding."""


class Examples(NamedTuple):
    """Inputs and their classes."""

    inputs: Shaped[np.ndarray, "n ..."]
    """Images, uint8 [n, height, width, channels]; or token ids, int32 [n, S]."""
    labels: Int[np.ndarray, " n"]
    """int32, from 0; `NOBODY` at padding."""


class LabelledSource(abc.ABC):
    """Examples for training, validation and test, which fit into memory.

    A source of your own derives from this class: a frozen dataclass with these three methods.
    """

    @abc.abstractmethod
    def examples(self, split: ExampleSplit) -> Examples:
        """The examples of a split, in an order that never changes."""

    @abc.abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, by its label."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Facts as JSON values, by which a reader of the run knows the data again."""


def check_example_split(split: str) -> None:
    """Refuses a split that sources do not have."""
    if split not in get_args(ExampleSplit):
        raise ValueError(f"split={split!r}: allowed are {', '.join(map(repr, get_args(ExampleSplit)))}")


def facts_of(examples: Examples) -> dict[str, Any]:
    """Number, shape and SHA-256 of some examples."""
    digest = hashlib.sha256(np.ascontiguousarray(examples.inputs).data)
    digest.update(np.ascontiguousarray(examples.labels, dtype=np.int32).data)
    return {"examples": len(examples.labels), "shape": list(examples.inputs.shape[1:]), "sha256": digest.hexdigest()}


def evaluation_batches(examples: Examples, batch_size: int) -> list[Examples]:
    """All examples in order, the last batch filled up with copies of its first row that count for nobody."""
    batches = []
    for start in range(0, len(examples.labels), batch_size):
        inputs, labels = (part[start : start + batch_size] for part in examples)
        missing = batch_size - len(labels)
        inputs = np.concatenate([inputs, np.repeat(inputs[:1], missing, axis=0)])
        batches.append(Examples(inputs, np.concatenate([labels, np.full(missing, NOBODY, np.int32)])))
    return batches


def choosing_half(examples: Examples) -> Examples:
    """Of a validation split, what chooses among checkpoints: every second example, from the first on."""
    return Examples(examples.inputs[::2], examples.labels[::2])


def calibration_half(examples: Examples) -> Examples:
    """The other half, for guarantees: they hold for a model that their examples did not choose."""
    return Examples(examples.inputs[1::2], examples.labels[1::2])


def parts(examples: Examples, sizes: Sequence[int], seed: int) -> list[Examples]:
    """Examples shuffled by a seed and cut into parts of so many; what is left over belongs to the first.

    Raises:
        ValueError: there are fewer examples than all the parts need.
    """
    left = len(examples.labels) - sum(sizes)
    if left < 1:
        raise ValueError(f"there are {len(examples.labels)} examples; {list(sizes)} of them are held out, none is left")
    order = np.random.default_rng(seed).permutation(len(examples.labels))
    cuts = np.split(order, np.cumsum([left, *sizes])[:-1])
    return [Examples(examples.inputs[cut], examples.labels[cut]) for cut in cuts]
