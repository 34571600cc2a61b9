"""Copies of turned views at the speed of memory.

NumPy copies a transposed matrix element by element over rows that fall on the same lines of the cache; XLA on CPU does
no better (experiments/LOG.md). Blocks that go through a small square stay in it; in C++ they need no interpreter.
"""

import jax.numpy as jnp
import numpy as np

from ...kernels.turned_copy import turned_copy

ALIGNMENT = 64
"""Bytes: JAX on CPU uses an array that starts so without copying it."""
BLOCK = 128
"""Side of the square, in elements: the fastest of 32 to 256 for 2 bytes."""
_SAME_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def contiguous(seen: np.ndarray, dtype: np.dtype, space: np.ndarray | None = None) -> np.ndarray:
    """A copy of a view, its last axis contiguous, in a dtype; aligned so that JAX on CPU need not copy it again.

    It lies in the first bytes of `space`, from `aligned`, or in new memory.
    """
    size = seen.size * np.dtype(dtype).itemsize
    out = (aligned(size) if space is None else space)[:size].view(dtype).reshape(seen.shape)
    copy(seen, out)
    return out


def copy(seen: np.ndarray, target: np.ndarray) -> None:
    """Copy a view into an array of its shape, rounding to that one's dtype."""
    shape, strides = _merged(seen)
    fast = [axis for axis, stride in enumerate(strides) if stride == seen.itemsize and shape[axis] > 1]
    if not fast or fast[0] == len(shape) - 1 or seen.size < BLOCK * BLOCK or not target.flags.c_contiguous:
        _rounded(seen, target)
        return
    seen = np.lib.stride_tricks.as_strided(seen, shape, strides, writeable=False)
    seen, target = np.moveaxis(seen, fast[0], -2), np.moveaxis(target.reshape(shape), fast[0], -2)
    for index in np.ndindex(seen.shape[:-2]):
        _turn(seen[index], target[index])


def _turn(seen: np.ndarray, target: np.ndarray) -> None:
    """Copy [I, O] whose first axis is the contiguous one; without C++ a panel of rows at a time."""
    if turned_copy(seen, target):
        return
    kind = _SAME_SIZE[seen.itemsize]
    panel = np.empty((BLOCK, seen.shape[1]), kind)
    square, turned = np.empty((BLOCK, BLOCK), kind), np.empty((BLOCK, BLOCK), kind)
    source = seen.T.view(kind)
    for row in range(0, seen.shape[0], BLOCK):
        rows = min(BLOCK, seen.shape[0] - row)
        for column in range(0, seen.shape[1], BLOCK):
            columns = min(BLOCK, seen.shape[1] - column)
            square[:columns, :rows] = source[column : column + columns, row : row + rows]
            turned[:rows, :columns] = square[:columns, :rows].T
            panel[:rows, column : column + columns] = turned[:rows, :columns]
        _rounded(panel[:rows].view(seen.dtype), target[row : row + rows])


def _rounded(seen: np.ndarray, target: np.ndarray) -> None:
    """Copy, rounding to the target's dtype."""
    if seen.dtype == jnp.bfloat16 and target.dtype == np.float32:
        # The upper half of a float32. NumPy's own cast is slower, and keeps other threads waiting.
        np.left_shift(seen.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(target, seen, casting="unsafe")


def aligned(size: int) -> np.ndarray:
    """So many bytes, without numbers yet."""
    space = np.empty(size + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    return space[start : start + size]


def _merged(seen: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides with neighbouring axes joined that are one axis in memory."""
    shape, strides = [1], [seen.itemsize]
    for length, stride in zip(reversed(seen.shape), reversed(seen.strides), strict=True):
        if length == 1:
            continue
        if shape[0] == 1:
            shape[0], strides[0] = length, stride
        elif stride == strides[0] * shape[0]:
            shape[0] *= length
        else:
            shape.insert(0, length)
            strides.insert(0, stride)
    return tuple(shape), tuple(strides)
