"""Rows that remain, compacted into few shapes: powers of two, so that one compiled program of each size serves all.

A compiled program takes one shape. Rows that are done can be left out only where the host picks the others and calls a
smaller program. Letters: B rows, R rows of a bucket.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes that a batch is padded to."""

    smallest: int = 8
    """Fewer rows are padded to so many: below that a call costs about the same."""
    largest: int = 1024
    """More rows are cut into calls of so many."""

    def __post_init__(self):
        for name in ("smallest", "largest"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Buckets.{name} is {value}; it must be a power of two")
        if self.smallest > self.largest:
            raise ValueError(
                f"Buckets.smallest is {self.smallest}; it must be at most Buckets.largest = {self.largest}"
            )

    def size(self, rows: int) -> int:
        """Of the bucket for so many rows.

        Raises:
            ValueError: there are none, or more than `largest`.
        """
        if not 1 <= rows <= self.largest:
            raise ValueError(f"rows is {rows}; a bucket holds 1 to Buckets.largest = {self.largest}")
        return max(self.smallest, 1 << (rows - 1).bit_length())

    def sizes(self, rows: int) -> list[int]:
        """Of the buckets for any number of rows, one call each."""
        full, rest = divmod(rows, self.largest)
        return [self.largest] * full + ([self.size(rest)] if rest else [])


class Bucketed(NamedTuple):
    """What came out of a function, and what it ran on."""

    outputs: Any
    """The function's pytree: its arrays begin with the asked rows, in the order asked for; padding follows. It is not
    cut off, for each length would be a shape of its own; NumPy can do that."""
    sizes: list[int]
    """Rows of each call, padding included: what was paid for."""


def run_in_buckets(
    function: Callable[[Any], Any], inputs: Any, rows: Int[np.ndarray, " B"], buckets: Buckets
) -> Bucketed:
    """Run a function on some rows of its inputs.

    Padding repeats the first row, for a row of the user's own cannot be invalid. What a function makes of a row must
    not depend on the others: normalisation over the batch, or experts of bounded capacity, would break that.

    Args:
        function: a jitted function of a pytree of arrays [R, ...] that returns one; it is compiled once for each size.
        inputs: arrays [rows in all, ...].
        rows: which, at least one.
        buckets: the sizes.

    Raises:
        ValueError: there is no row to run.
    """
    if not len(rows):
        raise ValueError("rows is empty; a bucket needs at least one row")
    outputs, sizes, start = [], buckets.sizes(len(rows)), 0
    for size in sizes:
        part = rows[start : start + size]
        start += size
        padded = np.concatenate([part, np.full(size - len(part), part[0], part.dtype)])
        outputs.append(function(take_rows(inputs, padded)))
    if len(outputs) == 1:
        return Bucketed(outputs[0], sizes)
    # All but the last are full, so all padding is at the end.
    return Bucketed(jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs), sizes)


def take_rows(arrays: Any, rows: Int[np.ndarray, " B"]) -> Any:
    """Rows of each array: NumPy's stay on the host, JAX's on their device."""
    return jax.tree.map(lambda array: _take(array, rows) if isinstance(array, jax.Array) else array[rows], arrays)


@jax.jit
def _take(array: Any, rows: Any) -> Any:
    # The rows are known to exist; without this JAX checks each.
    return jnp.take(array, rows, axis=0, mode="clip")
