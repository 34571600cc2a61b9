"""A function of sequences, a block of positions at a time: what it makes on the way never exists for all of them.

In the backward pass each block is computed again. Letters: B batch, S sequence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def by_blocks(
    function: Callable[..., Shaped[Array, "B S ..."]], block: int | None, *arrays: Shaped[Array, "B S ..."]
) -> Shaped[Array, "B S ..."]:
    """`function(*arrays)`, where each position of its result needs the same position of the arrays alone.

    Args:
        function: may close over other arrays; their gradients are summed over the blocks in their own dtype.
        block: positions at a time; the last block may be shorter. None, or at least S: all at once, nothing twice.
        *arrays: all with the same B and S.
    """
    length = arrays[0].shape[1]
    if block is None or block >= length:
        return function(*arrays)
    function, count = jax.checkpoint(function), length // block

    def cut(array: jax.Array) -> jax.Array:
        return array[:, : count * block].reshape(array.shape[0], count, block, *array.shape[2:]).swapaxes(0, 1)

    blocks = jax.lax.map(lambda parts: function(*parts), tuple(map(cut, arrays)))
    y = blocks.swapaxes(0, 1).reshape(arrays[0].shape[0], count * block, *blocks.shape[3:])
    if count * block == length:
        return y
    return jnp.concatenate([y, function(*(array[:, count * block :] for array in arrays))], axis=1)
