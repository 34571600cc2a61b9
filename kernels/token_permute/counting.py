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
MOST_EXPERTS = 2**24
"""More counters would not be told apart in 32 bits."""


def sort_by_expert_counting(expert: Int[Array, " A"], experts: int) -> Permutation:
    """See `sort_by_expert`.

    Raises:
        NotImplementedError: more experts than it has counters for.
    """
    if experts > MOST_EXPERTS:
        raise NotImplementedError(f"experts is {experts}; allowed are at most {MOST_EXPERTS}")
    assignments = expert.shape[0]
    steps = -(-assignments // CHUNKS)
    chunked = jnp.pad(expert, (0, CHUNKS * steps - assignments), constant_values=experts).reshape(CHUNKS, steps)
    counters = CHUNKS * experts
    chunk = jnp.arange(CHUNKS, dtype=jnp.int32)[:, None]
    counter = jnp.where(chunked < experts, chunk * experts + chunked, counters + chunk)  # past the end: nobody

    histogram = jnp.zeros(counters, jnp.int32).at[counter].add(1, mode="drop").reshape(CHUNKS, experts)
    group_sizes = histogram.sum(axis=0, dtype=jnp.int32)
    start = jnp.cumsum(group_sizes) - group_sizes
    next_row = (start[None] + jnp.cumsum(histogram, axis=0) - histogram).reshape(-1)

    def hand_out(next_row, counter):
        # Read after the write: in the other order XLA would copy all counters in every step.
        after = next_row.at[counter].add(1, mode="drop", unique_indices=True)
        return after, after.at[counter].get(mode="fill", fill_value=assignments + 1) - 1

    _, row = jax.lax.scan(hand_out, next_row, counter.T)
    row = row.T.reshape(-1)[:assignments]
    return Permutation(row, invert(row, assignments), group_sizes)
