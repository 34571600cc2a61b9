"""A counting sort over the experts: each assignment is counted and handed its row, none is compared with another.

The assignments are cut into N chunks. A histogram of each chunk, summed over the chunks before it and over the experts
before its own, says which row a chunk's first assignment to an expert gets. Then all chunks walk through their
assignments side by side: each hands out its expert's next row. Memory is N * E, whatever A is.

Written for CPU, where a scatter is a plain loop. Letters: A assignments, E experts, N chunks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .permutation import Permutation, invert

CHUNKS = 64
"""More chunks are fewer steps, but larger histograms."""


def sort_by_expert_counting(expert: Int[Array, " A"], experts: int) -> Permutation:
    """See `sort_by_expert`."""
    assignments = expert.shape[0]
    steps = -(-assignments // CHUNKS)
    chunked = jnp.pad(expert, (0, CHUNKS * steps - assignments), constant_values=experts).reshape(CHUNKS, steps)

    # Mapped over the chunks, not by flat indices: so devices that share the chunks walk without waiting for each other.
    def count(histogram, expert):
        return histogram.at[expert].add(1, mode="drop")

    def hand_out(next_row, expert):
        # Read after the write: in the other order XLA would copy all counters in every step.
        after = next_row.at[expert].add(1, mode="drop", unique_indices=True)
        return after, after.at[expert].get(mode="fill", fill_value=assignments + 1) - 1

    histogram = jax.vmap(count)(jnp.zeros((CHUNKS, experts), jnp.int32), chunked)
    group_sizes = histogram.sum(axis=0, dtype=jnp.int32)
    start = jnp.cumsum(group_sizes) - group_sizes
    next_row = start[None] + jnp.cumsum(histogram, axis=0) - histogram
    _, row = jax.lax.scan(jax.vmap(hand_out), next_row, chunked.T)
    row = row.T.reshape(-1)[:assignments]
    return Permutation(row, invert(row, assignments), group_sizes)
